"""
The datasets of multiple choice: exams and abstracts without images, and questions about several images.

A record's `choices` are its options, as published: empty or equal ones stay. tasks/choices.py says how they are
written behind the question. Those that were made to test with have a test split alone, so that nothing trains on
them; figures.py has the large sets of multiple choice about one image.
"""

import csv
import functools
import re
from collections import Counter

from data import Record, View
from plumbing.flags import UserError
from prepare.datasets import (HUB_IMAGE, NO_NAME, count_from, dataset, expect, lettered, place, read_csv, read_json,
                              read_json_lines, read_parquets, refuse_damage, require_known,
                              require_splits)
from prepare.questions import open_folder
from tasks.choices import LETTERS

FOUR = ("A", "B", "C", "D")


# ----------------------------------------------------------------------------- a question

def right_place(where, letter, options, answer):
    """The place of the option with this letter, -1 if none has it; UserError if the answer's text is not its text."""
    right = place(letter.strip(), list(LETTERS[:len(options)]))
    if answer and right >= 0 and answer.strip() != options[right].strip():
        raise UserError(f"{where}: its answer is {answer!r:.60}, and option {letter} {options[right]!r:.60}; fetch "
                        "the file as it was published")
    return right


def group_equals(questions):
    """
    Groups that the bootstrap draws whole: of each (id, text) the id of the first with an equal text; "" where it
    is the only one. Case, spaces and punctuation aside: MedMCQA asks "Skeletal muscles" and "Skeletal muscles:".
    """
    identifiers, texts = zip(*questions) if questions else ((), ())
    keys = [re.sub(r"[\W_]+", "", text.casefold()) for text in texts]
    times, first = Counter(keys), {}
    return [first.setdefault(key, identifier) if key and times[key] > 1 else ""
            for identifier, key in zip(identifiers, keys)]


def show(views):
    """What a Record shows of its (bytes or None, name)s: a single image, or several parts with roles."""
    if len(views) == 1:
        return {"image": views[0][0], "image_name": views[0][1]}
    parts = tuple(View(image, name, f"image {number}") for number, (image, name) in enumerate(views, 1))
    return {"parts": parts, "image_name": views[0][1] if views else NO_NAME}


def first_file(raw, names):
    """The first of these files that is there; the first name where none is."""
    return next((raw / name for name in names if (raw / name).is_file()), raw / names[0])


# ----------------------------------------------------------------------------- MedQA

MED_QA_FOLDERS = ("", "data_clean/questions/US/4_options/")  # the hub's, its authors'


@dataset(kind="text questions", task="choices", licence="CC-BY-4.0 (hub card; MIT in the authors' repository)",
         access="open", megabytes=18, also=("medqa",),
         page="https://huggingface.co/datasets/GBaker/MedQA-USMLE-4-options",
         hub="GBaker/MedQA-USMLE-4-options", hub_files=("phrases_no_exclude_*.jsonl",),
         layouts=tuple(tuple(f"{folder}phrases_no_exclude_{split}.jsonl" for split in splits)
                       for folder in MED_QA_FOLDERS for splits in (("train", "test"), ("test",))),
         counts={"train": 10178, "test": 1273})
def med_qa(raw):
    """
    MedQA (Jin et al. 2020): questions of the United States licensing exam, four options each.

    The test file is read without the other, too.
    """
    form = {"question": str, "options": FOUR, "answer_idx": str, "meta_info": str, "answer": str}
    test = first_file(raw, [f"{folder}phrases_no_exclude_test.jsonl" for folder in MED_QA_FOLDERS])
    for split, path in (("train", test.with_name("phrases_no_exclude_train.jsonl")), ("test", test)):
        if split == "train" and not path.is_file():
            continue
        rows = list(read_json_lines(path, form, answer=""))
        names = [f"{split}_{number:06d}" for number in range(len(rows))]
        groups = group_equals([(name, row["question"]) for name, row in zip(names, rows)])
        for number, (name, row, group) in enumerate(zip(names, rows, groups), 1):
            options = list(row["options"].values())
            right = right_place(f"{path}: sample {number}", row["answer_idx"], options, row["answer"])
            yield split, lettered(name, row["question"], options, right, type=row["meta_info"], group=group)


MEDIQ_FILES = ("data/all_dev_good.jsonl", "all_dev_good.jsonl")


