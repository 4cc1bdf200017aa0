"""
The datasets of multiple choice: each from small copies of its layouts and, where NANOMEDQ_RAW has them, from real
files, whose counts are those of their papers or were counted here.
"""

import csv
import io
import json
from collections import Counter

import pytest

from data import Record, View
from prepare.choices import MMLU_SUBJECTS, group_equals
from prepare.datasets import DATASETS
from prepare.shards import clean_record, words_of
from tasks.choices import letter_options, stem_of
from test_box_data import real
from test_prepare import picture, write_parquet
from test_questions import read, refused, write_files, write_zip

NAMES = [name for name, facts in DATASETS.items() if facts.task == "choices"]
MADE_TO_TEST = ("mediq", "mmlu_med", "medbullets_4", "medbullets_5", "med_xpert_qa_text", "med_xpert_qa_mm",
                "med_frame_qa")


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows, header=None):
    stream = io.StringIO()
    csv.writer(stream).writerows([header, *rows] if header else rows)
    return stream.getvalue()


def files_found(name, raw_dir):
    return sorted(DATASETS[name].find(raw_dir))


def by_id(records):
    return {record.id: record for _, record in records}


# ----------------------------------------------------------------------------- small copies

def med_qa_row(letter, **changes):
    return {"question": "A man coughs. Which drug helps?", "answer": "Codeine", "answer_idx": letter,
            "options": {"A": "Aspirin", "B": "Codeine", "C": "Iron", "D": "Water"},
            "meta_info": "step2&3", "metamap_phrases": ["man", "cough"]} | changes


def write_med_qa(raw, folder=""):
    swapped = med_qa_row("D", options={"D": "Codeine", "C": "Éther", "B": "Iron", "A": "Water"}, meta_info="step1")
    write_files(raw, {f"{folder}phrases_no_exclude_train.jsonl": json_lines([med_qa_row("B"), swapped]),
                      f"{folder}phrases_no_exclude_test.jsonl": json_lines([swapped]).strip()})


def mediq_row(number, letter, **changes):
    return {"id": number, "context": ["A man coughs.", "He is pale."], "question": f"Which drug helps in {number}?",
            "options": {"A": "Aspirin", "B": "Codeine", "C": "Iron", "D": "Water"}, "context_len": 2,
            "answer": {"B": "Codeine", "C": "Iron"}[letter], "answer_idx": letter, "facts": ["He is a man."]} | changes


def write_mediq(raw, folder="data/"):
    write_files(raw, {f"{folder}all_dev_good.jsonl": json_lines([mediq_row(0, "B"), mediq_row(7, "C", context=[])])})


def med_mcqa_row(identifier, right, subject="Anatomy", question="Which bone is longest?"):
    return {"id": identifier, "question": question, "opa": "Femur", "opb": "Tibia",
            "opc": "Ulna", "opd": "Stapes", "cop": right, "choice_type": "multi", "exp": None,
            "subject_name": subject, "topic_name": None}


MCQA = {"train": [("a", 0), ("b", 3, "Anatomy", "Which is shortest?"), ("c", 2, None, "which bone is longest")],
        "validation": [("d", 1, "Surgery"), ("g", 3)]}


def write_med_mcqa(raw):
    rows = {split: [med_mcqa_row(*row) for row in some] for split, some in MCQA.items()}
    for name, some in (("train-00000-of-00002", rows["train"][:2]), ("train-00001-of-00002", rows["train"][2:]),
                       ("validation-00000-of-00001", rows["validation"])):
        write_parquet(raw / f"data/{name}.parquet", some)


def write_med_mcqa_lines(raw, folder="data/"):
    """The authors' files, which count from 1."""
    for split, name in (("train", "train"), ("validation", "dev")):
        rows = [med_mcqa_row(*row) for row in MCQA[split]]
        write_files(raw, {f"{folder}{name}.json": json_lines([row | {"cop": row["cop"] + 1} for row in rows])})


MMLU_ROWS = [("Which bone?\nThe longest, \"please\".", "Femur", "Tibia", "Ulna", "None of the above", "A"),
             ("Which nerve?", "I", "II", "III", "IV", "D")]


def write_mmlu(raw, folder="data/test/"):
    for subject in MMLU_SUBJECTS:
        write_files(raw, {f"{folder}{subject}_test.csv": table(MMLU_ROWS[:1 + (subject == "anatomy")])})


def write_mmlu_parquets(raw):
    for subject in MMLU_SUBJECTS:
        write_parquet(raw / subject / "test-00000-of-00001.parquet", [
            {"question": question, "subject": subject, "choices": options, "answer": "ABCD".index(letter)}
            for question, *options, letter in MMLU_ROWS[:1 + (subject == "anatomy")]])


