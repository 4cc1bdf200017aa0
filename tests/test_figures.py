"""The readers of prepare/figures.py: every record of small copies of the original files, and damage."""

import contextlib
import json
import random
import tracemalloc
import zipfile

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from data import Record, write_plain
from plumbing.flags import UserError
from prepare.datasets import DATASETS
from prepare.figures import CAPTION_QUESTION
from prepare.shards import SplitWriter
from test_prepare import picture

NAMES = ("roco", "roco_v2", "pmc_oa", "omni_med_vqa", "pmc_vqa", "pmc_vqa_v2", "ubench")
PMC_OA = "caption_T060_filtered_top4_sep_v0_subfigures/"


def read(name, raw):
    return list(DATASETS[name].read(raw))


def write_zip(path, members, damaged=()):
    """A zip of {name: bytes}; one bit of each of the `damaged` is flipped, so that its CRC is wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    whole = bytearray(path.read_bytes())
    for name in damaged:
        whole[whole.find(members[name]) + len(members[name]) // 2] ^= 1
    path.write_bytes(whole)


def refuses(name, raw, pattern):
    """Reading ends in a UserError of one line that matches the pattern."""
    with pytest.raises(UserError, match=pattern) as caught:
        read(name, raw)
    assert "\n" not in str(caught.value)


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_complete(name):
    facts = DATASETS[name]
    assert facts.name == name and facts.access == "open" and facts.licence and facts.megabytes > 1000
    assert facts.hub and facts.hub_files and facts.page == f"https://huggingface.co/datasets/{facts.hub}"
    captions = name in ("roco", "roco_v2", "pmc_oa")
    assert (facts.kind, facts.task) == (("captions", "") if captions else ("image questions", "choices"))
    assert set(facts.counts) <= {"train", "validation", "test"} and len(facts.layouts) == 1


# ----------------------------------------------------------------------------- captions

def write_roco(raw, **other_columns):
    images = [picture(n) for n in range(4)]
    rows = [("PMC1_F1", " Chest X-ray & CT.", {"bytes": images[0], "path": "PMC1_F1.jpg"}),
            ("PMC2_F1", "An arrow.", {"bytes": b"", "path": None}),
            ("PMC3_F2", None, {"bytes": images[1], "path": None}), (None, "No image.", None)]
    rows = [{"image": image, "image_id": name, "caption": caption, **other_columns}
            for name, caption, image in rows]
    more = [{"image": {"bytes": image, "path": None}, "image_id": f"PMC{n}_F9", "caption": f" {n}.",
             **other_columns} for n, image in enumerate(images[2:], start=4)]
    (raw / "data").mkdir(parents=True)
    for name, part in (("train-00000-of-00002", rows[:2]), ("train-00001-of-00002", rows[2:]),
                       ("validation-00000-of-00001", more[:1]), ("test-00000-of-00001", more[1:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), raw / f"data/{name}.parquet")
    return images


@pytest.mark.parametrize("name, columns", [("roco", {}), ("roco_v2", {"cui": ["C0040405", "C1306645"]})])
def test_roco_is_read_from_the_hubs_parquets(name, columns, tmp_path):
    images = write_roco(tmp_path / name, **columns)
    assert len(DATASETS[name].find(tmp_path)) == 4
    assert read(name, tmp_path / name) == [
        ("train", Record("PMC1_F1", CAPTION_QUESTION, " Chest X-ray & CT.", images[0], "PMC1_F1.jpg")),
        ("train", Record("PMC2_F1", CAPTION_QUESTION, "An arrow.", b"", "PMC2_F1")),
        ("train", Record("PMC3_F2", CAPTION_QUESTION, "", images[1], "PMC3_F2")),
        ("train", Record("train_000003", CAPTION_QUESTION, "No image.", None, "train_000003")),
        ("validation", Record("PMC4_F9", CAPTION_QUESTION, " 4.", images[2], "PMC4_F9")),
        ("test", Record("PMC5_F9", CAPTION_QUESTION, " 5.", images[3], "PMC5_F9"))]
    path = tmp_path / name / "data/validation-00000-of-00001.parquet"
    cut(path)
    refuses(name, tmp_path / name, f"{path}: damaged parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image_id": "a", "text": "b"}]), path)
    refuses(name, tmp_path / name, f"{path}: no column 'image' among its columns image_id, text")
    path.unlink()
    assert not DATASETS[name].find(tmp_path)  # a split that is missing


def write_pmc_oa(raw, rows, members, damaged=()):
    write_zip(raw / "images.zip", members, damaged)
    (raw / "pmc_oa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pmc_oa_is_read_line_by_line(tmp_path):
    raw, images = tmp_path / "pmc_oa", [picture(n) for n in range(3)]
    rows = [{"image": "PMC212319_Fig3_4.jpg", "caption": " A. Translocation of α-ARF1\u2028& more.",
             "alignment_type": "sub", "alignment_score": 0.5},
            {"image": "PMC1_Fig1_1.jpg", "caption": None},
            {"image": "PMC1_Fig1_2.jpg", "caption": "Not in the zip."},
            {"image": "PMC1_Fig1_3.jpg", "caption": "Damaged."}]
    members = {f"{PMC_OA}PMC212319_Fig3_4.jpg": images[0], f"{PMC_OA}PMC1_Fig1_1.jpg": images[1],
               f"{PMC_OA}PMC1_Fig1_3.jpg": images[2], f"{PMC_OA}PMC9_Fig9_9.jpg": b"asked about by none"}
    write_pmc_oa(raw, rows, members, damaged=[f"{PMC_OA}PMC1_Fig1_3.jpg"])
    assert sorted(DATASETS["pmc_oa"].find(tmp_path)) == ["images.zip", "pmc_oa.jsonl"]
    wanted = [("PMC212319_Fig3_4.jpg", " A. Translocation of α-ARF1\u2028& more.", images[0]),
              ("PMC1_Fig1_1.jpg", "", images[1]), ("PMC1_Fig1_2.jpg", "Not in the zip.", None),
              ("PMC1_Fig1_3.jpg", "Damaged.", b"")]
    wanted = [("train", Record(name, CAPTION_QUESTION, caption, image, PMC_OA + name))
              for name, caption, image in wanted]
    assert read("pmc_oa", raw) == wanted

    table, archive = raw / "pmc_oa.jsonl", raw / "images.zip"
    whole = table.read_bytes()
    table.write_bytes(whole + b"\n \n")  # blank lines are none
    assert read("pmc_oa", raw) == wanted
    for damage in (whole[:-20], whole[:-1] + b"}\n", whole.replace(b"Damaged", b"\xff")):
        table.write_bytes(damage)
        refuses("pmc_oa", raw, rf"{table}: line 4: damaged or not JSON .*; fetch it again")
        records = DATASETS["pmc_oa"].read(raw)
        assert [next(records) for _ in range(3)] == wanted[:3]  # what comes before it is read
    table.write_text('{"image": "a.jpg", "text": "b"}\n')
    refuses("pmc_oa", raw, rf"{table}: line 1: no column 'caption' among its columns image, text")
    table.write_text('[1, 2]\n')
    refuses("pmc_oa", raw, rf"{table}: line 1: list found where dict was expected")
    table.write_bytes(whole)
    write_zip(archive, {"other/a.jpg": b"a"})
    refuses("pmc_oa", raw, f"{archive}: no folder {PMC_OA} in it")
    cut(archive)
    refuses("pmc_oa", raw, f"{archive}: damaged zip")


def test_pmc_oa_takes_no_memory_that_grows_with_it(tmp_path):
    raw, image = tmp_path / "pmc_oa", picture(0)
    rows = [{"image": f"PMC{n % 8}_Fig1_1.jpg", "caption": "x" * 2000} for n in range(4000)]  # 8 MB
    write_pmc_oa(raw, rows, {f"{PMC_OA}PMC{n}_Fig1_1.jpg": image for n in range(8)})
    tracemalloc.start()
    assert sum(record.image == image for _, record in DATASETS["pmc_oa"].read(raw)) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


# ----------------------------------------------------------------------------- multiple choice

def omni_row(number, image, options, answer, **changes):
    row = {"dataset": "ACRIMA", "question_id": f"ACRIMA_{number:04d}",
           "question_type": "Disease Diagnosis", "question": f"What is seen in {number}?",
           "gt_answer": answer, "image_path": f"Images/{image}", "modality_type": "CT"}
    return row | {f"option_{letter}": option for letter, option in zip("ABCD", options)} | changes


@pytest.mark.parametrize("root", ["OmniMedVQA/", ""])
def test_omni_med_vqa_is_read_from_the_zip(root, tmp_path):
    raw, images = tmp_path / "omni_med_vqa", [picture(n) for n in range(4)]
    chest = omni_row(1, "Chest CT Scan/train/a b.png", ["MR", "CT", "OCT"], "CT",
                     question_type="Modality Recognition")
    chest["modality"] = chest.pop("modality_type")
    tables = {
        "OCT & X-Ray 2017": [
            omni_row(4, "OCT & X-Ray 2017/gone.jpg", ["No", "Yes"], "No"),
            omni_row(5, "OCT & X-Ray 2017/bad.jpg", ["No", "Yes", None, ""], " Yes ")],
        "ACRIMA": [
            omni_row(0, "ACRIMA/Im002.png", ["Glaucoma", "Normal.", "Myopia", "Cataract"], "Cataract"),
            omni_row(2, "ACRIMA/Im003.png", ["Glaucoma", "Normal"], "Something else"),
            omni_row(3, "ACRIMA/Im002.png", ["Glaucoma", "Normal"], "Normal", question="")],
        "Chest CT Scan": [chest]}
    folder = f"{root}QA_information/"
    members = {f"{folder}Open-access/{name}.json": json.dumps(rows) for name, rows in tables.items()}
    members = {name: rows.encode() for name, rows in members.items()} | {
        f"{folder}Open-access/": b"", f"{folder}Restricted-access/3D Modality.json": b"[{}]",
        f"__MACOSX/{folder}Open-access/._ACRIMA.json": b"\x00\x05\x16",
        f"{root}Images/ACRIMA/Im002.png": images[0], f"{root}Images/ACRIMA/Im003.png": images[1],
        f"{root}Images/Chest CT Scan/train/a b.png": images[2],
        f"{root}Images/OCT & X-Ray 2017/bad.jpg": images[3]}
    archive = raw / "OmniMedVQA.zip"
    write_zip(archive, members, damaged=[f"{root}Images/OCT & X-Ray 2017/bad.jpg"])
    assert list(DATASETS["omni_med_vqa"].find(tmp_path)) == ["OmniMedVQA.zip"]
    four = "A. Glaucoma B. Normal. C. Myopia D. Cataract"
    wanted = [
        ("0000", f"What is seen in 0? {four}", "D. Cataract", images[0], "ACRIMA/Im002.png",
         "Glaucoma Normal. Myopia Cataract"),
        ("0002", "What is seen in 2?", "", images[1], "ACRIMA/Im003.png", "Glaucoma Normal"),
        ("0003", "", "", images[0], "ACRIMA/Im002.png", "Glaucoma Normal"),
        ("0001", "What is seen in 1? A. MR B. CT C. OCT", "B. CT", images[2],
         "Chest CT Scan/train/a b.png", "MR CT OCT"),
        ("0004", "What is seen in 4? A. No B. Yes", "A. No", None, "OCT & X-Ray 2017/gone.jpg", "No Yes"),
        ("0005", "What is seen in 5? A. No B. Yes", "B. Yes", b"", "OCT & X-Ray 2017/bad.jpg", "No Yes")]
    assert read("omni_med_vqa", raw) == [
        ("train", Record(f"ACRIMA_{number}", question, answer, image, f"{root}Images/{name}",
                         type="Modality Recognition" if number == "0001" else "Disease Diagnosis",
                         choices=tuple(options.split())))
        for number, question, answer, image, name, options in wanted]

    name = f"{folder}Open-access/ACRIMA.json"
    write_zip(archive, members, damaged=[name])
    refuses("omni_med_vqa", raw, f"{archive}: '{name}': damaged or not JSON")
    write_zip(archive, members | {name: b'[{"question_id": 1'})
    refuses("omni_med_vqa", raw, f"{archive}: '{name}': damaged or not JSON")
    write_zip(archive, members | {name: json.dumps([{"question_id": 1, "label": 2}]).encode()})
    refuses("omni_med_vqa", raw, f"{name}': item 1: no column 'question_type' among .*question_id, la")
    write_zip(archive, {"Images/a.png": images[0]})
    refuses("omni_med_vqa", raw, f"{archive}: no folder OmniMedVQA/QA_information/Open-access/")
    cut(archive, 0.9)
    refuses("omni_med_vqa", raw, f"{archive}: damaged zip")


V1 = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
V2 = "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n"
PMC_VQA = {  # name -> its tables, its zip, the folder in it, and what turns a row into a line
    "pmc_vqa": ("train.csv", "test_clean.csv", "images.zip", "images/", V1,
                '{figure},"{question}",{text},{choices},{label}\n'),
    "pmc_vqa_v2": ("train_2.csv", "test_2.csv", "images_2.zip", "figures/", V2,
                   '7,{figure},"A caption,\nof two lines.","{question}",{choices},{label},train\n')}


@pytest.mark.parametrize("name", PMC_VQA)
def test_pmc_vqa_is_read_from_csv_and_zip(name, tmp_path):
    train, test, images, folder, header, line = PMC_VQA[name]
    raw, content = tmp_path / name, [picture(n) for n in range(2)]
    choices = " A:Diffuse uptake , B:Focal uptake , C:No: A uptake,\"D:None, or both\""

    def write(figure, label, choices=choices, question="What is the uptake pattern, \"left\"\"?"):
        return line.format(figure=figure, question=question.replace('"', '""'), text="Focal uptake",
                           label=label, choices=choices)

    members = {f"{folder}PMC1_F1.jpg": content[0], f"{folder}PMC2_F1.jpg": content[1]}
    write_zip(raw / images, members, damaged=[f"{folder}PMC2_F1.jpg"])
    (raw / train).write_text("\ufeff" + header + write("PMC1_F1.jpg", "B") + write("PMC1_F1.jpg", " D ")
                             + write("PMC3_F1.jpg", "A") + write("PMC2_F1.jpg", "C")
                             + write("PMC1_F1.jpg", "E") + write("PMC1_F1.jpg", "")
                             + write("PMC1_F1.jpg", "B", "yes,,no,perhaps")
                             + write("PMC1_F1.jpg", "B", question=" ") + "PMC1_F1.jpg,1,2\n")
    (raw / test).write_text(header + write("PMC1_F1.jpg", "A", "yes,no,B:,perhaps"))
    assert sorted(DATASETS[name].find(tmp_path)) == sorted([train, test, images])
    question = 'What is the uptake pattern, "left""?'
    asked = f"{question} A. Diffuse uptake B. Focal uptake C. No: A uptake D. None, or both"
    short = ("1", "PMC1_F1.jpg") if name == "pmc_vqa" else ("", "1")  # the line with too few columns
    wanted = [(asked, "B. Focal uptake", content[0], "PMC1_F1.jpg"),
              (asked, "D. None, or both", content[0], "PMC1_F1.jpg"),
              (asked, "A. Diffuse uptake", None, "PMC3_F1.jpg"),
              (asked, "C. No: A uptake", b"", "PMC2_F1.jpg"),
              (question, "", content[0], "PMC1_F1.jpg"), (question, "", content[0], "PMC1_F1.jpg"),
              (question, "", content[0], "PMC1_F1.jpg"), (" ", "", content[0], "PMC1_F1.jpg"),
              (short[0], "", members.get(folder + short[1]), short[1])]
    options = {6: ("yes", "", "no", "perhaps"), 8: ("",) * 4}
    options = [options.get(n, ("Diffuse uptake", "Focal uptake", "No: A uptake", "None, or both"))
               for n in range(len(wanted))]
    wanted = [("train", Record(f"train_{n:06d}", *row[:3], folder + row[3], choices=options[n]))
              for n, row in enumerate(wanted)]
    assert read(name, raw) == wanted + [
        ("test", Record("test_000000", f"{question} A. yes B. no C. B: D. perhaps", "A. yes", content[0],
                        f"{folder}PMC1_F1.jpg", choices=("yes", "no", "B:", "perhaps")))]

    for other in ("figures/", "images/"):  # either folder will do
        write_zip(raw / images, {f"{other}PMC1_F1.jpg": content[0]})
        assert read(name, raw)[0][1].image_name == f"{other}PMC1_F1.jpg"
    whole = (raw / test).read_bytes()
    (raw / test).write_bytes(whole.replace(b"Figure_path", b"image"))
    refuses(name, raw, f"{raw / test}: no column 'Figure_path' among its columns .*image, ")
    (raw / test).write_bytes(whole.replace(b"Choice C", b"choice_C"))
    refuses(name, raw, f"{raw / test}: no column 'Choice C' among its columns .*Figure_path.*choice_C")
    (raw / test).write_bytes(whole.replace(b"perhaps", b"\xff\xfe"))
    refuses(name, raw, f"{raw / test}: damaged table")
    (raw / test).write_bytes(b"")
    refuses(name, raw, f"{raw / test}: no column 'Figure_path'")
    write_zip(raw / images, {"pictures/a.jpg": b"a"})
    refuses(name, raw, f"{raw / images}: no folder figures/ or images/ in it")
    cut(raw / images)
    refuses(name, raw, f"{raw / images}: damaged zip")


QUESTION = pyarrow.struct([("id", pyarrow.string()), ("question", pyarrow.string()),
                           ("options", pyarrow.list_(pyarrow.string())), ("answer", pyarrow.string())])
KEYS = ("domain", "subdomain", "modality", "submodality", "stain", "classification")
UBENCH = pyarrow.schema([
    ("image_id", pyarrow.string()),
    ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
    ("label", pyarrow.int64()), ("dataset", pyarrow.string()), ("split", pyarrow.string()),
    ("questions", pyarrow.struct([(key, QUESTION) for key in KEYS]))])


def write_arrow(path, rows, rows_per_batch, schema=UBENCH):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for batch in pyarrow.Table.from_pylist(rows, schema).to_batches(max_chunksize=rows_per_batch):
            stream.write_batch(batch)


def ubench_row(number, image, path=None, **questions):
    asked = {key: {"id": f"q_{key}", "question": f"Which {key}?", "options": options, "answer": answer}
             for key, (options, answer) in questions.items()}
    return {"image_id": f"image_{number}", "image": {"bytes": image, "path": path}, "label": 0,
            "dataset": None, "split": "train", "questions": dict.fromkeys(KEYS) | asked}


def test_ubench_is_read_batch_by_batch(tmp_path):
    raw, images = tmp_path / "ubench", [picture(n) for n in range(9)]
    folder, none = raw / "perception/0.1.0", "none of the above"
    rows = [
        ubench_row(0, images[0], "cell 0.png", domain=(["biology", none], "biology"),
                   stain=(["H&E", none], "H&E"),
                   classification=(["basophil", "platelet", none], "platelet")),
        ubench_row(1, images[1], stain=(["Giemsa", none], None), modality=(["light", none], "electron"),
                   subdomain=([str(n) for n in range(11)], "3"),
                   submodality=([str(n) for n in range(10)], "9")),
        ubench_row(2, images[2]) | {"questions": None},
        ubench_row(3, None, domain=(["biology", none], none)) | {"image": None}]
    rows[1]["questions"]["domain"] = {"id": None, "question": None, "options": None, "answer": None}
    write_arrow(folder / "ubench-test-00000-of-00007.arrow", rows, rows_per_batch=3)
    for n in range(1, 7):
        more = [ubench_row(n * 100 + k, images[n], stain=(["H&E", none], none)) for k in range(40)]
        write_arrow(folder / f"ubench-test-0000{n}-of-00007.arrow", more, rows_per_batch=35)
    (folder / "dataset_info.json").write_text("{}")
    assert len(DATASETS["ubench"].find(tmp_path)) == 7
    ten = " ".join(f"{letter}. {n}" for n, letter in enumerate("ABCDEFGHIJ"))
    options = {"image_0_domain": ("biology", none), "image_0_stain": ("H&E", none),
               "image_0_classification": ("basophil", "platelet", none), "image_1_modality": ("light", none),
               "image_1_subdomain": tuple(map(str, range(11))), "image_1_submodality": tuple(map(str, range(10))),
               "image_1_stain": ("Giemsa", none), "image_3_domain": ("biology", none)}
    wanted = [
        ("image_0_domain", f"Which domain? A. biology B. {none}", "A. biology", images[0], "cell 0.png"),
        ("image_0_stain", f"Which stain? A. H&E B. {none}", "A. H&E", images[0], "cell 0.png"),
        ("image_0_classification", f"Which classification? A. basophil B. platelet C. {none}",
         "B. platelet", images[0], "cell 0.png"),
        ("image_1_subdomain", "Which subdomain?", "", images[1], "image_1"),
        ("image_1_modality", "Which modality?", "", images[1], "image_1"),
        ("image_1_submodality", f"Which submodality? {ten}", "J. 9", images[1], "image_1"),
        ("image_1_stain", "Which stain?", "", images[1], "image_1"),
        ("image_3_domain", f"Which domain? A. biology B. {none}", f"B. {none}", None, "image_3"),
        *((f"image_{n * 100 + k}_stain", f"Which stain? A. H&E B. {none}", f"B. {none}", images[n],
           f"image_{n * 100 + k}") for n in range(1, 7) for k in range(40))]
    assert read("ubench", raw) == [
        ("train", Record(*row, type=row[0].rsplit("_")[-1], choices=options.get(row[0], ("H&E", none))))
        for row in wanted]

    last = folder / "ubench-test-00006-of-00007.arrow"
    whole = last.read_bytes()
    for share in (0, 0.001, 0.5, 0.99):
        last.write_bytes(whole)
        cut(last, share)
        refuses("ubench", raw, f"{last}: damaged arrow file")
    write_arrow(last, rows, 3)
    whole = last.read_bytes()
    for place in random.Random(0).sample(range(len(whole)), 300):
        last.write_bytes(whole[:place] + bytes([whole[place] ^ 129]) + whole[place + 1:])
        with contextlib.suppress(UserError):  # read or refused, but nothing else
            read("ubench", raw)
    write_arrow(last, [{"image_id": "a", "answers": "b"}], 1,
                pyarrow.schema([("image_id", pyarrow.string()), ("answers", pyarrow.string())]))
    refuses("ubench", raw, f"{last}: no column 'image' among its columns image_id, answers")
    row = {"image_id": "a", "image": None, "questions": {"stain": {"question": "b", "choices": "c"}}}
    write_arrow(last, [row], 1, pyarrow.Table.from_pylist([row]).schema)
    refuses("ubench", raw, f"{last}: 'stain': no column 'options' among its columns question, choices")
    last.unlink()
    assert not DATASETS["ubench"].find(tmp_path)  # one of seven is missing


# ----------------------------------------------------------------------------- all of them

def test_a_member_whose_name_escapes_writes_nothing(tmp_path):
    folder, image = tmp_path / "a/b/c", picture(0)
    away, absolute = "../../escaped.jpg", str(tmp_path / "absolute.jpg")
    write_pmc_oa(folder / "pmc_oa", [{"image": name, "caption": "a"} for name in (away, absolute)],
                 {PMC_OA + away: image, absolute: image, PMC_OA + absolute: image, away: image})
    row = "{},q,yes,A:yes,B:no,C:x,D:y,A\n"
    write_zip(folder / "pmc_vqa/images.zip", {"images/" + away: image, absolute: image, away: image})
    (folder / "pmc_vqa/train.csv").write_text(V1 + row.format(away) + row.format(absolute))
    (folder / "pmc_vqa/test_clean.csv").write_text(V1)
    table = [omni_row(0, "", ["No", "Yes"], "No", image_path=path) for path in (away, absolute)]
    write_zip(folder / "omni_med_vqa/OmniMedVQA.zip",
              {"OmniMedVQA/QA_information/Open-access/../../../escaped.json": json.dumps(table),
               "OmniMedVQA/" + away: image, absolute: image})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name in ("pmc_oa", "pmc_vqa", "omni_med_vqa"):
        found = [record.image for _, record in read(name, folder / name)]
        assert found == ([image, image] if name == "pmc_oa" else [image, None])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_is_wrong_with_a_sample_is_counted_as_such(tmp_path):
    """The empty texts and images that the readers give are those that the writer of shards knows."""
    class Words:
        vocab_size = 1000
        write = staticmethod(lambda record: write_plain(record, lambda text: [1] * len(text.split())))

    raw, good = tmp_path / "omni_med_vqa", picture(0)
    rows = [omni_row(n, "a.png", ["No", "Yes"], "No", **changes) for n, changes in enumerate(
        [{}, {"gt_answer": "Maybe"}, {"question": None}, {"image_path": None}])]
    write_zip(raw / "OmniMedVQA.zip", {"OmniMedVQA/QA_information/Open-access/a.json": json.dumps(rows),
                                       "OmniMedVQA/Images/a.png": good})
    writer = SplitWriter(tmp_path / "train", DATASETS["omni_med_vqa"], Words, lambda content: None, 4)
    for _, record in read("omni_med_vqa", raw):
        writer.add(record)
    assert writer.skipped == {"empty answer": 1, "empty question": 1, "image missing": 1}
