"""Classification from shards to a table: eight datasets, own folders, resumption, refusals."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_cls
from data import Record
from lora import add_lora
from model import CONFIGS, ViT, ViTConfig
from plumbing.files import checkpoints, read_manifest, seal, write_manifest
from plumbing.flags import UserError, parse_flags
from plumbing.kernels import Linear
from plumbing.shards import PROMPT_VERSION, SHARD_VERSION, Shard
from prepare.datasets import DATASETS, Dataset
from prepare.leaks import guard
from prepare.shards import write_dataset
from tasks import labelled
from tasks.encoders import EIGHT, read_results
from test_bad_input import WRITERS
from test_model import TOLERANCE, randomise, relative_error
from train_cls import Config, copy_of, main
from weights import load_trained_encoder, save_module
from zoo.adapters import save_adapter
from zoo.classifier import Classifier
from zoo.resnet import ResNet, ResNetConfig

ROOT = Path(__file__).resolve().parent.parent


TINY = ViTConfig(image_size=32, width=64, depth=1), CONFIGS["sample"][1]


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch):
    monkeypatch.setitem(CONFIGS, "sample", TINY)


def picture(seed, shade):
    """A noisy image of one shade of grey: the shade is what a class can be told by."""
    noise = np.random.default_rng(seed).integers(-40, 40, (16, 16, 3))
    stream = io.BytesIO()
    Image.fromarray((shade + noise).clip(0, 255).astype(np.uint8)).resize((32, 32)).save(stream, "PNG")
    return stream.getvalue()


def toy_records(classes, each={"train": 8, "validation": 4, "test": 4}, multi_label=False):
    """(split, Record)s with so many images of each class."""
    rows, seed = [], 0
    for split, count in each.items():
        for number in range(count):
            for place, name in enumerate(classes):
                seed += 1
                labels = (name,) if not multi_label or number % 2 else tuple({name, classes[0]})
                rows.append((split, Record(f"{split}{seed}", image=picture(seed, 40 + 170 * place // len(classes)),
                                           image_name=f"{seed}.png", labels=labels)))
    return rows


def write(shards, name, records, classes, size=32, multi_label=False):
    """A prepared classification dataset."""
    dataset = Dataset(name=name, read=lambda raw: iter(records), kind="classification", licence="none",
                      access="open", megabytes=0, page="", layouts=(), counts={}, classes=tuple(classes),
                      multi_label=multi_label)
    facts = {"dataset": name, "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION, "limit": 0,
             "licence": "none", "image": {"size": size, "resize": "squash", "codec": "png", "quality": 0}}
    write_dataset(shards / name, dataset, shards, {}, b"", facts, 1)
    guard(shards, "drop")
    return shards


def settings(tmp_path, **flags):
    """The Config of a short run of a tiny encoder."""
    return Config(**{"dataset": "toy", "encoder": "scratch", "model": "sample", "epochs": 2, "batch_size": 8,
                     "learning_rate": 1e-3, "shards_dir": str(tmp_path), "weights_dir": str(tmp_path),
                     "out": str(tmp_path / "cls"), "device": "cpu", **flags})


def write_results(out, entries):
    """The result.json of runs that were not made."""
    for entry in entries:
        folder = Path(out) / entry["dataset"] / entry["name"] / f"seed_{entry['seed']}"
        folder.mkdir(parents=True)
        write_manifest(folder, "result.json", {"flags": {}, "inputs": {}} | entry)


@pytest.fixture
def toy(tmp_path):
    return write(tmp_path, "toy", toy_records(("dark", "light")), ("dark", "light"))


# ----------------------------------------------------------------------------- what is learnt

def test_a_run_learns_what_there_is_to_see_and_leaves_a_model(toy, capsys):
    config = settings(toy, epochs=6, seeds=2)
    main(config)
    results = read_results(config.out)
    assert results.keys() == {("toy", "scratch", 0), ("toy", "scratch", 1)}
    for entry in results.values():
        assert entry["test"]["macro_f1"] == 1 and entry["test"]["confusion"] == [[4, 0], [0, 4]]
    printed = capsys.readouterr().out
    assert "toy, scratch, seed 1: 8 test images" in printed
    assert "macro-F1 1.000 (1.000 to 1.000, images drawn), blind 0.333, " in printed  # of two classes as frequent
    assert re.search(r"toy +1\.000 ± 0\.000 +0\.333\n", printed)  # the table, after several seeds
    assert printed.count("blind: the most frequent class") == 1
    folder = toy / "cls/toy/scratch/seed_0"
    assert sorted(os.listdir(folder)) == ["config.json", "log.jsonl", "model", "result.json", "test.csv",
                                          "validation.csv"]
    rows = list(csv.DictReader(open(folder / "test.csv")))
    assert len(rows) == 8 and all(float(row[row["labels"]]) > 0.5 for row in rows)
    main(config)  # finished: nothing is made twice
    assert "finished already" in capsys.readouterr().out and read_results(config.out) == results


def test_the_head_reads_the_class_token_beside_the_mean_of_the_patches():
    for encoder in (ViT(ViTConfig(32, 16, 64, 1)), ViT(ViTConfig(32, 16, 64, 1, clip=True)),
                    ResNet(ResNetConfig(64, 8, (1, 1, 1, 1), 96)).eval()):
        model = randomise(Classifier(encoder, 3), 0)
        size, width = encoder.config.image_size, encoder.config.width
        images = torch.randn(2, 3, size, size)
        tokens = encoder(images)
        assert model.head.weight.shape == (3, 2 * width) and tokens.shape == (2, 5, width)
        wanted = (tokens[:, 0] @ model.head.weight[:, :width].T + tokens[:, 1:].mean(1)
                  @ model.head.weight[:, width:].T + model.head.bias)
        assert relative_error(model(images), wanted) < TOLERANCE


def test_a_frozen_encoder_stays_and_only_the_head_learns(toy):
    main(settings(toy, frozen=True, epochs=3, learning_rate=1e-2))
    torch.manual_seed(0)
    with torch.device("cpu"):
        first = ViT(CONFIGS["sample"][0])
    saved = load_file(toy / "cls/toy/scratch/seed_0/model/encoder.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in first.state_dict().items())


def test_batch_norms_keep_their_statistics(toy, monkeypatch):
    model = ResNet(ResNetConfig(32, 8, (1, 1, 1, 1), 64))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    save_file(model.state_dict(), toy / "pmc_clip.safetensors")
    main(settings(toy, encoder="pmc_clip", epochs=1))
    saved = load_file(toy / "cls/toy/pmc_clip/seed_0/model/encoder.safetensors")
    moved = {name: not torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items()}
    assert moved["conv1.weight"] and moved["bn1.weight"]
    assert not any(value for name, value in moved.items() if "running" in name or "num_batches" in name)


@pytest.mark.parametrize("lora", [False, True])
def test_openmedq_s_encoder_is_that_of_the_run(lora, tmp_path):
    config = ViTConfig(32, 16, 64, 2)
    vision, folder = randomise(ViT(config), 1), tmp_path / "run/partial"
    save_module(vision, tmp_path / "vision.safetensors")
    images = torch.randn(2, 3, 32, 32)
    settings_of = {"targets": "qkv", "r": 2, "alpha": 4, "dropout": 0.0}
    folder.mkdir(parents=True)
    if lora:
        add_lora(vision, **settings_of)
        randomise(vision, 2)
        save_module(vision, tmp_path / "vision.safetensors")  # what it is without its LoRA
        save_adapter(vision, folder / "vision_adapter", "", **settings_of)
    (folder / "config.json").write_text(json.dumps({
        "weights": {"vision": str(tmp_path / "vision.safetensors"), "language": ""},
        "lora": {"vision": settings_of} if lora else {}}))
    seal(folder, tmp_path / "run/step_000002")
    encoder = load_trained_encoder(tmp_path / "run/step_000002")
    assert type(encoder.blocks[0].attn.qkv) is Linear
    assert relative_error(encoder(images), vision(images)) < TOLERANCE


# ----------------------------------------------------------------------------- datasets

@pytest.mark.parametrize("name", EIGHT)
def test_each_of_the_eight_runs_from_its_raw_files_to_its_test(name, tmp_path):
    dataset, raw = DATASETS[name], tmp_path / "raw" / name
    raw.mkdir(parents=True)
    WRITERS[name](raw)
    several = name in ("cxr8", "med_fmc_chest", "med_fmc_endo")
    records = list(dataset.read(raw))  # a handful; the rest is made up, so that each class is everywhere
    assert records
    records += toy_records(dataset.classes, {"train": 2, "validation": 1, "test": 1}, several)
    write(tmp_path, name, records, dataset.classes, multi_label=several)
    config = settings(tmp_path, dataset=name, epochs=1)
    main(config)
    entry = read_results(config.out)[name, "scratch", 0]
    assert list(entry["test"]["classes"]) == list(dataset.classes)
    assert ("confusion" in entry["test"]) != several and ("positive_f1" in entry["test"]) == several
    assert entry["test"]["images"] >= len(dataset.classes) and 0 <= entry["test"]["macro_f1"] <= 1


def test_questions_about_an_image_are_one_image_of_it(tmp_path):
    rows = toy_records(("dark", "light"), {"train": 20, "test": 4})
    rows = [(split, replace(record, question=f"{n}?", answer="yes"))
            for split, record in rows for n in range(3)]
    write(tmp_path, "toy", rows, ("dark", "light"))
    splits, _ = labelled.open_dataset(tmp_path / "toy", 32)
    assert {name: len(split.names) for name, split in splits.items()} == {
        "train": 36, "test": 8, "validation": 4}  # no validation split: a tenth of train
    assert not set(splits["train"].names) & set(splits["validation"].names)
    shard = Shard(tmp_path / "toy/test")
    splits["test"].read_pixels()
    assert np.array_equal(splits["test"].pixels[3], shard.read_image(3))
    assert splits["test"].labels.tolist() == [[True, False], [False, True]] * 4


def test_training_images_of_a_test_split_are_left_out(tmp_path):
    rows = toy_records(("dark", "light"))
    rows.append(("train", replace(rows[-1][1], id="leak", image_name="leak.png")))
    write(tmp_path, "toy", rows, ("dark", "light"))
    for recorded, asked, decision, images in [("drop", "recorded", "drop", 16), ("drop", "keep", "keep", 17),
                                          ("keep", "recorded", "keep", 17), ("keep", "drop", "drop", 16)]:
        guard(tmp_path, recorded)
        splits, facts = labelled.open_dataset(tmp_path / "toy", 32, asked)
        assert facts["train"]["images"] == len(splits["train"].names) == images
        assert ("leak.png" in splits["train"].names) == (decision == "keep")
        assert (facts["leaks"]["decision"], facts["leaks"]["left out"]) == (decision, 17 - images)


def test_validation_images_of_the_test_split_are_left_out_of_validation(tmp_path):
    rows = toy_records(("dark", "light"))
    test = rows[-1][1]
    rows.append(("validation", replace(test, id="leak", image_name="leak.png")))
    write(tmp_path, "toy", rows, ("dark", "light"))
    for asked, images in [("recorded", 8), ("drop", 8), ("keep", 9)]:
        splits, facts = labelled.open_dataset(tmp_path / "toy", 32, asked)
        assert facts["validation"]["images"] == images == len(splits["validation"].names)
        assert ("leak.png" in splits["validation"].names) == (images == 9)
        assert len(splits["train"].names) == 16 and test.image_name in splits["test"].names


# ----------------------------------------------------------------------------- stopped and resumed

@pytest.mark.parametrize("killed_in", [1, 3, 4])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(killed_in, toy, monkeypatch):
    flags = {"epochs": 5, "save_every": 2, "learning_rate": 3e-4}
    main(settings(toy, **flags))
    undisturbed = toy / "cls/toy/scratch/seed_0"
    original, out = train_cls.train_epoch, str(toy / "again")

    def stop(model, optimizer, split, epoch, *rest):
        if epoch == killed_in:
            raise KeyboardInterrupt
        return original(model, optimizer, split, epoch, *rest)

    monkeypatch.setattr(train_cls, "train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        main(settings(toy, out=out, **flags))
    monkeypatch.setattr(train_cls, "train_epoch", original)
    stopped = toy / "again/toy/scratch/seed_0"
    assert [state.name for state in checkpoints(stopped)] == {1: [], 3: ["step_000002"], 4: ["step_000004"]}[killed_in]
    if killed_in > 1:
        with pytest.raises(UserError, match="--learning_rate=0.1: the run in .* has 0.0003; choose another"):
            main(settings(toy, out=out, **{**flags, "learning_rate": 0.1}))
    main(settings(toy, out=out, **flags))
    for name in ("model/encoder.safetensors", "model/head.safetensors", "model/config.json", "test.csv",
                 "validation.csv", "log.jsonl"):
        assert (stopped / name).read_bytes() == (undisturbed / name).read_bytes(), name
    one, other = (read_results(folder)["toy", "scratch", 0]
                  for folder in (out, str(toy / "cls")))
    assert one["test"] == other["test"] and one["best_epoch"] == other["best_epoch"]


def test_a_damaged_state_or_model_is_refused_and_an_older_whole_state_is_used(toy, monkeypatch, capsys):
    flags = {"epochs": 5, "save_every": 2}
    folder = toy / "cls/toy/scratch/seed_0"
    original = train_cls.train_epoch

    def stop(model, optimizer, split, epoch, *rest):
        if epoch == 4:
            raise KeyboardInterrupt
        return original(model, optimizer, split, epoch, *rest)

    monkeypatch.setattr(train_cls, "train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        main(settings(toy, **flags))
    monkeypatch.setattr(train_cls, "train_epoch", original)
    state = folder / "step_000004/model.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1  # in a weight, where nothing but its hash tells
    state.write_bytes(content)
    for _ in range(2):
        with pytest.raises(UserError, match="none of its 1 checkpoints is whole, see above; delete .*seed_0 and train"):
            main(settings(toy, **flags))
        assert "step_000004: not used: model.safetensors was altered" in capsys.readouterr().err
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    partial = folder / "older"
    shutil.copytree(folder / "step_000004", partial)
    (partial / "manifest.json").unlink()
    facts = read_manifest(folder / "step_000004") | {"step": 3}
    seal(partial, folder / "step_000003",
         **{name: facts[name] for name in facts.keys() - {"files", "checksum", "name"}})
    state.write_bytes(content[:-1])
    main(settings(toy, **flags))
    assert not checkpoints(folder) and (folder / "result.json").is_file()
    with open(folder / "model/head.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(UserError, match="model: head.safetensors was altered; delete .*seed_0 and train again"):
        main(settings(toy, predict=str(toy), **flags))


def test_two_processes_share_the_runs_and_make_what_one_makes(tmp_path, monkeypatch):
    """Each run is one process's: not a bit depends on their number."""
    monkeypatch.undo()  # two other processes have no tiny encoder
    rows = toy_records(("dark", "light"), {"train": 4, "validation": 1, "test": 4})
    toy = write(tmp_path, "toy", rows, ("dark", "light"), size=224)
    main(settings(toy, seeds=3))
    config = settings(toy, seeds=3, out=str(toy / "two"))
    flags = [f"--{item.name}={getattr(config, item.name)}" for item in fields(config)]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                           "--", "train_cls.py", *flags], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean over seeds") == 1
    one, two = read_results(toy / "cls"), read_results(config.out)
    assert one.keys() == two.keys() and len(two) == 3
    for key, entry in one.items():
        assert entry["test"] == two[key]["test"] and entry["best_epoch"] == two[key]["best_epoch"]
        names = [Path("toy/scratch") / f"seed_{key[2]}" / "model" / name for name in
                 ("encoder.safetensors", "head.safetensors")]
        assert all((toy / "cls" / name).read_bytes() == (toy / "two" / name).read_bytes() for name in names)