def bullets_row(link, options, letter, question="A man falls. What is next?"):
    return (link, question, *options, letter, options["ABCDE".index(letter)], "Long,\nand quoted.")


def write_medbullets(count, folder=""):
    def write(raw):
        header = ("link", "question", *(f"op{letter}" for letter in "abcde"[:count]), "answer_idx", "answer",
                  "explanation")
        options = ["CT", "MRI", "Rest", "Splint", "X-ray"]
        rows = [bullets_row("https://a.b/1", options[:count], "B"),
                bullets_row("https://a.b/2", options[5 - count:], "C", "Why does he fall?"),
                bullets_row("https://a.b/3", options[:count], "B", "A man falls.  What is next?")]
        write_files(raw, {f"{folder}medbullets_op{count}.csv": table(rows[::(1 if count == 4 else -1)], header)})
    return write


def xpert_row(identifier, letter, count, images=None, hub=True, stem="Which is it?"):
    letters = "ABCDEFGHIJ"[:count]
    asked = f"{stem}\nAnswer Choices: {' '.join(f'({name}) cause {name.lower()}' for name in letters)}"
    row = {"id": identifier, "question": asked, "medical_task": "Diagnosis", "body_system": "Digestive",
           "question_type": "Reasoning", "label": letter if hub else [letter],
           "options": {name: f"cause {name.lower()}" for name in letters} if hub else
           [{"letter": name, "content": f"cause {name.lower()}"} for name in letters]}
    return row if images is None else row | {
        "images": images if hub else [{"image_path": image} for image in images]}


XPERT_TEXTS = [("Text-3", "J"), ("Text-5", "A")]
XPERT_IMAGES = {f"MM-{name}": picture(number) for number, name in enumerate(("0-a.jpeg", "0-b.png", "4-a.jpeg"))}


def xpert_mm_rows(hub):
    return [xpert_row("MM-0", "E", 5, ["MM-0-a.jpeg", "MM-0-b.png"], hub),
            xpert_row("MM-4", "A", 5, ["MM-4-a.jpeg"], hub), xpert_row("MM-5", "B", 5, ["MM-5-a.jpeg"], hub)]


def write_xpert_text(raw):
    write_files(raw, {"Text/test.jsonl": json_lines([xpert_row(*row, 10) for row in XPERT_TEXTS])})


def write_xpert_mm(raw):
    write_files(raw, {"MM/test.jsonl": json_lines(xpert_mm_rows(True))})
    write_zip(raw / "images.zip", {f"images/{name}": image for name, image in XPERT_IMAGES.items()})


def frame_row(number, letter, images, options=("fluid", "air", "bone", "fat", "blood", "none of these")):
    frames = {f"image_{n + 1}": {"bytes": picture(image), "path": f"{image}.jpg"} for n, image in enumerate(images)}
    return {"question_id": f"q{number}", "question": "What do the frames show?", "options": list(options),
            "correct_answer": letter, "modality": "CT", "system": "Respiratory", "video_id": f"video {number // 2}",
            **dict.fromkeys(("image_1", "image_2", "image_3", "image_4", "image_5")), **frames}


def write_med_frame_qa(raw):
    write_parquet(raw / "data/test-00000-of-00001.parquet",
                  [frame_row(0, "F", range(5)), frame_row(1, "A", (7, 8), ("fluid", "air")), frame_row(2, "B", (9,))])


def write_pubmed_qa(raw):
    rows = {number: {"QUESTION": f"does {number} help?", "CONTEXTS": ["We tried.", "It did."],
                     "final_decision": decision} for number, decision in (("7", "yes"), ("8", "maybe"))}
    write_files(raw, {"ori_pqal.json": json.dumps(rows), "test_ground_truth.json": json.dumps({"8": "maybe"})})


def write_pubmed_qa_artificial(raw):
    write_parquet(raw / "pqa_artificial/train-00000-of-00001.parquet", [
        {"pubid": number, "question": question, "long_answer": "It does.", "final_decision": decision,
         "context": {"contexts": contexts, "labels": ["AIM"], "meshes": ["Humans"]}}
        for number, question, contexts, decision in [
            (25429730, "Does it help?", ["We tried.", "It did."], "yes"),
            (25433161, "Does it harm?", [], "no"), (7, "Is it new?", ["No."], None)]])


WRITERS = {"med_qa": write_med_qa, "mediq": write_mediq, "med_mcqa": write_med_mcqa, "mmlu_med": write_mmlu,
           "medbullets_4": write_medbullets(4), "medbullets_5": write_medbullets(5),
           "med_xpert_qa_text": write_xpert_text, "med_xpert_qa_mm": write_xpert_mm,
           "med_frame_qa": write_med_frame_qa, "pubmed_qa": write_pubmed_qa,
           "pubmed_qa_artificial": write_pubmed_qa_artificial}


