"""The classification benchmarks: each read from a small copy of its layout, and how they are split."""

import io
import json
import os
import random
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data import Record
from plumbing.flags import UserError
from prepare.classify import split_by_group
from prepare.datasets import DATASETS

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("cxr8", "mendeley_cxray", "med_fmc_chest", "med_fmc_colon", "med_fmc_endo", "busi", "cbis_ddsm",
         "cbis_ddsm_three", "cbis_ddsm_whole", "chaoyang")


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(name, raw):
    return list(DATASETS[name].read(raw))


def refused(name, raw, *words):
    with pytest.raises(UserError) as error:
        read(name, raw)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


# ----------------------------------------------------------------------------- splits

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def patients(count=400, seed=0):
    """Groups of 1 to 9 items with a common, a rare and a very rare class, some items with several."""
    draw = random.Random(seed)
    groups = [f"patient {number}" for number in range(count) for _ in range(draw.randint(1, 9))]
    return groups, [tuple(name for name, share in (("common", 0.5), ("rare", 0.05), ("very rare", 0.02))
                          if draw.random() < share) for _ in groups]


def test_groups_stay_whole_and_shares_are_near_within_each_class():
    groups, labels = patients()
    splits = split_by_group(groups, labels, SHARES)
    assert len(set(zip(groups, splits))) == len(set(groups))
    for split, share in SHARES.items():
        assert splits.count(split) == pytest.approx(share * len(groups), abs=3)
        for name in ("common", "rare", "very rare"):
            total = sum(name in names for names in labels)
            found = sum(name in names for names, place in zip(labels, splits) if place == split)
            assert found == pytest.approx(share * total, abs=2), (split, name)


def test_a_split_is_a_pure_function_that_no_order_changes():
    groups, labels = patients()
    splits = split_by_group(groups, labels, SHARES)
    assert split_by_group(groups, labels, SHARES, seed=0) == splits
    assert split_by_group(groups, labels, SHARES, seed=1) != splits
    order = random.Random(1).sample(range(len(groups)), len(groups))
    shuffled = split_by_group([groups[n] for n in order], [labels[n] for n in order], SHARES)
    assert shuffled == [splits[n] for n in order]
    assert split_by_group(list("abcdefghij"), [("x",)] * 10, {"train": 0.9, "validation": 0.1}) == [
        "train", "validation", *["train"] * 8]


def test_a_group_larger_than_a_split_goes_where_there_is_room():
    groups = ["large"] * 50 + [f"small {number}" for number in range(50)]
    splits = split_by_group(groups, [("x",)] * 100, SHARES)
    assert splits[0] == "train" and Counter(splits) == {"train": 70, "validation": 10, "test": 20}
    assert split_by_group([], [], SHARES) == []
    with pytest.raises(ValueError):
        split_by_group(["a"], [], SHARES)


# ----------------------------------------------------------------------------- chest films

CXR8_HEADER = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
               "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n")


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("images")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def cxr8_fixture(raw):
    findings = {f"{patient:08d}_{visit:03d}.png": "No Finding" for patient in range(1, 11)
                for visit in (0, 1)}
    findings |= {"00000002_000.png": "Effusion|Mass", "00000003_001.png": "Gout",
                 "00000011_000.png": "Hernia", "00000011_001.png": "No Finding"}
    put(raw / "Data_Entry_2017.csv", "an older table, which is not read\n")
    put(raw / "Data_Entry_2017_v2020.csv", CXR8_HEADER + "".join(
        f"{name},{labels},0,{int(name[:8])},58,M,PA,2682,2749,0.143,0.143,\n"
        for name, labels in findings.items()))
    put(raw / "train_val_list.txt", "\n".join(sorted(findings)[:20]))  # no line break at its end
    put(raw / "test_list.txt", "00000011_000.png\n00000011_001.png\n")
    packed = {f"images/{name}": name.encode() for name in sorted(findings)[:21]}
    write_tar(raw / "images_001.tar.gz", dict(list(packed.items())[:9]))
    write_tar(raw / "images_002.tar.gz", dict(list(packed.items())[9:]) | {
        "images/._00000001_000.png": b"", "images/00000001_000.png": b"again"})
    return findings