@dataset(only_by_name=True, kind="text questions", task="choices", licence="CC-BY-4.0", access="open", megabytes=3,
         page="https://github.com/stellalisy/mediQ",
         urls=("https://raw.githubusercontent.com/stellalisy/mediQ/faa2ce62fef0423e35af4c31d7537aad973173eb/"
               "data/all_dev_good.jsonl",),
         layouts=tuple((name,) for name in MEDIQ_FILES), counts={"test": 1272})
def mediq(raw):
    """MediQ (Li et al. 2024): the development questions of MedQA, cut into sentences; here they are whole again."""
    path = first_file(raw, MEDIQ_FILES)
    form = {"id": str, "context": [str], "question": str, "options": FOUR, "answer": str, "answer_idx": str}
    rows = list(read_json_lines(path, form))
    questions = [" ".join((*row["context"], row["question"])) for row in rows]
    groups = group_equals([(row["id"], question) for row, question in zip(rows, questions)])
    for number, (row, question, group) in enumerate(zip(rows, questions, groups), 1):
        options = list(row["options"].values())
        right = right_place(f"{path}: sample {number}", row["answer_idx"], options, row["answer"])
        yield "test", lettered(row["id"], question, options, right, group=group)


# ----------------------------------------------------------------------------- MedMCQA

def open_med_mcqa(raw):
    """(where, {split: function from a form to its rows}) of the hub's parquets or the authors' lines of JSON."""
    if any(raw.glob("data/*.parquet")):
        require_splits(raw / "data", "train", "validation", "test")
        return raw / "data", {split: functools.partial(read_parquets, raw / "data", name)
                              for split, name in (("train", "train"), ("test", "validation"))}
    test = first_file(raw, ("data/dev.json", "dev.json"))
    files = {"train": test.with_name("train.json"), "test": test}
    return test, {split: functools.partial(read_json_lines, path) for split, path in files.items()
                  if split == "test" or path.is_file()}


@dataset(kind="text questions", task="choices", licence="Apache-2.0 (hub card; MIT in the authors' repository)",
         access="open", megabytes=88, also=("medmcqa",),
         page="https://huggingface.co/datasets/openlifescienceai/medmcqa",
         hub="openlifescienceai/medmcqa", hub_files=("data/train-*.parquet", "data/validation-*.parquet"),
         layouts=(("data/train-*.parquet", "data/validation-*.parquet"), ("data/validation-*.parquet",),
                  ("data/train.json", "data/dev.json"), ("data/dev.json",), ("train.json", "dev.json"),
                  ("dev.json",)),
         counts={"train": 182822, "test": 4183})
def med_mcqa(raw):
    """
    MedMCQA (Pal et al. 2022): Indian medical entrance exams.

    Its authors keep the answers of their test file to themselves, so that everybody reports the validation
    questions: these are our test split, and the file without answers is never read.
    """
    columns = ("id", "question", "opa", "opb", "opc", "opd", "cop", "exp", "subject_name")
    where, reads = open_med_mcqa(raw)
    numbers = [row["cop"].removesuffix(".0") for read in reads.values() for row in read({"cop": str})]
    # The hub's count from 0, the authors' own JSON from 1
    first = count_from(f"{where}: cop", [number for number in numbers if number not in ("-1", "")], 4)
    places = [str(first + option) for option in range(4)]
    for split, read in reads.items():
        groups = group_equals([(row["id"], row["question"]) for row in read({"id": str, "question": str})])
        for row, group in zip(read(dict.fromkeys(columns, str)), groups):
            options = [row[name] for name in ("opa", "opb", "opc", "opd")]
            right = place(row["cop"].removesuffix(".0"), places)  # -1 or none: an empty answer
            yield split, lettered(row["id"], row["question"], options, right, type=row["subject_name"], group=group,
                                  reasoning=row["exp"])


# ----------------------------------------------------------------------------- MMLU

MMLU_SUBJECTS = ("anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics",
                 "professional_medicine")
MMLU_FOLDERS = ("data/test/", "test/")


def read_bare_csv(path, columns):
    """Yield the rows, lists of so many texts, of a table without a header; UserError at a row of another length."""
    with refuse_damage(path, "table"), open(path, encoding="utf-8-sig", newline="") as file:
        number = 0
        for number, row in enumerate(csv.reader(file), 1):
            if len(row) != columns:
                raise UserError(f"{path}: row {number} has {len(row)} columns, not {columns}; fetch the file as it "
                                "was published")
            yield row
        if not number:
            raise UserError(f"{path}: empty; fetch it again")