def hold_choices(records):
    """Every right answer is an option, and the stem of a cleaned record is what it was before the options."""
    for _, record in records:
        line = words_of(clean_record(record))
        stem, lettered = stem_of(line)
        wanted = letter_options(line["choices"]) if lettered else line["choices"]
        assert line["answer"] in wanted, line
        assert len(stem) > 5 and f"{stem} {' '.join(wanted)}".startswith(line["question"]), line


# ----------------------------------------------------------------------------- facts

@pytest.mark.parametrize("name", WRITERS)
def test_every_record_of_a_small_copy_has_its_choices(name, tmp_path):
    raw = tmp_path / name
    WRITERS[name](raw)
    facts, records = DATASETS[name], read(name, raw)
    assert facts.find(tmp_path) and facts.task == "choices"
    assert {split for split, _ in records} == set(facts.counts)
    hold_choices((split, record) for split, record in records if record.answer)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_made_to_test_with_is_not_trained_on(name):
    facts = DATASETS[name]
    assert facts.only_by_name == (name in MADE_TO_TEST or name == "pmc_vqa_v2")
    assert ("train" in facts.counts) == (name not in MADE_TO_TEST) or name == "ubench"
    assert (facts.kind == "text questions") == (name in WRITERS and name not in ("med_xpert_qa_mm", "med_frame_qa"))
    assert facts.licence and facts.page and (facts.urls or facts.hub)
    if facts.urls:  # what is downloaded is what is read
        assert any({url.rsplit("/", 1)[1] for url in facts.urls} == set(layout) for layout in facts.layouts)


@pytest.mark.parametrize("name, folder, write", [
    ("med_qa", "medqa", write_med_qa), ("med_mcqa", "medmcqa", write_med_mcqa), ("mmlu_med", "mmlu", write_mmlu),
    ("medbullets_4", "medbullets", write_medbullets(4)), ("medbullets_5", "medbullets", write_medbullets(5)),
    ("med_xpert_qa_text", "medxpertqa", write_xpert_text), ("med_xpert_qa_mm", "medxpertqa", write_xpert_mm)])
def test_a_folder_may_have_the_name_of_its_repository(name, folder, write, tmp_path):
    write(tmp_path / folder)
    assert DATASETS[name].raw(tmp_path) == tmp_path / folder and DATASETS[name].find(tmp_path)
    write(tmp_path / name)
    assert DATASETS[name].raw(tmp_path) == tmp_path / name


def test_equal_questions_are_one_group():
    assert group_equals([]) == []
    assert group_equals([("a", "Muscles:"), ("b", "Bones"), ("c", "muscles"), ("d", "?"), ("e", "!"), ("f", ""),
                         ("g", "Ärzte 1"), ("h", "ärzte, 1"), ("i", "Ärzte 2")]) == [
        "a", "", "a", "", "", "", "g", "g", ""]


# ----------------------------------------------------------------------------- MedQA, MediQ

DRUGS, OTHERS = ("Aspirin", "Codeine", "Iron", "Water"), ("Water", "Iron", "Éther", "Codeine")


@pytest.mark.parametrize("folder", ["", "data_clean/questions/US/4_options/"])
def test_med_qa_is_read_with_or_without_its_training_file(folder, tmp_path):
    raw = tmp_path / "med_qa"
    write_med_qa(raw, folder)
    asked = "A man coughs. Which drug helps? A. Aspirin B. Codeine C. Iron D. Water"
    # options stand in the order of their letters, whatever their order in the file
    other = "A man coughs. Which drug helps? A. Water B. Iron C. Éther D. Codeine"
    same = {"group": "train_000000"}
    test = ("test", Record("test_000000", other, "D. Codeine", type="step1", choices=OTHERS))
    assert read("med_qa", raw) == [
        ("train", Record("train_000000", asked, "B. Codeine", type="step2&3", choices=DRUGS, **same)),
        ("train", Record("train_000001", other, "D. Codeine", type="step1", choices=OTHERS, **same)), test]
    paths = [f"{folder}phrases_no_exclude_{split}.jsonl" for split in ("test", "train")]
    assert files_found("med_qa", tmp_path) == paths
    (raw / paths[1]).unlink()
    assert read("med_qa", raw) == [test] and files_found("med_qa", tmp_path) == paths[:1]
    (raw / paths[0]).unlink()
    assert files_found("med_qa", tmp_path) == []
    refused("med_qa", raw, "phrases_no_exclude_test.jsonl: missing")


