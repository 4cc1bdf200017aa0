"""The datasets of questions about images, and the drawn sample; those about text alone are in choices.py."""

import contextlib
import functools
import io
import itertools
import re
from pathlib import Path

from data import Record, format_prompt
from plumbing.flags import UserError
from prepare.datasets import (CAPTION_QUESTION, HUB_IMAGE, NO_NAME, dataset, find_folder, open_zip, read_json,
                              read_member, read_named_image, read_parquets, require_known, require_splits)

TEST_ANSWERS = "VQAMed2019_Test_Questions_w_Ref_Answers.txt"


# ----------------------------------------------------------------------------- raw files

def read_hub_questions(raw, type_of):
    """(split, Record)s of the hub's VQA parquets: data/<split>-*.parquet, one image a row."""
    form = {"image": HUB_IMAGE, "question": str, "answer": str}
    require_splits(raw / "data", "train", "validation", "test")
    for split in ("train", "validation", "test"):
        for number, row in enumerate(read_parquets(raw / "data", split, form)):
            question, answer = row["question"], row["answer"]
            name, image = f"{split}_{number:06d}", row["image"]
            yield split, Record(name, question, answer, image["bytes"], image["path"] or name,
                                type=type_of(question, answer))


@contextlib.contextmanager
def open_folder(folder):
    """
    A function from a file's name to its bytes, in a folder or else in the zip of that name.

    Asked file by file, so that a folder that was unpacked only in part does no harm.
    """
    packed = folder.with_name(f"{folder.name}.zip")
    with open_zip(packed) if packed.is_file() else contextlib.nullcontext() as archive:
        inside = functools.cache(lambda: find_folder(archive, f"{folder.name}/"))  # if it is asked at all

        def read(name):
            content = read_named_image(folder, name)
            if content is None and archive:
                content = read_member(archive, inside() + name)
            return content

        yield functools.lru_cache(maxsize=1)(read)  # an image's questions mostly follow one another


