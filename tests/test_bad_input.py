"""
Bad input, for every dataset: each file of a small copy is spoiled in many ways, also inside of what
is packed. A reader then refuses it, in one line that names the file, or gives records that are
whole: nothing else may be raised, and no bomb may fill the memory.
"""

import contextlib
import gzip
import io
import json
import random
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

import test_box_data
import test_choice_data
import test_studies
import test_classify as classify
import test_figures as figures
import test_questions as questions
import test_reports as reports
import prepare.datasets
from plumbing.flags import UserError
from plumbing.pixels import Unreadable, load_image
from prepare.datasets import (DATASETS, LARGEST_MEMBER, open_zip, read_csv, read_json, read_json_lines,
                              read_member, read_tar)
from prepare.shards import ImageSettings, encode_image
from test_prepare import picture, write_parquet

# ----------------------------------------------------------------------------- small copies


def write_hub(raw):
    rows = [{"image": {"bytes": picture(0), "path": None}, "question": "what is it?", "answer": "lung"},
            {"image": {"bytes": picture(1), "path": "a.png"}, "question": "is it?", "answer": "yes"}]
    for name in ("train-00000-of-00002-x", "train-00001-of-00002-y", "validation-00000-of-00001-z",
                 "test-00000-of-00001-z"):
        write_parquet(raw / f"data/{name}.parquet", rows)


def write_vqa_rad(raw):
    rows = [{"qid": n, "image_name": f"synpic{n}.jpg", "question": "how many?", "answer": answer,
             "question_type": "COUNT", "phrase_type": phrase}
            for n, answer, phrase in ((1, 3, "freeform"), (2, "two", "test_para"))]
    questions.write_files(raw, {"VQA_RAD Dataset Public.json": json.dumps(rows),
                                "VQA_RAD Image Folder/synpic1.jpg": picture(1)})


def write_slake(raw):
    questions.write_slake(raw)
    questions.write_zip(raw / "imgs.zip", questions.SLAKE_IMAGES)


def write_pmc_oa(raw):
    figures.write_pmc_oa(raw, [{"image": "a.jpg", "caption": "A."}, {"image": "b.jpg", "caption": "B."}],
                         {f"{figures.PMC_OA}a.jpg": picture(0)})


def write_omni_med_vqa(raw):
    rows = [figures.omni_row(n, "a.png", ["No", "Yes"], "No") for n in range(2)]
    figures.write_zip(raw / "OmniMedVQA.zip", {
        "OmniMedVQA/QA_information/Open-access/ACRIMA.json": json.dumps(rows).encode(),
        "OmniMedVQA/Images/a.png": picture(0)})


def write_pmc_vqa(name):
    def write(raw):
        train, test, images, folder, header, line = figures.PMC_VQA[name]
        row = line.format(figure="a.jpg", question="what?", text="x", choices="A:x,B:y,C:z,D", label="B")
        figures.write_zip(raw / images, {f"{folder}a.jpg": picture(0)})
        questions.write_files(raw, {train: header + 2 * row, test: header + row})
    return write


def write_ubench(raw):
    for n in range(7):
        figures.write_arrow(raw / f"perception/0.1.0/ubench-test-0000{n}-of-00007.arrow",
                            [figures.ubench_row(n, picture(n), stain=(["H&E", "none"], "none"))], 1)


def write_iu_xray(raw):
    reports.write_iu_xray(raw, reports.IU_XRAY_REPORTS,
                          {f"{name}.png": picture(0) for name in reports.IU_XRAY_IMAGES})


def write_mendeley(raw):
    figures.write_zip(raw / "ChestXRay2017.zip", classify.mendeley_fixture("chest_xray")[1])


def write_medfmc(form, numbers):
    def write(raw):
        pool = {form.format(n): numbers for n in range(10, 14)}
        classify.medfmc_fixture(raw, pool, {form.format(99): numbers}, (".png", ".jpg"))
    return write


def write_busi(raw):
    for number, label in enumerate(("benign", "malignant", "normal")):
        classify.put(raw / f"Dataset_BUSI_with_GT/{label}/{label} (1).png", picture(number))