def read_mmlu(raw, subject):
    """Yield (question, options, place of the right one) of a subject's test, from the authors' csv or the hub's."""
    path = first_file(raw, [f"{folder}{subject}_test.csv" for folder in MMLU_FOLDERS])
    if not path.is_file() and any((raw / subject).glob("test-*.parquet")):
        form = {"question": str, "choices": [str], "answer": str}
        for number, row in enumerate(read_parquets(raw / subject, "test", form), 1):
            require_known(f"{raw / subject}: answer of row {number}", row["answer"], ("0", "1", "2", "3"))
            yield row["question"], row["choices"], int(row["answer"])
        return
    for number, (question, *options, letter) in enumerate(read_bare_csv(path, 6), 1):
        require_known(f"{path}: answer of row {number}", letter.strip(), FOUR)  # a copy has a header, and 0 to 3
        yield question, options, FOUR.index(letter.strip())


@dataset(only_by_name=True, kind="text questions", task="choices", licence="MIT", access="open", megabytes=1,
         also=("mmlu",), page="https://github.com/hendrycks/test or https://huggingface.co/datasets/cais/mmlu",
         hub="cais/mmlu", hub_files=tuple(f"{subject}/test-*.parquet" for subject in MMLU_SUBJECTS),
         layouts=(*(tuple(f"{folder}{subject}_test.csv" for subject in MMLU_SUBJECTS) for folder in MMLU_FOLDERS),
                  tuple(f"{subject}/test-*.parquet" for subject in MMLU_SUBJECTS)),
         counts={"test": 1089})
def mmlu_med(raw):
    """
    MMLU (Hendrycks et al. 2021), the six subjects that works on medicine report.

    78 questions are in clinical_knowledge and in college_medicine, word for word; they stay, in groups. The five
    "dev" questions of a subject are examples for a prompt, no validation split, and are not read.
    """
    rows = [(f"{subject}_{number:03d}", subject, *row) for subject in MMLU_SUBJECTS
            for number, row in enumerate(read_mmlu(raw, subject))]
    groups = group_equals([(name, question) for name, _, question, *_ in rows])
    for (name, subject, question, options, right), group in zip(rows, groups):
        yield "test", lettered(name, question, options, right, type=subject, group=group)


# ----------------------------------------------------------------------------- Medbullets

def read_medbullets(raw, count):
    """("test", Record)s of the file with so many options a question; ids are links, which both files have."""
    path = first_file(raw, (f"medbullets_op{count}.csv", f"medbullets/medbullets_op{count}.csv"))
    columns = [f"op{letter}" for letter in LETTERS[:count].lower()]
    rows = list(read_csv(path, ("link", "question", *columns, "answer_idx", "answer", "explanation")))
    groups = group_equals([(row["link"], row["question"]) for row in rows])
    for number, (row, group) in enumerate(zip(rows, groups), 1):
        options = [row[column] for column in columns]
        right = right_place(f"{path}: row {number}", row["answer_idx"], options, row["answer"])
        yield "test", lettered(row["link"], row["question"], options, right, group=group,
                               reasoning=row["explanation"])


MEDBULLETS = {"only_by_name": True, "kind": "text questions", "task": "choices", "access": "open", "megabytes": 1,
              "licence": "none stated; the questions are medbullets.com's", "also": ("medbullets",),
              "page": "https://github.com/HanjieChen/ChallengeClinicalQA", "counts": {"test": 308}}
MEDBULLETS_URL = ("https://raw.githubusercontent.com/HanjieChen/ChallengeClinicalQA/"
                  "ef3c9da03fc17f46fbd95ce860e0a55c51ed3606/medbullets/")


@dataset(**MEDBULLETS, urls=(f"{MEDBULLETS_URL}medbullets_op4.csv",),
         layouts=(("medbullets_op4.csv",), ("medbullets/medbullets_op4.csv",)))
def medbullets_4(raw):
    """Medbullets (Chen et al. 2024), four options: cases in the style of the exam's steps 2 and 3; 10 occur twice."""
    yield from read_medbullets(raw, 4)


@dataset(**MEDBULLETS, urls=(f"{MEDBULLETS_URL}medbullets_op5.csv",),
         layouts=(("medbullets_op5.csv",), ("medbullets/medbullets_op5.csv",)))
