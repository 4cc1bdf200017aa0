"""From raw files to shards: what is stored, what is skipped, and what survives a kill or a flipped bit."""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import prepare.all as all_py
from data import BOS, EOS, Mixture, Record, Tokenizer, View, format_prompt, write_plain
from plumbing.files import lock, manifest_checksum
from plumbing.flags import UserError, parse_flags, run
from plumbing.leaks import read_leaks
from plumbing.pixels import TOO_LONG, resize_image, smart_shape
from plumbing.runs import image_settings
from plumbing.shards import PROMPT_VERSION, SAMPLE, SHARD_VERSION, Shard, hash_words
from prepare.datasets import DATASETS, Dataset, read_tar
from prepare.questions import train_sample_tokenizer
from prepare.shards import SplitWriter, read_manifests, write_dataset
from prepare.weights import Weights
from tasks.evaluations import choose_evaluations
from tasks.splits import find_misfit

ROOT = Path(__file__).resolve().parent.parent
FACTS = {"dataset": "toy", "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION,
         "limit": 0, "licence": "none",
         "image": {"size": 32, "resize": "squash", "codec": "png", "quality": 0}}


def command(*words, **environment):
    return subprocess.run([sys.executable, "prepare/all.py", *words], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, **environment})


def prepare(*words):
    """The same in this process, which has imported everything."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = run(all_py.main, parse_flags(all_py.Config, words)) or 0
        except SystemExit as stopped:
            code = stopped.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def picture(seed, form="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


@pytest.fixture(scope="module")
def tokenizer():
    return train_sample_tokenizer()


def write_toy(folder, records, tokenizer, workers=1, kind="text questions", multi_label=False, **image):
    """Write (split, Record)s as a dataset; its one source is a file made here. Text alone needs no image."""
    toy = Dataset(name="toy", read=lambda raw: iter(records), kind=kind, licence="none", access="open",
                  megabytes=0, page="", layouts=(), counts={"train": len(records)}, classes=("big", "small"),
                  multi_label=multi_label)
    source = folder / "toy.json"
    source.write_text("{}")
    facts = {**FACTS, "image": {**FACTS["image"], **image}}
    write_dataset(folder / "toy", toy, folder, {"toy.json": source}, tokenizer, facts, workers)
    return Shard(folder / "toy" / "train")


def toy_records():
    a, b = picture(0), picture(1, form="JPEG")
    return [("train", Record("1", "what is  this? ", "A  lung", a, "a.png", type="what")),
            ("train", Record("2", "is it big?", "yes", b, "b.jpg", labels=("big",))),
            ("train", Record("3", "is it red?", "no", a, "copy_of_a.png", type="yes/no")),
            ("train", Record("4", "why?", "because", context="It rained."))]


# ----------------------------------------------------------------------------- what is stored

def test_what_is_read_back_is_what_was_given(tokenizer, tmp_path):
    shard = write_toy(tmp_path, toy_records(), tokenizer)
    model = Tokenizer(tmp_path / "toy" / "tokenizer.model")
    assert shard.read_records() == [
        {"id": "1", "question": "what is this?", "answer": "A lung", "type": "what", "image": "a.png"},
        {"id": "2", "question": "is it big?", "answer": "yes", "type": "", "image": "b.jpg", "labels": ["big"]},
        {"id": "3", "question": "is it red?", "answer": "no", "type": "yes/no", "image": "copy_of_a.png"},
        {"id": "4", "question": "why?", "answer": "because", "type": "", "image": "", "context": "It rained."}]
    for number, record in enumerate(shard.read_records()):
        sample = shard.read_sample(number)
        image = [] if shard.samples["image"][number] < 0 else [-1 - shard.samples["image"][number]]
        prompt = model.encode(format_prompt(record["question"], record.get("context", "")))
        answer = [*model.encode(record["answer"]), EOS]
        assert sample.tokens.tolist() == [BOS, *image, *prompt, *answer]
        assert sample.prompt().tolist() == [BOS, *image, *prompt] and sample.head == 1 + len(image)
        assert sample.spans.tolist() == [[len(sample.tokens) - len(answer), len(sample.tokens)]]
        assert model.decode(prompt) == format_prompt(record["question"], record.get("context", ""))
        assert model.decode(answer) == record["answer"]
    assert shard.samples["image"].tolist() == [0, 1, 0, -1]  # the same bytes are one image
    for number, content in enumerate([picture(0), picture(1, form="JPEG")]):
        wanted = Image.open(io.BytesIO(content)).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(shard.read_image(number), np.asarray(wanted))  # png loses nothing
    manifest = shard.manifest
    assert (manifest["samples"], manifest["images"], manifest["skipped"]) == (4, 2, {})
    assert manifest["pixel_error"] == 0 and manifest["tokenizer_sha256"] == model.sha256
    assert manifest["sources"]["toy.json"]["bytes"] == 2 and manifest["licence"] == "none"


def study_records():
    """Three views of two patients with texts between them, conversations, and texts of several questions."""
    a, b, c = (picture(seed) for seed in (0, 1, 2))
    views = (View(a, "a.png", "frontal"), " history:  cough ", View(b, "b.png", " lateral"), View(a, "old.png"))
    first = Record("1", "is it  big?", "yes", parts=views, group="Ann", turns=(("where?", "left"), ("sure?", " no ")))
    return [first, Record("2", "which side?", "right", parts=views, group="Ann"),
            Record("3", "what?", "a lung", parts=views[:3], group="Bob"),
            Record("4", "why?", "rain", context="It rained.", turns=(("why?", "still rain"),)),
            Record("5", "how long?", "an hour", context="It  rained."),
            Record("6", "what?", "a lung", c, "c.png"),
            Record("7", "why?", "rain"), Record("8", "why?", "rain"),
            Record("9", "and this?", "a lung", c, "c.png"),
            Record("10", "and this?", "a lung", c, "c.png", context="It rained."),
            Record("11", "what is said?", "a cough", parts=("history: cough",))]


def test_parts_and_turns_are_stored_token_by_token(tokenizer, tmp_path):
    shard = write_toy(tmp_path, [("train", record) for record in study_records()], tokenizer)
    encode = Tokenizer(tmp_path / "toy" / "tokenizer.model").encode

    def ask(question, context=""):
        return encode(f"{context}Question: {question}\nAnswer:")

    def answer(text):
        return [*encode(text), EOS]

    frontal, lateral = [*encode("frontal:"), -1], [*encode("lateral:"), -2]
    study = [BOS, *frontal, *encode("history: cough"), *lateral]
    rain = "Context: It rained.\n"
    wanted = [  # prompt and answer, prompt and answer, ...
        [[*study, -1, *ask("is it big?")], answer("yes"), ask("where?"), answer("left"), ask("sure?"), answer("no")],
        [[*study, -1, *ask("which side?")], answer("right")], [[*study, *ask("what?")], answer("a lung")],
        [[BOS, *ask("why?", rain)], answer("rain"), ask("why?"), answer("still rain")],
        [[BOS, *ask("how long?", rain)], answer("an hour")], [[BOS, -3, *ask("what?")], answer("a lung")],
        [[BOS, *ask("why?")], answer("rain")], [[BOS, *ask("why?")], answer("rain")],
        [[BOS, -3, *ask("and this?")], answer("a lung")], [[BOS, -3, *ask("and this?", rain)], answer("a lung")],
        [[BOS, *encode("history: cough"), *ask("what is said?")], answer("a cough")]]
    heads = [len(study) + 1, len(study) + 1, len(study), 1, 1, 2, 1, 1, 2, 2, 1]
    for number, (pieces, head) in enumerate(zip(wanted, heads, strict=True)):
        sample, ends = shard.read_sample(number), np.cumsum([len(piece) for piece in pieces])
        assert sample.tokens.tolist() == sum(pieces, []) and sample.tokens.dtype == np.int64
        assert sample.spans.tolist() == np.stack([ends[::2], ends[1::2]], 1).tolist()
        assert sample.prompt().tolist() == sum(pieces[:-1], []) and sample.head == head
    samples = shard.samples
    assert samples["images"].tolist() == [3, 3, 2, 0, 0, 1, 0, 0, 1, 1, 0]
    assert samples["image"].tolist() == [0, 0, 0, -1, -1, 2, -1, -1, 2, 2, -1]
    assert [pairs.tolist() for pairs in shard.image_pairs()] == [
        [0, 0, 0, 1, 1, 1, 2, 2, 5, 8, 9], [0, 1, 0, 0, 1, 0, 0, 1, 2, 2, 2]]
    assert samples["prefix"].tolist() == [0, 0, 2, 3, 3, 5, 6, 7, 5, 9, 10]  # the first that begins alike
    assert samples["group"].tolist() == [1, 1, 2, *[0] * 8]
    assert samples["words"].tolist() == [
        hash_words("is it big?\nwhere?\nsure?", "yes\nleft\nno"), hash_words("which side?", "right"),
        hash_words("what?", "a lung"), hash_words("why?\nwhy?", "rain\nstill rain"),
        hash_words("how long?", "an hour"), hash_words("what?", "a lung"), *[hash_words("why?", "rain")] * 2,
        *[hash_words("and this?", "a lung")] * 2, hash_words("what is said?", "a cough")]
    assert len(set(samples["words"].tolist())) == 8
    for number, seed in enumerate((0, 1, 2)):
        pixels = Image.open(io.BytesIO(picture(seed))).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(shard.read_image(number), np.asarray(pixels))


def test_parts_and_turns_stand_in_the_words(tokenizer, tmp_path):
    shard = write_toy(tmp_path, [("train", record) for record in study_records()], tokenizer)
    records = shard.read_records()
    assert records[0] == {
        "id": "1", "question": "is it big?", "answer": "yes", "type": "", "image": "a.png", "group": "Ann",
        "parts": [{"image": "a.png", "role": "frontal"}, "history: cough", {"image": "b.png", "role": "lateral"},
                  {"image": "old.png", "role": ""}], "turns": [["where?", "left"], ["sure?", "no"]]}
    assert records[3] == {"id": "4", "question": "why?", "answer": "rain", "type": "", "image": "",
                          "context": "It rained.", "turns": [["why?", "still rain"]]}
    assert records[10] == {"id": "11", "question": "what is said?", "answer": "a cough", "type": "", "image": "",
                           "parts": ["history: cough"]}


def test_a_sample_of_which_one_image_or_turn_cannot_be_used_is_skipped(tokenizer, tmp_path):
    a, b, c = (picture(seed) for seed in (0, 1, 2))
    records = [Record("1", "what?", "a lung", parts=(View(a, "a.png"), View(b"no image", "b.png"), View(b, "c.png"))),
               Record("2", "what?", "a lung", parts=(View(c, "a.png"), View(None, "gone.png"))),
               Record("3", "what?", "a lung", a, turns=(("and?", " "),)),
               Record("4", "what?", "a lung", a, turns=((" ", "yes"),)),
               Record("5", "what?", "a lung", b, "c.png")]
    shard = write_toy(tmp_path, [("train", record) for record in records], tokenizer)
    assert shard.manifest["skipped"] == {
        "empty answer": 1, "empty question": 1, "image missing": 1,
        "image unreadable: no image, or of a format that is not read": 1}
    assert [record["id"] for record in shard.read_records()] == ["5"]
    assert len(shard) == 1 and shard.manifest["images"] == 2  # a is nobody's; c was never sent to be encoded
    assert shard.read_sample(0).tokens[1] == -2 and shard.samples["prefix"].tolist() == [0]
    pixels = Image.open(io.BytesIO(b)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(shard.read_image(1), np.asarray(pixels))


@pytest.mark.parametrize("pieces, dtype", [(65535, "uint16"), (65536, "uint32")])
def test_the_largest_number_of_the_token_type_is_no_token(pieces, dtype, tmp_path):
    last = SimpleNamespace(vocab_size=pieces, write=lambda record: write_plain(record, lambda text: [pieces - 1]))
    encoded = Future()
    encoded.set_result((b"", (32, 32), 0.0, b""))
    writer = SplitWriter(tmp_path / "train", DATASETS["sample"], last, lambda content: encoded, 4)
    writer.add(Record("1", "what?", "a lung", b"image", "a.png"))
    writer.close({})
    stored = np.fromfile(tmp_path / "train/tokens.bin", dtype).tolist()
    assert stored == [BOS, np.iinfo(dtype).max, pieces - 1, pieces - 1, EOS]
    assert json.loads((tmp_path / "train/manifest.json").read_text())["token_dtype"] == dtype


def test_what_samples_cannot_share_takes_no_memory(tmp_path):
    """Of most datasets, one image a question: eight bytes an image, and nothing for a text of its own."""
    def encode(content):
        encoded = Future()
        encoded.set_result((content, (32, 32), 0.0, b""))
        return encoded

    writer = SplitWriter(tmp_path / "train", DATASETS["pubmed_qa"],
                         SimpleNamespace(vocab_size=9, write=lambda record: write_plain(record, lambda text: [3])),
                         encode, 4)
    for number in range(200):
        writer.add(Record(str(number), "what?", "a lung", b"%d" % (number // 2), "a.png"))
        writer.add(Record(str(number), "what?", "a lung"))
    writer.close({})
    assert (len(writer.first_alone), writer.prefixes, writer.groups) == (100, {}, {})
    samples = np.fromfile(tmp_path / "train/samples.bin", SAMPLE)
    assert samples["prefix"].tolist() == [prefix for n in range(0, 400, 4) for prefix in (n, n + 1, n, n + 3)]


def test_what_is_connected_is_never_divided_when_samples_are_held_out(tokenizer, tmp_path):
    """Patients, images and texts in common, at any remove."""
    def records(times):
        for n in range(times):
            a, b, c = (picture(4 * n + seed) for seed in range(3))
            yield Record("1", "what?", "a lung", parts=(View(a), View(b)))
            yield Record("2", "what?", "a lung", parts=(View(b), View(c)), group=f"patient {n}")
            yield Record("3", "what?", "a lung", picture(4 * n + 3), group=f"patient {n}")
            yield Record("4", "what?", "a lung", context=f"On day {n} it rained.")
            yield Record("5", "why?", "rain", context=f"On day {n} it rained.")
            yield Record("6", "why?", "rain", context=f"Alone {n}.", group=f"patient {n}")
            yield Record("7", f"why {n}?", "rain")

    shard = write_toy(tmp_path, [("train", record) for record in records(12)], tokenizer)
    label = shard.connect().reshape(12, 7)
    assert (label[:, :3] == label[:, :1]).all() and (label[:, 3] == label[:, 4]).all()
    assert (label[:, 5] == label[:, 0]).all() and len(set(label.reshape(-1))) == 12 * 3
    for held_out in range(1, 60, 3):
        mixture = Mixture([shard], lambda heights, widths: np.full(len(heights), 5), held_out=held_out)
        train, validation = mixture.train[0], mixture.validation[0]
        assert len(validation) >= held_out and not set(label.reshape(-1)[train]) & set(label.reshape(-1)[validation])
        assert sorted([*train, *validation]) == list(range(84))


def test_references_are_cleaned_like_answers(tokenizer, tmp_path):
    given = [(), ("A lung",), (" a\nlung ", "a lung", " ", "", "the \ud800"), ("left lung", "A lung"),
             (" ",)]
    records = [("train", Record(str(number), "what?", " A  lung", references=texts))
               for number, texts in enumerate(given)]
    shard = write_toy(tmp_path, records, tokenizer)
    assert [record.get("references") for record in shard.read_records()] == [
        None, None, ["a lung", "the ?"], ["left lung", "A lung"], None]
    assert {record["answer"] for record in shard.read_records()} == {"A lung"}
    with pytest.raises(AssertionError, match="^7"):  # one text would be a tuple of letters
        write_toy(tmp_path, [("train", Record("7", "what?", "a lung", references="a lung"))], tokenizer)


def test_jpeg_alters_pixels_by_what_the_manifest_says(tokenizer, tmp_path):
    for name in ("exact", "jpeg"):
        (tmp_path / name).mkdir()
    exact = write_toy(tmp_path / "exact", toy_records(), tokenizer)
    jpeg = write_toy(tmp_path / "jpeg", toy_records(), tokenizer, codec="jpeg", quality=90)
    errors = [np.abs(exact.read_image(n).astype(int) - jpeg.read_image(n)).mean() for n in (0, 1)]
    assert jpeg.manifest["pixel_error"] == pytest.approx(np.mean(errors), abs=1e-4) and errors[0] > 0.5


def even_png():
    stream = io.BytesIO()
    Image.new("L", (9, 9), 30).save(stream, "PNG")
    return stream.getvalue()


def test_what_cannot_be_used_is_skipped_and_counted(tokenizer, tmp_path):
    cut = picture(2, form="JPEG")
    records = toy_records() + [
        ("train", Record("5", "what?", "lung", cut[:len(cut) // 2], "cut.jpg")),
        ("train", Record("6", "and this?", "lung", cut[:len(cut) // 2], "cut.jpg")),
        ("train", Record("7", "what?", "lung", b"not an image", "text.png")),
        ("train", Record("8", "what?", "lung", None, "gone.png")),
        ("train", Record("9", " \n", "lung", picture(0), "a.png")),
        ("train", Record("10", "what?", " ", picture(0), "a.png")),
        ("train", Record("10a", "what?", "lung", even_png()))]
    shard = write_toy(tmp_path, records, tokenizer)
    assert shard.manifest["skipped"] == {"empty answer": 1, "empty question": 1, "image missing": 1,
                                         "image unreadable: damaged, cut short, or packed in a way that is not read": 2,
                                         "image unreadable: even: all pixels alike": 1,
                                         "image unreadable: no image, or of a format that is not read": 1}
    assert shard.manifest["first_skipped"] == {
        "empty answer": "a.png", "empty question": "a.png", "image missing": "gone.png",
        "image unreadable: damaged, cut short, or packed in a way that is not read": "cut.jpg",
        "image unreadable: even: all pixels alike": "10a",
        "image unreadable: no image, or of a format that is not read": "text.png"}
    assert [record["id"] for record in shard.read_records()] == ["1", "2", "3", "4"]
    assert (shard.manifest["samples"], shard.manifest["images"]) == (4, 2)
    assert shard.samples["image"].tolist() == [0, 1, 0, -1]


def test_images_with_labels_need_no_question(tokenizer, tmp_path):
    records = [("train", Record(str(n), image=picture(n), image_name=f"{n}.png", labels=labels))
               for n, labels in enumerate([("big",), (), ("big", "small"), ("bigg",)])]
    records.append(("train", Record("4", labels=("small",))))
    shard = write_toy(tmp_path, records, b"", kind="classification", multi_label=True)
    assert (shard.manifest["tokenizer_sha256"], shard.manifest["vocab_size"], len(shard.tokens)) == ("", 0, 0)
    assert os.listdir(tmp_path / "toy") == ["train"]
    assert [record["labels"] for record in shard.read_records()] == [["big"], [], ["big", "small"]]
    assert shard.manifest["classes"] == ["big", "small"]
    assert shard.manifest["skipped"] == {"image missing": 1, "unknown label": 1}
    assert shard.samples["image"].tolist() == [0, 1, 2] and not shard.samples["prompt"].any()
    with pytest.raises(UserError, match="toy has labels but no questions"):
        shard.require_questions()


@pytest.mark.parametrize("kind", ["image questions", "captions", "reports", "classification"])
def test_where_there_must_be_an_image_a_record_without_one_is_skipped(kind, tokenizer, tmp_path):
    records = [("train", Record(str(n), "what?", "lung", image, name, labels=("big",)))
               for n, (image, name) in enumerate([(picture(0), "a.png"), (None, ""), (None, "gone.png")])]
    shard = write_toy(tmp_path, records, tokenizer, kind=kind)
    assert shard.manifest["skipped"] == {"image missing": 2} and shard.samples["image"].tolist() == [0]


def test_what_of_several_labels_an_image_may_have_is_the_datasets_word(tokenizer, tmp_path):
    given = [("big",), (), None, ("big", "small"), ("small", "small")]
    records = [("train", Record(str(n), image=picture(n), image_name=f"{n}.png", labels=labels, group=f"p{n}"))
               for n, labels in enumerate(given)]
    for multi_label, skipped, kept in ((False, {"no label": 2, "several labels": 1}, ["0", "4"]),
                                       (True, {"no label": 1}, ["0", "1", "3", "4"])):
        shard = write_toy(tmp_path, records, b"", kind="classification", multi_label=multi_label)
        assert shard.manifest["multi_label"] is multi_label and shard.manifest["skipped"] == skipped
        assert [(record["id"], record["group"]) for record in shard.read_records()] == [
            (name, f"p{name}") for name in kept]


def test_a_dataset_of_which_nothing_can_be_used_is_not_written(tokenizer, tmp_path):
    unusable = [("train", Record("1", "what?", "lung", None, "a.png")),
                ("train", Record("2", "what?", "", picture(0), "b.png"))]
    wanted = r"no sample of it could be used \(1 empty answer, 1 image missing\)"
    for rows in ([], toy_records()):  # nothing, or something, was there before
        if rows:
            write_toy(tmp_path, rows, tokenizer)
        with pytest.raises(UserError, match=wanted):
            write_toy(tmp_path, unusable, tokenizer)
        assert os.listdir(tmp_path) == (["toy.json", "toy"] if rows else ["toy.json"])
    assert len(Shard(tmp_path / "toy/train")) == 4
    write_toy(tmp_path, toy_records() + [("test", unusable[0][1])], tokenizer)  # of one split alone it may be so
    with pytest.raises(UserError, match="toy/test: no question of it could be used"):
        Shard(tmp_path / "toy/test").require_questions()


def test_files_do_not_depend_on_the_number_of_workers(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("prepare.shards.ProcessPoolExecutor", ProcessPoolExecutor)  # see conftest.py
    records = [("train", Record(str(n), "what is this?", "a lung", picture(n // 2), f"{n // 2}.png"))
               for n in range(40)]
    contents = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        write_toy(folder, records, tokenizer, workers)
        contents.append({path.name: path.read_bytes() for path in (folder / "toy/train").iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 8


# ----------------------------------------------------------------------------- pixels

def test_resizing_squashes_crops_or_pads():
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, :50], pixels[:, 150:] = (255, 0, 0), (0, 0, 255)  # red, black, blue
    image = Image.fromarray(pixels)
    squash, crop, pad = (np.asarray(resize_image(image, 40, how)) for how in ("squash", "crop", "pad"))
    assert squash.shape == crop.shape == pad.shape == (40, 40, 3)
    assert (squash[:, 2] == (255, 0, 0)).all() and (squash[:, 37] == (0, 0, 255)).all()
    assert not crop[:, 1:-1].any()  # the middle square is black, but for what bicubic rings
    assert not pad[:9].any() and not pad[31:].any() and (pad[20, 2] == (255, 0, 0)).all()


# ----------------------------------------------------------------------------- damage

@pytest.mark.parametrize("name", ["tokens.bin", "samples.bin", "parts.bin", "images.bin", "images.idx",
                                  "records.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "absent"])
def test_a_damaged_file_is_refused_by_name(name, damage, tokenizer, tmp_path):
    folder = write_toy(tmp_path, toy_records(), tokenizer).folder

    def read_all():
        shard = Shard(folder)
        return ([shard.read_sample(n) for n in range(len(shard))], shard.read_records(),
                [shard.read_image(n) for n in range(len(shard.image_index))])

    content = (folder / name).read_bytes()
    read_all()
    for place in random.Random(0).sample(range(len(content)), 6):
        if damage == "flipped":
            (folder / name).write_bytes(
                content[:place] + bytes([content[place] ^ 4]) + content[place + 1:])
        elif damage == "cut":
            (folder / name).write_bytes(content[:place])
        else:
            (folder / name).unlink(missing_ok=True)
        with pytest.raises(UserError, match=f"{name}.*prepare/all.py --only=toy"):
            read_all()


def test_a_dataset_killed_at_any_moment_is_absent_or_whole(tmp_path):
    words = ["--only=sample", "--limit=100", "--workers=1", f"--shards_dir={tmp_path}/shards"]
    images, target = tmp_path / "shards/.sample.partial/train/images.bin", tmp_path / "shards/sample"
    for size in (0, 300_000, 600_000):  # bytes of images on the disk when the kill comes
        process = subprocess.Popen([sys.executable, "prepare/all.py", *words], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (images.is_file() and images.stat().st_size >= size):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not target.exists() and images.is_file()
    done = prepare(*words)
    assert done.returncode == 0 and "ready" in done.stdout, done.stderr
    assert os.listdir(tmp_path / "shards") == ["sample"]  # nothing is left of the killed runs
    assert set(read_manifests(target)) == {"train", "test"}
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}

    again = prepare(*words)  # prepared already: nothing is written
    assert again.returncode == 0 and "up to date" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before

    (target / "test/manifest.json").unlink()  # whole again, and the same bytes
    assert "a manifest is missing" in prepare(*words).stdout
    assert {path for path in target.rglob("*")} == set(before)
    for split in ("train", "test"):  # as an earlier version of the code wrote it
        manifest = json.loads((target / split / "manifest.json").read_text())
        manifest["shard_version"] = SHARD_VERSION - 1
        manifest["checksum"] = manifest_checksum(manifest)
        (target / split / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another version of this code; run .*all.py --only=sample`"):
        Shard(target / "train")
    anew = prepare(*words)
    assert anew.returncode == 0 and "ready" in anew.stdout
    assert f"sample: shard_version was {SHARD_VERSION - 1}, now {SHARD_VERSION}" in anew.stdout
    assert len(read_leaks(Shard(target / "train"))) == 2
    other = prepare(*words, "--codec=png")
    assert "sample: image.codec was jpeg, now png" in other.stdout and other.returncode == 0
    assert Shard(target / "train").manifest["image"]["codec"] == "png"


def test_a_full_disk_fails_in_one_line_and_leaves_nothing(tmp_path):
    words = f"prepare/all.py --only=sample --limit=100 --shards_dir={tmp_path}/shards"
    done = subprocess.run(["bash", "-c", f"ulimit -f 200; {sys.executable} {words}"], cwd=ROOT,  # kB a file
                          text=True, capture_output=True)
    line, = [line for line in done.stdout.splitlines() if line.startswith("sample: failed")]
    assert done.returncode == 1 and "File too large" in line and "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "shards") == []


def test_a_failed_dataset_keeps_what_was_there_and_stops_no_other(tokenizer, tmp_path):
    raw = tmp_path / "raw/pubmed_qa"
    raw.mkdir(parents=True)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer)
    rows = {"7": {"QUESTION": "does it help?", "CONTEXTS": ["We tried.", "It did."], "final_decision": "yes"},
            "8": {"QUESTION": "does it harm?", "CONTEXTS": ["Nobody asked."], "final_decision": "maybe"}}
    (raw / "ori_pqal.json").write_text(json.dumps(rows))
    (raw / "test_ground_truth.json").write_text(json.dumps({"8": "maybe"}))
    words = ["--only=path_vqa,pubmed_qa", f"--raw_dir={tmp_path}/raw", f"--shards_dir={tmp_path}/shards",
             f"--tokenizer={tmp_path}/tokenizer.model"]
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = command(*words, **offline)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    missing, = [line for line in done.stdout.splitlines() if line.startswith("path_vqa: missing")]
    assert "path-vqa" in missing and f"{tmp_path}/raw/path_vqa" in missing
    shard = Shard(tmp_path / "shards/pubmed_qa/train")
    record, = shard.read_records()
    assert (record["question"], record["answer"]) == ("does it help?", "yes")
    assert record["context"] == "We tried. It did."
    assert "500 samples were expected, 1 found" in done.stdout

    (raw / "ori_pqal.json").write_text('{"7": {"QUESTION"')
    done = prepare(*words[1:], "--only=pubmed_qa")
    assert done.returncode == 1 and "damaged or not JSON" in done.stdout
    done = prepare(*words[1:3], "--only=pubmed_qa", f"--tokenizer={tmp_path}/typo.model")
    assert done.returncode == 1 and f"{tmp_path}/typo.model: no tokenizer here" in done.stdout
    assert Shard(tmp_path / "shards/pubmed_qa/train").read_records() == [record]


def test_a_dataset_without_questions_wants_no_tokenizer(tokenizer, tmp_path):
    for number, name in enumerate(["normal", "benign", "malignant"] * 5):
        path = tmp_path / f"raw/busi/Dataset_BUSI_with_GT/{name}/{name} ({number}).png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    words = ["--only=busi", f"--raw_dir={tmp_path}/raw", f"--shards_dir={tmp_path}/shards",
             f"--tokenizer={tmp_path}/none.model"]
    done = prepare(*words)
    assert done.returncode == 0 and "tokenizer" not in done.stdout + done.stderr and "ready" in done.stdout
    target = tmp_path / "shards/busi"
    assert sorted(os.listdir(target)) == ["test", "train", "validation"]
    shard = Shard(target / "train")
    assert len(shard) == 11 and shard.manifest["tokenizer_sha256"] == ""
    assert "up to date" in prepare(*words).stdout
    words[0] = "--only=busi,pubmed_qa"  # which has questions
    assert "none.model: no tokenizer here" in prepare(*words).stdout

    (target / "tokenizer.model").write_bytes(tokenizer)  # as it was when every dataset had one
    for split in ("train", "validation", "test"):
        path = target / split / "manifest.json"
        manifest = json.loads(path.read_text()) | {"tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest()}
        path.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    words[0] = "--only=busi"
    assert "up to date" in prepare(*words).stdout
    (target / "tokenizer.model").unlink()
    assert "its tokenizer is missing or altered" in prepare(*words).stdout  # so prepared anew, without
    assert "up to date" in prepare(*words).stdout and "tokenizer.model" not in os.listdir(target)


# ----------------------------------------------------------------------------- images in Qwen's own sizes

def test_images_keep_their_shapes_up_to_a_number_of_pixels(tokenizer, tmp_path):
    sizes = (300, 200), (64, 64), (30, 5000), (1000, 900), (20, 4001)  # width, height
    records = []
    for number, size in enumerate(sizes):
        stream = io.BytesIO()
        Image.effect_noise(size, 50).convert("RGB").save(stream, "PNG")
        records.append(("train", Record(str(number), "what?", "a lung", stream.getvalue(), f"{number}.png")))
    shard = write_toy(tmp_path, records, tokenizer, resize="smart", size=100000)
    stored = shard.image_index[["height", "width"]].tolist()
    assert stored == [(224, 320), (256, 256), (4064, 32), (288, 320)] and stored == [
        smart_shape(height, width, 100000) for width, height in sizes[:4]]
    assert shard.manifest["skipped"] == {f"image unreadable: {TOO_LONG}": 1}
    pixels = Image.open(io.BytesIO(records[0][1].image)).resize((320, 224), Image.Resampling.BICUBIC)
    assert np.array_equal(shard.read_image(0), np.asarray(pixels))


def test_a_run_names_the_flags_that_its_images_were_made_by(tmp_path):
    words = ["--only=sample", f"--shards_dir={tmp_path}", "--limit=4", "--workers=1", "--resize=fit"]
    assert prepare(*words, "--max_pixels=65536").returncode == 0
    assert "up to date" in prepare(*words, "--max_pixels=65536").stdout
    shard = Shard(tmp_path / "sample/train")
    image = image_settings([shard])
    assert (image["size"], image["resize"]) == (65536, "smart")
    assert {*shard.image_index["height"].tolist(), *shard.image_index["width"].tolist()} == {256}  # as it was drawn
    words_of_run = SimpleNamespace(sha256=shard.manifest["tokenizer_sha256"], system="", path="x")
    assert find_misfit(shard, words_of_run, image) == find_misfit(shard, words_of_run, None) == ""
    assert find_misfit(shard, words_of_run, image | {"size": 70000}) == (
        "images made by --resize=fit --max_pixels=65536, the run's by --resize=fit --max_pixels=70000; run "
        "`python prepare/all.py --only=sample --resize=fit --max_pixels=70000`")
    assert "image.size was 65536, now 70000" in prepare(*words, "--max_pixels=70000").stdout
    assert prepare("--only=sample_captions", *words[1:]).returncode == 0
    with pytest.raises(UserError, match="has images made by --image_size=224 --resize=fit, .*sample/train by "
                                        "--resize=fit --max_pixels=70000; prepare one as the other: `python "
                                        "prepare/all.py --only=sample_captions --resize=fit --max_pixels=70000`"):
        image_settings([Shard(tmp_path / "sample/train"), Shard(tmp_path / "sample_captions/train")])


# ----------------------------------------------------------------------------- several at once

def at_once(work):
    """What three calls at once return, sorted. A lock is of an open file: threads are as strange as processes."""
    with ThreadPoolExecutor(3) as pool:
        return sorted(call.result() for call in [pool.submit(work) for _ in range(3)])


def test_of_several_at_once_one_prepares_a_dataset(tokenizer, tmp_path, capsys):
    read = []

    def slowly(raw):
        read.append(raw)
        time.sleep(0.3)
        yield from toy_records()

    toy = Dataset(name="toy", read=slowly, kind="text questions", licence="none", access="open", megabytes=0,
                  page="", folder=tmp_path, layouts=(("toy.json",),), counts={"train": 4}, classes=("big", "small"),
                  train_tokenizer=lambda: tokenizer)
    (tmp_path / "toy.json").write_text("{}")
    config = all_py.Config(shards_dir=str(tmp_path / "shards"), raw_dir=str(tmp_path), workers=1, image_size=32)
    assert at_once(lambda: all_py.prepare_dataset(toy, config)) == [("ready", ""), *[("up to date", "")] * 2]
    assert len(read) == 1 and os.listdir(tmp_path / "shards") == ["toy"]
    assert len(Shard(tmp_path / "shards/toy/train")) == 4 and "is preparing toy" in capsys.readouterr().out
    at_once(lambda: str(all_py.print_leaks(["toy"], config)))
    assert read_leaks(Shard(tmp_path / "shards/toy/train"))[0] == "drop"
    assert os.listdir(tmp_path / "shards") == ["toy"]


def test_of_several_at_once_one_downloads_and_one_converts(tmp_path, monkeypatch):
    fetched, converted = [], []

    def fetch(url, path):
        if not path.is_file():
            fetched.append(url)
            time.sleep(0.2)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("weights")

    def convert(weights, raw, target):
        converted.append(target)
        time.sleep(0.2)
        target.write_text("converted")

    monkeypatch.setattr(all_py, "fetch", fetch)
    one = Weights(name="one", licence="none", access="open", megabytes=0, page="", urls=("http://x/a.bin",),
                  layouts=(("a.bin",),), target="one.safetensors", write=convert)
    config = all_py.Config(raw_dir=str(tmp_path / "raw"), weights_dir=str(tmp_path / "weights"))
    statuses = [status for status, _ in at_once(lambda: all_py.prepare_weights(one, config))]
    assert statuses == ["ready", "up to date", "up to date"]
    assert len(fetched) == len(converted) == 1
    assert os.listdir(tmp_path / "weights") == ["one.safetensors"] and os.listdir(tmp_path / "raw") == ["one"]


def test_a_lock_is_one_s_alone_and_a_killed_process_s_is_nobody_s(tmp_path):
    held, most, path = [], [], tmp_path / ".toy.lock"
    path.write_text("process 1")  # a killed process's, which no one holds

    def work(number):
        with lock(path, "testing", wait=True):
            held.append(number)
            most.append(len(held))
            time.sleep(0.002)
            held.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(100)))
    assert most == [1] * 100 and not path.exists()
    with lock(path, "testing"):
        with pytest.raises(UserError, match=f"process {os.getpid()} is testing there already"):
            with lock(path, "testing"):
                pass
    assert not path.exists()


# ----------------------------------------------------------------------------- readers

def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_hub_parquets_are_read_in_order(tmp_path):
    images = [picture(n, form="JPEG") for n in range(3)]
    rows = [{"image": {"bytes": image, "path": None}, "question": question, "answer": answer}
            for image, question, answer in zip(images, ["what is it?", "is it?", "the size?"],
                                               ["lung", "Yes", "3 cm"])]
    write_parquet(tmp_path / "path_vqa/data/train-00000-of-00002-x.parquet", rows[:2])
    write_parquet(tmp_path / "path_vqa/data/train-00001-of-00002-y.parquet",
                  [*rows[2:], {"image": None, "question": "gone?", "answer": "no"}])
    write_parquet(tmp_path / "path_vqa/data/test-00000-of-00001-z.parquet", rows[:1])
    found = list(DATASETS["path_vqa"].read(tmp_path / "path_vqa"))
    assert [(split, r.id, r.answer, r.type) for split, r in found] == [
        ("train", "train_000000", "lung", "what"), ("train", "train_000001", "Yes", "yes/no"),
        ("train", "train_000002", "3 cm", "other"), ("train", "train_000003", "no", "yes/no"),
        ("test", "test_000000", "lung", "what")]
    assert [r.image for _, r in found] == [*images, None, images[0]]
    write_parquet(tmp_path / "path_vqa/data/test-00000-of-00001-z.parquet", [{"question": "a"}])
    with pytest.raises(UserError, match="test-00000.*: no column 'image' among its columns question"):
        list(DATASETS["path_vqa"].read(tmp_path / "path_vqa"))
    (tmp_path / "path_vqa/data/test-00000-of-00001-z.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="test-00000.*damaged parquet"):
        list(DATASETS["path_vqa"].read(tmp_path / "path_vqa"))


def test_vqa_rad_is_read_from_osf_or_else_from_the_hub(tmp_path):
    raw, image = tmp_path / "vqa_rad", picture(0)
    write_parquet(raw / "data/train-00000-of-00001-x.parquet",
                  [{"image": {"bytes": image, "path": None}, "question": "side?", "answer": "left"}])
    write_parquet(raw / "data/test-00000-of-00001-y.parquet",
                  [{"image": {"bytes": image, "path": None}, "question": "big?", "answer": "no"}])
    vqa_rad = DATASETS["vqa_rad"]
    assert [split for split, _ in vqa_rad.read(raw)] == ["train", "test"]
    assert sorted(vqa_rad.find(tmp_path)) == [
        "data/test-00000-of-00001-y.parquet", "data/train-00000-of-00001-x.parquet"]
    (raw / "VQA_RAD Image Folder").mkdir()
    (raw / "VQA_RAD Image Folder/synpic1.jpg").write_bytes(image)
    (raw / "VQA_RAD Dataset Public.json").write_text(json.dumps([
        {"qid": 1, "image_name": "synpic1.jpg", "question": "how many?", "answer": 3,
         "question_type": "COUNT", "phrase_type": "freeform"},
        {"qid": 2, "image_name": "synpic2.jpg", "question": "how big?", "answer": "3 cm",
         "question_type": "SIZE", "phrase_type": "test_para"}]))
    assert list(vqa_rad.find(tmp_path)) == ["VQA_RAD Dataset Public.json"]
    (_, first), (split, second) = vqa_rad.read(raw)
    assert (first.id, first.answer, first.image, first.type) == ("1", "3", image, "COUNT")
    assert (split, second.image, second.image_name) == ("test", None, "synpic2.jpg")


def test_a_gzipped_tar_is_whole_or_refused(tmp_path):
    path, contents = tmp_path / "a.tgz", {f"folder/{n}.png": picture(n) for n in range(12)}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert dict(read_tar(path)) == contents
    whole, draw = path.read_bytes(), random.Random(0)
    for place in draw.sample(range(10, len(whole)), 60):  # behind the header, which holds a time stamp
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:]):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="a.tgz: damaged archive"):
                dict(read_tar(path))


# ----------------------------------------------------------------------------- real data

RAW = Path(os.environ.get("NANOMEDQ_RAW", ROOT / "raw"))
real = pytest.mark.skipif(not (RAW / "path_vqa").is_dir() or not (RAW / "vqa_rad").is_dir(),
                          reason=f"no real data in {RAW}; set NANOMEDQ_RAW to a folder of it")


@pytest.fixture(scope="module")
def real_shards(tmp_path_factory, tokenizer):
    """By the real command; images of 64 pixels, since those of 224 take several times as long."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    done = command("--only=path_vqa,vqa_rad,pubmed_qa", "--image_size=64", f"--raw_dir={RAW}",
                   f"--shards_dir={folder}/shards", f"--tokenizer={folder}/tokenizer.model")
    assert done.returncode == 0, done.stdout
    return folder / "shards"