def cxr8_records(findings, image):
    held_out = "00000004"  # the patient whom the seed draws
    return [("test" if name[:8] == "00000011" else "validation" if name[:8] == held_out else "train",
             Record(name[:-4], image=image(name), image_name=name, labels=() if labels == "No Finding"
                    else tuple(labels.split("|")))) for name, labels in sorted(findings.items())]


def test_cxr8_is_read_from_its_archives(tmp_path):
    findings = cxr8_fixture(tmp_path)
    image = dict.fromkeys(findings, None) | {name: name.encode() for name in sorted(findings)[:21]}
    assert read("cxr8", tmp_path) == cxr8_records(findings, image.get)  # the last is in no archive
    archive = tmp_path / "images_002.tar.gz"
    archive.write_bytes(archive.read_bytes()[:200])
    refused("cxr8", tmp_path, "images_002.tar.gz", "damaged archive")


@pytest.mark.parametrize("folder", ["images", "images_001/images"])
def test_cxr8_is_read_unpacked(folder, tmp_path):
    raw = tmp_path / "cxr8"
    findings = cxr8_fixture(raw)
    for archive in raw.glob("*.tar.gz"):
        archive.unlink()
    assert not DATASETS["cxr8"].find(tmp_path)  # no images
    for name in findings:
        put(raw / folder / name, f"unpacked {name}")
    assert f"{folder}/00000001_000.png" in DATASETS["cxr8"].find(tmp_path)
    assert sorted(read("cxr8", raw), key=lambda item: item[1].id) == cxr8_records(
        findings, lambda name: f"unpacked {name}".encode())


def test_cxr8_refuses_what_has_changed(tmp_path):
    cxr8_fixture(tmp_path)
    table = tmp_path / "Data_Entry_2017_v2020.csv"
    content = table.read_text()
    table.write_text(content.replace("Finding Labels", "Findings"))
    refused("cxr8", tmp_path, str(table), "no column 'Finding Labels'")
    table.write_text(content[:content.index("00000007_001")])
    refused("cxr8", tmp_path, "train_val_list.txt: '00000007_001.png' has no row in", str(table))
    table.write_text(content)
    (tmp_path / "test_list.txt").write_bytes(b"\xff\xfe\x00")
    refused("cxr8", tmp_path, "test_list.txt", "damaged list")
    (tmp_path / "test_list.txt").unlink()
    refused("cxr8", tmp_path, "test_list.txt", "missing")


def mendeley_fixture(form):
    """{name: content}: person7's bacterial and viral films, a film of val, and what is no film."""
    films = [f"train/PNEUMONIA/{name}" for number in range(1, 11) for name in (
        f"person{number}_bacteria_{number}", f"person{number}_virus_{number + 20}")]
    films += [f"train/NORMAL/IM-{number:04d}-0001" for number in range(115, 124)]
    films += ["train/NORMAL/NORMAL2-IM-0115-0001", "train/NORMAL/NORMAL2-IM-0115-0001-0002",
              "val/PNEUMONIA/person7_bacteria_99", "train/OTHER/odd",
              "test/NORMAL/IM-0001-0001", "test/PNEUMONIA/person7_virus_6"]
    if form == "CellData/chest_xray":  # the later archive's names
        films = ["train/NORMAL/NORMAL-28501-0001", "train/NORMAL/NORMAL-28501-0002",
                 "train/PNEUMONIA/BACTERIA-7422-0001", "train/PNEUMONIA/VIRUS-7422-0001",
                 "test/PNEUMONIA/BACTERIA-40699-0001"]
    files = {f"{form}/{film}.jpeg": film.encode() for film in films}
    other = [f"{form}/train/NORMAL/.DS_Store", f"__MACOSX/{form}/train/NORMAL/._IM-0115-0001.jpeg",
             f"{form}/train/NORMAL/._IM-0115-0001.jpeg",
             f"{form}/chest_xray/train/NORMAL/IM-0115-0001.jpeg",
             "CellData/OCT/train/CNV/CNV-1016042-1.jpeg"]
    return files, files | dict.fromkeys(other, b"not a film")


def mendeley_records(films, held_out):
    records = []
    for name, content in sorted(films.items()):
        *_, part, folder, film = name.removesuffix(".jpeg").split("/")
        split = "test" if part == "test" else "validation" if film.startswith(held_out) else "train"
        records.append((split, Record(film, image=content, image_name=name, labels=(folder.lower(),))))
    return records