def test_the_best_epoch_on_validation_is_tested_and_patience_stops(toy, monkeypatch):
    scores = iter([0.2, 0.9, 0.5, 0.4, 0.3, 0.1])
    weights = []
    original = train_cls.train_epoch

    def remember(model, *rest):
        loss = original(model, *rest)
        weights.append(copy_of(model))
        return loss

    monkeypatch.setattr(train_cls, "train_epoch", remember)
    monkeypatch.setattr(train_cls, "macro_f1", lambda *rest: next(scores, 0.0))
    monkeypatch.setattr(train_cls, "score", lambda *rest: {"macro_f1": 0})
    monkeypatch.setattr(train_cls, "print_run", lambda entry: None)
    main(settings(toy, epochs=6, patience=3))
    entry = read_results(toy / "cls")["toy", "scratch", 0]
    assert (entry["best_epoch"], entry["validation"], len(weights)) == (2, 0.9, 5)
    saved = load_file(toy / "cls/toy/scratch/seed_0/model/head.safetensors")
    assert torch.equal(saved["weight"], weights[1]["head.weight"])
    assert not torch.equal(saved["weight"], weights[4]["head.weight"])


def test_what_is_chosen_comes_from_validation_alone(tmp_path, monkeypatch):
    write(tmp_path, "toy", toy_records(("a", "b", "c"), multi_label=True), ("a", "b", "c"), multi_label=True)
    splits, seen = {}, []
    original_open, original_tune, original_conform = (
        train_cls.open_dataset, train_cls.tune_thresholds, train_cls.conform)
    monkeypatch.setattr(train_cls, "open_dataset", lambda *rest: splits.setdefault("", original_open(*rest)))
    monkeypatch.setattr(train_cls, "tune_thresholds", lambda probabilities, actual: seen.append(actual)
                        or original_tune(probabilities, actual))
    monkeypatch.setattr(train_cls, "fit_temperature", lambda logits, actual, several: seen.append(actual) or 2.0)
    monkeypatch.setattr(train_cls, "conform", lambda before, actual, *rest: seen.append(actual)
                        or original_conform(before, actual, *rest))
    main(settings(tmp_path, epochs=1))
    validation = splits[""][0]["validation"].labels
    assert len(seen) == 4 and all(actual is validation for actual in seen)
    facts = json.loads((tmp_path / "cls/toy/scratch/seed_0/model/config.json").read_text())
    entry = read_results(tmp_path / "cls")["toy", "scratch", 0]
    assert facts["thresholds"] == entry["test"]["thresholds"] and len(facts["thresholds"]) == 3