def test_the_first_layout_of_med_qa_that_is_there_wins(tmp_path):
    write_med_qa(tmp_path / "med_qa", "data_clean/questions/US/4_options/")
    write_files(tmp_path / "med_qa", {"phrases_no_exclude_test.jsonl": json_lines([med_qa_row("B")])})
    assert files_found("med_qa", tmp_path) == ["phrases_no_exclude_test.jsonl"]
    assert [record.answer for _, record in read("med_qa", tmp_path / "med_qa")] == ["B. Codeine"]


def test_med_qa_refuses_damage_and_a_letter_that_is_not_the_answer_s(tmp_path):
    path, lines = tmp_path / "phrases_no_exclude_test.jsonl", json_lines([med_qa_row("B"), med_qa_row("C")])
    path.write_text(lines)
    refused("med_qa", tmp_path, f"{path}: sample 2: its answer is 'Codeine', and option C 'Iron'; fetch the file")
    path.write_text(lines[:-20])
    refused("med_qa", tmp_path, f"{path}: line 2: damaged or not JSON")
    path.write_bytes(json_lines([med_qa_row("B", question="Éther?")]).encode("latin-1"))
    refused("med_qa", tmp_path, f"{path}: line 1: damaged or not JSON")
    path.write_text(json_lines([med_qa_row("E"), med_qa_row("", answer="")]))
    assert [record.answer for _, record in read("med_qa", tmp_path)] == ["", ""]  # skipped, as empty


@pytest.mark.parametrize("folder", ["", "data/"])
def test_mediq_s_sentences_are_one_question_again(folder, tmp_path):
    raw = tmp_path / "mediq"
    write_mediq(raw, folder)
    options = "A. Aspirin B. Codeine C. Iron D. Water"
    assert read("mediq", raw) == [
        ("test", Record("0", f"A man coughs. He is pale. Which drug helps in 0? {options}", "B. Codeine",
                        choices=DRUGS)),
        ("test", Record("7", f"Which drug helps in 7? {options}", "C. Iron", choices=DRUGS))]
    write_files(raw, {f"{folder}all_dev_good.jsonl": json_lines([mediq_row(0, "B", answer="Iron")])})
    refused("mediq", raw, "all_dev_good.jsonl: sample 1: its answer is 'Iron', and option B 'Codeine'")


# ----------------------------------------------------------------------------- MedMCQA

BONES = ("Femur", "Tibia", "Ulna", "Stapes")


def mcqa_records():
    options = "A. Femur B. Tibia C. Ulna D. Stapes"
    longest = f"Which bone is longest? {options}"
    return [("train", Record("a", longest, "A. Femur", type="Anatomy", choices=BONES, group="a")),
            ("train", Record("b", f"Which is shortest? {options}", "D. Stapes", type="Anatomy", choices=BONES)),
            ("train", Record("c", f"which bone is longest {options}", "C. Ulna", choices=BONES, group="a")),
            ("test", Record("d", longest, "B. Tibia", type="Surgery", choices=BONES, group="d")),
            ("test", Record("g", longest, "D. Stapes", type="Anatomy", choices=BONES, group="d"))]


def test_the_hub_s_med_mcqa_counts_from_0_and_its_validation_is_the_test(tmp_path):
    raw = tmp_path / "med_mcqa"
    write_med_mcqa(raw)
    (raw / "data/test-00000-of-00001.parquet").write_bytes(b"never read: the answers were withheld")
    assert read("med_mcqa", raw) == mcqa_records()
    assert [name for name in files_found("med_mcqa", tmp_path) if "test" in name] == []
    for path in raw.glob("data/train*"):
        path.unlink()
    assert read("med_mcqa", raw) == mcqa_records()[3:]
    path = raw / "data/validation-00000-of-00001.parquet"
    write_parquet(path, [{"id": "e", "question": "Which bone?", "answer": "Femur", "cop": 1}])
    refused("med_mcqa", raw, f"{path}: no column 'opa' among its columns id, question, answer")
    path.write_bytes(b"PAR1 and no more")
    refused("med_mcqa", raw, f"{path}: damaged parquet")


@pytest.mark.parametrize("folder", ["", "data/"])
def test_the_authors_med_mcqa_counts_from_1(folder, tmp_path):
    raw = tmp_path / "med_mcqa"
    write_med_mcqa_lines(raw, folder)
    write_files(raw, {f"{folder}test.json": "never read"})
    assert read("med_mcqa", raw) == mcqa_records()
    assert files_found("med_mcqa", tmp_path) == [f"{folder}dev.json", f"{folder}train.json"]
    (raw / f"{folder}train.json").unlink()
    assert read("med_mcqa", raw) == mcqa_records()[3:]
    assert files_found("med_mcqa", tmp_path) == [f"{folder}dev.json"]