@pytest.mark.parametrize("archive, form, held_out", [
    ("ChestXRay2017.zip", "chest_xray", ("person5_", "IM-0120-")),
    ("ZhangLabData.zip", "CellData/chest_xray", ("none",)),
    ("", "chest_xray", ("person5_", "IM-0120-")), ("", "CellData/chest_xray", ("none",))])
def test_mendeley_cxray(archive, form, held_out, tmp_path):
    raw = tmp_path / "mendeley_cxray"
    films, files = mendeley_fixture(form)
    if archive:
        raw.mkdir()
        with zipfile.ZipFile(raw / archive, "w") as packed:
            for name, content in files.items():
                packed.writestr(name, content)
        assert list(DATASETS["mendeley_cxray"].find(tmp_path)) == [archive]
    else:
        for name, content in files.items():
            put(raw / name, content)
        assert set(films) - set(DATASETS["mendeley_cxray"].find(tmp_path)) <= {
            name for name in films if "/val/" in name}
    assert read("mendeley_cxray", raw) == mendeley_records(films, held_out)
    if archive:
        (raw / archive).write_bytes((raw / archive).read_bytes()[:500])
        refused("mendeley_cxray", raw, archive, "damaged zip")


# ----------------------------------------------------------------------------- MedFMC

def medfmc_fixture(raw, pool, test, forms):
    """Lists with Windows line ends, and an image of each name but the last, of alternating forms."""
    put(raw / "fewshot-pool.txt", "".join(f"{name} {numbers}\r\n" for name, numbers in pool.items()))
    put(raw / "test.txt", "".join(f"{name} {numbers}\r\n" for name, numbers in test.items()))
    images = {}
    for number, name in enumerate([*pool, *test][:-1]):
        images[name] = f"{name}{forms[number % len(forms)]}"
        put(raw / "images" / images[name], images[name])
    return images


def medfmc_records(pool, test, images, labels, held_out):
    return [("test" if name in test else "validation" if name in held_out else "train",
             Record(name, image=images[name].encode() if name in images else None,
                    image_name=images.get(name, name), labels=labels.get(name, labels[None])))
            for name in [*pool, *test]]


def test_med_fmc_chest(tmp_path):
    bits = lambda *places: ",".join("1" if place in places else "0" for place in range(19))
    pool = {f"5E2653D72460CF{letter}": bits() for letter in "ABCDEFGHI"}
    dotted = "DX.1.3.46.670589.26.802544.25.20191028.115702.303763.0"  # ".0" is no ending
    pool |= {dotted: bits(1, 18)}
    test = {"5B91F7409CCCE2": bits(0).replace("1", "2"), "CR.1.3.12.2.1107.5.3": bits(10)}
    images = medfmc_fixture(tmp_path, pool, test, (".png", ".jpg"))
    labels = {None: (), dotted: ("nodule", "consolidation"), "5B91F7409CCCE2": ("2",),
              "CR.1.3.12.2.1107.5.3": ("TB",)}
    assert read("med_fmc_chest", tmp_path) == medfmc_records(
        pool, test, images, labels, ["5E2653D72460CFE"])


def test_med_fmc_colon(tmp_path):
    scans = [f"2019-06-11 00_58_{number:02d}" for number in range(10)]
    pool = {f"{scan}-lv1-{region}-6042-6546-12714p0001": scan[-1] == "3" and "1" or "0"
            for scan in scans for region in (820, 7052)}
    test = {f"{scans[0]}-lv1-9-1-1-1p0002": "7", "1900838001_2019-04-30 10_15_23-lv1-1-2-3-4p0007": "1"}
    images = medfmc_fixture(tmp_path, pool, test, (".png",))
    labels = {None: ("no_tumor",)} | {name: ("tumor",) for name in pool if "00_58_03" in name}
    labels |= dict(zip(test, [("7",), ("tumor",)]))
    assert read("med_fmc_colon", tmp_path) == medfmc_records(
        pool, test, images, labels, [name for name in pool if "00_58_08-" in name])


