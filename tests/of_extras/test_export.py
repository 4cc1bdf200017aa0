"""
extras/share/export.py: what it writes is loaded by timm, open_clip, transformers and PEFT, and what they save
again comes back, bit for bit. The second run starts from the parts that the first one exported.
"""

import io
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import peft
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

import eval_vqa
import train_vlm
from data import Tokenizer
from extras.share import card, export, hub
from lora import add_lora, lora_layers
from model import CLIP_MEAN, CLIP_STD, VLM, LLaMA, ViT, merge_patches
from plumbing.claims import read_adapter_config
from plumbing.files import (best_checkpoint, hash_file, lock, manifest_checksum, newest_checkpoint, read_manifest,
                            seal)
from plumbing.flags import UserError
from plumbing.tensors import plain_names, tensor_shapes
from prepare.leaks import guard
from prepare.questions import train_sample_tokenizer
from tasks import boxes, choices
from tasks.evaluations import choose_evaluations, find_evaluations, write_evaluation
from tasks.vqa import METRICS, cell_text
from test_encoders import CLIP_VIT, fill
from test_model import LLAMA, TOLERANCE, VIT, logits_of, randomise, relative_error
from test_train import flags, shards  # noqa: F401, the fixture: a prepared part of the sample
from weights import (build_vlm, load_encoder, load_llama, load_run, load_trained_encoder, load_vlm, save_module,
                     save_vlm)
from zoo.adapters import load_adapter
from zoo.siglip import Siglip, SiglipConfig

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):  # noqa: F811
    """{"full" or "lora": (run, its export)}; the latter has LoRA on both parts of the former."""
    folder, exported = tmp_path_factory.mktemp("runs"), {}
    for name, changes in [("full", {}), ("lora", dict(
            vision="lora", language="lora", lora_r=4, lora_alpha=6.0, learning_rate=3e-2,
            vision_weights=str(folder / "full/export/vision/model.safetensors"),
            language_weights=str(folder / "full/export/language")))]:
        train_vlm.main(flags(shards, folder / name, max_steps=20, **changes))
        eval_vqa.main(eval_vqa.Config(run=str(folder / name), shards_dir=str(shards)))
        export.main(export.Config(run=str(folder / name), shard_gigabytes=1e-3))
        exported[name] = folder / name, folder / name / "export"
    return exported


def some_tokens():
    return torch.randint(512, (40,), generator=torch.Generator().manual_seed(1))


def equal_tensors(these, those):
    assert these.keys() == those.keys()
    return [name for name in these if not torch.equal(these[name], those[name])] == []


def merged(run):
    """The language model of a run, its LoRA merged by lora.py, as {name: tensor}."""
    model = load_run(run).language
    for layer in lora_layers(model).values():
        layer.merge()
    state = model.state_dict()
    return {name: state[inside] for name, inside in plain_names(state).items()}


def encoder_of(run):
    return load_trained_encoder(newest_checkpoint(run))


def make_run(folder, model):
    """A run's folder with a checkpoint of this model."""
    save_vlm(model, folder / "partial")
    seal(folder / "partial", folder / "step_000001", step=1, flags={})
    return folder / "step_000001"


def test_parts_of_a_run(runs):
    names = {"vision", "language", "vlm", "README.md"}
    assert {path.name for path in runs["full"][1].iterdir()} == names
    assert {path.name for path in runs["lora"][1].iterdir()} == names | {"adapter", "vision_adapter"}


# ----------------------------------------------------------------------------- transformers

