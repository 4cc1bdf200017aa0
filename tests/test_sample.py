"""The drawn sample: repeatable, balanced so that words give nothing away, true of its pixels."""

import hashlib
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data import BOS, EOS, Tokenizer, format_prompt
from plumbing.pixels import load_image
from prepare import sample
from prepare.all import select
from prepare.datasets import CAPTION_QUESTION, DATASETS
from prepare.questions import train_sample_tokenizer


def draw(split, count, seed=0):
    """The records of a split's first images."""
    return [record for number in range(count)
            for record in sample.image_records(split, number, sample.draw_image(split, number, seed))]


@pytest.fixture(scope="module")
def test_records():
    return draw("test", sample.SPLITS["test"] * 2 * len(sample.KINDS))


@pytest.fixture(scope="module")
def images(test_records):
    """The test images: pixels (H, W, 3), label, and {type: answer}."""
    found = {}
    for record in test_records:
        if record.image_name not in found:
            pixels = np.asarray(load_image(record.image)).astype(int)
            found[record.image_name] = SimpleNamespace(pixels=pixels, label=record.labels[0], answers={})
        found[record.image_name].answers[record.type] = record.answer
    return list(found.values())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sample_tokenizer())
    return Tokenizer(path)


# ----------------------------------------------------------------------------- images

def test_seed_decides_every_byte():
    first = draw("train", 8)  # one image of each class
    assert draw("train", 8) == first
    for record, other in zip(first, draw("train", 8, seed=1), strict=True):
        assert record.image != other.image
        assert (record.id, record.question, record.answer) == (
            other.id, other.question, other.answer)


def test_no_two_images_are_alike_within_or_across_splits(images, test_records):
    test = {record.image for record in test_records}
    train = {record.image for record in draw("train", len(images))}
    assert len(test) == len(train) == len(images) and not test & train


def test_images_are_lossless_colour_images_of_one_size(images, test_records):
    assert all(record.image.startswith(b"P6\n224 224\n255\n") for record in test_records)
    assert all(record.image_name.endswith(".ppm") for record in test_records)
    assert {image.pixels.shape for image in images} == {(224, 224, 3)}


def test_images_of_224_pixels_are_those_that_results_were_published_of():
    """Of all kinds and details; the hash is that of the first version, which knew no other size."""
    content = b"".join(sample.draw_image(split, number) for split in sample.SPLITS for number in range(24))
    assert hashlib.sha256(content).hexdigest() == "ce0c8c215e06949382d346b1c0e771bf50c7a9a24fc945d2f688452e5f881753"