def test_med_fmc_endo(tmp_path):
    pool = {f"13333_2021.{study:02d}_0002_5497{frame}": "0 0 0 0" for study in range(1, 11)
            for frame in (1718, 1654)}
    pool |= {"13333_2021.03_0002_54971654": "1 0 0 1"}
    test = {"13333_2021.12_0005_56231595": "0 1 1 0", "13333_2021.12_0005_56232354": "0 0 0 0"}
    images = medfmc_fixture(tmp_path, pool, test, (".jpg", ".png"))
    labels = {None: (), "13333_2021.03_0002_54971654": ("ulcer", "tumor"),
              "13333_2021.12_0005_56231595": ("erosion", "polyp")}
    assert read("med_fmc_endo", tmp_path) == medfmc_records(
        pool, test, images, labels, [name for name in pool if "2021.10" in name])
    found = read("med_fmc_endo", tmp_path)
    for file in ("fewshot-pool.txt", "test.txt"):  # names that do have an ending are the same
        put(tmp_path / file, (tmp_path / file).read_text().replace(" ", ".png ", 1))
    assert read("med_fmc_endo", tmp_path) == found
    put(tmp_path / "test.txt", "13333_2021.12_0005_56232354.png\n")  # the list without labels
    refused("med_fmc_endo", tmp_path, "test.txt", "_56232354.png' is not a name and 4 numbers")
    (tmp_path / "fewshot-pool.txt").unlink()
    refused("med_fmc_endo", tmp_path, "fewshot-pool.txt", "missing")


# ----------------------------------------------------------------------------- breast

def test_busi(tmp_path):
    folder = tmp_path / "Dataset_BUSI_with_GT"
    for label, count in (("benign", 20), ("malignant", 10), ("normal", 10)):
        for number in range(1, count + 1):
            put(folder / label / f"{label} ({number}).png", f"{label} {number}")
            put(folder / label / f"{label} ({number})_mask.png", "a mask")
    put(folder / "benign/benign (4)_mask_1.png", "a second mask")
    put(folder / "benign/benign (4)_mask_2.png", "a third mask")
    put(folder / "malignant/malignant (9).png", "benign 7")  # one picture, published twice
    found = read("busi", tmp_path)
    assert [record for _, record in found] == [
        Record(path.stem, image=path.read_bytes(), image_name=f"{path.parent.name}/{path.name}",
               labels=(path.parent.name,)) for path in sorted(folder.glob("*/*).png"))]
    splits = {record.id: split for split, record in found}
    assert splits["benign (7)"] == splits["malignant (9)"]
    counts = Counter((record.labels[0], split) for split, record in found)
    assert counts == {("benign", "train"): 14, ("benign", "validation"): 2, ("benign", "test"): 4,
                      ("malignant", "train"): 7, ("malignant", "validation"): 1,
                      ("malignant", "test"): 2,
                      ("normal", "train"): 7, ("normal", "validation"): 1, ("normal", "test"): 2}
    put(folder / "other/other (1).png", "of a class that is none")
    assert read("busi", tmp_path)[-1][1].labels == ("other",)


CBIS_HEADER = ("patient_id,{density},left or right breast,image view,abnormality id,abnormality type,"
               "{words},assessment,pathology,subtlety,image file path,cropped image file path,"
               "ROI mask file path\r\n")
CBIS_WORDS = {"mass": {"density": "breast_density", "words": "mass shape,mass margins"},
              "calc": {"density": "breast density", "words": "calc type,calc distribution"}}


def film(width, seed):
    stream = io.BytesIO()
    Image.new("L", (width, 2 * width), seed).save(stream, "JPEG")
    return stream.getvalue()


