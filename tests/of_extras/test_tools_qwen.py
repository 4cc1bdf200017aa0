"""The demo, follow.py, browse.py, the card and train_cls.py on a run of a Qwen3-VL."""

import numpy as np
import pytest
import torch

import eval_vqa
import train_cls
import train_vlm
import zoo.qwen3_vl as qwen3_vl
from extras.look import browse, follow
from extras.share import demo_draw, demo_talk, export
from generate import Sampling, finished_groups, generate
from plumbing.flags import UserError
from test_qwen3_vl import lay_out, random_images
from test_train import flags, prepare_sample
from weights import load_run
from zoo.chatml import open_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run, shards) of a small Qwen3-VL after a step on images of 224 pixels."""
    folder = tmp_path_factory.mktemp("qwen")
    shards = prepare_sample(folder / "shards", "--limit=16")
    train_vlm.main(flags(shards, folder / "run", model="qwen_sample", vision="full", max_steps=1, held_out=0))
    return folder / "run", shards


@torch.no_grad()
def test_the_demo_answers_as_generate_and_shows_where_attention_lies(run, monkeypatch):
    """In an image of 2 x 3 tokens, whose positions are fewer than they."""
    model, tokenizer = load_run(run[0]).eval(), open_tokenizer(run[0])
    [image] = random_images([(64, 96)])
    conversation = demo_talk.Conversation(model, tokenizer, [image.numpy()], torch.float32)
    question = "what is the impression?"
    tokens = list(conversation.ask(question))
    prefix, own = demo_talk.write_prompt(tokenizer, question)
    prompt = [*prefix, *own]
    sampling = Sampling(stops=tokenizer.stops, vocab_size=tokenizer.vocab_size)
    [(_, [answer])] = finished_groups(generate(model, [([image.numpy()], [prompt])], sampling=sampling))
    assert [token.id for token in tokens if token.id not in tokenizer.stops] == answer.tokens
    seen = []

    def attend(q, k, v, mask):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        shares = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf).softmax(-1)
        seen.append(shares[:, -1].mean(0))
        return torch.einsum("hqk,khd->qhd", shares, v)

    monkeypatch.setattr(qwen3_vl, "attend", attend)
    encoded = model.encode_images([image])
    for number, token in enumerate(tokens[:3]):
        seen.clear()
        flat, positions = lay_out([*prompt, *(before.id for before in tokens[:number])], [image], model.vision)
        at = torch.arange(len(prefix) - 1, len(prefix) + 5)
        logits = model.language(flat.clone().index_fill_(0, at, 0), positions, None, None, encoded, at)
        assert token.probability == pytest.approx(logits[-1].softmax(0)[token.id].item(), abs=1e-5)
        assert token.looked == pytest.approx(torch.stack(seen).mean(0)[at].numpy(), abs=1e-5)
        assert demo_draw.patches_of(image.numpy(), token.looked).shape == (2, 3)
    heat = demo_draw.heat_map(image.numpy(), np.array([[0, 0, 0], [0, 0, 1.0]]), 0, 1)
    assert (heat[32:, 64:] != heat[:1, :1]).any() and heat.shape == (64, 96, 3)


def test_a_sample_is_followed_through_tower_and_mergers(run, capsys):
    follow.main(follow.Config(run=str(run[0]), data="sample", number=5, shards_dir=str(run[1])))
    rows = {line[:17].strip(): line[17:] for line in capsys.readouterr().out.splitlines()}
    assert rows["Vision"] == "(1, 49, 2048)" and rows["Mergers"] == "(49, 4, 128)"
    T = int(rows["Mixture.pack"].removeprefix("tokens (").partition(",")[0])
    end = T - 1 - 49 + 7
    assert rows["Vision.place"] == ("time, row, column: the image from [1, 1, 1] to [1, 7, 7], "
                                    f"the last token at [{end}, {end}, {end}]")
    assert rows["Text.embed"] == f"({T}, 128)" and "VLM.projector" not in rows
    assert rows["normalise"].startswith("(1, 3, 224, 224), mean -0.")


def test_answers_are_browsed_and_the_card_says_what_it_is(run, tmp_path):
    eval_vqa.main(eval_vqa.Config(run=str(run[0]), shards_dir=str(run[1]), limit=8))
    browse.main(browse.Config(run=str(run[0]), shards_dir=str(run[1]), out=str(tmp_path / "page.html")))
    page = (tmp_path / "page.html").read_text()
    assert '"rows":["model"' in page and page.count('"prediction"') + page.count('"answers":[{') >= 8
    export.main(export.Config(run=str(run[0]), only="card", folder=str(tmp_path)))
    text = (tmp_path / "README.md").read_text()
    assert "a Qwen3-VL\nwhose vision tower has 842,208 parameters (49 tokens for an image of 224 x 224 pixels)" in text
    assert "The language model started from random values." in text and "{" not in text


def test_a_classifier_is_not_made_of_its_tower(run, tmp_path):
    with pytest.raises(UserError, match="the tower of a Qwen3-VL, which no classifier here is made of") as error:
        train_cls.main(train_cls.Config(dataset="sample", encoder="openmedq", run=str(run[0]), device="cpu",
                                        shards_dir=str(run[1]), out=str(tmp_path / "cls")))
    assert "\n" not in str(error.value)