WRITERS = {
    "path_vqa": write_hub, "vqa_rad": write_vqa_rad, "slake": write_slake,
    "vqa_med_2019": questions.write_vqa_med, **test_choice_data.WRITERS, "iu_xray": write_iu_xray,
    "mimic_cxr": lambda raw: reports.write_mimic_cxr(raw, reports.MIMIC_STUDIES),
    "roco": figures.write_roco, "roco_v2": figures.write_roco, "pmc_oa": write_pmc_oa,
    "omni_med_vqa": write_omni_med_vqa, "pmc_vqa": write_pmc_vqa("pmc_vqa"),
    "pmc_vqa_v2": write_pmc_vqa("pmc_vqa_v2"), "ubench": write_ubench,
    "cxr8": classify.cxr8_fixture, "mendeley_cxray": write_mendeley,
    "med_fmc_chest": write_medfmc("5E2653D72460{}", ",".join("01" * 9 + "0")),
    "med_fmc_colon": write_medfmc("2019-06-11 00_58_{}-lv1-8-6-6-1p0001", "1"),
    "med_fmc_endo": write_medfmc("13333_2021.{}_0002_54971718", "0 1 0 0"),
    "busi": write_busi, "cbis_ddsm": classify.cbis_fixture, "cbis_ddsm_three": classify.cbis_fixture,
    "cbis_ddsm_whole": classify.cbis_fixture,
    "chaoyang": classify.chaoyang_fixture, **test_box_data.WRITERS, **test_studies.WRITERS}


# ----------------------------------------------------------------------------- ways to spoil them

ODD = (None, 7, True, "x", "", [], {}, [None], [[1]], {"a": 1})  # values of JSON, for any other


def spoiled_value(value):
    """JSON values that differ from this one in one place, which lies on the way to its first leaf."""
    yield from ODD
    if isinstance(value, list) and value:
        yield from ([other, *value[1:]] for other in spoiled_value(value[0]))
    if isinstance(value, dict):
        for name in list(value)[:12]:
            yield {other: item for other, item in value.items() if other != name}
            yield from (value | {name: other} for other in spoiled_value(value[name]))


def spoiled_json(content, draw):
    yield from (json.dumps(value).encode() for value in spoiled_value(json.loads(content)))
    yield b"[" * 100_000


def spoiled_json_lines(content, draw):
    first, *rest = content.splitlines(keepends=True)
    yield from (json.dumps(value).encode() + b"\n" + b"".join(rest)
                for value in spoiled_value(json.loads(first)))
    yield content + b"\n\n"


def spoiled_table(content, draw):
    lines = content.decode("utf-8-sig").splitlines(keepends=True)
    for name in lines[0].strip().split(","):
        yield content.replace(name.encode(), b"other", 1)
    for line in (lines[-1][:9], "\n", ",\n", "1," * 99 + "1\n", '"', "\0,\0\n", '"' + "x" * 200_000):
        yield content + line.encode()
    yield content.replace(b"\n", b"", 1)


def spoiled_parquet(content, draw, stream=False):
    if stream:
        table = pyarrow.ipc.open_stream(content).read_all()
    else:
        table = pyarrow.parquet.read_table(io.BytesIO(content))

    def columns(name):
        for value in spoiled_value(table[name][0].as_py()):
            with contextlib.suppress(pyarrow.ArrowException):  # a list of several types is none
                yield pyarrow.array([value] * len(table))

    tables = [table.slice(0, 0)]
    for number, name in enumerate(table.column_names):
        tables += [table.remove_column(number), table.select([name])]
        tables += [table.set_column(number, name, column) for column in columns(name)]
    for changed in tables:
        with io.BytesIO() as file, contextlib.suppress(pyarrow.ArrowException):  # nor one without a type
            if stream:
                with pyarrow.ipc.new_stream(file, changed.schema) as writer:
                    writer.write_table(changed)
            else:
                pyarrow.parquet.write_table(changed, file)
            yield file.getvalue()


def spoiled_zip(content, draw):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name in draw.sample(sorted(members), min(4, len(members))):
        for changed in spoiled(name, members[name], draw):
            with io.BytesIO() as file:
                with zipfile.ZipFile(file, "w") as archive:
                    for other, unchanged in members.items():
                        archive.writestr(other, changed if other == name else unchanged)
                yield file.getvalue()


def spoiled_tar(content, draw):
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [(member, archive.extractfile(member).read() if member.isreg() else b"")
                   for member in archive]
    chosen = draw.choice([member for member, _ in members if member.isreg()])
    for changed in spoiled(chosen.name, dict(members)[chosen], draw):
        with io.BytesIO() as file:
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
                for member, unchanged in members:
                    packed = tarfile.TarInfo(member.name)
                    packed.type, text = member.type, changed if member is chosen else unchanged
                    packed.size = len(text)
                    archive.addfile(packed, io.BytesIO(text))
            yield file.getvalue()