def cbis_fixture(raw, changed=("", "")):
    """
    Ten patients to train on, one of whom is also tested on, and two to test on.

    Patient 2 has a malignant calcification in a film of a benign mass; the series of patient 3's
    crop holds only its mask, that of the mask only the crop; patient 4's crop has no image.
    """
    tables = {(kind, split): CBIS_HEADER.format(**words) for kind, words in CBIS_WORDS.items()
              for split in ("train", "test")}

    def add(kind, split, patient, pathology, number=1):
        part = "Training" if split == "train" else "Test"
        case = f"{kind.capitalize()}-{part}_P_{patient:05d}_LEFT_CC"
        series = [f"1.3.{int(kind == 'calc')}.{patient}.{number}.{part}" for part in range(4)]
        paths = [f"{case}/1.3.9/{series[1]}/000000.dcm", f"{case}_{number}/1.3.9/{series[2]}/000001.dcm",
                 f"{case}_{number}/1.3.9/{series[2]}/000000.dcm"]
        images = [(series[1], "1-100", film(40, patient)), (series[2], "1-200", film(8, patient)),
                  (series[2], "1-100", film(40, 255))]
        if patient == 3:
            paths[2] = paths[2].replace(series[2], series[3])
            images[1:] = [(series[2], "1-001", film(40, 255)), (series[3], "1-001", film(8, patient))]
        for name, image, content in images[:1] + images[2:] if patient == 4 else images:
            put(raw / f"jpeg/{name}/{image}.jpg", content)
        tables[kind, split] += ",".join([  # a path may end in a line break, whichever of the two it is
            f"P_{patient:05d},3,LEFT,CC,{number},{kind},OVAL,SPICULATED,4,{pathology},4,{paths[0]}",
            f'"{paths[1]}\n"' if kind == "calc" else paths[1],
            f'"{paths[2]}\n"' if kind == "mass" else paths[2]]) + "\r\n"

    for patient in range(1, 11):
        add("mass", "train", patient, "MALIGNANT" if patient == 5 else "BENIGN_WITHOUT_CALLBACK")
    add("calc", "train", 2, "MALIGNANT")
    add("calc", "train", 3, "BENIGN", number=2)
    add("mass", "test", 11, "MALIGNANT")
    add("calc", "test", 10, "BENIGN")
    add("calc", "test", 12, "UNPROVEN")
    for (kind, split), table in tables.items():
        put(raw / f"csv/{kind}_case_description_{split}_set.csv", table.replace(*changed))


CBIS_HELD_OUT = 9  # the patient whom the seed draws


def cbis_split(patient):
    return "test" if patient >= 10 else "validation" if patient == CBIS_HELD_OUT else "train"


def test_cbis_ddsm(tmp_path):
    raw = tmp_path / "cbis_ddsm"
    cbis_fixture(raw)
    wanted = []
    for kind, patient, label, number in [
            *[("mass", patient, "benign", 1) for patient in (1, 2, 3, 4)], ("mass", 5, "malignant", 1),
            *[("mass", patient, "benign", 1) for patient in (6, 7, 8, 9)],
            ("calc", 2, "malignant", 1), ("calc", 3, "benign", 2), ("mass", 11, "malignant", 1),
            ("calc", 10, "benign", 1), ("calc", 12, "UNPROVEN", 1)]:
        series = f"jpeg/1.3.{int(kind == 'calc')}.{patient}.{number}"
        name = f"{series}.3/1-001.jpg" if patient == 3 else f"{series}.2/1-200.jpg"
        part = "Test" if patient >= 10 else "Training"
        missing = patient == 4
        wanted.append((cbis_split(patient), Record(
            f"{kind.capitalize()}-{part}_P_{patient:05d}_LEFT_CC_{number}",
            image=None if missing else film(8, patient),
            image_name=f"{series}.2" if missing else name, labels=(label,))))
    assert read("cbis_ddsm", raw) == wanted
    three = {("mass", "benign"): "benign_without_callback", ("calc", "UNPROVEN"): "unproven"}
    assert read("cbis_ddsm_three", raw) == [
        (split, replace(record, labels=(three.get((record.id[:4].lower(), record.labels[0]), record.labels[0]),)))
        for split, record in wanted]
    assert len(DATASETS["cbis_ddsm"].find(tmp_path)) == 4 + len(list(raw.glob("jpeg/*/*.jpg")))


def test_cbis_ddsm_whole(tmp_path):
    cbis_fixture(tmp_path)
    labels = {2: "malignant", 5: "malignant", 11: "malignant", 12: "UNPROVEN"}
    assert read("cbis_ddsm_whole", tmp_path) == [
        (cbis_split(patient), Record(
            f"P_{patient:05d}_LEFT_CC", image=film(40, patient), labels=(labels.get(patient, "benign"),),
            image_name=f"jpeg/1.3.{int(patient in (10, 12))}.{patient}.1.1/1-100.jpg"))
        for patient in (*range(1, 10), 11, 10, 12)]
    for image in tmp_path.glob("jpeg/1.3.0.6.1.1/*.jpg"):
        image.unlink()
    lost, = [record for _, record in read("cbis_ddsm_whole", tmp_path) if record.image is None]
    assert (lost.id, lost.image_name) == ("P_00006_LEFT_CC", "jpeg/1.3.0.6.1.1")


