"""train_grpo.py: gradients against enumerated ones, sampling against training, runs from flags to files."""

import itertools
import json
import math
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_grpo
import train_vlm
from data import BOS, Mixture
from generate import Sampling
from grpo import (Prompt, Rollout, balanced, find_advantages, find_shares, log_probabilities, make_micro_batches,
                  policy_loss, read_prompts, roll_out)
from lora import lora_layers
from model import LLaMA, LlamaConfig, VLM, ViT
from plumbing.devices import autocast_to, to_device
from plumbing.flags import UserError
from plumbing.shards import Sample
from plumbing.sources import open_shards
from tasks import rewards
from test_model import VIT, randomise
from test_ranks import together
from test_train import flags as sft_flags
from test_train import prepare_sample, read_log
from run import make_optimizer, open_trained_run
from tasks.seen import open_trained
from train_grpo import State, anchor_all, update_once
from weights import build_vlm

CPU = torch.device("cpu")
STOP, LIMIT = 2, 3  # of five tokens, the third ends an answer


def tiny_policy():
    torch.manual_seed(0)
    config = LlamaConfig(5, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1)
    return randomise(VLM(ViT(VIT), LLaMA(config))).double().eval()


def answers_of_five():
    """All answers of at most three tokens."""
    words = [token for token in range(5) if token != STOP]
    for length in range(LIMIT):
        yield from ([*some, STOP] for some in itertools.product(words, repeat=length))
    yield from (list(some) for some in itertools.product(words, repeat=LIMIT))


def ask(tokens=(BOS, 3, 4)):
    sample = Sample(np.array([*tokens, STOP]), np.array([[len(tokens), len(tokens) + 1]]), 1)
    return Prompt(SimpleNamespace(read_image=None), 0, 0, sample, {})


def text_mixture(**changes):
    """What make_micro_batches wants of a Mixture, for prompts without images."""
    mixture = SimpleNamespace(**{**dict(image_tokens=[np.zeros(0, np.int64)], max_length=64, micro_batch_tokens=4096,
                                        multiple=1, rank=0, ranks=1), **changes})
    mixture.divide = lambda pieces: Mixture.divide(mixture, pieces)
    return mixture


def logs_of(model, prompt, answer):
    """(M,) log-probabilities of an answer's tokens, by one plain pass."""
    tokens = torch.tensor([*prompt, *answer])
    logits = model.language(tokens[:-1])[len(prompt) - 1:].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.language.parameters()])


def losses(model, micro_batches, config):
    """The sum of policy_loss over MicroBatches, with its gradient in the model."""
    model.zero_grad()
    total = 0.0
    for micro in micro_batches:
        loss, _ = policy_loss(model, to_device(micro, CPU), None, config)
        loss.backward()
        total += loss.item()
    return total


def test_a_steps_gradient_is_that_of_the_expected_reward():
    """
    Over all groups of two answers, each as often as it is sampled, the steps' mean is (1 - 1/G) of the gradient of
    the expected reward, by the number of tokens that an answer may have.
    """
    model, config = tiny_policy(), train_grpo.Config(mask_truncated=False)
    answers = list(answers_of_five())
    worth = np.random.default_rng(0).integers(0, 4, len(answers)) / 3
    logs = [logs_of(model, (BOS, 3, 4), answer) for answer in answers]
    chance = torch.stack([some.sum().exp() for some in logs])
    assert chance.sum().item() == pytest.approx(1, abs=1e-12)
    (chance * torch.tensor(worth)).sum().backward()
    wanted = -gradient(model) * (1 - 1 / 2) / LIMIT  # a loss falls where the reward rises
    chance = chance.detach().numpy()
    pairs = list(itertools.product(range(len(answers)), repeat=2))
    rollouts = [[Rollout(answers[n], logs[n].tolist(), "", False, worth[n]) for n in pair] for pair in pairs]
    found, alive = find_advantages(np.array([[one.reward for one in group] for group in rollouts]), "none")
    lengths = np.array([[len(one.tokens) for one in group] for group in rollouts])
    often = np.array([[chance[a] * chance[b]] for a, b in pairs]) * len(pairs)
    shares = find_shares(lengths, LIMIT, "constant") * often
    prompts = [ask()] * len(pairs)
    losses(model, make_micro_batches(text_mixture(), prompts, rollouts, found, alive, shares, config), config)
    assert (gradient(model) - wanted).norm() < 1e-6 * wanted.norm() and wanted.norm() > 1e-4