@torch.no_grad()
@pytest.mark.parametrize("name", ["full", "lora"])
def test_language_model_is_transformers_and_comes_back(name, runs, tmp_path):
    run, folder = runs[name]
    files = sorted(folder.glob("language/*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 1.01e6 for file in files)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "language", output_loading_info=True)
    assert not any(loading.values()) and theirs.dtype == torch.float32
    ids = (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.generation_config.eos_token_id)
    assert ids == (1, 2, 2)
    ours = load_run(run).language.eval()
    assert relative_error(logits_of(theirs, some_tokens()), ours(some_tokens())) < TOLERANCE
    assert equal_tensors(theirs.state_dict(), merged(run))
    if name == "lora":
        base = load_llama(runs["full"][1] / "language")
        assert relative_error(ours(some_tokens()), base(some_tokens())) > 0.01
    randomise(theirs).save_pretrained(tmp_path, max_shard_size="1MB")  # fine-tuned there
    back = load_llama(tmp_path)
    assert equal_tensors(back.state_dict(), theirs.state_dict())
    assert relative_error(back(some_tokens()), logits_of(theirs, some_tokens())) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_rounded_once(dtype, runs, tmp_path):
    run = runs["lora"][0]
    export.main(export.Config(run=str(run), folder=str(tmp_path), only="language", dtype=dtype))
    assert not (tmp_path / "language/model.safetensors.index.json").exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    assert theirs.dtype == getattr(torch, dtype)
    assert equal_tensors(theirs.state_dict(), {key: tensor.to(theirs.dtype)
                                               for key, tensor in merged(run).items()})


def test_values_past_those_of_float16_are_refused(tmp_path):
    model = VLM(ViT(VIT), LLaMA(LLAMA))
    model.language.lm_head.weight.data[3, 5] = 7e4
    checkpoint = make_run(tmp_path, model)
    with pytest.raises(UserError, match="lm_head.weight has values past those of torch.float16; try"):
        export.write_part(tmp_path / "new", export.write_language, checkpoint, None, torch.float16, 1e9)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def train_tokenizer(lines, **changes):
    """A SentencePiece model with LLaMA's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(**{**dict(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=3000,
        hard_vocab_limit=False, byte_fallback=True, split_digits=True, add_dummy_prefix=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2,
        pad_id=-1, num_threads=1, minloglevel=2), **changes})
    return model.getvalue()


def texts(lines):
    """Texts on which tokenizers part ways, of words, spaces, runs, control pieces and other scripts."""
    generator = random.Random(0)
    pieces = [*" \n\t\r\0\u00a0\u3000\x1c\x85\u2028\u200b▁abest=-._0139éﬁ中", "the ", "</s>", "<s>",
              "<unk>", "<0x0A>", "  ", " yes", "\r\n", "😀", "e\u0301", *generator.sample(lines, 50)]
    for _ in range(2000):
        yield "".join(generator.choices(pieces, k=generator.randint(0, 30)))
        yield "".join(generator.choice("ab=-. e1\n") * generator.randint(1, 40) for _ in range(3))
        yield "".join(map(chr, (number for number in (generator.randrange(1 << 17) for _ in range(8))
                                if not 0xd800 <= number < 0xe000)))


@pytest.mark.parametrize("kind", ["sample", "larger"])
def test_tokenizer_gives_our_ids_for_any_text(kind, tmp_path):
    lines = [line for path in sorted(ROOT.glob("extras/*/*.py"))
             for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    (tmp_path / "tokenizer.model").write_bytes(
        train_sample_tokenizer() if kind == "sample" else train_tokenizer(lines))
    ours = Tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "new").mkdir()
    export.write_tokenizer(ours, 2048, tmp_path / "new")
    (tmp_path / "new/config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert len(theirs) == ours.vocab_size == (512 if kind == "sample" else 3000)
    wrong = [text for text in texts(lines) if theirs(text).input_ids != [1, *ours.encode(text)]]
    assert not wrong, wrong[:5]
    for text in lines:
        tokens = theirs(text, add_special_tokens=False).input_ids
        assert tokens == ours.encode(text)
        assert theirs.decode([1, *tokens, 2], skip_special_tokens=True).strip() == ours.decode(tokens)
    assert (tmp_path / "new/tokenizer.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(lines[:100]).input_ids == theirs(lines[:100]).input_ids


@pytest.mark.parametrize("changes", [dict(model_type="unigram"), dict(byte_fallback=False)])
def test_tokenizer_of_another_kind_is_refused(changes, tmp_path):
    lines = [f"{word} of the {other}" for word in dir(torch) for other in ("lung", "heart")]
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(lines, **{"vocab_size": 600, **changes}))
    with pytest.raises(UserError, match="tokenizer.model: no BPE with bytes; --only has parts that"):
        export.write_tokenizer(Tokenizer(tmp_path / "tokenizer.model"), 2048, tmp_path)


# ----------------------------------------------------------------------------- PEFT

@torch.no_grad()
def test_adapter_is_peft_s_and_comes_back(runs, tmp_path):
    run, folder = runs["lora"]
    base = transformers.AutoModelForCausalLM.from_pretrained(runs["full"][1] / "language")
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()
    ours = load_run(run).language.eval()
    assert relative_error(logits_of(theirs, some_tokens()), ours(some_tokens())) < TOLERANCE
    randomise(theirs).save_pretrained(tmp_path)  # trained on there
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == load_file(folder / "adapter/adapter_model.safetensors").keys()
    assert read_adapter_config(tmp_path) == read_adapter_config(folder / "adapter")
    load_adapter(ours, tmp_path)
    for name, layer in lora_layers(ours).items():
        assert torch.equal(layer.lora_A, saved[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(layer.lora_B, saved[f"base_model.model.{name}.lora_B.weight"])
    assert relative_error(logits_of(theirs, some_tokens()), ours(some_tokens())) < TOLERANCE


def test_adapter_trained_elsewhere_becomes_part_of_a_model(runs, tmp_path):
    """With another rank and alpha, and all linear layers, as in docs/interchange.md."""
    run, base = runs["lora"][0], runs["full"][1] / "language"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(theirs).save_pretrained(tmp_path / "theirs")
    settings = read_adapter_config(tmp_path / "theirs")
    assert (settings["r"], settings["alpha"], len(settings["targets"].split(","))) == (3, 7, 7)
    language = load_llama(base)
    add_lora(language, **settings)
    load_adapter(language, tmp_path / "theirs")
    model = VLM(encoder_of(run), language)
    model.projector, model.lora = load_run(run).projector, {"language": settings}
    save_vlm(model, tmp_path / "model")
    again = load_vlm(tmp_path / "model")
    assert relative_error(again.language(some_tokens()), logits_of(theirs.eval(), some_tokens())) < TOLERANCE
    assert equal_tensors(again.projector.state_dict(), load_run(run).projector.state_dict())


# ----------------------------------------------------------------------------- the whole

@pytest.mark.parametrize("name", ["full", "lora"])
def test_whole_model_stands_alone_and_answers_the_same(name, runs, shards, tmp_path):  # noqa: F811
    run, folder = runs[name]
    moved = runs["full"][1].rename(tmp_path / "away")  # the second run's weights, and the first's export
    try:
        vlm = shutil.copytree(moved / "vlm" if name == "full" else folder / "vlm", tmp_path / "vlm")
        model = load_run(vlm)
        eval_vqa.main(eval_vqa.Config(run=str(vlm), shards_dir=str(shards)))
    finally:
        moved.rename(runs["full"][1])
    assert set(model.lora) == ({"vision", "language"} if name == "lora" else set())
    assert equal_tensors(model.state_dict(), load_run(run).state_dict())
    for file in ("predictions.jsonl", "predictions_image_shuffled.jsonl"):
        ours, theirs = (find_evaluations(place)[0] / file for place in (vlm, run))
        assert ours.read_bytes() == theirs.read_bytes()
    assert not list(vlm.rglob("optimizer*")) and newest_checkpoint(vlm).name == "step_000020"


# ----------------------------------------------------------------------------- the card

def test_card_says_what_the_run_says(runs, shards):  # noqa: F811
    run, folder = runs["lora"]
    written = huggingface_hub.ModelCard.load(folder / "README.md")
    assert written.data.license == "unknown" and written.data.pipeline_tag == "visual-question-answering"
    assert written.data.base_model == [] and written.data.datasets == []
    text = written.text
    assert "**Not for clinical use.**" in text and "{" not in text
    manifest = json.loads((shards / "sample/train/manifest.json").read_text())
    row = f"| sample | MIT | {manifest['samples']} | {manifest['images']} | 0, left out |"
    assert row in text and "compared with sample/test." in text
    rows = choose_evaluations(run)["sample/test"][1]["results"]["sample/test"]["all"]["rows"]
    assert list(rows) == ["model", "image shuffled", "question only", "the image adds"]
    for name, cells in rows.items():
        shown = ["{:.1f} [{:.1f} {:.1f}]".format(*cells[metric]) for metric in METRICS]
        assert f"| {name} | {' | '.join(shown)} |" in text
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    loss, held = ([entry[key] for entry in log if key in entry][-1] for key in ("loss", "held_out_loss"))
    assert f"last loss logged is {loss:.3f} nats\na token, on held-out samples {held:.3f}." in text
    for flag in ("--lora_r=4", "--learning_rate=0.03", "--language=lora", "--epochs=15.0"):
        assert f"    {flag}\n" in text
    assert "--shards_dir" not in text and str(run.parent) not in text  # places on a disk concern nobody
    assert "The vision model started from model.safetensors (origin and licence not known)." in text
    assert "The vision model started from random values." in (runs["full"][1] / "README.md").read_text()


def write_card(run, path, **changes):
    """The card of a run whose checkpoint had been sealed with other facts."""
    checkpoint = newest_checkpoint(run)
    card.write_card(checkpoint, card.make_public(read_manifest(checkpoint) | changes), path)
    return huggingface_hub.ModelCard.load(path)


def test_card_says_what_is_not_known(runs, tmp_path):
    run = shutil.copytree(runs["full"][0], tmp_path / "run", ignore=shutil.ignore_patterns("export", "eval"))
    record = read_manifest(newest_checkpoint(run))
    (run / "log.jsonl").write_text('{"step": 20, "loss": 1.5}\n{"step": 30, "loss": 9}\n[3]\n{"st')
    own = record["inputs"]["data"]["sample"]
    tests = {"path_vqa/test": "x", "hidden/test": "x", "busi/test": "y"}
    data = {"sample": own | {"leaks": "keep"}, "path_vqa": own, "our_feet": own, "old_skulls": own}
    written = write_card(
        run, tmp_path / "README.md",
        flags=record["flags"] | {"model": "paper", "data": "sample:2, path_vqa,our_feet,old_skulls"},
        inputs=record["inputs"] | {"data": data}, tests={"sample": {}, "path_vqa": tests, "our_feet": tests},
        machine=record["machine"] | {"commit": ""})
    assert written.data.datasets == ["flaviagiammarino/path-vqa"] and written.data.base_model == [
        "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", "chaoyi-wu/PMC_LLAMA_7B"]
    counts = f"{own['samples']} | {own['images']} | 0"
    for line in (f"| sample:2 | MIT | {counts}, kept |", f"| private_1 | not known | {counts}, left out |",
                 f"| private_2 | not known | {counts}, left out |",
                 "made by nanoMedQ at commit not known", "compared with 1 private, busi/test, path_vqa/test.",
                 "the last loss logged is 1.500 nats\na token, on held-out samples not known.",
                 "pmc_llama_7b (https://huggingface.co/chaoyi-wu/PMC_LLAMA_7B, licence: LLaMA's)"):
        assert line in written.text
    assert not re.search("our_feet|old_skulls|hidden", written.text)


def test_card_of_a_stage_says_that_it_began_with_another_run(runs, tmp_path):
    run = runs["full"][0]
    record = read_manifest(newest_checkpoint(run))
    written = write_card(run, tmp_path / "README.md", flags=record["flags"] | {"start": "/home/x/out/captions"})
    assert "It began with captions, another run, checkpoint or adapter: what" in written.text
    assert "--start=captions" in written.text and "/home" not in written.text and written.data.base_model == []


def test_card_has_the_scores_of_boxes_and_the_blind_rows(runs, tmp_path):
    run = shutil.copytree(runs["full"][0], tmp_path / "run", ignore=shutil.ignore_patterns("export", "eval"))
    records = [{"question": "detect cell", "boxes": {"cell": [[0, 0, 100 + n, 100]] * (n % 3)}} for n in range(6)]
    texts = {"model": "cell <box>[[0, 0, 100, 100]]</box>", "question only": "cell <box>[]</box>"}
    scored = {row: [boxes.score(record, text) for record in records] for row, text in texts.items()}
    tables = boxes.report("bccd/test", scored, 6, records, "not known", np.arange(6))
    write_evaluation(run / "eval/bccd", {
        "stands_on": {"checkpoint": read_manifest(newest_checkpoint(run))["checksum"]}, "unusual_flags": {},
        "machine": {"commit": "", "device": "cpu"}, "results": {"bccd/test": tables}}, {"model": []})
    written = write_card(run, tmp_path / "README.md").text
    for row, cells in tables["all"]["rows"].items():
        assert len(cells) == 15
        for begin in (0, 6, 12):
            some = [cell_text(cell) for cell in cells.values()][begin:begin + 6]
            assert f"| {row} | {' | '.join(some)} |" in written
    assert "| bccd/test, all questions: 6, over images | F-IoU | mean IoU |" in written and "BLEU-1" not in written
    for heads in ("F1 at 0.75 | count error, boxes |", "IoU of medium boxes | IoU of large boxes |"):
        assert heads in written
    assert "bccd/test, those new to the run: not known" in written


def test_card_has_one_table_of_all_evaluations_first(runs, tmp_path):
    run = shutil.copytree(runs["full"][0], tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    records = [{"question": f"which {n}? A. x B. y", "answer": "B. y", "choices": ["x", "y"], "type": ""}
               for n in range(8)]
    texts = {"model": ["B"] * 5 + ["A"] * 2 + ["?"], "longest option": ["A. x"] * 8}
    scored = {row: [choices.score(*pair) for pair in zip(records, some)] for row, some in texts.items()}
    tables = choices.report("st_anna/test", scored, 0, records, [""] * 6 + ["words"] * 2, np.arange(8), "questions")
    own = {"stands_on": {"checkpoint": read_manifest(newest_checkpoint(run))["checksum"]}, "unusual_flags": {},
           "machine": {"commit": "", "device": "cpu"}}
    for name in ("st_anna/test", "med_qa/test"):
        write_evaluation(run / "eval" / name.partition("/")[0], own | {"results": {name: tables}}, {"model": []})
    leaked = choices.report("slake/test", scored, 0, records, ["image"] * 8, np.arange(8), "questions")
    write_evaluation(run / "eval/slake", own | {"results": {"slake/test": leaked}}, {"model": []})
    older = {key: value for key, value in tables.items() if key != "summary"}
    write_evaluation(run / "eval/older", own | {"results": {"vqa_rad/test": older}}, {"model": []})
    results = write_card(run, tmp_path / "README.md").text.partition("## Results")[2].partition("## Training data")[0]
    head, rule, *rows = [line for line in results.splitlines() if line.startswith("|")]
    assert head == ("| dataset | questions | metric | score | blind answers | image adds | unreadable | cut | empty | "
                    "repeating | leaks |")
    assert head.count("|") == rule.count("|") and set(rule) <= set("|-: ")
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows[:rows.index(next(
        row for row in rows if "all questions" in row))]]
    assert [name for name in names if name] == ["sample/test", "a private dataset", "med_qa/test",
                                                    "slake/test"]
    assert "slake/test, those new to the run: none\n" in results
    score = cell_text(tables["summary"]["lines"][0]["score"])
    row = f"| a private dataset | 8 | accuracy | {score} | - | - | 12.5% | - | - | - | 2 |"
    assert score[:4] == "62.5" and row in rows
    assert "| med_qa/test, all questions: 8, over questions | accuracy | MedEvalKit's | letter | whole |" in results
    assert "vqa_rad/test, all questions: 8" in results and "st_anna" not in results


def test_card_of_a_run_with_rewards_says_so(runs, tmp_path):
    run = shutil.copytree(runs["full"][0], tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    record = read_manifest(newest_checkpoint(run))
    (run / "log.jsonl").write_text('{"step": 19, "reward": 0.25, "loss": -1e-3}\n{"step": 21, "reward": 1}\n')
    written = write_card(run, tmp_path / "README.md", flags=record["flags"] | {"reward": "boxes:2", "start": "x"}).text
    assert ("steps of AdamW on GRPO's objective, its answers rewarded by boxes:2 of tasks/rewards.py;\n"
            "the last mean reward logged is 0.250. Machine") in written
    assert "The flags of train_grpo.py" in written and "cross-entropy" not in written


def test_card_shows_each_flag_that_decides_a_number():
    assert card.HIDDEN == train_vlm.FREE_ON_RESUME | {"vision_weights", "language_weights"}


def test_card_has_what_the_run_recorded_whatever_the_shards_are_now(runs, tmp_path):
    run = runs["full"][0]
    inputs = read_manifest(newest_checkpoint(run))["inputs"]
    inputs["data"]["sample"] |= {"samples": 4321, "images": 765, "leaked": 12}
    written = write_card(run, tmp_path / "README.md", inputs=inputs)
    assert "| sample | MIT | 4321 | 765 | 12, left out |" in written.text


# ----------------------------------------------------------------------------- privacy

@pytest.fixture(scope="module")
def private(shards, tmp_path_factory):  # noqa: F811
    """(export of a run on a private dataset beside another one, words that may be nowhere in it)."""
    folder = tmp_path_factory.mktemp("st_anna") / "home_of_maria"
    here = folder / "shards"
    for name in ("st_anna_skulls", "feet_of_maria", "sample"):
        shutil.copytree(shards / "sample", here / name)
        for path in here.glob(f"{name}/*/manifest.json"):
            manifest = json.loads(path.read_text()) | {"dataset": name}
            path.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    guard(here, "keep")
    base = folder / "a_base"
    save_vlm(build_vlm("sample", 512), base)
    shutil.move(base / "language", folder / "language_of_maria")
    settings = json.loads((folder / "language_of_maria/config.json").read_text())
    (folder / "language_of_maria/config.json").write_text(json.dumps(
        settings | {"_name_or_path": str(folder / "language_of_maria")}))
    shapes = tensor_shapes(folder / "language_of_maria/model.safetensors")
    (folder / "language_of_maria/model.safetensors.index.json").write_text(json.dumps({  # as prepare/weights.py does
        "metadata": {"config": hash_file(folder / "language_of_maria/config.json")},
        "weight_map": dict.fromkeys(shapes, "model.safetensors")}))
    train_vlm.main(flags(here, folder / "run", data="sample,st_anna_skulls:2", max_steps=2, language="lora",
                         vision="full", language_weights=str(folder / "language_of_maria")))
    eval_vqa.main(eval_vqa.Config(run=str(folder / "run"), shards_dir=str(here), limit=4, blind="none"))
    export.main(export.Config(run=str(folder / "run"), folder=str(folder / "out")))
    return folder / "out", ("st_anna", "feet_of", "home_of", str(Path.home()), str(folder), str(ROOT))


def test_a_base_loads_whose_config_lost_the_name_of_its_place(private):
    settings = json.loads(next(private[0].glob("vlm/step_*/language/config.json")).read_text())
    assert "_name_or_path" not in settings and settings["hidden_size"] == 128
    assert load_run(private[0] / "vlm").language.config.hidden_size == 128


def test_no_exported_file_names_private_datasets_people_or_places(private):
    folder, secrets = private
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"README.md", "manifest.json", "adapter_config.json"} <= {path.name for path in files}
    leaked = {(path.relative_to(folder).as_posix(), word) for path in files for word in secrets
              if word.encode() in path.read_bytes() or word in path.name}
    assert leaked == set()
    text = (folder / "README.md").read_text()
    assert "--data=sample,private_1:2" in text and "| private_1:2 | not known | 64 |" in text
    assert "private" in text.split("images were compared with")[1].split(".")[0]


# ----------------------------------------------------------------------------- refusals

def test_images_of_different_shapes_are_no_config_of_timm_s(runs, tmp_path, monkeypatch):
    run = runs["full"][0]
    opened = export.open_trained_run(str(run))
    monkeypatch.setattr(export, "open_trained_run", lambda *names: (
        *opened[:2], opened[2] | {"image": opened[2]["image"] | {"resize": "fit"}}, opened[3]))
    for only in ("", "vision,card"):
        with pytest.raises(UserError, match="by --resize=fit its images have different shapes") as caught:
            export.main(export.Config(run=str(run), folder=str(tmp_path / "out"), only=only))
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    export.main(export.Config(run=str(run), folder=str(tmp_path / "out"), only="card"))


def test_the_checkpoint_that_is_named_is_exported(runs, tmp_path, capsys):
    run = runs["full"][0]
    names = [path.name for path in run.glob("step_*")]
    assert len(names) > 1
    for name in ("best", *names):
        export.main(export.Config(run=str(run), folder=str(tmp_path / name), only="card", checkpoint=name))
        step = best_checkpoint(run).name if name == "best" else name
        assert f"of {run / step}, into" in capsys.readouterr().out
    with pytest.raises(UserError, match="--checkpoint=step_7: .* has step_000020"):
        export.main(export.Config(run=str(run), folder=str(tmp_path / "no"), checkpoint="step_7"))


@pytest.mark.parametrize("changes, message", [
    (dict(), r"export/vision: there already; remove it, or choose another --folder"),
    (dict(only="card"), r"export/README.md: there already"),
    (dict(only="vlm, lanugage"), "--only=lanugage: no such part; there are vision, language, adapter, "),
    (dict(only="adapter"), "--only=adapter: .*full has no LoRA; leave it out"),
    (dict(run="nowhere"), "nowhere: no checkpoint here; run `python train_vlm.py --run=nowhere`")])
def test_a_mistake_gets_a_line(changes, message, runs):
    before = sorted(runs["full"][1].rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        export.main(export.Config(**{"run": str(runs["full"][0]), **changes}))
    assert "\n" not in str(caught.value) and sorted(runs["full"][1].rglob("*")) == before


def test_what_a_killed_export_left_is_in_no_way_and_two_at_once_take_turns(runs, tmp_path):
    out = tmp_path / "out"
    config = export.Config(run=str(runs["full"][0]), folder=str(out), only="card,vision")
    left = out / ".vision.partial"
    left.mkdir(parents=True)
    (left / export.SOURCE).write_text("")  # it was killed while it wrote this
    with lock(out / ".lock", "exporting"), pytest.raises(UserError, match="out: process .* is exporting there already"):
        export.main(config)
    assert list(out.iterdir()) == [left]
    export.main(config)
    assert {path.name for path in out.iterdir()} == {"vision", "README.md"}


def change_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_another_tokenizer_is_refused(runs, tmp_path):
    run = shutil.copytree(runs["full"][0], tmp_path / "run", ignore=shutil.ignore_patterns("export", "eval"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(run / "tokenizer.model"))
    piece = next(model.id_to_piece(token) for token in range(300, 512)
                 if re.fullmatch("[a-z]{3}", model.id_to_piece(token)))
    content = (run / "tokenizer.model").read_bytes()
    change_bit(run / "tokenizer.model", content.index(piece.encode()))
    Tokenizer(run / "tokenizer.model")  # which is a tokenizer still
    with pytest.raises(UserError, match="tokenizer.model: not the one that the run was trained with; bring that back"):
        export.main(export.Config(run=str(run), folder=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_other_base_weights_are_refused(runs, tmp_path):
    base = runs["full"][1] / "language"
    file = sorted(base.glob("*.safetensors"))[0]
    before = file.read_bytes()
    change_bit(file, len(before) - 1)
    try:
        with pytest.raises(UserError, match="not the base weights that the run was trained on"):
            export.main(export.Config(run=str(runs["lora"][0]), folder=str(tmp_path / "out")))
    finally:
        file.write_bytes(before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["removed", "altered", "gone halfway"])
def test_what_a_run_removes_meanwhile_is_exported_whole_or_not_at_all(change, runs, tmp_path, monkeypatch):
    run = shutil.copytree(runs["full"][0], tmp_path / "run", ignore=shutil.ignore_patterns("export", "eval"))
    checkpoint, save = newest_checkpoint(run), export.save_module

    def go_on(*arguments, **named):
        if change == "altered":
            change_bit(checkpoint / "projector.safetensors", -1)
        elif change == "removed":
            save(*arguments, **named)
        if change != "altered":
            checkpoint.rename(run / "removed_step")
        if change != "removed":
            save(*arguments, **named)

    monkeypatch.setattr(export, "save_module", go_on)
    with pytest.raises(UserError, match="step_000020: removed or altered while it was exported") as caught:
        export.main(export.Config(run=str(run), folder=str(tmp_path / "out")))
    assert "\n" not in str(caught.value) and list((tmp_path / "out").iterdir()) == []


def test_parts_of_two_checkpoints_do_not_come_together(runs, tmp_path, capsys):
    export.main(export.Config(run=str(runs["full"][0]), folder=str(tmp_path), only="vision"))
    assert f"of {runs['full'][0]}/step_000020, into" in capsys.readouterr().out
    with pytest.raises(UserError, match="vision: is of step_000020, another checkpoint than this"):
        export.main(export.Config(run=str(runs["lora"][0]), folder=str(tmp_path), only="adapter"))
    assert [path.name for path in tmp_path.iterdir()] == ["vision"]


def test_a_full_or_unwritable_target_is_told_before_the_work(runs, tmp_path, monkeypatch):
    run = str(runs["full"][0])
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(export, "write_part", lambda *arguments, **named: pytest.fail("it began"))
    with pytest.raises(UserError, match="cannot be written to .*; name another place with --folder="):
        export.main(export.Config(run=run, folder=str(tmp_path / "file/new")))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(UserError, match=r"GB are to be written, 0.001 GB are free; make space"):
        export.main(export.Config(run=run, folder=str(tmp_path / "new")))


def test_what_cannot_be_written_whole_is_not_there(runs, tmp_path, monkeypatch):
    save, calls = hub.save_file, []

    def fill_the_disk(*arguments, **named):
        save(*arguments, **named)
        calls.append(1)
        if len(calls) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(hub, "save_file", fill_the_disk)
    with pytest.raises(UserError, match="language: not written: No space left on device; see to it"):
        export.main(export.Config(run=str(runs["full"][0]), folder=str(tmp_path), only="vision,language",
                                  shard_gigabytes=1e-3))
    assert [path.name for path in tmp_path.iterdir()] == ["vision"]


# ----------------------------------------------------------------------------- timm and open_clip

@torch.no_grad()
@pytest.mark.parametrize("name", ["full", "lora"])
def test_encoder_is_timm_s_and_open_clip_s_too(name, runs, references, tmp_path):
    run, folder = runs[name]
    timm, open_clip = references
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    theirs = timm.create_model(f"local-dir:{folder / 'vision'}", pretrained=True).eval()
    wanted = load_run(run).vision.eval()(pixels)
    assert relative_error(theirs.forward_features(pixels), wanted) < TOLERANCE
    assert relative_error(theirs(pixels), wanted[:, 0]) < TOLERANCE and theirs.num_classes == 0
    assert equal_tensors(theirs.state_dict(), encoder_of(run).state_dict())
    if name == "lora":
        base = load_encoder(runs["full"][1] / "vision/model.safetensors")
        assert relative_error(base(pixels), wanted) > 0.01
    assert timm.data.resolve_data_config(model=theirs) == {
        "input_size": (3, 224, 224), "interpolation": "bicubic", "mean": list(CLIP_MEAN),
        "std": list(CLIP_STD), "crop_pct": 1.0, "crop_mode": "squash"}
    tower = open_clip.timm_model.TimmModel(f"local-dir:{folder / 'vision'}", theirs.num_features,
                                           pool="token", proj="none", pretrained=True).eval()
    assert torch.equal(tower(pixels), theirs(pixels))
    save_file(fill(theirs).state_dict(), tmp_path / "tuned.safetensors")  # fine-tuned there
    back = load_encoder(tmp_path / "tuned.safetensors")
    assert back.config == encoder_of(run).config
    assert equal_tensors(back.state_dict(), theirs.state_dict())
    assert relative_error(back(pixels), theirs.forward_features(pixels)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("config", [VIT, CLIP_VIT])
@pytest.mark.parametrize("resize, crop_mode", [("crop", "center"), ("pad", "border")])
def test_other_sizes_and_clip_s(config, resize, crop_mode, references, tmp_path):
    model = VLM(fill(ViT(config)), LLaMA(LLAMA))
    image = {"size": config.image_size, "resize": resize}
    export.write_vision(make_run(tmp_path, model), image, tmp_path / "vision")
    theirs = references[0].create_model(f"local-dir:{tmp_path / 'vision'}", pretrained=True).eval()
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    assert relative_error(theirs.forward_features(pixels), model.vision(pixels)) < TOLERANCE
    assert references[0].data.resolve_data_config(model=theirs)["crop_mode"] == crop_mode


@torch.no_grad()
@pytest.mark.parametrize("size", [30, 36])  # 2 pixels along a side are in no patch, or 1; the second's are interpolated
@pytest.mark.parametrize("kind, layer", [("siglip", "normed"), ("siglip", "-2"), ("clip", "-2"), ("vit", "-1")])
def test_timm_has_siglip_s_and_what_no_norm_is_behind(kind, layer, size, references, tmp_path):
    config = {"siglip": SiglipConfig(30, 7, 32, 3, head_size=8, hidden=86), "vit": replace(VIT, image_size=30),
              "clip": replace(CLIP_VIT, image_size=30, patch_size=7)}[kind]
    vision = Siglip(config) if kind == "siglip" else ViT(config)
    save_module(randomise(vision), tmp_path / "tower.safetensors")
    model = VLM(load_encoder(tmp_path / "tower.safetensors", layer=layer), LLaMA(LLAMA))
    export.write_vision(make_run(tmp_path, model), {"size": size, "resize": "tiles:4"}, tmp_path / "vision")
    theirs = references[0].create_model(f"local-dir:{tmp_path / 'vision'}", pretrained=True).eval()
    pixels = torch.randn(2, 3, size, size)
    tokens, wanted = theirs.forward_features(pixels), model.vision(pixels)
    assert relative_error(tokens, wanted) < TOLERANCE
    assert relative_error(theirs(pixels), wanted.mean(1) if kind == "siglip" else wanted[:, 0]) < TOLERANCE
    assert references[0].data.resolve_data_config(model=theirs)["mean"] == list(vision.mean)
    back = load_encoder(tmp_path / "vision/model.safetensors", layer=layer)
    assert relative_error(back(pixels), tokens) < TOLERANCE and back.config.image_size == size


@torch.no_grad()
@pytest.mark.parametrize("merge", [1, 2])
def test_an_encoder_of_larger_images_has_its_positions_interpolated_and_comes_back(merge, references, tmp_path):
    """As --image_size=32 trains a ViT of 16 pixels; what --merge makes of its patches is the VLM's."""
    model = VLM(fill(ViT(replace(VIT, merge=merge))), LLaMA(LLAMA))
    export.write_vision(make_run(tmp_path, model), {"size": 32, "resize": "squash"}, tmp_path / "vision")
    theirs = references[0].create_model(f"local-dir:{tmp_path / 'vision'}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 32, 32)
    tokens = theirs.forward_features(pixels)
    merged = tokens if merge == 1 else merge_patches(tokens[:, 1:], 4, 4, 2)
    assert merged.shape == (2, 17, 128) if merge == 1 else (2, 4, 512)
    assert relative_error(merged, model.vision(pixels)) < TOLERANCE
    assert relative_error(load_encoder(tmp_path / "vision/model.safetensors")(pixels), tokens) < TOLERANCE


@torch.no_grad()
def test_a_head_size_of_its_own_is_transformers_too(tmp_path):
    model = VLM(ViT(VIT), randomise(LLaMA(replace(LLAMA, head_dim=16))))
    settings = {"targets": "q_proj,o_proj", "r": 2, "alpha": 4.0, "dropout": 0.0}
    add_lora(model.language, **settings)
    model.lora["language"] = settings
    randomise(model.language, seed=1)
    checkpoint = make_run(tmp_path, model)
    (tmp_path / "tokenizer.model").write_bytes(train_sample_tokenizer())
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    export.write_language(checkpoint, tokenizer, torch.float32, 1e9, tmp_path / "new")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    tokens = some_tokens() % 307
    assert theirs.config.head_dim == 16
    assert relative_error(logits_of(theirs, tokens), model.language(tokens)) < TOLERANCE


@torch.no_grad()
def test_open_clip_starts_a_model_from_the_tower(runs, references):
    """Its own text tower is random: as little as there is in this model."""
    folder = runs["full"][1] / "vision"
    model = references[1].CustomTextCLIP(
        16, {"timm_model_name": f"local-dir:{folder}", "timm_model_pretrained": True,
             "timm_pool": "token"},
        {"layers": 1, "width": 64, "heads": 1, "context_length": 7, "vocab_size": 50})
    assert equal_tensors(model.visual.trunk.state_dict(), load_file(folder / "model.safetensors"))


@torch.no_grad()
def test_vision_adapter_is_peft_s(runs, references):
    run, folder = runs["lora"]
    base = references[0].create_model(f"local-dir:{runs['full'][1] / 'vision'}", pretrained=True)
    theirs = peft.PeftModel.from_pretrained(base, folder / "vision_adapter").eval()
    pixels = torch.randn(2, 3, 224, 224)
    assert relative_error(theirs.base_model.model.forward_features(pixels),
                          load_run(run).vision(pixels)) < TOLERANCE