def amplitudes(image):
    """Of a square image's frequencies: (below, beyond) what 224 pixels can show, summed."""
    size = len(image)
    grey = image.mean(-1) if image.ndim == 3 else image
    strength = np.abs(np.fft.fftshift(np.fft.fft2(grey)))
    inner = slice(size // 2 - 112, size // 2 + 112)
    return strength[inner, inner].sum(), strength.sum() - strength[inner, inner].sum()


@pytest.mark.parametrize("name", sample.KINDS)
def test_a_larger_image_is_the_same_picture_with_more_detail(name):
    """Its own detail, before the grain of single pixels is laid over it."""
    draw, _, _, _, details, *_ = sample.KINDS[name]
    for number, value in enumerate((0, *details)):
        small, large, other = (draw(np.random.default_rng(seed), value, size)
                               for seed, size in ((number, 224), (number, 448), (number + 9, 224)))
        assert large.shape == (448, 448, *small.shape[2:])
        halved = large.reshape(224, 2, 224, 2, -1).mean((1, 3)).reshape(small.shape)
        assert np.abs(halved - small).mean() < np.abs(other - small).mean() / 2
        channels = [Image.fromarray(channel).resize((448, 448), Image.Resampling.BICUBIC)
                    for channel in np.moveaxis(small.astype(np.float32).reshape(224, 224, -1), -1, 0)]
        enlarged = np.stack([np.asarray(channel) for channel in channels], -1)
        below, beyond = amplitudes(large)
        _, beyond_enlarged = amplitudes(enlarged)
        assert beyond > 2 * beyond_enlarged and beyond < below, (beyond, beyond_enlarged, below)


@pytest.mark.parametrize("name", ["sample", "sample_captions", "sample_boxes"])
@pytest.mark.parametrize("asked, drawn", [(32, 224), (224, 224), (300, 300), (448, 448)])
def test_images_are_drawn_at_the_size_asked_for_or_larger(name, asked, drawn):
    _, record = next(DATASETS[name].read(None, asked))
    assert record.image.startswith(b"P6\n%d %d\n" % (drawn, drawn))


def test_contact_sheet_is_a_png_of_four_rows(tmp_path):
    sample.contact_sheet(tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        rows = np.asarray(sheet.convert("L")).reshape(4, -1)
    assert (rows.std(1) > 10).all() and len({row.tobytes() for row in rows}) == 4


# ----------------------------------------------------------------------------- questions

@pytest.fixture
def all_records(monkeypatch):
    """Every (split, Record) of the sample, without its image: drawing is what takes time."""
    monkeypatch.setattr(sample, "encode", lambda rng, image: b"")
    for name, (_, *facts) in sample.KINDS.items():
        monkeypatch.setitem(sample.KINDS, name, (lambda *drawn: None, *facts))
    return list(sample.records())


def test_splits_have_the_published_counts_and_every_id_is_its_own(all_records, test_records):
    assert Counter(split for split, _ in all_records) == DATASETS["sample"].counts
    assert len({record.id for _, record in all_records}) == len(all_records)
    assert [record.id for split, record in all_records if split == "test"] == [
        record.id for record in test_records]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_question_sees_each_of_its_answers_equally_often(split, all_records):
    answers, wordings = defaultdict(Counter), defaultdict(set)
    for name, record in all_records:
        if name == split:
            answers[record.question][record.answer] += 1
            wordings[record.type, record.labels].add(record.question)
    for question, counts in answers.items():
        assert len(counts) > 1 and len(set(counts.values())) == 1, (question, counts)
    assert len({type for type, _ in wordings}) >= 5
    assert all(len(texts) > 1 for texts in wordings.values())
    assert {question: set(counts) for question, counts in answers.items()
            if question.startswith(("on which", "how many"))} == {
        "on which side of the image is the bleed?": {"left", "right"},
        "on which side of the image is the effusion?": {"left", "right"},
        "how many white cells are there?": {"one", "two", "three"},
        "how many cysts are there?": {"one", "two", "three"}}


def test_labels_are_equally_frequent_and_agree_with_the_answers(images):
    counts = Counter(image.label for image in images)
    assert len(counts) >= 8 and len(set(counts.values())) == 1
    kinds, impressions = defaultdict(set), defaultdict(set)
    for image in images:
        kind, _, finding = image.label.partition("_")
        present = not finding.startswith("no_")
        kinds[kind].add((image.answers["modality"], image.answers["organ"]))
        impressions[image.answers["impression"]].add(image.label)
        assert image.answers["finding"] == ("yes" if present else "no")
        assert ("side" in image.answers) + ("count" in image.answers) == present
        assert f"{kind}_{'no_' if present else ''}{finding.removeprefix('no_')}" in counts
    assert len(kinds) >= 4 and len(set.union(*kinds.values())) == len(kinds)
    assert len(impressions) == len(counts)
    assert all(len(labels) == 1 for labels in impressions.values())


# ----------------------------------------------------------------------------- captions

def test_a_caption_tells_all_that_the_questions_ask(test_records):
    answers = defaultdict(dict)
    for record in test_records:
        answers[record.image_name][record.type] = record.answer
    captions = [sample.write_caption(number) for number in range(len(answers))]
    for caption, told in zip(captions, answers.values(), strict=True):
        assert caption.startswith(f"{told['modality']} of the {told['organ']} with")
        assert (" without " in caption) == (told["finding"] == "no")
        assert caption.endswith(f" on the {told['side']}") if "side" in told else " on the " not in caption
        assert f" with {told['count']} " in caption if "count" in told else not any(
            f" {count} " in caption for count in sample.COUNTS.values())
    assert captions[:8] == [
        "ct scan of the brain without a bleed", "ct scan of the brain with a bleed on the left",
        "light microscopy of the blood without white cells", "light microscopy of the blood with one white cell",
        "radiograph of the chest without an effusion", "radiograph of the chest with an effusion on the left",
        "ultrasound of the liver without cysts", "ultrasound of the liver with one cyst"]
    assert len(set(captions)) == 14 and set(Counter(captions).values()) == {10, 15, 30}  # three, two, or one of a class


def test_captions_are_of_other_images_with_the_prompt_of_all_captions(tokenizer, monkeypatch):
    monkeypatch.setattr(sample, "SPLITS", {"train": 2, "test": 2})
    facts = DATASETS["sample_captions"]
    assert facts.only_by_name and facts.kind == "captions" and facts.train_tokenizer is train_sample_tokenizer
    captions, questions = (list(DATASETS[name].read(None)) for name in ("sample_captions", "sample"))
    images = {record.image for _, record in captions}
    assert len(images) == len(captions) == 32 and not images & {record.image for _, record in questions}
    assert len({record.id for _, record in captions}) == 32
    assert not {record.image_name for _, record in captions} & {record.image_name for _, record in questions}
    assert {record.question for _, record in captions} == {CAPTION_QUESTION}
    for number, (split, record) in enumerate(captions):
        assert split == ("train", "test")[number % 2] and record.answer == sample.write_caption(number // 2)
        assert tokenizer.decode(tokenizer.encode(record.answer)) == record.answer


def test_captions_have_the_published_counts_and_are_prepared_only_by_name(monkeypatch):
    monkeypatch.setattr(sample, "draw_image", lambda split, number, seed, size: b"")
    counts = Counter(split for split, _ in DATASETS["sample_captions"].read(None))
    assert counts == DATASETS["sample_captions"].counts
    assert "sample_captions" not in select("") and select("sample_captions") == ["sample_captions"]


# ----------------------------------------------------------------------------- boxes

@pytest.fixture(scope="module")
def boxed():
    """Of 48 images with boxes: (its pixels, (H, W, 3), its Record)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "SPLITS", {"train": 2, "test": 1})
        return [(np.asarray(load_image(record.image)).astype(int), record)
                for _, record in sample.box_records("detect {}".format)]


def painted(pixels, finding):
    """Where a finding is by its colour alone: (H, W)."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    inside = np.hypot(*(sample.grid(len(pixels)) / np.array((0.70, 0.55))[:, None, None])) < 1  # of the skull
    return {"bleed": (red > 190) & inside, "white cell": blue - green > 18, "cyst": red < 40}[finding]


@pytest.mark.parametrize("finding", ["bleed", "white cell", "cyst"])
def test_boxes_are_around_what_is_painted(finding, boxed):
    """At half the size, for grain is no finding: along its middle it ends within 4 of 112 pixels of its box."""
    for pixels, record in boxed:
        mask = painted(pixels.reshape(112, 2, 112, 2, 3).mean((1, 3)), finding)
        for box in record.boxes[finding] if record.type == finding else ():
            x1, y1, x2, y2 = np.round(np.array(box) * 112).astype(int)
            middle = np.array((y1 + y2, x1 + x2)) // 2
            row, column = (np.take(mask, np.arange(at - 4, at + 5), axis).mean(axis) > 0.5
                           for axis, at in enumerate(middle))
            for line, begin, end in ((row, x1, x2), (column, y1, y2)):
                assert line[begin + 2:begin + 4].any() and line[end - 4:end - 2].any(), (record.id, box)
                assert not line[begin - 4:begin - 2].any() and not line[end + 2:end + 4].any(), (record.id, box)


@pytest.mark.parametrize("side", [-1, 1])
def test_an_effusions_box_is_around_what_it_changes(side):
    masks = []
    with_it = sample.draw_film(np.random.default_rng(5), side, 224, masks.append)
    changed = np.abs(with_it - sample.draw_film(np.random.default_rng(5), 0, 224)) > 0.04
    assert np.allclose(sample.bounds(changed), sample.bounds(masks[0]), atol=0.03) and len(masks) == 1


def test_bounds_are_those_of_whole_pixels():
    mask = np.zeros((8, 8))
    mask[2:4, 1:6], mask[7, 7] = 0.6, 0.5
    assert sample.bounds(mask) == (1 / 8, 2 / 8, 6 / 8, 4 / 8)


def test_every_image_has_as_many_boxes_as_its_answers_say(boxed):
    counts = Counter((record.type, len(record.boxes[record.type])) for _, record in boxed)
    assert counts == {("bleed", 0): 3, ("bleed", 1): 3, ("effusion", 0): 3, ("effusion", 1): 3,
                      **{(finding, n): 3 if n == 0 else (2, 1)[n - 1]
                         for finding in ("white cell", "cyst") for n in (0, 1, 2)}}
    for _, record in boxed:
        number = int(record.id[-6:])
        _, value, _ = sample.read_case(number)
        assert len(record.boxes[record.type]) == (abs(value) if record.type in ("bleed", "effusion") else value)
        assert record.question == f"detect {record.type}" and record.answer == ""
        if record.type in ("bleed", "effusion") and value:
            x1, _, x2, _ = record.boxes[record.type][0]
            assert (x1 + x2 > 1) == (value > 0)


def test_boxes_are_of_images_of_their_own_and_the_same_at_another_size(boxed, monkeypatch):
    others = {sample.draw_image(split, number, seed) for seed in (0, 1) for split in ("train", "test")
              for number in range(8)}
    assert len({record.image for _, record in boxed}) == len(boxed) == 24
    assert not others & {record.image for _, record in boxed}
    monkeypatch.setattr(sample, "SPLITS", {"train": 2, "test": 1})
    for (_, small), (_, large) in zip(boxed, sample.box_records("detect {}".format, 448), strict=True):
        assert large.image.startswith(b"P6\n448 448") and large.boxes.keys() == small.boxes.keys()
        assert np.allclose(*(np.array(record.boxes[small.type]) for record in (small, large)), atol=0.02)


def test_boxes_have_the_published_counts_the_samples_tokenizer_and_short_answers(tokenizer, monkeypatch):
    monkeypatch.setattr(sample, "draw_image", lambda split, number, seed, size, show: b"")
    facts = DATASETS["sample_boxes"]
    assert Counter(split for split, _ in facts.read(None)) == facts.counts == {"train": 1200, "test": 240}
    assert facts.only_by_name and facts.kind == "boxes" and facts.train_tokenizer is train_sample_tokenizer
    answer = "white cell <box>[[123, 45, 678, 90], [0, 1000, 7, 12]]</box>"
    assert tokenizer.decode(tokenizer.encode(answer)) == answer and len(tokenizer.encode(answer)) < 55
    numbers = [len(tokenizer.encode(f"1{digits}")) - len(tokenizer.encode("1")) for digits in ("2", "23", "234")]
    assert numbers == [1, 2, 3]  # a digit is a token


# ----------------------------------------------------------------------------- studies in time

@pytest.fixture(scope="module")
def studies():
    """Of every study: (split, Record, what was drawn: {film: (side, size of the effusion)}), without its films."""
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "draw_study_film", lambda split, number, film, side, effusion, seed, size: (
            drawn.append((split, number, film, side, effusion)) or b"%d" % film))
        records = list(DATASETS["sample_studies"].read(None))
    films = defaultdict(dict)
    for split, number, film, side, effusion in drawn:
        films[f"sample_studies_{split}_{number:06d}"][film] = side, effusion
    return [(split, record, films[record.id]) for split, record in records]


def words_before(record):
    """All that a model reads of a study before it answers."""
    return (*(part if isinstance(part, str) else part.role for part in record.parts), record.question)


def test_what_a_study_says_is_what_was_drawn(studies):
    for _, record, films in studies:
        (side, now), before = films[1], films.get(0, (None, None))[1]
        left_or_right = {-1: "left", 1: "right"}[side]
        change = ("is larger than before" if now > before else "is smaller than before" if now < before else
                  "is unchanged") if before and now else "is new" if before == 0 and now else (
            "has resolved" if before else "")
        findings = (f"the effusion on the {left_or_right} {change}." if change else
                    f"there is an effusion on the {left_or_right}." if now else "there is no effusion.")
        assert record.answer.startswith(f"Findings: {findings} Impression: "), (record.answer, films)
        short = record.answer.partition(" Impression: ")[2]
        word = {"has resolved": "resolved"}.get(change, change.removeprefix("is ").removesuffix(" than before"))
        assert short == (f"{word} effusion on the {left_or_right}.".lstrip() if change or now else "no effusion.")
        told = [part for part in record.parts if isinstance(part, str)]
        assert told[1:] == ([] if before is None else [
            f"Prior report: Findings: there is an effusion on the {left_or_right}. "
            f"Impression: effusion on the {left_or_right}." if before else
            "Prior report: Findings: there is no effusion. Impression: no effusion."])
        assert [(view.role, view.image) for view in record.views()] == [
            *([] if before is None else [("prior frontal", b"0")]), ("frontal", b"1")]
        assert record.type == ("no prior" if before is None else word or "absent") and record.group == record.id


@pytest.mark.parametrize("split, times", [("train", 25), ("test", 5)])
def test_changes_are_equally_frequent_and_words_do_not_tell_them_apart(split, times, studies):
    some = [(record, films) for name, record, films in studies if name == split]
    assert Counter(record.type for record, _ in some) == dict.fromkeys(
        ("larger", "smaller", "unchanged", "new", "resolved", "absent"), 6 * times) | {"no prior": 12 * times}
    told = defaultdict(Counter)
    for record, _ in some:
        told[record.type][words_before(record)] += 1
    assert told["larger"] == told["smaller"] == told["unchanged"] == told["resolved"]
    assert len(told["larger"]) == 10  # both sides, five indications
    alone = Counter(record.answer for record, _ in some if record.type == "no prior")
    assert sorted(alone.values()) == [3 * times, 3 * times, 6 * times]
    pairs = Counter((films[0], films[1]) for _, films in some if 0 in films and films[0][1] and films[1][1])
    assert len(pairs) == 18 and set(pairs.values()) == {times}  # any size before with any now


@pytest.mark.parametrize("film", [0, 1])
def test_one_film_alone_tells_five_changes_of_nine(film, studies):
    by_size = defaultdict(Counter)
    for _, record, films in studies:
        if record.type in ("larger", "smaller", "unchanged"):
            by_size[films[film][1]][record.type] += 1
    guessed = sum(max(counts.values()) for counts in by_size.values())
    assert 9 * guessed == 5 * sum(map(Counter.total, by_size.values()))


def test_any_48_studies_have_all_cases():
    for begin in (0, 5, 48):
        cases = Counter(sample.read_study_case(number) for number in range(begin, begin + 48))
        assert cases == Counter(sample.STUDY_CASES) and len(cases) == 40


@pytest.mark.parametrize("side, half", [(-1, slice(0, 112)), (1, slice(112, 224))])
def test_films_of_studies_show_effusions_of_three_sizes(side, half):
    """What they brighten of the same film without lies in one half, and is far more for each next size."""
    extents = defaultdict(list)
    for number in range(6):
        grey = [np.asarray(load_image(sample.draw_study_film("test", number, number % 2, side, effusion)))
                .astype(int)[..., 0] for effusion in range(4)]
        for effusion in (1, 2, 3):
            brighter = grey[effusion] - grey[0] > 40
            assert brighter[:, half].sum() > 0.95 * brighter.sum()
            extents[effusion].append(int(brighter.sum()))
    assert min(extents[1]) > 1200
    assert all(min(extents[size + 1]) > max(extents[size]) + 1200 for size in (1, 2)), extents  # more than a patch


def test_two_films_of_a_patient_are_one_body_in_two_exposures():
    first, second, other = (np.asarray(load_image(sample.draw_study_film("train", number, film, -1, 2))).astype(int)
                            for number, film in ((7, 0), (7, 1), (8, 0)))
    edges = [np.abs(np.diff(pixels.reshape(56, 4, 56, 4, 3).mean((1, 3, 4)))) for pixels in (first, second, other)]
    assert (first != second).mean() > 0.5
    assert np.abs(edges[0] - edges[1]).mean() < np.abs(edges[0] - edges[2]).mean() / 2


def test_films_of_studies_are_their_own_and_the_same_at_another_size(monkeypatch):
    monkeypatch.setattr(sample, "SPLITS", {"train": 1, "test": 1})
    small, large = (list(DATASETS["sample_studies"].read(None, size)) for size in (32, 448))
    films = [view.image for _, record in small for view in record.views()]
    assert len(set(films)) == len(films) == sum(len(record.views()) for _, record in large) > 20
    assert all(film.startswith(b"P6\n224 224\n") for film in films)
    assert all(view.image.startswith(b"P6\n448 448\n") for _, record in large for view in record.views())
    for (_, one), (_, two) in zip(small, large, strict=True):
        assert (one.id, one.answer, words_before(one)) == (two.id, two.answer, words_before(two))
    again = [view.image for _, record in DATASETS["sample_studies"].read(None) for view in record.views()]
    assert again == films


def test_studies_have_the_published_counts_and_the_samples_tokenizer(studies, tokenizer):
    facts = DATASETS["sample_studies"]
    assert Counter(split for split, *_ in studies) == facts.counts == {"train": 1200, "test": 240}
    assert facts.only_by_name and facts.kind == "reports" and facts.train_tokenizer is train_sample_tokenizer
    assert len({record.id for _, record, _ in studies}) == 1440
    for _, record, _ in studies:
        tokens, spans, _ = tokenizer.write(record)
        spelt = {tokenizer.piece(token) for token in tokens if token >= 0 and tokenizer.model.is_byte(token)}
        assert spelt <= {"<0x0A>", "<0x2E>", "<0x46>", "<0x49>", "<0x50>"}  # line break, full stop, F, I, P
        assert len(tokens) < 150 and spans[0][1] - spans[0][0] < 40
        assert tokenizer.decode(tokens[spans[0][0]:spans[0][1] - 1]) == record.answer


def test_the_report_flag_reaches_the_drawn_studies(monkeypatch):
    monkeypatch.setattr(sample, "draw_study_film", lambda *drawn: b"")
    answers = [next(DATASETS["sample_studies"].read(None, report=report))[1].answer
               for report in ("both", "findings", "impression")]
    assert answers[0] == f"{answers[1]} {answers[2]}" and answers[2].startswith("Impression: ")


# ----------------------------------------------------------------------------- answers and pixels

def of_kind(images, kind):
    """(image, its mean over blocks of 4 by 4 pixels, (56, 56, 3)) of one kind."""
    chosen = [(image, image.pixels.reshape(56, 4, 56, 4, 3).mean((1, 3))) for image in images
              if image.label.startswith(kind)]
    assert len(chosen) == 2 * sample.SPLITS["test"]
    return chosen


def count_blobs(mask):
    """How many patches of more than 9 pixels, joined along their sides, a mask has."""
    mask, count = np.pad(mask, 1), 0
    while mask.any():
        left, ahead = mask.sum(), [divmod(int(mask.argmax()), mask.shape[1])]
        while ahead:
            y, x = ahead.pop()
            if mask[y, x]:
                mask[y, x] = False
                ahead += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        count += left - mask.sum() > 9
    return count


def test_blobs_are_counted():
    mask = np.zeros((12, 12), bool)
    mask[:4, :4] = mask[4:8, 4:8] = mask[3:12, 11] = mask[10, 2:11] = mask[11, :3] = True
    mask[0, 6:9] = True
    assert count_blobs(mask) == 3  # two squares that touch at a corner and a bent line; a speck


def test_bleed_is_on_the_side_that_the_answer_says(images):
    for image, pixels in of_kind(images, "ct"):
        bright = pixels[14:42, 16:40, 0] > 190  # inside of the skull
        left, right = bright[:, :12].sum(), bright[:, 12:].sum()
        side = "left" if left > right + 20 else "right" if right > left + 20 else None
        assert side == image.answers.get("side"), image.answers
        assert (left + right > 20) == (image.answers["finding"] == "yes")


def test_effusion_is_on_the_side_that_the_answer_says(images):
    for image, pixels in of_kind(images, "film"):
        left, right = pixels[25:37, 7:16].mean(), pixels[25:37, 40:49].mean()  # the lungs' bases
        side = "left" if left > right + 50 else "right" if right > left + 50 else None
        assert side == image.answers.get("side"), image.answers


def test_white_cells_are_as_many_as_the_answer_says(images):
    for image, pixels in of_kind(images, "smear"):
        red, green, blue = np.moveaxis(pixels, -1, 0)
        count = count_blobs((blue - green > 60) & (red < 160))  # nuclei alone are purple
        assert [None, "one", "two", "three"][count] == image.answers.get("count"), image.answers


def test_cysts_are_as_many_as_the_answer_says(images):
    for image, pixels in of_kind(images, "ultrasound"):
        dark = np.pad(pixels[..., 0] < 40, 1, constant_values=True)
        count = count_blobs(dark) - 1  # what surrounds the picture is one more, joined by the rim
        assert [None, "one", "two", "three"][count] == image.answers.get("count"), image.answers


# ----------------------------------------------------------------------------- tokenizer

def test_tokenizer_has_llamas_special_ids_and_is_the_same_when_trained_again(tokenizer):
    assert (tokenizer.model.bos_id(), tokenizer.model.eos_id()) == (BOS, EOS) == (1, 2)
    assert tokenizer.vocab_size == 512
    assert hashlib.sha256(train_sample_tokenizer()).hexdigest() == tokenizer.sha256


def test_tokenizer_returns_every_question_and_answer(tokenizer, test_records):
    texts = {text for record in test_records
             for text in (record.question, format_prompt(record.question), record.answer)}
    for text in texts:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert len(tokens) < len(text) / 2 or not text.startswith("Question:")
        assert tokenizer.model.id_to_piece(tokens[0]).startswith("▁")
        spelt = [tokenizer.model.id_to_piece(token) for token in tokens
                 if tokenizer.model.is_byte(token)]
        assert spelt == ["<0x0A>"] * text.count("\n"), text  # a line break is a byte, as in LLaMA's


def test_tokens_past_the_vocabulary_have_no_text(tokenizer):
    tokens = tokenizer.encode("left")
    assert tokenizer.decode([*tokens, tokenizer.vocab_size]) == "left"


@pytest.mark.parametrize("text", ["naïve café ± 5 µm 中", "12 mg/dl <s> é", "UPPER\n\nlines\tZ", "🩻"])
def test_tokenizer_spells_any_other_text_in_bytes(text, tokenizer):
    tokens = tokenizer.encode(text)
    assert not {tokenizer.model.unk_id(), BOS, EOS} & set(tokens)
    assert any(tokenizer.model.is_byte(token) for token in tokens)
    assert tokenizer.decode(tokens) == text.replace("\t", " ")