def some_rollouts(model, prompts, count=4, seed=3):
    generator = np.random.default_rng(seed)
    answers = list(answers_of_five())
    return [[Rollout(answer, logs_of(model, prompt.sample.prompt().tolist(), answer).tolist(), "", len(answer) == 3
                     and answer[-1] != STOP, float(generator.random()))
             for answer in (answers[int(n) - 1] for n in len(answers) ** generator.random(count))]  # of any length
            for prompt in prompts]


@pytest.mark.parametrize("changes", [{}, dict(kl=0.3, clip_low=0.05, clip_high=0.1, length="answer",
                                              mask_truncated=False),
                                     dict(normalise="group", length="step", mask_truncated=False)])
def test_a_group_behind_one_prompt_has_the_loss_and_gradient_of_its_answers_alone(changes):
    model, config = tiny_policy(), train_grpo.Config(**changes)
    prompts = [ask(), ask((BOS, 1, 1, 4)), ask((BOS, 0))]
    rollouts = some_rollouts(model, prompts)
    for rollout in itertools.chain(*rollouts):  # as of another model, so that some are clipped
        rollout.log_probabilities = [value - 0.1 for value in rollout.log_probabilities]
    scores = np.array([[one.reward for one in group] for group in rollouts])
    advantages, alive = find_advantages(scores, config.normalise)
    lengths = np.array([[len(one.tokens) for one in group] for group in rollouts])
    assert {*lengths.flatten()} == {1, 2, 3}
    shares = find_shares(lengths, LIMIT, config.length)
    together = make_micro_batches(text_mixture(), prompts, rollouts, advantages, alive, shares, config)
    alone = make_micro_batches(text_mixture(), [prompt for prompt in prompts for _ in range(4)],
                               [[one] for group in rollouts for one in group], advantages.reshape(-1, 1),
                               np.repeat(alive, 4), shares.reshape(-1, 1), config)
    assert sum(len(micro.batch.tokens) for micro in together) < sum(len(micro.batch.tokens) for micro in alone)
    found = []
    for micro_batches in (together, alone):
        for micro in micro_batches:
            micro.anchor = 1.3 * micro.sampled  # so that tokens differ in their divergence
        found.append((losses(model, micro_batches, config), gradient(model)))
    (first, one), (second, other) = found
    assert first == pytest.approx(second, rel=1e-6) and (one - other).norm() < 1e-6 * one.norm() and one.norm() > 0


def test_advantages_and_shares_by_hand():
    scores = np.array([[0.0, 1.0], [0.5, 0.5]])
    advantages, alive = find_advantages(scores, "none")
    assert advantages.tolist() == [[-0.5, 0.5], [0, 0]] and alive.tolist() == [True, False]
    half = 0.5 / (0.5 ** 0.5 + 1e-4)
    assert find_advantages(scores, "group")[0][0] == pytest.approx([-half, half])
    assert find_advantages(scores, "step")[0][0, 1] == pytest.approx(0.5 / (np.std(scores, ddof=1) + 1e-4))
    lengths = np.array([[1, 3], [4, 4]])
    assert (find_shares(lengths, 8, "constant") == 1 / 32).all() and (find_shares(lengths, 8, "step") == 1 / 12).all()
    assert find_shares(lengths, 8, "group").tolist() == [[1 / 8] * 2, [1 / 16] * 2]
    assert find_shares(lengths, 8, "answer").tolist() == [[1 / 4, 1 / 12], [1 / 16] * 2]