def medbullets_5(raw):
    """Medbullets (Chen et al. 2024), five options: the same questions with one more, in another order."""
    yield from read_medbullets(raw, 5)


# ----------------------------------------------------------------------------- MedXpertQA

XPERT_TEXT = ("Text/test.jsonl", "eval/data/medxpertqa/input/medxpertqa_text_input.jsonl",
              "eval/data/medxpertqa_sampled/input/medxpertqa_sampled_text_input.jsonl")
XPERT_MM = ("MM/test.jsonl", "eval/data/medxpertqa/input/medxpertqa_mm_input.jsonl")


def xpert_options(where, options):
    """The texts of {"A": text, ...}, the hub's, or of [{"letter": "A", "content": text}, ...], the repository's."""
    if isinstance(options, dict):
        letters, texts = list(options), expect(f"{where}: options", list(options.values()), [str])
    else:
        pairs = expect(f"{where}: options", options, [("letter", "content")])
        letters, texts = [pair["letter"] for pair in pairs], [pair["content"] for pair in pairs]
    if letters != list(LETTERS[:len(letters)]):
        raise UserError(f"{where}: its options are lettered {', '.join(letters)!r:.60}, not from A on; fetch the file "
                        "as it was published")
    return texts


def read_xpert(path):
    """
    Yield (row, question, options, place of the right one) of a file of MedXpertQA, in either layout.

    The question is published with its choices behind it, which lettered() writes, too: they are cut off.
    """
    form = {"id": str, "question": str, "question_type": str}
    for number, row in enumerate(read_json_lines(path, dict, options=None, label=None, images=None), 1):
        where = f"{path}: line {number}"
        options = xpert_options(where, row["options"])
        letters = row["label"] if isinstance(row["label"], list) else [row["label"]]
        letters = expect(f"{where}: label", letters, [str])
        if len(letters) > 1:
            raise UserError(f"{where}: {len(letters)} right options, where one is read; fetch the file as it was "
                            "published")
        row |= expect(where, row, form)
        question = re.split(r"\s*Answer Choices:\s*\(A\)", row["question"])[0]
        yield row, question, options, right_place(where, "".join(letters), options, "")


def xpert_images(where, images):
    """The names in ["a.png", ...], the hub's, or in [{"image_path": "a.png"}, ...], the repository's."""
    if isinstance(images, list) and any(isinstance(image, dict) for image in images):
        return [image["image_path"] for image in expect(where, images, [("image_path",)])]
    return expect(where, images, [str])


@dataset(only_by_name=True, kind="text questions", task="choices", licence="MIT", access="open", megabytes=6,
         also=("medxpertqa",), page="https://huggingface.co/datasets/TsinghuaC3I/MedXpertQA",
         hub="TsinghuaC3I/MedXpertQA", hub_files=XPERT_TEXT[:1], layouts=tuple((name,) for name in XPERT_TEXT),
         counts={"test": 2450})
def med_xpert_qa_text(raw):
    """
    MedXpertQA (Zuo et al. 2025), its text questions, ten options each.

    Where there is nothing else, the 244 of them are read that the authors' repository has as a sample.
    """
    rows = list(read_xpert(first_file(raw, XPERT_TEXT)))
    groups = group_equals([(row["id"], question) for row, question, *_ in rows])
    for (row, question, options, right), group in zip(rows, groups):
        yield "test", lettered(row["id"], question, options, right, type=row["question_type"], group=group)


@dataset(only_by_name=True, kind="image questions", task="choices", licence="MIT", access="open", megabytes=0,
         also=("medxpertqa",), page="https://huggingface.co/datasets/TsinghuaC3I/MedXpertQA",
         hub="TsinghuaC3I/MedXpertQA", hub_files=(XPERT_MM[0], "images.zip"),
         layouts=tuple((name, images) for name in XPERT_MM for images in ("images.zip", "images/MM-*")),
         counts={"test": 2000})
def med_xpert_qa_mm(raw):
    """
    MedXpertQA (Zuo et al. 2025), its questions about one to six images, five options each.

    The hub's images.zip was never seen: its images are looked for in images/, in it or unpacked beside it.
    """
    path = first_file(raw, XPERT_MM)
    with open_folder(raw / "images") as read:
        for number, (row, question, options, right) in enumerate(read_xpert(path), 1):
            names = xpert_images(f"{path}: line {number}: images", row["images"])
            yield "test", lettered(row["id"], question, options, right, type=row["question_type"],
                                   **show([(read(name), name or NO_NAME) for name in names]))