@real
def test_real_datasets_have_the_published_counts(real_shards):
    counts = {(name, split): (manifest["samples"], manifest["images"], manifest["skipped"])
              for name in ("path_vqa", "vqa_rad", "pubmed_qa")
              for split, manifest in read_manifests(real_shards / name).items() if split != "validation"}
    assert counts == {
        ("path_vqa", "train"): (19654, 2599, {}), ("path_vqa", "test"): (6719, 858, {}),
        ("vqa_rad", "train"): (1797, 313, {}), ("vqa_rad", "test"): (451, 203, {}),
        ("pubmed_qa", "train"): (500, 0, {}), ("pubmed_qa", "test"): (500, 0, {})}


@real
def test_real_questions_train_and_are_answered(real_shards, tmp_path):
    import eval_vqa
    import train_vlm

    for script, words in (
            (train_vlm, ["--model=sample", "--language=full", "--data=vqa_rad,pubmed_qa", "--batch_size=16",
                         "--questions_per_image=0", "--held_out=32", "--max_steps=2"]),
            (eval_vqa, ["--limit=24"])):
        script.main(parse_flags(script.Config, [*words, f"--shards_dir={real_shards}", f"--run={tmp_path}/run"]))
    evaluations = choose_evaluations(tmp_path / "run")
    assert evaluations.keys() == {"path_vqa/test", "vqa_rad/test"}  # all that ask about images
    results = {name: found["results"][name] for name, (_, found) in evaluations.items()}
    assert results["path_vqa/test"]["all"]["questions"] == 24
    # Half of its questions show an image of training, but those training samples were left out.
    assert results["vqa_rad/test"]["new"]["questions"] > 12