# ----------------------------------------------------------------------------- own images

@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_own_images_are_trained_on_and_new_ones_predicted(kind, tmp_path, capsys):
    source, new = tmp_path / "my wrists", tmp_path / "new"
    lines = ["path,labels"]
    for number in range(60):
        name, shade = (("whole", 60), ("broken", 190))[number % 2]
        path = source / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, shade))
        lines.append(f"{name}/{number}.png,{name}" + ("|old" if number % 3 == 0 else ""))
    for name, shade in (("a/light.png", 190), ("dark.PNG", 60)):
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_bytes(picture(99, shade))
    (new / "notes.txt").write_text("no image")
    Image.new("L", (20, 20), 190).save(new / "even.png")
    if kind == "csv":
        (source / "labels.csv").write_text("\n".join(lines) + "\n")
    dataset = str(source if kind == "folder" else source / "labels.csv")
    words = [f"--dataset={dataset}", "--encoder=scratch", "--model=sample", "--epochs=5", "--learning_rate=1e-3",
             f"--shards_dir={tmp_path}/shards", f"--out={tmp_path}/cls", "--device=cpu"]
    main(parse_flags(Config, words))
    results, = read_results(tmp_path / "cls").values()
    assert results["test"]["macro_f1"] > (0.9 if kind == "folder" else 0.4)
    assert list(results["test"]["classes"]) == ["broken", "whole"] if kind == "folder" else ["broken", "old", "whole"]
    main(parse_flags(Config, [*words, f"--predict={new}"]))
    told = capsys.readouterr().out
    assert "even.png: not an image that can be read (even: all pixels alike)" in told
    assert f"1 could not be read, see above; 1 files are no pictures, such as {new}/notes.txt" in told
    assert re.search(r"predicted_new_\w{8}\.csv: 2 images", told)
    for path in (source / "whole").glob("*0.png"):  # prepared anew, as they have changed: another run's images
        path.write_bytes(picture(7, 60) + b" ")
    message = refused(parse_flags(Config, words))
    assert "train.sha256 was " in message and "choose another --name" in message
    table, = (tmp_path / "cls").glob("*/scratch/seed_0/predicted_new_????????.csv")
    rows = {row["image"]: row for row in csv.DictReader(open(table))}
    assert rows.keys() == {"a/light.png", "dark.PNG"}
    assert "broken" in rows["a/light.png"]["predicted"] and "whole" in rows["dark.PNG"]["predicted"]
    assert float(rows["dark.PNG"]["whole"]) > 0.5 > float(rows["a/light.png"]["whole"])