@pytest.mark.parametrize("name", ["cbis_ddsm", "cbis_ddsm_three", "cbis_ddsm_whole"])
def test_cbis_ddsm_refuses_a_changed_table(name, tmp_path):
    cbis_fixture(tmp_path, ("pathology", "diagnosis"))
    refused(name, tmp_path, "mass_case_description_train_set.csv", "no column 'pathology'")


# ----------------------------------------------------------------------------- colon

def chaoyang_fixture(raw):
    patches = {"train": [(f"{slide}_4-IMG005x{patch:03d}", label) for slide in range(353040, 353050)
                         for patch, label in ((14, 0), (15, 2))],
               "test": [("535940-IMG009x024", 3), ("535940-IMG009x025", 9), ("535941-IMG001x001", 1)]}
    rows = {part: [{"name": f"{part}/{name}-{label}.JPG", "label": label} for name, label in listed]
            for part, listed in patches.items()}
    for part, listed in rows.items():
        put(raw / f"chaoyang-data/{part}.json", json.dumps(listed))
        for row in listed:
            put(raw / "chaoyang-data" / row["name"], row["name"])
    return rows


def test_chaoyang(tmp_path):
    folder, classes = tmp_path / "chaoyang-data", DATASETS["chaoyang"].classes
    wanted = []
    for part, listed in chaoyang_fixture(tmp_path).items():
        for row in listed:
            split = "validation" if "353046_4" in row["name"] else part
            label = classes[row["label"]] if row["label"] < 4 else "9"
            wanted.append((split, Record(Path(row["name"]).stem, image=row["name"].encode(),
                                         image_name=row["name"], labels=(label,))))
    assert read("chaoyang", tmp_path) == wanted
    (folder / "test/535941-IMG001x001-1.JPG").unlink()
    wanted[-1][1].image = None
    assert read("chaoyang", tmp_path) == wanted
    put(folder / "test.json", '[{"name": "test/a.JPG", "class": 1}]')
    refused("chaoyang", tmp_path, "test.json: item 1: no column 'label' among its columns name, class")
    put(folder / "test.json", '[{"name": "test/a')
    refused("chaoyang", tmp_path, "test.json", "damaged or not JSON")


def test_labels_that_count_from_one_are_refused(tmp_path):
    put(tmp_path / "chaoyang-data/test.json", '[{"name": "test/a.JPG", "label": 2}]')
    put(tmp_path / "chaoyang-data/train.json", '[{"name": "train/a.JPG", "label": 4}]')
    refused("chaoyang", tmp_path, "chaoyang-data: its labels count 4 classes from 1, the published ones from 0")
    put(tmp_path / "fewshot-pool.txt", "a 1\nb 2\n")
    put(tmp_path / "test.txt", "c 0\n")
    refused("med_fmc_colon", tmp_path, "fewshot-pool.txt: its labels count 2 classes from 1")


# ----------------------------------------------------------------------------- facts and real data

@pytest.mark.parametrize("name", NAMES)
def test_facts_are_complete(name):
    facts = DATASETS[name]
    assert facts.kind == "classification" and set(facts.counts) == {"train", "validation", "test"}
    assert len(set(facts.classes)) == len(facts.classes) > 1 and all(facts.counts.values())
    assert not facts.urls and not facts.hub and facts.page.startswith("https://") and facts.layouts


RAW = Path(os.environ.get("NANOMEDQ_RAW", ROOT / "raw"))


@pytest.mark.skipif(not (RAW / "busi").is_dir(),
                    reason=f"no real BUSI in {RAW}; set NANOMEDQ_RAW to a folder of it")
def test_real_busi_has_the_published_counts():
    found = read("busi", RAW / "busi")
    labels = Counter(record.labels[0] for _, record in found)
    assert labels == {"benign": 437, "malignant": 210, "normal": 133}
    counts = Counter((record.labels[0], split) for split, record in found)
    for label, total in labels.items():
        for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
            assert counts[label, split] == pytest.approx(share * total, abs=1.5)
    assert Counter(split for split, _ in found) == DATASETS["busi"].counts
    places = {}
    for split, record in found:
        places.setdefault(record.image, set()).add(split)
    assert all(len(splits) == 1 for splits in places.values())