def read_rows(folder, read, name, columns):
    """The rows of a table without a header in an opened folder, its columns parted by "|"."""
    content = read(name)
    if not content:
        raise UserError(f"{folder}: no {name} in it or its zip, or a damaged one; fetch it again")
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{folder}/{name}: not UTF-8 ({error}); fetch it again") from None
    rows = [line.strip().split("|", columns - 1) for line in lines if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise UserError(f"{folder}/{name}: row {number} has {len(row)} columns, not {columns}")
    return rows


# ----------------------------------------------------------------------------- the sample

def train_sample_tokenizer():
    """A tokenizer of 512 pieces with the settings of LLaMA's, as a SentencePiece model."""
    import sentencepiece

    from prepare import sample

    # Wordings and answers recur every 6 images of a class: the first 1,000 records hold them all.
    images = (sample.image_records("train", number, None) for number in itertools.count())
    records = itertools.islice(itertools.chain.from_iterable(images), 1000)
    # Line by line, so that a line break stays a byte, as in LLaMA's vocabulary.
    lines = [line for record in records
             for line in (*format_prompt(record.question).split("\n"), record.answer)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=512,
        hard_vocab_limit=False, byte_fallback=True, split_digits=True, add_dummy_prefix=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, character_coverage=0.99995, num_threads=1, minloglevel=2)
    return model.getvalue()


@dataset(kind="image questions", licence="MIT", access="part of this repository", megabytes=0,
         page="prepare/sample.py", folder=Path(__file__).parent, layouts=(("sample.py",),),
         counts={"train": 5400, "test": 1080}, train_tokenizer=train_sample_tokenizer, one_pattern=True,
         drawn=True,
         classes=("ct_no_bleed", "ct_bleed", "smear_no_white_cell", "smear_white_cell",
                  "film_no_effusion", "film_effusion", "ultrasound_no_cyst", "ultrasound_cyst"))
def sample(raw, size=224):
    """Drawn pictures with exact answers; it brings a tokenizer of its own."""
    from prepare import sample as drawn

    yield from drawn.records(max(size, drawn.SIZE))


@dataset(only_by_name=True, kind="captions", licence="MIT", access="part of this repository", megabytes=0,
         page="prepare/sample.py", folder=Path(__file__).parent, layouts=(("sample.py",),),
         counts={"train": 1200, "test": 240}, train_tokenizer=train_sample_tokenizer, one_pattern=True, drawn=True)
def sample_captions(raw, size=224):
    """Other pictures of the sample's kinds, each with a caption; to begin a training in stages with."""
    from prepare import sample as drawn

    yield from drawn.caption_records(CAPTION_QUESTION, max(size, drawn.SIZE))


@dataset(only_by_name=True, kind="boxes", licence="MIT", access="part of this repository", megabytes=0,
         page="prepare/sample.py", folder=Path(__file__).parent, layouts=(("sample.py",),),
         counts={"train": 1200, "test": 240}, train_tokenizer=train_sample_tokenizer, one_pattern=True, drawn=True)
def sample_boxes(raw, size=224):
    """Other pictures of the sample's kinds, each with the boxes of its finding, or none."""
    from prepare import sample as drawn
    from tasks.boxes import ask

    yield from drawn.box_records(ask, max(size, drawn.SIZE))


@dataset(only_by_name=True, kind="reports", licence="MIT", access="part of this repository", megabytes=0,
         page="prepare/sample.py", folder=Path(__file__).parent, layouts=(("sample.py",),),
         counts={"train": 1200, "test": 240}, train_tokenizer=train_sample_tokenizer, one_pattern=True, drawn=True,
         sections=True)
def sample_studies(raw, size=224, report="both"):
    """Drawn chest films, three of four with a film and a report of before: whether an effusion has grown."""
    from prepare import sample as drawn
    from prepare.studies import study_record

    yield from drawn.study_records(functools.partial(study_record, report=report), max(size, drawn.SIZE))


# ----------------------------------------------------------------------------- about images

@dataset(kind="image questions", licence="MIT (hub card; textbook publishers hold the images)",
         access="open", megabytes=785, page="https://huggingface.co/datasets/flaviagiammarino/path-vqa",
         hub="flaviagiammarino/path-vqa", hub_files=("data/*.parquet",),
         layouts=(("data/*.parquet",),), counts={"train": 19654, "validation": 6259, "test": 6719})
def path_vqa(raw):
    """PathVQA (He et al. 2020), the hub's cleaned copy: pathology textbook figures."""
    words = ("what", "where", "how", "why", "when", "who", "whose", "which")

    def type_of(question, answer):
        if answer.strip().lower() in ("yes", "no"):
            return "yes/no"
        first = question.lower().split()[:1]
        return first[0] if first and first[0] in words else "other"

    yield from read_hub_questions(raw, type_of)


@dataset(kind="image questions", licence="CC0-1.0", access="open", megabytes=35,
         page="https://osf.io/89kps or https://huggingface.co/datasets/flaviagiammarino/vqa-rad",
         hub="flaviagiammarino/vqa-rad", hub_files=("data/*.parquet",),
         layouts=(("VQA_RAD Dataset Public.json",),
                  ("data/train-*.parquet", "data/test-*.parquet")),
         counts={"train": 1797, "test": 451}, shared_ids="MedPix")
def vqa_rad(raw):
    """
    VQA-RAD (Lau et al. 2018), as published on OSF, or the hub's copy where that is not there.

    The hub's copy has no question types and four training rows fewer: it dropped duplicates.
    """
    questions = raw / "VQA_RAD Dataset Public.json"
    if not questions.is_file():
        yield from read_hub_questions(raw, lambda question, answer: "")
        return
    columns = ("qid", "question", "answer", "image_name", "question_type", "phrase_type")
    for row in read_json(questions, [columns]):
        require_known(f"{questions}: phrase_type of {row['qid']!r:.40}", row["phrase_type"],
                      ("freeform", "para", "test_freeform", "test_para"))
        split = "test" if row["phrase_type"].startswith("test_") else "train"
        name = row["image_name"] or NO_NAME
        yield split, Record(row["qid"], row["question"], row["answer"],
                            read_named_image(raw / "VQA_RAD Image Folder", name), name,
                            type=row["question_type"])


@dataset(kind="image questions", licence="CC-BY-4.0", access="open", megabytes=216,
         page="https://huggingface.co/datasets/BoKelvin/SLAKE or https://www.med-vqa.com/slake",
         hub="BoKelvin/SLAKE", hub_files=("train.json", "validat*.json", "test.json", "imgs.zip"),
         layouts=(("train.json", "validat*.json", "test.json", "imgs.zip"),
                  ("train.json", "validat*.json", "test.json", "imgs/*/source.jpg"),
                  ("train.json", "validat*.json", "test.json")),
         counts={"train": 4919, "validation": 1053, "test": 1061})
def slake(raw):
    """
    SLAKE (Liu et al. 2021): radiology images, with some questions that ask for general knowledge.

    English rows only: the Chinese ones split the images differently, test images into train.
    """
    renamed = (raw / "validation.json").is_file()  # it was validate.json at first
    files = {"train": "train", "validation": "validation" if renamed else "validate", "test": "test"}
    columns = ("qid", "question", "answer", "img_name", "content_type", "q_lang")
    with open_folder(raw / "imgs") as read:
        for split, file in files.items():
            for row in read_json(raw / f"{file}.json", [columns]):
                require_known(f"{raw / file}.json: q_lang of {row['qid']!r:.40}", row["q_lang"], ("en", "zh"))
                if row["q_lang"] == "en":
                    name = row["img_name"] or NO_NAME
                    yield split, Record(row["qid"], row["question"], row["answer"], read(name), name,
                                        type=row["content_type"])


@dataset(kind="image questions", licence="CC-BY-4.0", access="open", megabytes=186,
         page="https://zenodo.org/records/10499039",
         urls=("https://zenodo.org/records/10499039/files/ImageClef-2019-VQA-Med-Training.zip",
               "https://zenodo.org/records/10499039/files/ImageClef-2019-VQA-Med-Validation.zip",
               "https://zenodo.org/records/10499039/files/VQAMed2019Test.zip"),
         layouts=(("ImageClef-2019-VQA-Med-Training.zip", "ImageClef-2019-VQA-Med-Validation.zip",
                   "VQAMed2019Test.zip"),
                  ("ImageClef-2019-VQA-Med-Training/All_QA_Pairs_train.txt",
                   "ImageClef-2019-VQA-Med-Validation/All_QA_Pairs_val.txt",
                   f"VQAMed2019Test/{TEST_ANSWERS}"),
                  (f"VQAMed2019Test/{TEST_ANSWERS}",), (TEST_ANSWERS,)),
         counts={"train": 12792, "validation": 2000, "test": 500}, shared_ids="MedPix")
def vqa_med_2019(raw):
    """
    VQA-Med 2019 (Ben Abacha et al. 2019): modality, plane, organ and abnormality in radiology.

    Test answers stay as published, with all that counts as right beside them, see `references`. The
    test set is read without the others, too.
    """
    for split, part, name in (("train", "train", "ImageClef-2019-VQA-Med-Training"),
                              ("validation", "val", "ImageClef-2019-VQA-Med-Validation")):
        folder = raw / name
        if not any(raw.glob(f"{name}*")):
            continue
        with open_folder(folder) as read:
            types = {(image, question): category.lower()
                     for number, category in enumerate(("Modality", "Plane", "Organ", "Abnormality"), 1)
                     for image, question, _ in read_rows(
                         folder, read, f"QAPairsByCategory/C{number}_{category}_{part}.txt", 3)}
            rows = read_rows(folder, read, f"All_QA_Pairs_{part}.txt", 3)
            for number, (image, question, answer) in enumerate(rows):
                yield split, Record(f"{split}_{number:06d}", question, answer,
                                    read(f"{part.title()}_images/{image}.jpg"), f"{image}.jpg",
                                    type=types.get((image, question), ""))
    yield from read_vqa_med_test(raw if (raw / TEST_ANSWERS).is_file() else raw / "VQAMed2019Test")


def references(answer):
    """
    All that counts as right by a test answer of VQA-Med 2019, whose "#" parts alternatives and whose
    brackets hold what may be left out.

    An alternative counts as it stands, which is how the training answers are written, too, then
    without its brackets, then without what they hold. A bracket without its partner holds nothing.

    >>> references("ct (iv)#mri")
    ('ct (iv)', 'ct iv', 'ct', 'mri')
    """
    alternatives = []
    for text in answer.split("#"):
        short, nested = text, True
        while nested:  # the innermost first
            short, nested = re.subn(r"\([^()]*\)", "", short)
        alternatives += [text, re.sub(r"[()]", "", text), short]
    alternatives = [" ".join(text.split()) for text in alternatives]
    return tuple(dict.fromkeys(text for text in alternatives if text))


def read_vqa_med_test(folder):
    """("test", Record)s of VQA-Med 2019, whose test images lie in a zip inside the folder or zip."""
    images = "VQAMed2019_Test_Images"
    with open_folder(folder) as read:
        rows, packed = read_rows(folder, read, TEST_ANSWERS, 4), read(f"{images}.zip")
        archive = None if packed is None else open_zip(f"{folder}/{images}.zip", io.BytesIO(packed))
        inside = archive and find_folder(archive, f"{images}/")
        for number, (name, category, question, answer) in enumerate(rows):
            image = read(f"{images}/{name}.jpg")
            if image is None and archive:
                image = read_member(archive, f"{inside}{name}.jpg")
            yield "test", Record(f"test_{number:06d}", question, answer, image, f"{name}.jpg",
                                 type=category, references=references(answer))
