"""The leak guard: copies of an image are found, strangers are not, and what is found is not trained on."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

import prepare.leaks
from data import PROMPT_VERSION, SHARD_VERSION, Record, Shard, load_image, open_mixture
from plumbing.files import manifest_checksum
from plumbing.flags import UserError
from prepare.classify import group_alike
from prepare.datasets import DATASETS, Dataset
from prepare.leaks import ALIKE, FINGERPRINT, alike, fingerprint, guard, report_rows
from prepare.questions import train_sample_tokenizer
from prepare.shards import write_dataset


def drawing(seed, size=(320, 240)):
    """A smooth picture with a few shapes: like its own copies, and unlike another seed's."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for x, y, r in rng.integers(10, 200, (6, 3)):
        pen.ellipse((x, y, x + r, y + r // 2), tuple(rng.integers(0, 256, 3).tolist()))
    return image


def encoded(image, form="PNG", **settings):
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def prints(images):
    return np.frombuffer(b"".join(map(fingerprint, images)), FINGERPRINT)


def bits_apart(one, other):
    return np.unpackbits(one["look"] ^ other["look"], axis=-1).sum(-1)


# ----------------------------------------------------------------------------- fingerprints

def test_pixels_have_one_hash_whatever_file_they_come_from():
    image = drawing(0)
    one, = prints([image])
    for content in (encoded(image), encoded(image, compress_level=1), encoded(image, "TIFF"),
                    encoded(image, "WEBP", lossless=True)):
        assert prints([load_image(content)])[0] == one
    other = image.copy()
    other.putpixel((5, 5), (1, 2, 3))
    assert prints([other])[0]["pixels"] != one["pixels"]
    strip = Image.fromarray(np.zeros((2, 8, 3), np.uint8))  # the same bytes in another shape
    assert prints([strip])[0]["pixels"] != prints([strip.resize((4, 4))])[0]["pixels"]


@pytest.mark.parametrize("alter", [
    lambda image: load_image(encoded(image, "JPEG", quality=30)),
    lambda image: image.resize((160, 120), Image.Resampling.BICUBIC),
    lambda image: image.resize((224, 224), Image.Resampling.BICUBIC),  # another aspect, too
    lambda image: image.resize((900, 700), Image.Resampling.BILINEAR),
    lambda image: image.convert("L").convert("RGB"),
    lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    lambda image: image.crop((3, 2, 317, 238))],
    ids=["jpeg", "smaller", "square", "larger", "grey", "flat", "dark", "blurred", "cropped"])
def test_altered_copies_are_alike_and_strangers_are_not(alter):
    images = [drawing(seed) for seed in range(20)]
    looks, copies = prints(images), prints(map(alter, images))
    assert bits_apart(looks, copies).max() <= ALIKE
    assert not (looks["pixels"] == copies["pixels"]).any()
    strangers = bits_apart(looks[:, None], copies[None])[~np.eye(20, dtype=bool)]
    assert strangers.min() > ALIKE + 16


def test_reduced_decoding_keeps_the_look():
    content = encoded(drawing(1, (1600, 1200)), "JPEG", quality=90)
    whole, reduced = load_image(content), load_image(content, at_least=448)
    assert whole.size == (1600, 1200) and reduced.size == (800, 600)
    assert bits_apart(*prints([whole, reduced])) <= 8
    small = encoded(drawing(1), "JPEG")  # nothing to spare: decoded whole
    assert load_image(small, at_least=448).tobytes() == load_image(small).tobytes()


def test_an_even_image_is_like_nothing():
    even = [Image.new("RGB", (300, 200), colour) for colour in ("black", "white", "grey")]
    even.append(Image.fromarray(np.random.default_rng(0).integers(100, 103, (300, 200, 3), np.uint8)))
    looks = prints(even)["look"]
    assert not looks.any() and len(alike(looks, looks)) == 0


def test_pairs_are_those_of_a_comparison_one_by_one():
    rng = np.random.default_rng(0)
    these = rng.integers(0, 256, (4500, 32), np.uint8)  # more than one block of each
    those = rng.integers(0, 256, (4200, 32), np.uint8)
    for one, other, flips in [(0, 0, 0), (4095, 4096, ALIKE), (4096, 4199, ALIKE), (7, 4000, ALIKE + 1)]:
        bits = np.unpackbits(these[one])
        bits[rng.permutation(256)[:flips]] ^= 1
        those[other] = np.packbits(bits)
    wanted = [(one, other) for one in range(0, 4500) for other in np.flatnonzero(
        np.bitwise_count(these[one] ^ those).sum(-1, dtype=int) <= ALIKE)]
    assert alike(these, those).tolist() == [list(pair) for pair in wanted]
    assert wanted == [(0, 0), (4095, 4096), (4096, 4199)]


def test_alike_files_share_a_group_through_others(tmp_path):
    paths = [tmp_path / f"{n}.png" for n in range(5)]
    base = drawing(0, (640, 480))
    for path, image in zip(paths, [base, drawing(1), base.resize((90, 90)), base.crop((6, 4, 634, 476)), None]):
        path.write_bytes(encoded(image) if image else b"no image")
    group = group_alike(paths)
    assert group[0] == group[2] == group[3] and len({group[0], group[1], group[4]}) == 3


# ----------------------------------------------------------------------------- the guard

@pytest.fixture(scope="module")
def tokenizer():
    return train_sample_tokenizer()


@pytest.fixture
def write(tokenizer, tmp_path, monkeypatch):
    """write(name, *(split, name of an image file or "", image), **facts of its Dataset)"""
    def write_dataset_of(name, *rows, **facts):
        records = [(split, Record(f"id{n}", "what is this?", "a lung",
                                  image if isinstance(image, bytes) or image is None else encoded(image), file))
                   for n, (split, file, image) in enumerate(rows)]
        dataset = Dataset(name=name, read=lambda raw: iter(records), kind="text questions", licence="none",
                          access="open", megabytes=0, page="", layouts=(), counts={}, **facts)
        monkeypatch.setitem(DATASETS, name, dataset)
        manifest = {"dataset": name, "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION,
                    "limit": 0, "licence": "none",
                    "image": {"size": 32, "resize": "squash", "codec": "png", "quality": 0}}
        write_dataset(tmp_path / "shards" / name, dataset, tmp_path, {}, tokenizer, manifest, 1)
        return tmp_path / "shards"

    return write_dataset_of


def test_training_images_that_a_test_split_has_are_found_and_left_out(write):
    a, b, c, d = (drawing(seed) for seed in range(4))
    write("learn", ("train", "a.png", a), ("train", "small_b.png", b.resize((100, 80))), ("train", "c.png", c),
          ("train", "again.png", a), ("train", "", None), ("test", "d.png", d), ("train", "d.jpg", encoded(d, "JPEG")))
    write("exam", ("test", "1.tiff", encoded(a, "TIFF")), ("test", "2.png", b))
    shards = write("later", ("validation", "c.png", c))  # a validation split guards nothing
    report = guard(shards, "drop")
    assert list(report) == ["learn/train"]
    assert report["learn/train"]["found"] == {"exam/test": {"same pixels": [0, 3], "alike": [1]},
                                              "learn/test": {"alike": [5]}}
    assert report_rows(report) == [("learn/train", "exam/test", "2", "1", "", ""),
                                   ("learn/train", "learn/test", "", "1", "", "")]
    shard = Shard(shards / "learn/train")
    assert (shard.read_leaks()[0], shard.read_leaks()[1].tolist()) == ("drop", [0, 1, 3, 5])
    mixture = open_mixture("learn", shards, "train", image_tokens=5, batch_size=2)
    assert mixture.train[0].tolist() == [2, 4] and mixture.samples_per_epoch == 2
    assert {number for n in range(4) for _, number in mixture.step(n).samples} == {2, 4}
    mixture = open_mixture("learn", shards, "train", image_tokens=5, batch_size=2, held_out=1)
    assert len(mixture.held_out[0]) == 1 and len(mixture.train[0]) == 1

    kept = guard(shards, "keep")["learn/train"]  # the published mix, and leaks.json says so
    assert kept["leaks"] == "keep" and kept["found"] == report["learn/train"]["found"]
    assert (shard.read_leaks()[0], shard.read_leaks()[1].tolist()) == ("keep", [0, 1, 3, 5])
    mixture = open_mixture("learn", shards, "train", image_tokens=5, batch_size=2)
    assert mixture.train[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_images_of_a_test_split_that_train_has_are_named(write):
    a, b, c, d, e, f = (drawing(seed) for seed in range(6))
    write("learn", ("train", "a.png", a), ("train", "small_b.png", b.resize((100, 80))),
          ("train", "synpic7.jpg", c), ("train", "a again.png", a), ("train", "", None),
          ("train", "Known Source/k.png", d), ("test", "own.png", d.resize((100, 80))),
          shared_ids="MedPix", known_leaks=(("Known Source/", "films"),))
    write("films", ("test", "1.png", e))
    shards = write("exam", ("test", "stranger.png", f), ("test", "1.tiff", encoded(a, "TIFF")),
                   ("test", "b.png", b), ("test", "b.png", b), ("test", "", None),  # of the same id
                   ("test", "synpic7.png", e), ("test", "smaller a.png", a.resize((100, 80))),
                   shared_ids="MedPix")
    leaks = guard(shards, "drop")["learn/train"]
    assert leaks["found"] == {
        "exam/test": {"same pixels": [0, 3], "alike": [1], "same id": [2, 4]},
        "films/test": {"known source": [5]}, "learn/test": {"alike": [5]}}
    assert leaks["test_images"] == {"exam/test": [1, 2, 3, 4], "learn/test": [0]}
    train, exam = Shard(shards / "learn/train"), Shard(shards / "exam/test")
    assert train.read_leaked_images(exam).tolist() == [1, 2, 3, 4]
    assert exam.samples["image"].tolist() == [0, 1, 2, 2, -1, 3, 4]  # so they are images, not samples
    assert train.read_leaked_images(Shard(shards / "learn/test")).tolist() == [0]
    none = train.read_leaked_images(Shard(shards / "films/test"))
    assert none.dtype == np.int64 and none.tolist() == []


def test_common_ids_and_known_sources_are_left_out(write):
    write("one", ("train", "synpic7.jpg", drawing(0)), ("train", "synpic8.jpg", drawing(1)), shared_ids="MedPix")
    write("two", ("test", "folder/synpic8.png", drawing(2)), ("train", "x/Known Source/1.png", drawing(3)),
          ("train", "x/other/1.png", drawing(4)), shared_ids="MedPix",
          known_leaks=(("/Known Source/", "films"), ("/Never/", "films")))
    write("texts", ("train", "", None), ("train", "", None), shared_ids="PubMed")
    shards = write("exam", ("test", "", None), ("test", "synpic7.png", drawing(5)), shared_ids="PubMed")
    found = {train: leaks["found"] for train, leaks in guard(shards, "drop").items()}
    assert found == {"one/train": {"two/test": {"same id": [1]}},
                     "texts/train": {"exam/test": {"same id": [0]}},
                     "two/train": {"films/test": {"known source": [0]}}}


def test_drawings_of_one_pattern_are_compared_by_their_pixels_alone(write):
    image = drawing(0)
    shards = write("drawn", ("train", "1.png", image.resize((300, 200))), ("train", "2.png", image),
                   ("test", "3.tiff", encoded(image, "TIFF")), one_pattern=True)
    leaks = guard(shards, "drop")["drawn/train"]
    assert leaks["found"] == {"drawn/test": {"same pixels": [1]}}
    assert leaks["test_images"] == {"drawn/test": [0]}


def test_only_what_is_new_is_compared_and_no_shard_is_written_again(write, monkeypatch):
    compared, original = [], prepare.leaks.compare
    monkeypatch.setattr(prepare.leaks, "compare", lambda train, test: compared.append(1) or original(train, test))
    image = drawing(0)
    write("learn", ("train", "a.png", image), ("test", "b.png", drawing(1)))
    shards = write("exam", ("test", "a.png", image))
    first = guard(shards, "drop")
    assert len(compared) == 2
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*.*")}
    assert guard(shards, "drop") == first and len(compared) == 2
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*.*")} == before

    write("more", ("test", "d.png", drawing(4)), ("test", "c.png", image.resize((100, 100))))
    leaks = guard(shards, "drop")["learn/train"]
    assert leaks["found"] == {"exam/test": {"same pixels": [0]}, "more/test": {"alike": [0]}}
    assert leaks["test_images"] == {"exam/test": [0], "more/test": [1]} and len(compared) == 3
    changed = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {shards / "learn/train/leaks.json"}
    guard(shards, "keep")
    assert guard(shards, "")["learn/train"]["leaks"] == "keep" and len(compared) == 3
    write("exam", ("test", "a.png", drawing(2)))  # prepared anew, with another image
    assert list(guard(shards, "drop")["learn/train"]["found"]) == ["more/test"] and len(compared) == 4
    write("learn", ("train", "a.png", drawing(2)))
    assert list(guard(shards, "drop")["learn/train"]["found"]) == ["exam/test"] and len(compared) == 6


def test_a_shard_that_was_not_compared_with_all_beside_it_is_refused(write):
    shards = write("learn", ("train", "a.png", drawing(0)))

    def refused(message):
        with pytest.raises(UserError, match=f"learn/train: not compared with {message}; run `python prepare/all.py"):
            open_mixture("learn", shards, "train", image_tokens=5)

    refused("the test splits")
    guard(shards, "drop")
    open_mixture("learn", shards, "train", image_tokens=5)
    write("exam", ("test", "a.png", drawing(1)))
    refused("exam/test")
    guard(shards, "drop")
    path = shards / "learn/train/leaks.json"
    whole = path.read_text()
    path.write_text(whole.replace('"drop"', '"keep"'))  # altered by hand
    refused("the test splits")
    path.write_text(whole[:-9])
    refused("the test splits")
    assert guard(shards, "drop") and path.read_text() == whole
    write("learn", ("train", "a.png", drawing(3)), ("train", "b.png", drawing(4)))
    (shards / "learn/train/leaks.json").write_text(whole)  # of the shard that it was
    refused("the test splits")


def alter(path, **changes):
    """Change a manifest or a leaks.json, with a checksum that fits; None deletes an entry."""
    facts = json.loads(path.read_text()) | changes
    facts = {key: value for key, value in facts.items() if value is not None}
    path.write_text(json.dumps(facts | {"checksum": manifest_checksum(facts)}))


def test_leaked_images_are_those_of_the_very_test_split(write):
    write("learn", ("train", "a.png", drawing(0)))
    shards = write("exam", ("test", "a.png", drawing(0)))
    train, exam = Shard(shards / "learn/train"), Shard(shards / "exam/test")

    def refused(train, test):
        with pytest.raises(UserError) as error:
            train.read_leaked_images(test)
        assert str(error.value) == (f"{train.folder}: not compared with {test.folder}; "
                                    "run `python prepare/all.py --only=learn`")

    refused(train, exam)
    guard(shards, "drop")
    assert train.read_leaked_images(exam).tolist() == [0]
    write("exam", ("test", "b.png", drawing(1)), ("test", "a.png", drawing(0)))
    refused(train, Shard(shards / "exam/test"))
    guard(shards, "drop")
    assert train.read_leaked_images(Shard(shards / "exam/test")).tolist() == [1]
    refused(train, exam)  # mapped before it was prepared anew
    leaks = (shards / "learn/train/leaks.json").read_text()
    write("learn", ("train", "c.png", drawing(2)))
    (shards / "learn/train/leaks.json").write_text(leaks)  # of the shard that it was
    refused(Shard(shards / "learn/train"), Shard(shards / "exam/test"))


def test_what_an_older_version_found_is_found_anew(write):
    write("learn", ("train", "a.png", drawing(0)))
    shards = write("exam", ("test", "a.png", drawing(0)))
    first = guard(shards, "keep")
    alter(shards / "learn/train/leaks.json", test_images=None)
    with pytest.raises(UserError, match="learn/train: not compared with .*exam/test; run"):
        Shard(shards / "learn/train").read_leaked_images(Shard(shards / "exam/test"))
    assert guard(shards, "") == first and first["learn/train"]["test_images"] == {"exam/test": [0]}
    assert Shard(shards / "learn/train").read_leaked_images(Shard(shards / "exam/test")).tolist() == [0]


def test_shards_of_an_older_version_are_passed_by_but_not_forgotten(write):
    """Of a dataset prepared anew alone, training waits for the test splits that are not."""
    write("learn", ("train", "a.png", drawing(0)))
    write("old", ("train", "b.png", drawing(1)))
    shards = write("exam", ("test", "a.png", drawing(0)))
    for split in ("exam/test", "old/train"):
        alter(shards / split / "manifest.json", shard_version=SHARD_VERSION - 1)
    leaks = guard(shards, "drop")
    assert list(leaks) == ["learn/train"] and leaks["learn/train"]["tests"] == {}
    with pytest.raises(UserError, match="not compared with exam/test; run .*all.py --only=exam`"):
        Shard(shards / "learn/train").read_leaks()
    with pytest.raises(UserError, match="old/train: written by another version .* --only=old`"):
        Shard(shards / "old/train")


def test_a_damaged_shard_is_named(write):
    shards = write("learn", ("train", "a.png", drawing(0)), ("test", "b.png", drawing(1)))
    path = shards / "learn/test/fingerprints.bin"
    content = path.read_bytes()
    path.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    with pytest.raises(UserError, match="learn/test/fingerprints.bin: damaged"):
        guard(shards, "drop")