def write_cops(raw, train, validation=(1, 2)):
    for split, numbers in (("train", train), ("validation", validation)):
        write_parquet(raw / f"data/{split}-00000-of-00001.parquet",
                      [med_mcqa_row(str(n), number) for n, number in enumerate(numbers)])


@pytest.mark.parametrize("train, first", [((0, 1, 3), 0), ((1, 4, 2), 1), ((1.0, 4.0, None), 1), ((1, 2), 0)])
def test_med_mcqa_s_numbers_say_from_where_they_count(train, first, tmp_path):
    write_cops(tmp_path, train)
    names = ["A. Femur", "B. Tibia", "C. Ulna", "D. Stapes"]
    assert [record.answer for _, record in read("med_mcqa", tmp_path)] == [
        "" if number is None else names[int(number) - first] for number in (*train, 1, 2)]


@pytest.mark.parametrize("train, which", [((0, 1, 4), "both"), ([1, 2, 3] * 7, "neither")])
def test_med_mcqa_whose_counting_is_not_known_is_refused(train, which, tmp_path):
    write_cops(tmp_path, train)
    refused("med_mcqa", tmp_path, f"{tmp_path}/data: cop: has {which} of 0 and 4, so whether it counts 4 from 0")


# ----------------------------------------------------------------------------- MMLU

@pytest.mark.parametrize("write", [write_mmlu, lambda raw: write_mmlu(raw, "test/"), write_mmlu_parquets])
def test_mmlu_s_six_subjects_are_read_from_each_layout(write, tmp_path):
    raw = tmp_path / "mmlu_med"
    write(raw)
    records = read("mmlu_med", raw)
    assert Counter(record.type for _, record in records) == dict.fromkeys(MMLU_SUBJECTS, 1) | {"anatomy": 2}
    assert records[:2] == [
        ("test", Record("anatomy_000", "Which bone?\nThe longest, \"please\". A. Femur B. Tibia C. Ulna D. None of the "
                        "above", "A. Femur", type="anatomy", choices=("Femur", "Tibia", "Ulna", "None of the above"),
                        group="anatomy_000")),
        ("test", Record("anatomy_001", "Which nerve? A. I B. II C. III D. IV", "D. IV", type="anatomy",
                        choices=("I", "II", "III", "IV")))]
    assert [record.group for _, record in records[2:]] == ["anatomy_000"] * 5  # of all subjects
    assert len(files_found("mmlu_med", tmp_path)) == 6
    (raw / files_found("mmlu_med", tmp_path)[3]).unlink()
    assert files_found("mmlu_med", tmp_path) == []


def test_mmlu_refuses_a_header_another_counting_and_a_row_of_another_length(tmp_path):
    write_mmlu(tmp_path)
    path = tmp_path / "data/test/college_biology_test.csv"
    for rows, message in (([("question", "A", "B", "C", "D", "answer")], "answer of row 1 'answer' is none of A, B, C"),
                          ([MMLU_ROWS[1], ("q", "1", "2", "3", "4", "0")], "answer of row 2 '0' is none of A, B, C, D"),
                          ([MMLU_ROWS[1], ("q", "1", "2", "3", "A")], "row 2 has 5 columns, not 6"), ([], "empty")):
        path.write_text(table(rows))
        refused("mmlu_med", tmp_path, f"{path}: {message}")
    path.write_bytes("é,1,2,3,4,A".encode("latin-1"))
    refused("mmlu_med", tmp_path, f"{path}: damaged table")
    write_mmlu_parquets(tmp_path / "hub")
    write_parquet(tmp_path / "hub/anatomy/test-00000-of-00001.parquet",
                  [{"question": "q", "choices": ["1", "2", "3", "4"], "answer": 4}])
    refused("mmlu_med", tmp_path / "hub", f"{tmp_path}/hub/anatomy: answer of row 1 '4' is none of 0, 1, 2, 3")


# ----------------------------------------------------------------------------- Medbullets