INSIDE = {".json": spoiled_json, ".jsonl": spoiled_json_lines, ".csv": spoiled_table,
          ".parquet": spoiled_parquet, ".zip": spoiled_zip, ".tgz": spoiled_tar, ".tar.gz": spoiled_tar,
          ".arrow": lambda content, draw: spoiled_parquet(content, draw, stream=True),
          ".csv.gz": lambda content, draw: (gzip.compress(changed, 1) for changed in
                                            spoiled("a.csv", gzip.decompress(content), draw))}


def spoiled(name, content, draw):
    """Contents for a file in place of this one. The first three should be refused, if it is read."""
    yield from (b"", b"<html>Not found</html>\n", b"\xff\xfe\xff" * 9, content[:len(content) // 2])
    for _ in range(4 if content else 0):
        place = draw.randrange(len(content))
        yield content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1:]
        yield content[:place] + draw.choice((b"\0", b"\n", b"\xff", b'"', b"|")) + content[place:]
        yield content[:place] + b"\xe9" + content[place + 1:]
    suffix = next((suffix for suffix in INSIDE if name.endswith(suffix)), None)
    if suffix:
        yield from INSIDE[suffix](content, draw)


# ----------------------------------------------------------------------------- every dataset

def read_whole(name, raw, path):
    """Whether a dataset is read; False if it is refused in one line that names the file."""
    try:
        records = list(DATASETS[name].read(raw))
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 1500, message
        assert str(path) in message or str(path.with_suffix("")) in message, message
        return False
    for split, record in records:
        assert split in ("train", "validation", "test")
        texts = [record.id, record.question, record.answer, record.image_name, record.context,
                 record.type, *(record.labels or ()), *record.references]
        assert all(isinstance(text, str) for text in texts), record
        assert record.image is None or isinstance(record.image, bytes), record
        assert isinstance(record.labels, tuple if DATASETS[name].classes else type(None)), record
        assert isinstance(record.references, tuple), record
        if DATASETS[name].kind not in ("text questions", "classification"):  # else asked without it
            assert record.image is not None or record.image_name or record.parts or name in test_studies.WRITERS, record
    return True


@pytest.mark.parametrize("name", [name for name in DATASETS if not DATASETS[name].drawn])
def test_a_spoiled_file_is_refused_by_name_or_read(name, tmp_path):
    raw, draw = tmp_path / name, random.Random(name)
    WRITERS[name](raw)
    assert read_whole(name, raw, raw)
    paths = sorted(path for path in raw.rglob("*") if path.is_file())
    images = [path for path in paths if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    tables = [path for path in paths if path not in images and path.name != "Data_Entry_2017.csv"]
    for path in tables + images[:1]:
        content = path.read_bytes()
        path.unlink()
        read_whole(name, raw, raw)
        for number, changed in enumerate(spoiled(path.name, content, draw)):
            path.write_bytes(changed)
            whole = read_whole(name, raw, path)
            none = not changed and path.parent.name == "labels"  # YOLO's file of an image without a box
            assert path in images or number > 2 or not whole or none, (path, changed[:80])
        path.write_bytes(content)
    assert read_whole(name, raw, raw)


# ----------------------------------------------------------------------------- some shards, null rows

def test_part_of_a_splits_shards_is_refused(tmp_path):
    write_hub(tmp_path)
    data = tmp_path / "data"
    first, second = sorted(data.glob("train-*"))
    content = second.read_bytes()
    second.unlink()
    questions.refused("path_vqa", tmp_path, f"{data}: no train-00001-of-00002*.parquet among its 1 file")
    second.write_bytes(content)
    (data / "train-00000-of-00001-v.parquet").write_bytes(content)  # of another download
    questions.refused("path_vqa", tmp_path, f"{data}: 3 files train-*.parquet, not 2, as they say")
    first.unlink()
    questions.refused("path_vqa", tmp_path, f"{data}: no train-00000-of-00002*.parquet among its 2 file")
    for path in data.glob("train-*"):
        path.unlink()
    (data / "train-all.parquet").write_bytes(content)  # a name that says nothing
    assert [split for split, _ in questions.read("path_vqa", tmp_path)] == [
        *["train"] * 2, *["validation"] * 2, *["test"] * 2]


def test_null_and_numbers_are_texts_and_other_types_are_refused(tmp_path):
    path, form = tmp_path / "a.json", [{"text": str, "parts": [("name",)], "picture": {"bytes": bytes}}]
    row = {"text": 2.5, "parts": [{"name": 1, "more": {}}, {"name": None}, None], "picture": None}
    path.write_text(json.dumps([row, None, row | {"text": float("nan"), "parts": None}]))
    absent = {"text": "", "parts": [], "picture": {"bytes": None}}
    whole = {"text": "2.5", "parts": [{"name": "1"}, {"name": ""}, {"name": ""}]}
    assert read_json(path, form) == [absent | whole, absent, absent]
    for changes, message in (
            ({"text": ["a"]}, "item 1: text: list found where str was expected"),
            ({"parts": "a"}, "item 1: parts: str found where list was expected"),
            ({"parts": [{"name": "a"}, 2]}, "item 1: parts: item 2: int found where dict was expected"),
            ({"parts": [{"n\na": 2}]}, "item 1: parts: item 1: no column 'name' among its columns n a"),
            ({"picture": {"bytes": "a"}}, "item 1: picture: bytes: str found where bytes was expected")):
        path.write_text(json.dumps([row | changes]))
        with pytest.raises(UserError) as error:
            read_json(path, form)
        assert str(error.value) == f"{path}: {message}"


def test_a_file_without_a_value_is_refused(tmp_path):
    path = tmp_path / "a"
    for content in (b"", b" \n\n", b"[]", b"{}", b"null"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: (empty|damaged or not JSON .*); fetch it again"):
            read_json(path, dict)
        with pytest.raises(UserError, match=f"{path}: (line 1: )?empty; fetch it again"):
            list(read_json_lines(path, dict))


# ----------------------------------------------------------------------------- bombs

ZEROS = 0x04030201  # bytes that a bomb inflates to: 67 MB, where a reader may take 8 MB


@contextlib.contextmanager
def little_memory():
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < ZEROS // 8


def lying_zip(claimed, packing=zipfile.ZIP_DEFLATED):
    """A zip whose member "bomb" inflates to ZEROS, whatever it claims; "good" is good."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", packing) as archive:
            archive.writestr("bomb", bytes(ZEROS))
            archive.writestr("good", b"good")
        size = ZEROS.to_bytes(4, "little")
        return file.getvalue().replace(size, claimed.to_bytes(4, "little"))


@pytest.mark.parametrize("claimed, packing", [
    (10, zipfile.ZIP_DEFLATED), (0, zipfile.ZIP_DEFLATED), (LARGEST_MEMBER + 1, zipfile.ZIP_DEFLATED),
    (10, zipfile.ZIP_BZIP2), (10, zipfile.ZIP_LZMA)])
def test_a_zips_bomb_is_an_unreadable_image(claimed, packing, tmp_path):
    path, content = tmp_path / "a.zip", lying_zip(claimed, packing)
    path.write_bytes(content)
    with little_memory():
        for file in (None, io.BytesIO(content)):  # a zip, and one that lies in another
            with open_zip(path, file) as archive:
                assert read_member(archive, "bomb") == b"" and read_member(archive, "none") is None
                assert packing != zipfile.ZIP_DEFLATED or read_member(archive, "good") == b"good"


def test_a_tars_bomb_is_an_unreadable_image_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.datasets, "LARGEST_MEMBER", ZEROS - 1)
    path = tmp_path / "a.tgz"
    large, good = tarfile.TarInfo("large.png"), tarfile.TarInfo("good.png")
    large.size, good.size = ZEROS, 4
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(large.tobuf() + bytes(ZEROS + -ZEROS % 512) + good.tobuf() + b"good" + bytes(1532))
    with little_memory():
        assert list(read_tar(path)) == [("large.png", b""), ("good.png", b"good")]
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        name = tarfile.TarInfo("name")
        name.type, name.size = kind, ZEROS
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(name.tobuf() + bytes(ZEROS))
        with little_memory(), pytest.raises(UserError, match=f"{path}: damaged archive .a header of"):
            list(read_tar(path))


@pytest.mark.parametrize("start", [b"", b'"', b"a,b\n"])
def test_a_tables_bomb_is_refused(start, tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(start + bytes(ZEROS), 1))
    with little_memory(), pytest.raises(UserError, match=f"{path}: damaged table"):
        list(read_csv(path, ("a", "b")))


@pytest.mark.parametrize("width, height", [(50_000, 50_000), (1, 200_000_000)])
def test_an_images_bomb_is_unreadable_before_it_is_decoded(width, height):
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    content = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999)))
               + chunk(b"IEND", b""))
    with pytest.raises(Unreadable, match="^too many pixels$"):
        load_image(content)
    assert encode_image(content, ImageSettings(224, "squash", "jpeg", 97)) == "too many pixels"