@real
def test_answers_together_are_those_given_one_at_a_time(real_shards):
    """200 real questions, token for token, by random weights, whose answers differ and go on."""
    import torch

    from generate import finished_groups, generate
    from weights import build_vlm

    torch.manual_seed(0)
    model = build_vlm("sample", 32000).eval()
    shard = Shard(real_shards / "path_vqa" / "test")
    prompts = [[token if token >= 0 else -1 for token in shard.read_sample(number).prompt().tolist()]
               for number in range(200)]  # of one image, whose number in its group is 0
    questions = defaultdict(list)
    for number in range(200):
        questions[int(shard.samples[number]["image"])].append(number)
    together, groups = {}, list(questions.items())
    given = (([shard.read_image(image)], [prompts[n] for n in numbers]) for image, numbers in groups)
    for group, answers in finished_groups(generate(model, given, max_new_tokens=4, rows=16)):
        together.update(zip(groups[group][1], [answer.tokens for answer in answers], strict=True))
    assert len({tuple(answer) for answer in together.values()}) > 50
    for image, numbers in groups:
        pixels = shard.read_image(image)
        for number in numbers:
            alone = finished_groups(generate(model, [([pixels], [prompts[number]])], max_new_tokens=4))
            (_, [answer]), = alone
            assert together[number] == answer.tokens, number