@pytest.mark.parametrize("folder", ["", "medbullets/"])
def test_each_medbullets_is_read_from_its_own_file(folder, tmp_path):
    raw = tmp_path / "medbullets"
    for count in (4, 5):
        write_medbullets(count, folder)(raw)
        assert files_found(f"medbullets_{count}", tmp_path) == [f"{folder}medbullets_op{count}.csv"]
    four, five = (by_id(read(f"medbullets_{count}", raw)) for count in (4, 5))
    assert list(four) == list(five)[::-1] == [f"https://a.b/{n}" for n in (1, 2, 3)]
    assert four["https://a.b/1"] == Record(
        "https://a.b/1", "A man falls. What is next? A. CT B. MRI C. Rest D. Splint", "B. MRI",
        choices=("CT", "MRI", "Rest", "Splint"), group="https://a.b/1", reasoning="Long,\nand quoted.")
    assert [record.group for record in four.values()] == ["https://a.b/1", "", "https://a.b/1"]
    assert five["https://a.b/2"] == Record(
        "https://a.b/2", "Why does he fall? A. CT B. MRI C. Rest D. Splint E. X-ray", "C. Rest",
        choices=("CT", "MRI", "Rest", "Splint", "X-ray"), reasoning="Long,\nand quoted.")
    path = raw / f"{folder}medbullets_op4.csv"
    path.write_text(path.read_text().replace(",B,MRI,", ",D,MRI,", 1))
    refused("medbullets_4", raw, f"{path}: row 1: its answer is 'MRI', and option D 'Splint'")
    path.write_text(path.read_text().replace("opd", "option_d", 1))
    refused("medbullets_4", raw, f"{path}: no column 'opd' among its columns link, question, opa")


# ----------------------------------------------------------------------------- MedXpertQA

def xpert_record(identifier, letter, count, **more):
    causes = tuple(f"cause {name}" for name in "abcdefghij"[:count])
    return Record(identifier, f"Which is it? {' '.join(letter_options(causes))}",
                  f"{letter}. cause {letter.lower()}", type="Reasoning", choices=causes, **more)


@pytest.mark.parametrize("path, hub", [
    ("Text/test.jsonl", True), ("eval/data/medxpertqa/input/medxpertqa_text_input.jsonl", False),
    ("eval/data/medxpertqa_sampled/input/medxpertqa_sampled_text_input.jsonl", False)])
def test_med_xpert_qa_s_choices_are_cut_off_its_questions(path, hub, tmp_path):
    raw = tmp_path / "med_xpert_qa_text"
    write_files(raw, {path: json_lines([xpert_row(*row, 10, hub=hub) for row in XPERT_TEXTS])})
    assert read("med_xpert_qa_text", raw) == [
        ("test", xpert_record(*row, 10, group="Text-3")) for row in XPERT_TEXTS]
    assert files_found("med_xpert_qa_text", tmp_path) == [path]


def test_the_whole_of_med_xpert_qa_is_read_before_its_sample(tmp_path):
    for path, name in (("medxpertqa/input/medxpertqa_text_input", "whole"),
                       ("medxpertqa_sampled/input/medxpertqa_sampled_text_input", "sample")):
        write_files(tmp_path, {f"eval/data/{path}.jsonl": json_lines([xpert_row(name, "A", 10, hub=False)])})
    assert [record.id for _, record in read("med_xpert_qa_text", tmp_path)] == ["whole"]


@pytest.mark.parametrize("path, hub", [("MM/test.jsonl", True),
                                       ("eval/data/medxpertqa/input/medxpertqa_mm_input.jsonl", False)])
def test_med_xpert_qa_shows_its_images_in_their_order(path, hub, tmp_path):
    raw, names = tmp_path / "med_xpert_qa_mm", list(XPERT_IMAGES)
    write_files(raw, {path: json_lines(xpert_mm_rows(hub))})
    assert files_found("med_xpert_qa_mm", tmp_path) == []  # no images
    views = [View(XPERT_IMAGES[name], name, f"image {number}") for number, name in enumerate(names[:2], 1)]
    wanted = [("test", xpert_record("MM-0", "E", 5, parts=tuple(views), image_name=names[0])),
              ("test", xpert_record("MM-4", "A", 5, image=XPERT_IMAGES[names[2]], image_name=names[2])),
              ("test", xpert_record("MM-5", "B", 5, image=None, image_name="MM-5-a.jpeg"))]  # skipped, as missing
    write_zip(raw / "images.zip", {f"images/{name}": image for name, image in XPERT_IMAGES.items()})
    assert read("med_xpert_qa_mm", raw) == wanted
    assert files_found("med_xpert_qa_mm", tmp_path) == sorted([path, "images.zip"])
    (raw / "images.zip").unlink()
    write_files(raw / "images", XPERT_IMAGES)
    assert read("med_xpert_qa_mm", raw) == wanted
    assert files_found("med_xpert_qa_mm", tmp_path) == sorted([path, *(f"images/{name}" for name in names)])