def test_own_images_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    (tmp_path / "scans").mkdir()
    for name, reason in (("scans", "not understood, it has no file"), ("gone.csv", "no folder and no csv there")):
        words = [f"--dataset={tmp_path / name}", "--encoder=scratch", "--model=sample", "--device=cpu",
                 f"--shards_dir={tmp_path}/shards", f"--out={tmp_path}/cls"]
        done = subprocess.run([sys.executable, "train_cls.py", *words], cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 2 and done.stdout == ""
        assert re.fullmatch(rf"train_cls\.py: {re.escape(str(tmp_path / name))}: {reason}.*\n", done.stderr)


# ----------------------------------------------------------------------------- refusals

def refused(config):
    with pytest.raises(UserError) as error:
        main(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_learnt_or_tested_is_refused_in_one_line(tmp_path):
    def message(records, classes=("dark", "light"), **flags):
        name = f"toy{len(os.listdir(tmp_path))}"
        write(tmp_path, name, records, classes)
        return refused(settings(tmp_path, dataset=name, **flags))

    rows = toy_records(("dark", "light"))
    assert "train: no image of class 'other'" in message(rows, ("dark", "light", "other"))
    assert "test: all of its 4 images have the same label" in message(
        [row for row in rows if row[0] != "test" or row[1].labels == ("dark",)])
    bare = [(split, replace(record, labels=())) for split, record in rows]
    write(tmp_path, "bare", bare, (), multi_label=True)
    assert "has no labels; those with labels" in refused(settings(tmp_path, dataset="bare"))
    assert "images of 64 pixels, but the model reads 32" in refused(settings(
        write(tmp_path, "large", rows, ("dark", "light"), size=64), dataset="large"))
    unseen = rows + [("test", replace(rows[-1][1], labels=("grey",)))]  # not trained on: no such class
    write(tmp_path, "unseen", unseen, ("dark", "light"))
    assert Shard(tmp_path / "unseen/test").manifest["skipped"] == {"unknown label": 1}


def test_what_is_not_there_is_named_with_what_brings_it(toy):
    assert "nothing/train: not prepared; run `python prepare/all.py --only=nothing`" in refused(
        settings(toy, dataset="nothing"))
    assert "biomedclip.safetensors: not there; run `python prepare/all.py --only=biomedclip`" in refused(
        settings(toy, encoder="biomedclip"))
    assert "name the train_vlm.py run" in refused(settings(toy, encoder="openmedq"))
    assert "no checkpoint here" in refused(settings(toy, encoder="openmedq", run=str(toy / "none")))
    assert "no trained model" in refused(settings(toy, predict=str(toy)))
    assert "no run yet" in refused(settings(toy, report=True))
    for word, fault in (("--epochs=0", "from 1 to"), ("--name=a/b", "a name without /"), ("--name=..", "a name")):
        with pytest.raises(UserError, match=f"{re.escape(word)}: {fault}"):
            parse_flags(Config, [word])
    save_file({"x": torch.zeros(2)}, toy / "pubmedclip.safetensors")
    assert "no ViT in timm's layout" in refused(settings(toy, encoder="pubmedclip"))
    with pytest.raises(UserError, match="lower --learning_rate"):
        main(settings(toy, learning_rate=1e30, clip=0.0, name="wild"))


# ----------------------------------------------------------------------------- the table

def test_the_table_leaves_blank_what_was_not_run(tmp_path, capsys):
    config = settings(tmp_path, report=True)
    entries = [{"dataset": dataset, "name": name, "seed": seed, "test": {"macro_f1": value + 0.01 * seed}}
               for name, value in (("scratch", 0.5), ("openmedq", 0.7))
               for dataset in (EIGHT if name == "openmedq" else EIGHT[:2]) for seed in range(3)]
    entries.append({"dataset": "busi", "name": "biomedclip", "seed": 7, "test": {"macro_f1": 0.6}})
    write_results(config.out, entries)
    main(config)
    printed = capsys.readouterr().out.splitlines()
    table = {line[:18].strip(): line[18:].split("  ") for line in printed}
    cells = {name: [cell.strip() for cell in row if cell.strip()] for name, row in table.items()}
    assert cells["macro-F1 on test"] == ["openmedq", "biomedclip", "scratch"]
    assert cells["cxr8"] == ["0.710 ± 0.010", "0.510 ± 0.010"] and cells["busi"] == ["0.710 ± 0.010", "0.600"]
    assert cells["mean of the eight"] == ["0.710"]  # the others lack some
    assert cells["the paper's mean"] == ["0.757", "0.745", "0.616"]
    assert printed[-1] == ("openmedq - scratch: +0.200 over n = 2 dataset(s), each the mean of 3 seed(s), higher in 2, "
                           "p = 0.500 (whole datasets' signs flipped)")
    assert not [line for line in printed if "biomedclip:" in line]  # no seed in common


def fold_of(fold, name="scratch", seed=0, value=0.5, blind=0.3, folds=5):
    return {"dataset": f"wrists_fold_{fold}_of_{folds}", "name": name, "seed": seed,
            "test": {"macro_f1": value, "blind_macro_f1": blind},
            "inputs": {"folds": {"of": "wrists", "fold": fold, "folds": folds}}}


def test_folds_are_one_row_of_their_mean_and_missing_ones_are_named(tmp_path, capsys):
    config = settings(tmp_path, report=True)
    values = (0.5, 0.6, 0.7, 0.8, 0.9)
    entries = [fold_of(fold, value=value + 0.01 * seed - 0.005, blind=0.1 * fold, seed=seed)
               for fold, value in enumerate(values) for seed in range(2)]
    entries += [fold_of(fold, "openmedq", value=values[fold] + 0.1, blind=0.1 * fold) for fold in (0, 2, 3)]
    entries += [{"dataset": "toy", "name": name, "seed": 0, "test": {"macro_f1": 0.4}}
                for name in ("scratch", "openmedq")]
    write_results(config.out, entries)
    main(config)
    printed = capsys.readouterr().out
    row, = [line for line in printed.splitlines() if line.startswith("wrists")]
    assert re.split("  +", row) == ["wrists (5 folds)", "0.767 ± 0.153, 3 of 5 folds", "0.700 ± 0.158", "0.200"]
    assert "_fold_" not in printed and printed.count("of folds: mean over folds") == 1
    assert "openmedq - scratch: +0.052 over n = 2 dataset(s), each the mean of 1 or 3 seed(s) or fold(s)" in printed


def test_folds_that_were_trained_otherwise_are_no_part_of_their_mean(tmp_path, capsys):
    config = settings(tmp_path, report=True)
    entries = [fold_of(fold, value=0.5 + 0.1 * fold) | {"flags": {"epochs": 3, "dataset": f"wrists_fold_{fold}"}}
               for fold in range(3)]
    entries += [fold_of(3, value=0.1) | {"flags": {"epochs": 100, "dataset": "wrists_fold_3"}}]
    write_results(config.out, entries)
    main(config)
    printed = capsys.readouterr().out
    assert re.search(r"wrists \(5 folds\) +0.600 ± 0.100, 3 of 5 folds ", printed)
    assert "seed_0: flags.epochs was 3, now 100\n1 of 4 finished runs are left out" in printed


def test_a_run_on_a_fold_knows_which_it_is(toy):
    for split in ("train", "validation", "test"):
        manifest = read_manifest(toy / "toy" / split)
        write_manifest(toy / "toy" / split, "manifest.json",
                       manifest | {"folds": {"of": "wrists", "fold": 2, "folds": 5}})
    guard(toy, "")
    main(settings(toy, epochs=1))
    result = read_results(toy / "cls")["toy", "scratch", 0]
    assert result["inputs"]["folds"] == {"of": "wrists", "fold": 2, "folds": 5}
