"""The leak guard: copies of an image are found, strangers are not, and what is found is not trained on."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

import prepare.all as all_py
import prepare.leaks
import prepare.looks
from data import Mixture, Record, View
from plumbing.files import manifest_checksum
from plumbing.flags import UserError
from plumbing.leaks import read_leaked_images, read_leaks
from plumbing.pixels import load_image
from plumbing.shards import PROMPT_VERSION, SHARD_VERSION, Shard
from plumbing.sources import open_shards
from prepare.classify import group_alike
from prepare.datasets import DATASETS, Dataset
from prepare.folder import prepare_folder
from prepare.leaks import guard, report_rows
from prepare.looks import FINGERPRINT, alike, fingerprint, frequency_signs, propose, turned, whole
from prepare.own import Wanted
from prepare.questions import train_sample_tokenizer
from prepare.shards import ImageSettings, write_dataset


def drawing(seed, size=(320, 240)):
    """A smooth picture with a few shapes: like its own copies, and unlike another seed's."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for x, y, r in rng.integers(10, 200, (6, 3)):
        pen.ellipse((x, y, x + r, y + r // 2), tuple(rng.integers(0, 256, 3).tolist()))
    return image


def five(heights, widths):
    """Tokens of each image."""
    return np.full(len(heights), 5)


def encoded(image, form="PNG", **settings):
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def prints(images):
    return np.frombuffer(b"".join(map(fingerprint, images)), FINGERPRINT)


def called_alike(these, those):
    """Pairs of numbers, of lists of images."""
    return [tuple(pair) for pair in alike(prints(these)["look"], prints(those)["look"]).tolist()]


def same_numbers(count):
    return [(n, n) for n in range(count)]


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


COPIES = {
    "jpeg": lambda image: load_image(encoded(image, "JPEG", quality=30)),
    "smaller": lambda image: image.resize((160, 120), Image.Resampling.BICUBIC),
    "square": lambda image: image.resize((224, 224), Image.Resampling.BICUBIC),  # another aspect, too
    "larger": lambda image: image.resize((900, 700), Image.Resampling.BILINEAR),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "flat": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "dark": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "cut": lambda image: image.crop((10, 6, 312, 233)),
    "mirrored": ImageOps.mirror,
    "upside down": ImageOps.flip,
    "turned by 90": lambda image: image.rotate(90, expand=True),
    "turned by 180": lambda image: image.rotate(180),
    "turned by 270, small, jpeg": lambda image: load_image(encoded(
        image.rotate(270, expand=True).resize((150, 200)), "JPEG", quality=60)),
    "mirrored and turned": lambda image: ImageOps.mirror(image.rotate(90, expand=True)),
    "mirrored and cut": lambda image: ImageOps.mirror(image).crop((10, 6, 312, 233)),
    "framed in black": lambda image: ImageOps.expand(image, (0, 40)),
    "framed in white": lambda image: ImageOps.expand(image, (50, 0), "white")}


@pytest.mark.parametrize("alter", COPIES.values(), ids=COPIES)
def test_altered_copies_are_alike_and_strangers_are_not(alter):
    images = [drawing(seed) for seed in range(12)]
    copies = [alter(image) for image in images]
    assert called_alike(images, copies) == called_alike(copies, images) == same_numbers(12)
    assert not (prints(images)["pixels"] == prints(copies)["pixels"]).any()


def eye(seed, size=192):
    """A photograph of the back of an eye: one lit disc, in which nothing but the vessels is its own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    side = rng.choice([-1, 1])
    disc_x, disc_y = side * rng.uniform(0.19, 0.25), rng.uniform(-0.04, 0.04)
    light = 0.6 + rng.uniform(-0.1, 0.1) * x + rng.uniform(-0.1, 0.1) * y - 0.4 * (x * x + y * y)
    light += 0.35 * np.exp(-((x - disc_x) ** 2 + (y - disc_y) ** 2) / 0.003)
    image = Image.fromarray((light * 255).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for vessel in range(10):
        at, course = np.array([disc_x + 0.5, disc_y + 0.5]) * size, (-1) ** vessel * rng.uniform(0.3, 1.4)
        for step in range(70):
            course += rng.normal(0, 0.12)
            to = at + 1.6 * np.array([-side * np.cos(course), np.sin(course)])
            pen.line((*at, *to), fill=90, width=max(1, 3 - step // 25))
            at = to
    lit = np.hypot(x, y) < 0.48
    return Image.fromarray((np.asarray(image) * lit).astype(np.uint8)).convert("RGB")


def test_different_images_of_one_pattern_are_not_alike_but_their_copies_are():
    eyes = [eye(seed) for seed in range(30)]
    signs = [frequency_signs(whole(prints(eyes)["look"])).reshape(30, 256)[:, 1:]] * 2
    near = (signs[0] @ signs[1].T)[np.triu_indices(30, 1)] >= 255 - 2 * 64
    assert near.mean() > 0.05  # by the hash alone one in twenty would be taken for one another
    assert called_alike(eyes, eyes) == same_numbers(30)
    copies = [load_image(encoded(ImageOps.mirror(image).resize((130, 130)), "JPEG")) for image in eyes[:10]]
    assert called_alike(copies, eyes) == same_numbers(10)


def test_images_of_one_pattern_do_not_join_into_one_group(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(12)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(eye(number % 11)))
    assert group_alike(paths) == [*range(11), 0]


def test_reduced_decoding_keeps_the_look():
    content = encoded(drawing(1, (1600, 1200)), "JPEG", quality=90)
    whole_image, reduced = load_image(content), load_image(content, at_least=448)
    assert whole_image.size == (1600, 1200) and reduced.size == (800, 600)
    assert called_alike([whole_image], [reduced]) == [(0, 0)]
    small = encoded(drawing(1), "JPEG")  # nothing to spare: decoded whole
    assert load_image(small, at_least=448).tobytes() == load_image(small).tobytes()


def test_an_even_image_is_like_nothing():
    even = [Image.new("RGB", (300, 200), colour) for colour in ("black", "white", "grey")]
    even.append(Image.fromarray(np.random.default_rng(0).integers(100, 103, (300, 200, 3), np.uint8)))
    looks = prints(even)["look"]
    assert not looks.any() and len(alike(looks, looks)) == 0
    assert alike(looks[:0], looks).shape == alike(looks, looks[:0]).shape == (0, 2)


def test_proposed_pairs_are_those_of_a_comparison_one_by_one(monkeypatch):
    monkeypatch.setattr(prepare.looks, "CLOSEST", 3)
    monkeypatch.setattr(prepare.looks, "BITS", 108)
    looks = np.random.default_rng(0).integers(0, 256, (40, 48, 48), np.uint8)
    looks[[3, 17]] = 0  # without a look
    copies = np.stack([turned(look, number % 8) for number, look in enumerate(looks)])
    near, far, way = propose(looks, copies, whole)

    def bits(one, other):
        return int((frequency_signs(whole(one[None])) != frequency_signs(whole(other[None]))).sum())

    wanted = []
    for number, look in enumerate(looks):
        apart = [min(bits(turned(look, way), copy) for way in range(8)) for copy in copies]
        wanted += [(number, other) for other in range(40)
                   if look.any() and copies[other].any() and apart[other] <= 108
                   and apart[other] <= sorted(apart[n] for n in range(40) if copies[n].any())[2]]
    assert list(zip(near.tolist(), far.tolist())) == wanted
    exact = near == far
    assert exact.sum() == 38 < len(near)
    assert all((turned(looks[n], w) == copies[n]).all() for n, w in zip(near[exact], way[exact]))


def test_no_more_than_the_closest_are_proposed(monkeypatch):
    image = drawing(0)
    many = prints([image.resize((320 - 2 * n, 240)) for n in range(20)] + [drawing(1)])["look"]
    monkeypatch.setattr(prepare.looks, "CLOSEST", 4)
    near, _, _ = propose(many, many, whole)
    assert max(np.bincount(near)) <= 8 and len(near) < 21 * 21 / 2  # of equal distance more than 4
    assert {tuple(pair) for pair in alike(many, many).tolist()} >= {(n, n) for n in range(21)}


def test_turning_signs_is_turning_looks():
    looks = np.random.default_rng(0).integers(0, 256, (5, 48, 48)).astype(np.float32)
    mirror = np.where(np.arange(16) % 2, -1, 1)
    ways = [turned(looks, way) for way in range(8)]
    assert len({way.tobytes() for way in ways}) == 8
    for way, look in enumerate(ways):
        signs = turned(frequency_signs(looks), way, lambda signs: signs * mirror)
        assert (signs == frequency_signs(look)).mean() > 0.999  # but where a frequency is all but 0


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
    """write(name, *(split, name of an image file or "", image, more names and images), **facts of its Dataset)"""
    def content(image):
        return image if isinstance(image, bytes) or image is None else encoded(image)

    def write_dataset_of(name, *rows, **facts):
        records = []
        for n, (split, file, image, *more) in enumerate(rows):
            parts = [View(content(image), file) for file, image in zip([file, *more[::2]], [image, *more[1::2]])]
            about = {"parts": tuple(parts)} if more else {"image": content(image), "image_name": file}
            records.append((split, Record(f"id{n}", "what is this?", "a lung", **about)))
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
    shards = write("later", ("validation", "c.png", c))  # it guards nothing but its own train
    report = guard(shards, "drop")
    assert list(report) == ["later/validation", "learn/train"] and not report["later/validation"]["found"]
    assert report["learn/train"]["found"] == {"exam/test": {"same pixels": [0, 3], "alike": [1]},
                                              "learn/test": {"alike": [5]}}
    assert report_rows(report) == [("learn/train", "learn/test", "", "1", "", ""),
                                   ("learn/train", "exam/test", "2", "1", "", "")]
    shard = Shard(shards / "learn/train")
    assert (read_leaks(shard)[0], read_leaks(shard)[1].tolist()) == ("drop", [0, 1, 3, 5])
    mixture = Mixture(**open_shards("learn", shards, "train"), count_tokens=five, batch_size=2)
    assert mixture.train[0].tolist() == [2, 4] and mixture.samples_per_epoch == 2
    assert {number for n in range(4) for _, number in mixture.step(n).samples} == {2, 4}
    mixture = Mixture(**open_shards("learn", shards, "train"), count_tokens=five, batch_size=2, held_out=1)
    assert len(mixture.validation[0]) == 1 and len(mixture.train[0]) == 1

    kept = guard(shards, "keep")["learn/train"]  # the published mix, and leaks.json says so
    assert kept["leaks"] == "keep" and kept["found"] == report["learn/train"]["found"]
    assert (read_leaks(shard)[0], read_leaks(shard)[1].tolist()) == ("keep", [0, 1, 3, 5])
    mixture = Mixture(**open_shards("learn", shards, "train"), count_tokens=five, batch_size=2)
    assert mixture.train[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_sample_leaks_if_any_of_its_images_does(write):
    a, b, c, d, e, f, g = (drawing(seed) for seed in range(7))
    write("learn", ("train", "a.png", a, "b.png", b), ("train", "c.png", c, "small_d.png", d.resize((100, 80))),
          ("train", "c.png", c, "synpic7.png", e, "a.png", a), ("train", "a.png", a, "c.png", c),
          ("train", "c.png", c, "Known Source/k.png", g),
          shared_ids="MedPix", known_leaks=(("Known Source/", "films"),))
    write("films", ("test", "1.png", drawing(8)))
    shards = write("exam", ("test", "x.png", f, "b.png", b), ("test", "d.png", d, "y.png", drawing(9)),
                   ("test", "z.png", drawing(7), "synpic7.png", drawing(10)), shared_ids="MedPix")
    leaks = guard(shards, "drop")["learn/train"]
    assert leaks["found"] == {"exam/test": {"same pixels": [0], "alike": [1], "same id": [0, 2]},
                              "films/test": {"known source": [4]}}
    train, exam = Shard(shards / "learn/train"), Shard(shards / "exam/test")
    assert read_leaked_images(train, exam).tolist() == [1, 2, 5]  # none that stands beside them
    assert [numbers.tolist() for numbers in exam.image_pairs()] == [[0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5]]
    mixture = Mixture(**open_shards("learn", shards, "train"), count_tokens=five, batch_size=1)
    assert mixture.train[0].tolist() == [3]


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
    assert read_leaked_images(train, exam).tolist() == [1, 2, 3, 4]
    assert exam.samples["image"].tolist() == [0, 1, 2, 2, -1, 3, 4]  # so they are images, not samples
    assert read_leaked_images(train, Shard(shards / "learn/test")).tolist() == [0]
    none = read_leaked_images(train, Shard(shards / "films/test"))
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
            Mixture(**open_shards("learn", shards, "train"), count_tokens=five)

    refused("the test splits")
    guard(shards, "drop")
    Mixture(**open_shards("learn", shards, "train"), count_tokens=five)
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
            read_leaked_images(train, test)
        assert str(error.value) == (f"{train.folder}: not compared with {test.folder}; "
                                    "run `python prepare/all.py --only=learn`")

    refused(train, exam)
    guard(shards, "drop")
    assert read_leaked_images(train, exam).tolist() == [0]
    write("exam", ("test", "b.png", drawing(1)), ("test", "a.png", drawing(0)))
    refused(train, Shard(shards / "exam/test"))
    guard(shards, "drop")
    assert read_leaked_images(train, Shard(shards / "exam/test")).tolist() == [1]
    refused(train, exam)  # mapped before it was prepared anew
    leaks = (shards / "learn/train/leaks.json").read_text()
    write("learn", ("train", "c.png", drawing(2)))
    (shards / "learn/train/leaks.json").write_text(leaks)  # of the shard that it was
    refused(Shard(shards / "learn/train"), Shard(shards / "exam/test"))


def test_what_an_older_version_found_is_found_anew(write):
    write("learn", ("train", "a.png", drawing(0)))
    shards = write("exam", ("test", "a.png", drawing(0)))
    first = guard(shards, "keep")
    alter(shards / "learn/train/leaks.json", alike=48, found={}, test_images={})
    assert guard(shards, "") == first and first["learn/train"]["test_images"] == {"exam/test": [0]}
    assert read_leaked_images(Shard(shards / "learn/train"), Shard(shards / "exam/test")).tolist() == [0]


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
        read_leaks(Shard(shards / "learn/train"))
    with pytest.raises(UserError, match="old/train: written by another version .* --only=old`"):
        Shard(shards / "old/train")


def test_a_damaged_shard_is_named(write):
    shards = write("learn", ("train", "a.png", drawing(0)), ("test", "b.png", drawing(1)))
    path = shards / "learn/test/fingerprints.bin"
    content = path.read_bytes()
    path.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    with pytest.raises(UserError, match="learn/test/fingerprints.bin: damaged"):
        guard(shards, "drop")


def test_a_training_image_that_validation_has_is_left_out_of_training(write):
    a, b, c, d = (drawing(seed) for seed in range(4))
    shards = write("learn", ("train", "a.png", a), ("train", "b.png", b), ("train", "c.png", c),
                   ("validation", "a.png", ImageOps.mirror(a)), ("validation", "d.png", d),
                   ("validation", "c.png", c), ("test", "c.png", c.resize((100, 80))))
    write("other", ("validation", "b.png", b), ("train", "d.png", d))  # its validation is no affair of learn
    report = guard(shards)
    assert report["learn/train"]["found"] == {"learn/test": {"alike": [2]},
                                              "learn/validation": {"same pixels": [2], "alike": [0]}}
    assert report["learn/validation"]["found"] == {"learn/test": {"alike": [2]}}
    assert report["other/train"]["found"] == report["other/validation"]["found"] == {}
    train, validation = Shard(shards / "learn/train"), Shard(shards / "learn/validation")
    assert (read_leaks(train)[0], read_leaks(train)[1].tolist()) == ("drop", [0, 2])
    assert (read_leaks(validation)[0], read_leaks(validation)[1].tolist()) == ("drop", [2])
    assert read_leaked_images(train, validation).tolist() == [0, 2]
    write("learn", ("train", "a.png", a), ("validation", "b.png", b))  # without a test split
    guard(shards)
    assert read_leaks(Shard(shards / "learn/validation"))[1].tolist() == []


def test_what_is_kept_stays_kept_until_it_is_asked_for(write, tmp_path):
    image = drawing(0)

    def choices():
        return {split: leaks["leaks"] for split, leaks in guard(tmp_path / "shards").items()}

    write("exam", ("test", "a.png", image))
    write("one", ("train", "a.png", image))
    shards = write("two", ("train", "a.png", image))
    assert choices() == {"one/train": "drop", "two/train": "drop"}
    guard(shards, "keep", ["one"])
    assert choices() == {"one/train": "keep", "two/train": "drop"}
    guard(shards, "drop", ["two", "exam"])
    write("three", ("train", "a.png", image), ("validation", "b.png", drawing(1)))
    assert choices() == {"one/train": "keep", "two/train": "drop", "three/train": "drop",
                         "three/validation": "drop"}
    write("one", ("train", "a.png", image), ("train", "b.png", drawing(1)), ("validation", "c.png", drawing(2)))
    with pytest.raises(UserError, match="one/train: not compared"):  # as it is prepared anew
        read_leaks(Shard(shards / "one/train"))
    assert choices()["one/train"] == choices()["one/validation"] == "keep"
    assert read_leaks(Shard(shards / "one/train"))[1].tolist() == [0]
    assert set(choices().values()) == {"keep", "drop"}
    guard(shards, "keep")
    assert set(choices().values()) == {"keep"}


def test_the_table_names_the_split_that_each_left_out_sample_meets(write, capsys):
    a, b, c = (drawing(seed) for seed in range(3))
    write("learn", ("train", "a.png", a), ("train", "b.png", b), ("train", "c.png", c), ("test", "a.png", a))
    shards = write("exam", ("test", "b.png", b), ("test", "a.png", a))
    config = all_py.Config(shards_dir=str(shards))
    all_py.print_leaks(["learn"], config)
    assert ("learn/train: 2 samples will be left out of it: learn/test has 1, exam/test has 2\n"
            in capsys.readouterr().out)
    all_py.print_leaks(["exam"], replace(config, only="exam", leaks="keep"))
    assert "learn/train: 2 samples will be left out of it" in capsys.readouterr().out
    all_py.print_leaks(["learn"], replace(config, only="learn", leaks="keep"))
    all_py.print_leaks(["exam"], replace(config, only="exam"))
    assert capsys.readouterr().out.count("learn/train: 2 samples kept all the same: learn/test has 1") == 2


def test_images_of_ones_own_guard_themselves_alone(write, tmp_path, monkeypatch):
    """They are compared with public test splits, and nobody with theirs."""
    images = [drawing(seed) for seed in range(4)]
    shards = write("public", ("train", "0.png", images[0]), ("train", "1.png", images[1]),
                   ("test", "2.png", images[2]))
    for name in ("mine", "yours"):
        table = tmp_path / name / "table.csv"
        table.parent.mkdir()
        rows = [("train", 0, "x"), ("train", 2, "x"), ("train", 3, "y"), ("test", 0, "x"), ("test", 1, "y")]
        for number, (_, image, _) in enumerate(rows):
            (table.parent / f"{number}.png").write_bytes(encoded(images[image].resize((300, 200 + number))))
        table.write_text("path,label,split\n" + "".join(
            f"{number}.png,{label},{split}\n" for number, (split, _, label) in enumerate(rows)))
        assert prepare_folder(table, shards, Wanted(ImageSettings(32, "squash", "jpeg", 97), workers=1))
    found = {split: leaks["found"] for split, leaks in guard(shards).items()}
    table, other = sorted(split for split in found if split.startswith("table"))
    assert found == {"public/train": {}, **{split: {f"{split.partition('/')[0]}/test": {"alike": [0]},
                                                    "public/test": {"alike": [1]}} for split in (table, other)}}
    for split in found:
        assert len(read_leaks(Shard(shards / split))[1]) == 2 * ("table" in split)
        assert "table" not in str(guard(shards)["public/train"]["tests"])