def test_med_xpert_qa_refuses_what_it_does_not_expect(tmp_path):
    path, good = tmp_path / "Text/test.jsonl", xpert_row("Text-3", "A", 10)
    for changes, message in (
            ({"options": {"B": "x", "A": "y"}}, "its options are lettered 'B, A', not from A on"),
            ({"label": ["A", "B"]}, "2 right options, where one is read"),
            ({"options": {"A": 2, "B": ["x"]}}, "options: item 2: list found where str was expected"),
            ({"options": "A"}, "options: str found where list was expected"),
            ({"label": {"A": 1}}, "label: item 1: dict found where str was expected"),
            ({"question_type": []}, "question_type: list found where str was expected")):
        write_files(tmp_path, {"Text/test.jsonl": json_lines([good, good | changes])})
        refused("med_xpert_qa_text", tmp_path, f"{path}: line 2: {message}")
    write_files(tmp_path, {"Text/test.jsonl": json_lines([good | {"label": "K"}, good | {"label": None}])})
    assert [record.answer for _, record in read("med_xpert_qa_text", tmp_path)] == ["", ""]  # skipped, as empty
    write_xpert_mm(tmp_path)
    write_files(tmp_path, {"MM/test.jsonl": json_lines([xpert_row("MM-0", "A", 5, ["a.png"]) | {"images": "a.png"}])})
    refused("med_xpert_qa_mm", tmp_path, "MM/test.jsonl: line 1: images: str found where list was expected")


def test_an_image_name_of_med_xpert_qa_leads_out_of_no_folder(tmp_path):
    raw = tmp_path / "med_xpert_qa_mm"
    names = ["../../outside.png", str(tmp_path / "outside.png")]
    write_files(raw, {"MM/test.jsonl": json_lines([xpert_row("MM-0", "A", 5, names)]), "images/MM-1-a.png": picture(1)})
    (tmp_path / "outside.png").write_bytes(picture(2))
    assert [view.image for view in read("med_xpert_qa_mm", raw)[0][1].views()] == [None, None]


# ----------------------------------------------------------------------------- MedFrameQA

def test_med_frame_qa_shows_the_frames_that_a_question_has(tmp_path):
    raw = tmp_path / "med_frame_qa"
    write_med_frame_qa(raw)
    six, two, one = read("med_frame_qa", raw)
    names = ("fluid", "air", "bone", "fat", "blood", "none of these")
    assert six == ("test", Record(
        "q0", f"What do the frames show? {' '.join(letter_options(names))}", "F. none of these", type="CT",
        choices=names, group="video 0", image_name="0.jpg",
        parts=tuple(View(picture(n), f"{n}.jpg", f"image {n + 1}") for n in range(5))))
    assert two[1].answer == "A. fluid" and two[1].choices == ("fluid", "air") and two[1].group == "video 0"
    assert [(view.name, view.role) for view in two[1].views()] == [("7.jpg", "image 1"), ("8.jpg", "image 2")]
    assert (one[1].image, one[1].image_name, one[1].parts, one[1].group) == (picture(9), "9.jpg", (), "video 1")


# ----------------------------------------------------------------------------- PubMedQA

def test_pubmed_qa_s_choices_are_words_that_its_question_does_not_list(tmp_path):
    write_pubmed_qa(tmp_path)
    assert read("pubmed_qa", tmp_path) == [
        (split, Record(number, f"does {number} help?", answer, context="We tried. It did.", type="yes/no/maybe",
                       choices=("yes", "no", "maybe")))
        for split, number, answer in (("train", "7", "yes"), ("test", "8", "maybe"))]
    path, truth = tmp_path / "ori_pqal.json", tmp_path / "test_ground_truth.json"
    truth.write_text('{"8": "no"}')
    refused("pubmed_qa", tmp_path, f"{path}: '8' is 'maybe', by {truth} 'no'")
    path.write_text(path.read_text().replace('"yes"', '"Yes"'))
    refused("pubmed_qa", tmp_path, f"{path}: final_decision of '7' 'Yes' is none of yes, no, maybe")


def test_pubmed_qa_artificial_is_read(tmp_path):
    raw = tmp_path / "pubmed_qa_artificial"
    path = raw / "pqa_artificial/train-00000-of-00001.parquet"
    write_pubmed_qa_artificial(raw)
    facts = {"type": "yes/no", "choices": ("yes", "no")}
    assert read("pubmed_qa_artificial", raw) == [
        ("train", Record("25429730", "Does it help?", "yes", context="We tried. It did.", **facts)),
        ("train", Record("25433161", "Does it harm?", "no", **facts)),
        ("train", Record("7", "Is it new?", "", context="No.", **facts))]
    write_parquet(path, [{"pubid": 7, "question": "Is it?", "final_decision": "maybe", "context": {"contexts": ["a"]}}])
    refused("pubmed_qa_artificial", raw, "final_decision of '7' 'maybe' is none of yes, no")
    write_parquet(path, [{"pubid": 7, "question": "Is it new?", "final_decision": "no"}])
    refused("pubmed_qa_artificial", raw, f"{path}: no column 'context'")
    path.write_bytes(path.read_bytes()[:-3])
    refused("pubmed_qa_artificial", raw, f"{path}: damaged parquet")