def test_what_is_clipped_gives_no_gradient():
    model, config = tiny_policy(), train_grpo.Config(clip_low=0.2, clip_high=0.3)
    (prompt,), answer = [ask()], [3, 1, STOP]
    logs = logs_of(model, (BOS, 3, 4), answer)
    for shift, advantage, flows in ((0.5, 1.0, False), (0.1, 1.0, True), (-0.5, -1.0, False), (-0.5, 1.0, True),
                                    (0.5, -1.0, True)):
        rollouts = [[Rollout(answer, (logs - shift).tolist(), "", False)]]
        micro_batches = make_micro_batches(text_mixture(), [prompt], rollouts, np.array([[advantage]]), [True],
                                           np.array([[1.0]]), config)
        losses(model, micro_batches, config)
        assert (gradient(model).norm() > 0) == flows
        _, sums = policy_loss(model, to_device(micro_batches[0], CPU), None, config)
        assert sums[1] == (0 if flows else 3)


def test_a_number_chooses_the_token_where_the_running_sum_passes_it():
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0)).expand(4000, 7)
    numbers = (torch.arange(4000)[:, None] + 0.5) / 4000
    chosen = Sampling(0.7).choose(logits, numbers)[:, 0]
    chance = (logits[0] / 0.7).softmax(0)
    assert (torch.bincount(chosen, minlength=7) / 4000 - chance).abs().max() < 1e-3
    assert Sampling(1.0).choose(logits[:1], torch.tensor([[1.0]])) == 6


def test_datasets_are_balanced_by_their_medians():
    prompts = [SimpleNamespace(shard=SimpleNamespace(folder=SimpleNamespace(parent=SimpleNamespace(name=name))))
               for name in "aab"]
    medians = {}
    rewards_of = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]])
    mapped = balanced(rewards_of, prompts, medians)
    assert medians == {"a": pytest.approx(0.2), "b": pytest.approx(0.8)}
    assert mapped[:, 1] == pytest.approx([0.5] * 3) and mapped[0, 0] == pytest.approx(0.25)
    balanced(rewards_of + 0.1, prompts, medians)
    assert medians["a"] == pytest.approx(0.21)


# ----------------------------------------------------------------------------- with images

@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return prepare_sample(tmp_path_factory.mktemp("shards"), "--limit=48", only="sample,sample_boxes")


@pytest.fixture(scope="module")
def start(shards, tmp_path_factory):
    """A run that has learnt a little of both."""
    run = tmp_path_factory.mktemp("out") / "start"
    train_vlm.main(sft_flags(shards, run, data="sample_boxes,sample", max_steps=4, batch_size=16))
    return run