# ----------------------------------------------------------------------------- MedFrameQA

@dataset(only_by_name=True, kind="image questions", task="choices", licence="CC-BY-4.0", access="open", megabytes=0,
         also=("medframeqa",), page="https://huggingface.co/datasets/SuhaoYu1020/MedFrameQA",
         hub="SuhaoYu1020/MedFrameQA", hub_files=("data/test-*.parquet",), layouts=(("data/test-*.parquet",),),
         counts={"test": 2851})
def med_frame_qa(raw):
    """
    MedFrameQA (Yu et al. 2025): two to five frames of a teaching video a question, and up to six options.

    The file was never seen: its columns are those that programs in public use read of it. A video is a group.
    """
    frames = [f"image_{number}" for number in range(1, 6)]
    form = dict.fromkeys(("question_id", "question", "correct_answer", "modality", "video_id"), str)
    form |= {"options": [str]} | dict.fromkeys(frames, HUB_IMAGE)
    require_splits(raw / "data", "test")
    for number, row in enumerate(read_parquets(raw / "data", "test", form), 1):
        right = right_place(f"{raw / 'data'}: row {number}", row["correct_answer"], row["options"], "")
        images = [(row[frame]["bytes"], row[frame]["path"] or f"{row['question_id']}_{frame}") for frame in frames
                  if row[frame]["bytes"] is not None or row[frame]["path"]]
        yield "test", lettered(row["question_id"], row["question"], row["options"], right, type=row["modality"],
                               group=row["video_id"], **show(images))


# ----------------------------------------------------------------------------- PubMedQA

def word_choice(where, identifier, question, decision, contexts, words):
    """The Record of a question that one of these words answers, or nothing; it does not list them."""
    if decision:
        require_known(f"{where}: final_decision of {identifier!r:.40}", decision, words)
    return Record(identifier, question, decision, context=" ".join(contexts), type="/".join(words), choices=words)


@dataset(kind="text questions", task="choices", licence="MIT", access="open", megabytes=3,
         page="https://github.com/pubmedqa/pubmedqa", counts={"train": 500, "test": 500}, shared_ids="PubMed",
         urls=("https://raw.githubusercontent.com/pubmedqa/pubmedqa/master/data/ori_pqal.json",
               "https://raw.githubusercontent.com/pubmedqa/pubmedqa/master/data/test_ground_truth.json"),
         layouts=(("ori_pqal.json", "test_ground_truth.json"),))
def pubmed_qa(raw):
    """PubMedQA (Jin et al. 2019), the 1,000 expert-labelled questions; answers yes, no, maybe."""
    held_out, path = read_json(raw / "test_ground_truth.json", dict), raw / "ori_pqal.json"
    form = {"QUESTION": str, "CONTEXTS": [str], "final_decision": str}
    for identifier, row in read_json(path, dict).items():
        row = expect(f"{path}: {identifier!r}", row, form)
        decision = row["final_decision"]
        if identifier in held_out and held_out[identifier] != decision:
            raise UserError(f"{path}: {identifier!r:.40} is {decision!r:.40}, by "
                            f"{raw / 'test_ground_truth.json'} {held_out[identifier]!r:.40}; fetch both again")
        yield ("test" if identifier in held_out else "train",
               word_choice(path, identifier, row["QUESTION"], decision, row["CONTEXTS"], ("yes", "no", "maybe")))


@dataset(kind="text questions", task="choices", licence="MIT", access="open", megabytes=233,
         page="https://huggingface.co/datasets/qiaojin/PubMedQA",
         hub="qiaojin/PubMedQA", hub_files=("pqa_artificial/*.parquet",),
         layouts=(("pqa_artificial/*.parquet",),), counts={"train": 211269}, shared_ids="PubMed")
def pubmed_qa_artificial(raw):
    """PubMedQA (Jin et al. 2019), the questions made out of article titles; answers yes, no."""
    form = {"pubid": str, "question": str, "context": {"contexts": [str]}, "final_decision": str}
    folder = raw / "pqa_artificial"
    require_splits(folder, "train")
    where = next(iter(sorted(folder.glob("*.parquet"))), folder)  # the hub's is one file
    for row in read_parquets(folder, "train", form):
        yield "train", word_choice(where, row["pubid"], row["question"], row["final_decision"],
                                   row["context"]["contexts"], ("yes", "no"))