# ----------------------------------------------------------------------------- real files

def letters_of(records):
    return Counter(record.answer[0] for _, record in records)


@pytest.mark.parametrize("name, folder, count, letters, groups", [
    ("med_qa", "medqa", 1273, {"A": 353, "B": 309, "C": 346, "D": 265}, 0),
    ("med_mcqa", "medmcqa", 4183, {"A": 1348, "B": 1085, "C": 925, "D": 825}, 20),
    ("mmlu_med", "mmlu", 1089, {"A": 235, "B": 254, "C": 248, "D": 352}, 77),
    ("medbullets_4", "medbullets", 308, {"A": 87, "B": 76, "C": 77, "D": 68}, 10),
    ("medbullets_5", "medbullets", 308, {"A": 61, "B": 74, "C": 53, "D": 67, "E": 53}, 10),
    ("med_xpert_qa_text", "medxpertqa", 244,
     dict(zip("ABCDEFGHIJ", (27, 21, 17, 31, 30, 19, 22, 20, 26, 31))), 0),
    ("med_xpert_qa_mm", "medxpertqa", 2000, {"A": 399, "B": 408, "C": 383, "D": 386, "E": 424}, 0),
    ("mediq", "mediq", 1272, {"A": 330, "B": 316, "C": 352, "D": 274}, 0),
    ("pubmed_qa", "pubmed_qa", 1000, {"y": 552, "n": 338, "m": 110}, 0)])
def test_a_real_file_has_its_counts(name, folder, count, letters, groups):
    records = read(name, real(folder))
    assert len(records) == len(by_id(records)) == count and letters_of(records) == letters
    assert Counter(split for split, _ in records) == {"test": count} or name == "pubmed_qa"
    assert len({record.group for _, record in records if record.group}) == groups
    hold_choices(records)


def test_real_mmlu_has_its_subjects_and_asks_78_questions_in_two_of_them():
    records = [record for _, record in read("mmlu_med", real("mmlu"))]
    assert Counter(record.type for record in records) == dict(zip(MMLU_SUBJECTS, (135, 265, 144, 173, 100, 272)))
    most = Counter(record.answer[0] for record in records if record.type == "professional_medicine")
    assert most.most_common(1) == [("D", 122)]
    groups = Counter(record.group for record in records if record.group)
    assert Counter(groups.values()) == {2: 76, 4: 1}
    assert {record.type for record in records if record.group} == {"clinical_knowledge", "college_medicine"}
    assert sum("\n" in record.question for record in records) == 17
    asked = [(record.question, record.answer) for record in records]
    assert Counter(Counter(asked).values()) == {1: 1089 - 2 * 78, 2: 78}


def test_real_medbullets_agree_on_every_answer_that_they_join():
    four, five = (by_id(read(f"medbullets_{count}", real("medbullets"))) for count in (4, 5))
    assert four.keys() == five.keys() and list(four) != list(five)
    assert all(four[link].answer[3:] == five[link].answer[3:] for link in four)
    assert all(set(four[link].choices) < set(five[link].choices) for link in four)
    assert sum(four[link].answer == five[link].answer for link in four) == 80


def test_no_real_question_of_med_xpert_qa_lists_its_choices_twice():
    records = read("med_xpert_qa_text", real("medxpertqa")) + read("med_xpert_qa_mm", real("medxpertqa"))
    assert not any("Answer Choices" in record.question for _, record in records)
    assert {len(record.choices) for _, record in records[:244]} == {10}
    assert {len(record.choices) for _, record in records[244:]} == {5}
    images = Counter(len(record.parts) or 1 for _, record in records[244:])
    assert images == {1: 1581, 2: 236, 3: 59, 4: 22, 5: 78, 6: 24}
    assert Counter(record.type for _, record in records[244:]) == {"Reasoning": 1446, "Understanding": 554}


def test_real_med_mcqa_keeps_equal_options_as_published():
    records = [record for _, record in read("med_mcqa", real("medmcqa"))]
    assert sum(len(set(record.choices)) < 4 for record in records) == 21
    assert len({record.type for record in records}) == 21 and all(map(str.strip, sum((r.choices for r in records), ())))


def test_real_pubmed_qa_tests_with_its_500_held_out_questions():
    assert Counter(split for split, _ in read("pubmed_qa", real("pubmed_qa"))) == {"train": 500, "test": 500}