@pytest.mark.parametrize("name", ["sample", "qwen_sample"])
def test_sampled_log_probabilities_are_those_of_training(name, shards):
    torch.manual_seed(0)
    mixture = Mixture(**open_shards("sample_boxes,sample", shards, "train"), batch_size=6,
                      count_tokens=lambda height, width: height // 32 * (width // 32) + 1)
    tokenizer = train_grpo.tokenizer_of(mixture.shards[0])
    tokenizer.stops = tuple(range(64))  # so that some end
    model = build_vlm(name, tokenizer.vocab_size).eval()
    mixture.image_tokens = [np.asarray(model.vision.tokens(index["height"].astype(int), index["width"].astype(int)))
                            for index in (shard.image_index for shard in mixture.shards)]
    records = [shard.read_records() for shard in mixture.shards]
    prompts = read_prompts(mixture, records, mixture.chosen(0)[0])
    draws = np.random.default_rng(0).random((6, 5, 12))
    config = train_grpo.Config(temperature=1.3)
    with torch.no_grad():
        rollouts = roll_out(model, tokenizer, prompts, 5, 12, 1.3, draws)
        assert len({tuple(one.tokens) for group in rollouts for one in group}) > 20
        ended = [one.tokens[-1] < 64 for group in rollouts for one in group]
        assert 5 < sum(ended) < 29 and [not one.cut for group in rollouts for one in group] == ended
        shares = find_shares(np.array([[len(one.tokens) for one in group] for group in rollouts]), 12, "constant")
        for rollout in itertools.chain(*rollouts):
            rollout.cut = False
        for micro in make_micro_batches(mixture, prompts, rollouts, np.ones((6, 5)), np.full(6, True), shares, config):
            again = log_probabilities(model, to_device(micro.batch, CPU), tokenizer.vocab_size, 1.3)
            assert len(again) > 100 and (again - torch.from_numpy(micro.sampled)).abs().max() < 1e-5
        # Whatever else is under way, an answer is the same
        (alone,) = roll_out(model, tokenizer, prompts[3:4], 5, 12, 1.3, draws[3:4])
    assert [one.tokens for one in alone] == [one.tokens for one in rollouts[3]]


def flags(shards, start, run, **changes):
    return train_grpo.Config(**{**dict(
        shards_dir=str(shards), start=str(start), run=str(run), data="sample", reward="exact", batch_size=4, answers=3,
        max_new_tokens=6, max_steps=4, learning_rate=1e-3, save_every=2, evaluate_every=2, held_out=6, max_length=256,
        micro_batch_tokens=512, mask_truncated=False), **changes})


@pytest.fixture(autouse=True)
def lengths_pay(monkeypatch):
    """In place of exact words, which a model that knows nothing never hits."""
    monkeypatch.setitem(rewards.REWARDS, "exact", lambda record, text, progress: len(text) % 7 / 6)


def tensors_of(folder):
    return {path.relative_to(folder).as_posix(): load_file(path) for path in folder.rglob("*.safetensors")}


def same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    return all((tensor - other[file][name]).abs().max() <= tolerance
               for file, some in one.items() for name, tensor in some.items())


@pytest.mark.parametrize("changes", [dict(), dict(kl=0.1, data="sample,sample_boxes", reward="exact,boxes", updates=2),
                                     dict(language="full", vision="full", normalise="group", length="answer")])
def test_resumed_run_equals_undisturbed(changes, shards, start, tmp_path):
    train_grpo.main(flags(shards, start, tmp_path / "whole", **changes))
    log = read_log(tmp_path / "whole")
    assert [entry["step"] for entry in log] == [0, 1, 2, 2, 3, 4, 4]
    assert all(math.isfinite(entry["loss"]) for entry in log if "loss" in entry) and log[1]["gradient_norm"] > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step_000004")
    train_grpo.main(flags(shards, start, tmp_path / "cut", resume=True, **changes))
    assert same(tensors_of(tmp_path / "whole/step_000004"), tensors_of(tmp_path / "cut/step_000004"))
    moved = tensors_of(tmp_path / "whole/step_000002"), tensors_of(tmp_path / "whole/step_000004")
    assert not same(*moved)
    timeless = [[{key: value for key, value in entry.items() if "per_second" not in key}
                 for entry in read_log(tmp_path / run)] for run in ("whole", "cut")]
    assert timeless[0] == timeless[1]


def test_each_step_and_prompt_draws_anew(monkeypatch):
    """Two prompts of one step, and one prompt in two, get other numbers; the same step again the same."""
    seen = []
    monkeypatch.setattr(train_grpo, "roll_out", lambda *arguments: seen.append(arguments[-1]) or [[]] * 2)
    monkeypatch.setattr(train_grpo, "reward_all", lambda *arguments: None)
    state = SimpleNamespace(model=None, tokenizer=None, limit=3)
    for step in (0, 1, 0):
        train_grpo.sample_step(state, [ask(), ask()], step, train_grpo.Config(answers=2))
    first, second, again = map(np.array, seen)
    assert first.shape == (2, 2, 3) and (first == again).all()
    assert len(np.unique(np.stack([first, second]))) == 24


def test_two_processes_are_as_one(shards, start, tmp_path):
    changes = dict(data="sample,sample_boxes:0", kl=0.1)
    train_grpo.main(flags(shards, start, tmp_path / "one", **changes))
    together(2, flags(shards, start, tmp_path / "two", **changes), train_grpo.main)
    one, two = (read_log(tmp_path / run) for run in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - {"sampled_tokens_per_second", "trained_tokens_per_second"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
    assert set(one[0]["held_out"]) == {"sample", "sample_boxes"}
    assert same(tensors_of(tmp_path / "one/step_000004"), tensors_of(tmp_path / "two/step_000004"), 1e-4)


def test_the_anchor_of_new_lora_is_the_model_without_it(shards, start, tmp_path):
    config = flags(shards, start, tmp_path / "run", kl=0.5, max_steps=2)
    train_grpo.main(config)
    first, second = (entry["kl"] for entry in read_log(tmp_path / "run") if "kl" in entry)
    assert first == pytest.approx(0, abs=1e-7) and second > 1e-7
    model = tiny_policy().float()
    model.lora = {}
    train_grpo.make_trainable(model, train_grpo.Config(vision="frozen", lora_targets=train_grpo.SEVEN), None)
    reference = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    plain = logs_of(model, (BOS, 3, 4), [3, STOP])
    with torch.no_grad():
        for layer in lora_layers(model.language).values():
            layer.lora_B.add_(0.3)
    assert (logs_of(model, (BOS, 3, 4), [3, STOP]) - plain).abs().max() > 0.01
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    micro_batches = make_micro_batches(text_mixture(), [ask()], [[Rollout([3, STOP], [0.0, 0.0], "", False)]],
                                       np.ones((1, 1)), [True], np.ones((1, 1)), config)
    state = State(model, SimpleNamespace(vocab_size=5), None, [], 3, None, None, reference, {},
                  autocast_to(CPU, torch.float32))
    anchor_all(state, micro_batches, train_grpo.Config())
    assert micro_batches[0].anchor == pytest.approx(plain.detach().numpy(), abs=1e-6)
    assert all((p == trained[name]).all() for name, p in model.named_parameters())


def sleep_for_ever(*arguments):
    time.sleep(60)


@pytest.mark.parametrize("bad, said", [
    (lambda *arguments: 1 / 0, "ZeroDivisionError"), (lambda *arguments: math.nan, "nan for"),
    (lambda *arguments: 1.5, "not in [0, 1]"), (sleep_for_ever, "TimeoutError: took more than 1 seconds"),
    (lambda *arguments: None, "none of these is for such a sample")])
def test_a_bad_reward_names_its_sample_and_loses_nothing(bad, said, shards, start, tmp_path, monkeypatch):
    good = rewards.REWARDS["exact"]
    monkeypatch.setitem(rewards.REWARDS, "exact", lambda record, text, progress: (
        good if progress < 0.7 else bad)(record, text, progress))
    saved = said.startswith("nan")  # at the step that fails: there is nothing to save then
    config = dict(reward_timeout=1, save_every=3 if saved else 0, evaluate_every=50)
    with pytest.raises(UserError) as raised:
        train_grpo.main(flags(shards, start, tmp_path / "run", **config))
    message = str(raised.value)
    assert said in message and "sample/train:" in message and "step 3:" in message and "\n" not in message
    assert (tmp_path / "run/step_000003").is_dir()
    if said != "ZeroDivisionError":
        return
    monkeypatch.setitem(rewards.REWARDS, "exact", good)
    train_grpo.main(flags(shards, start, tmp_path / "run", resume=True, **config))
    train_grpo.main(flags(shards, start, tmp_path / "whole", **config))
    assert same(tensors_of(tmp_path / "run/step_000004"), tensors_of(tmp_path / "whole/step_000004"))


def test_with_a_divergence_groups_of_equal_rewards_count():
    rollouts = [[Rollout([3, STOP], [-1.0, -1.0], "", False)] * 2]
    for kl, count in ((0.0, 0), (0.1, 1)):
        none = np.zeros((1, 2))
        micro_batches = make_micro_batches(text_mixture(), [ask()], rollouts, none, [False], none + 1,
                                           train_grpo.Config(kl=kl))
        assert len(micro_batches) == count


def test_a_micro_batch_without_images_changes_no_projection():
    model = tiny_policy().float()
    model.requires_grad_(False).projector.requires_grad_(True)
    micro_batches = make_micro_batches(text_mixture(), [ask()], [[Rollout([3, STOP], [-1.0, -1.0], "", False)]],
                                       np.ones((1, 1)), [True], np.ones((1, 1)), train_grpo.Config())
    state = State(model, SimpleNamespace(vocab_size=5), None, [], 3,
                  make_optimizer([("projector.weight", model.projector.weight, 1.0)], 0.0), None, None, {},
                  autocast_to(CPU, torch.float32))
    before = model.projector.weight.clone()
    assert update_once(state, micro_batches, 1.0, train_grpo.Config())[1] == 0
    assert (model.projector.weight == before).all()


def test_a_base_of_few_bits_is_not_trained_in_full(shards, start, tmp_path):
    train_vlm.main(sft_flags(shards, tmp_path / "low", start=str(start), language="lora", vision="frozen", base_bits=8,
                             max_steps=1, data="sample"))
    with pytest.raises(UserError, match="--language=full: the base of .* has 8 bits; add --base_bits=0"):
        train_grpo.main(flags(shards, tmp_path / "low", tmp_path / "a", language="full"))
    train_grpo.main(flags(shards, tmp_path / "low", tmp_path / "b", max_steps=1))


def test_an_altered_reference_is_refused(shards, start, tmp_path):
    changes = dict(kl=0.1)
    train_grpo.main(flags(shards, start, tmp_path / "run", **changes))
    shutil.rmtree(tmp_path / "run/step_000004")
    path = tmp_path / "run/reference.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="reference.safetensors: missing or altered"):
        train_grpo.main(flags(shards, start, tmp_path / "run", resume=True, **changes))


def test_mistakes_are_one_line(shards, start, tmp_path):
    with pytest.raises(UserError, match="--start: name the run"):
        train_grpo.main(train_grpo.Config(shards_dir=str(shards)))
    with pytest.raises(UserError, match="did you mean boxes"):
        train_grpo.main(flags(shards, start, tmp_path / "a", reward="box"))
    with pytest.raises(UserError, match="none of these is for such a sample; add another, such as f1"):
        train_grpo.main(flags(shards, start, tmp_path / "b", reward="boxes"))


def test_a_run_is_evaluated_and_says_what_the_start_has_seen(shards, start, tmp_path, capsys):
    import eval_vqa

    train_grpo.main(flags(shards, start, tmp_path / "run", max_steps=1))
    assert "may have learnt from what is held out here" in capsys.readouterr().out
    eval_vqa.main(eval_vqa.Config(run=str(tmp_path / "run"), shards_dir=str(shards), data="sample,sample_boxes"))
    out = capsys.readouterr().out
    assert "F-IoU" in out and "BLEU-1" in out
    results = [json.loads(path.read_text())["results"] for path in (tmp_path / "run/eval").glob("*/results.json")]
    tables = {name: table for one in results for name, table in one.items()}
    assert tables.keys() == {"sample/test", "sample_boxes/test"}
    assert tables["sample_boxes/test"]["new"]["questions"] == 48  # also those that are answered by no box
    # sample_boxes was learnt before: its blind answers are its own
    assert tables["sample_boxes/test"]["all"]["rows"]["question only"]["unreadable"][0] == 0
    assert set(open_trained(open_trained_run(tmp_path / "run")[2], shards)) == {"sample", "sample_boxes"}
