"""
Forty layouts of folders and files as people have them, each made small and prepared by `--own`, with the samples and
pictures that are expected of it.

A layout is a function that writes into an empty folder and returns the samples to expect: (question, answer, numbers of
its pictures), (labels, numbers) or (report, numbers). picture(n) is told from all others by its pixels.
"""

import base64
import functools
import io
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from plumbing.flags import UserError
from plumbing.shards import Shard
from prepare.all import Config, main
from prepare.questions import train_sample_tokenizer
from test_box_data import put, voc

SIDE, COUNT = 32, 12
LAYOUTS = []  # (function, flags)
NUMBERS = range(COUNT)


def layout(**flags):
    def register(write):
        LAYOUTS.append(pytest.param(write, flags, id=write.__name__))
        return write
    return register


# ----------------------------------------------------------------------------- pictures

@functools.cache
def pixels_of(number):
    """(SIDE, SIDE) uint8: noise whose darkest and brightest twentieth are even, so that percentiles alter nothing."""
    grey = np.random.default_rng(number).integers(20, 236, (SIDE, SIDE)).astype(np.uint8)
    grey[:2], grey[-2:] = 0, 255
    return grey


def picture(number, form="PNG", mode="RGB"):
    stream = io.BytesIO()
    Image.fromarray(pixels_of(number)).convert(mode).save(stream, form, **({"quality": 98} if form == "JPEG" else {}))
    return stream.getvalue()


def pages(numbers, form="TIFF"):
    stream, (first, *rest) = io.BytesIO(), [Image.fromarray(pixels_of(number)) for number in numbers]
    first.save(stream, form, save_all=True, append_images=rest)
    return stream.getvalue()


def dicom(numbers, **header):
    """A DICOM file of these pictures, whose values are Hounsfield units from -160 to 95 when they are stored."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = "CT", "MONOCHROME2", 1
    data.Rows = data.Columns = SIDE
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    values = np.stack([pixels_of(number).astype(np.uint16) + 864 for number in numbers])  # grey - 160 HU
    if len(numbers) > 1:
        data.NumberOfFrames = len(numbers)
    data.PixelData = values.tobytes()
    for name, value in header.items():
        setattr(data, name, value)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


WIDE = "-33/255"  # a window of these values' own range: grey comes back as it was, to a level


def write_series(folder, numbers, **header):
    """A series whose files are named against the order of position."""
    from pydicom.uid import generate_uid

    uid = generate_uid()
    for place, number in enumerate(numbers):
        put(folder / f"IM{len(numbers) - place:04}", dicom(
            [number], SeriesInstanceUID=uid, StudyInstanceUID=uid, InstanceNumber=place + 1, PixelSpacing=[1, 1],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, -5.0 * len(numbers) + 5 * place],
            **header))


def number_of(pixels):
    """Which picture (H, W, 3) pixels are, whatever JPEG and windows did to them."""
    assert (pixels == pixels[..., :1]).all() or np.ptp(pixels.astype(int), -1).max() < 12
    apart = [np.abs(pixels[..., 0].astype(int) - pixels_of(number).astype(int)).mean() for number in range(4 * COUNT)]
    assert min(apart) < 4, min(apart)
    return int(np.argmin(apart))


# ----------------------------------------------------------------------------- what is prepared

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sample_tokenizer())
    return path


def prepare(path, shards, tokenizer, **flags):
    main(Config(own=str(path), shards_dir=str(shards), tokenizer=str(tokenizer), image_size=SIDE, codec="png",
                workers=1, **flags))


def samples(shards):
    """[(split, dataset's manifest, words, numbers of its pictures)] of all that is prepared."""
    found = []
    for folder in sorted(shards.glob("[!.]*/*")):
        if folder.is_dir():
            shard = Shard(folder)
            owner, image = shard.image_pairs()
            for number, words in enumerate(shard.read_records()):
                shown = [number_of(shard.read_image(place)) for place in image[owner == number]]
                found.append((folder.name, shard.manifest, words, shown))
    return found


def told(sample):
    """What a layout expects of a sample."""
    _, manifest, words, shown = sample
    if manifest["kind"] == "classification":
        return "|".join(words["labels"]), shown
    if manifest["kind"] == "reports":
        return words["answer"], shown
    turns = [part for pair in words.get("turns", ()) for part in pair]
    return (words["question"], words["answer"], *turns, shown)


@pytest.mark.parametrize("write, flags", LAYOUTS)
def test_a_layout_gives_the_samples_that_are_expected(tmp_path, tokenizer, capsys, write, flags):
    expected = write(tmp_path / "own")
    path = tmp_path / "own" / flags.get("file", "")
    prepare(path, tmp_path / "shards", tokenizer, **{name: flag for name, flag in flags.items() if name != "file"})
    found = samples(tmp_path / "shards")
    assert sorted(map(told, found), key=repr) == sorted(expected, key=repr)
    assert {"train", "test"} <= {split for split, *_ in found}
    for together in ("group", "study"):  # is on one side
        sides = {(words[together], split) for split, _, words, _ in found if together in words}
        assert len(sides) == len({name for name, _ in sides})
    assert f"{path.name}: " in capsys.readouterr().out  # what it was taken for


# ----------------------------------------------------------------------------- images with labels

def class_of(number):
    return "benign" if number % 2 else "malignant"


LABELLED = [(class_of(number), [number]) for number in NUMBERS]


@layout()
def a_folder_for_each_class(folder):
    for number in NUMBERS:
        put(folder / class_of(number) / f"{number}.png", picture(number))
    return LABELLED


@layout()
def classes_below_splits(folder):
    for number in NUMBERS:
        put(folder / ("train", "train", "Test")[number // 4] / class_of(number) / f"{number}.PNG", picture(number))
    return LABELLED


@layout()
def patients_inside_classes(folder):
    for number in NUMBERS:
        put(folder / class_of(number) / f"patient {number}" / "left.JPG", picture(number, "JPEG"))
        put(folder / class_of(number) / f"patient {number}" / "right.JPG", picture(number + COUNT, "JPEG"))
    return LABELLED + [(class_of(number), [number + COUNT]) for number in NUMBERS]


@layout(file="labels.csv")
def a_csv_of_labels(folder):
    put(folder / "labels.csv", "path,label\n" + "".join(f"png/{n}.png,{class_of(n)}\n" for n in NUMBERS))
    for number in NUMBERS:
        put(folder / f"png/{number}.png", picture(number))
    return LABELLED


@layout(file="Befunde.csv")
def a_csv_of_excel(folder):
    rows = "".join(f"{n}.png;{'gutartig' if n % 2 else 'bösartig'}\r\n" for n in NUMBERS)
    put(folder / "Befunde.csv", f"sep=;\r\nFile Name;Label\r\n{rows}".encode("cp1252"))
    for number in NUMBERS:
        put(folder / f"{number}.png", picture(number))
    return [("gutartig" if n % 2 else "bösartig", [n]) for n in NUMBERS]


@layout(file="findings.tsv")
def several_labels_an_image(folder):
    label = ("effusion|mass", "mass", "")
    put(folder / "findings.tsv", "image\tlabels\n" + "".join(f"{n}.png\t{label[n % 3]}\n" for n in NUMBERS))
    for number in NUMBERS:
        put(folder / f"{number}.png", picture(number))
    return [(label[n % 3], [n]) for n in NUMBERS]


@layout(window=WIDE)
def dicom_files_without_an_end(folder):
    for number in NUMBERS:
        put(folder / class_of(number) / f"IMG{number:05}", dicom([number], PatientID=f"MRN{number}"))
    return LABELLED


@layout(window=WIDE, slices="middle")
def volumes_in_nifti(folder):
    import nibabel

    for number in NUMBERS:  # the middle one of three slices; NIfTI's first axis goes to the patient's right or left
        numbers = number + COUNT, number, number + 2 * COUNT
        slices = [pixels_of(n).T[::-1, ::-1].astype(np.int16) - 160 for n in numbers]
        image = nibabel.Nifti1Image(np.stack(slices, -1), np.eye(4))
        (folder / class_of(number)).mkdir(parents=True, exist_ok=True)
        nibabel.save(image, folder / class_of(number) / f"ct_{number}.nii.gz")
    return LABELLED


@layout(window=WIDE, file="labels.csv")
def a_csv_of_series(folder):
    put(folder / "labels.csv", "series,label\n" + "".join(f"scan {n},{class_of(n)}\n" for n in NUMBERS))
    for number in NUMBERS:
        write_series(folder / f"scan {number}", [number, number + COUNT])
    return LABELLED + [(class_of(n), [n + COUNT]) for n in NUMBERS]


@layout(file="labels.csv")
def tiffs_of_several_pages(folder):
    put(folder / "labels.csv", "file,class\n" + "".join(f"{n}.tif,{class_of(n)}\n" for n in NUMBERS))
    for number in NUMBERS:
        put(folder / f"{number}.tif", pages([number, number + COUNT]))
    return LABELLED + [(class_of(n), [n + COUNT]) for n in NUMBERS]


@layout()
def grey_of_16_bits_with_a_bright_spot(folder):
    for number in NUMBERS:
        deep = pixels_of(number).astype(np.uint16) * 16
        deep[5, 5] = 65535
        stream = io.BytesIO()
        Image.fromarray(deep).save(stream, "PNG")
        put(folder / class_of(number) / f"{number}.png", stream.getvalue())
    return LABELLED


@layout()
def what_computers_leave_in_folders(folder):
    for number in NUMBERS:
        put(folder / class_of(number) / f"{number}.png", picture(number))
        put(folder / class_of(number) / f"._{number}.png", b"\0\5\x16\7 of a Mac")
    put(folder / "benign/Thumbs.db", b"\xd0\xcf\x11\xe0")
    put(folder / "benign/desktop.ini", b"[.ShellClassInfo]")
    put(folder / ".DS_Store", b"\0\0\0\1Bud1")
    return LABELLED


# ----------------------------------------------------------------------------- questions in tables

QUESTIONS = [(f"what is shown in {n}?", f"finding {n}", [n]) for n in NUMBERS]


def put_pictures(folder, name="{}.png", form="PNG", numbers=NUMBERS):
    for number in numbers:
        put(folder / name.format(number), picture(number, form))


@layout(file="questions.csv")
def a_csv_of_questions(folder):
    put(folder / "questions.csv", "image,question,answer\n" + "".join(
        f"{n}.png,{question},{answer}\n" for question, answer, (n,) in QUESTIONS))
    put_pictures(folder)
    return QUESTIONS


@layout()
def a_folder_with_one_table(folder):
    put(folder / "qa.csv", "image,question,answer\n" + "".join(
        f"films/{n}.png,{question},{answer}\n" for question, answer, (n,) in QUESTIONS))
    put_pictures(folder / "films")
    return QUESTIONS


@layout(file="export.txt.tsv")
def synonyms_in_utf_16(folder):
    put(folder / "export.txt.tsv", ("Image Path\tQuery\tResponse\n" + "".join(
        f"{n}.png\t{question}\tüber {answer}\n" for question, answer, (n,) in QUESTIONS)).encode("utf-16"))
    put_pictures(folder)
    return [(question, f"über {answer}", shown) for question, answer, shown in QUESTIONS]


@layout(file="questions.csv")
def paths_of_windows(folder):
    put(folder / "questions.csv", "\ufefffilename;question;answer\r\n" + "".join(
        f"C:\\Users\\Anna\\study\\films\\{n}.jpg;{question};{answer}\r\n" for question, answer, (n,) in QUESTIONS))
    put_pictures(folder / "films", "{}.JPG", "JPEG")
    return QUESTIONS


@layout(file="t.csv", columns="image:bild,question:frage,answer:antwort")
def columns_that_are_named_by_a_flag(folder):
    put(folder / "t.csv", "frage,antwort,bild,question\n" + "".join(
        f"{question},{answer},{n},no\n" for question, answer, (n,) in QUESTIONS))
    put_pictures(folder)
    return QUESTIONS


@layout(file="q.jsonl")
def lines_of_json_with_several_images(folder):
    put(folder / "q.jsonl", "".join(json.dumps({
        "images": [f"{n}.png", f"{n + COUNT}.png"], "question": question, "answer": answer}) + "\n"
        for question, answer, (n,) in QUESTIONS))
    put_pictures(folder, numbers=range(2 * COUNT))
    return [(question, answer, [n, n + COUNT]) for question, answer, (n,) in QUESTIONS]


@layout(file="q.json")
def json_of_texts_alone(folder):
    rows = [{"Question": question, "Answer": n} for question, _, (n,) in QUESTIONS]
    put(folder / "q.json", json.dumps({"data": rows}))
    return [(question, str(n), []) for question, _, (n,) in QUESTIONS]


@layout(file="mcq.csv")
def choices_in_columns_and_a_letter(folder):
    put(folder / "mcq.csv", "image,question,A,B,C,answer\n" + "".join(
        f"{n}.png,{question},cyst,mass,\"gas, free\",{'ABC'[n % 3]}\n" for question, _, (n,) in QUESTIONS))
    put_pictures(folder)
    options = ("A. cyst", "B. mass", "C. gas, free")
    return [(f"{question} {' '.join(options)}", options[n % 3], [n]) for question, _, (n,) in QUESTIONS]


@layout(file="mcq.jsonl")
def choices_in_a_list_and_the_right_text(folder):
    put(folder / "mcq.jsonl", "".join(json.dumps({
        "question": question, "options": ["cyst", "mass"], "answer": ("cyst", "mass")[n % 2]}) + "\n"
        for question, _, (n,) in QUESTIONS))
    options = ("A. cyst", "B. mass")
    return [(f"{question} {' '.join(options)}", options[n % 2], []) for question, _, (n,) in QUESTIONS]


@layout(file="questions.csv")
def splits_and_patients_in_columns(folder):
    put(folder / "questions.csv", "Patient ID,image,question,answer,split\n" + "".join(
        f"P{n // 2},{n}.png,{question},{answer},{('train', 'val', 'test')[n // 4]}\n"
        for question, answer, (n,) in QUESTIONS))
    put_pictures(folder)
    return QUESTIONS


@layout(file="questions.csv")
def empty_answers_and_nan(folder):
    rows = "".join(f"{n}.png,{question},{answer}\n" for question, answer, (n,) in QUESTIONS)
    put(folder / "questions.csv", f"image,question,answer\n{rows}1.png,what else?,NaN\n2.png,and where?,\n")
    put_pictures(folder)
    return QUESTIONS


@layout(file="questions.csv")
def names_in_another_form_of_unicode(folder):
    put(folder / "questions.csv", "image,question,answer\n" + "".join(
        unicodedata.normalize("NFD", f"Schädel {n}.png") + f",{question},{answer}\n"
        for question, answer, (n,) in QUESTIONS))
    put_pictures(folder, unicodedata.normalize("NFC", "Schädel {}.png"))
    return QUESTIONS


@layout(file="notes.jsonl")
def a_context_and_other_right_answers(folder):
    put(folder / "notes.jsonl", "".join(json.dumps({
        "image": f"{n}.png", "context": "a man of 60", "question": question, "answer": answer,
        "references": [answer, "a finding"]}) + "\n" for question, answer, (n,) in QUESTIONS))
    put_pictures(folder)
    return QUESTIONS


@layout(file="follow.csv")
def two_dates_of_a_study(folder):
    """A question about the newer film, of which the older one is a prior."""
    put(folder / "follow.csv", "image,study,date,question,answer\n" + "".join(
        f"{n}.png,S{n},2020-0{2 + n % 2}-01,{question},{answer}\n" for question, answer, (n,) in QUESTIONS))
    put_pictures(folder)
    return QUESTIONS


@layout(file="boxes.jsonl")
def questions_with_boxes(folder):
    put(folder / "boxes.jsonl", "".join(json.dumps({
        "image": f"{n}.png", "question": "detect cyst", "boxes": {"cyst": [[8, 8, 24, 24]]}}) + "\n" for n in NUMBERS))
    put_pictures(folder)
    return [("detect cyst", "cyst <box>[[250, 250, 750, 750]]</box>", [n]) for n in NUMBERS]


@layout(file="ct.csv", window=WIDE, slices="every:2")
def questions_about_frames(folder):
    put(folder / "ct.csv", "image,question,answer\n" + "".join(
        f"{n}.dcm,{question},{answer}\n" for question, answer, (n,) in QUESTIONS))
    for number in NUMBERS:
        put(folder / f"{number}.dcm", dicom([number, number + COUNT, number + 2 * COUNT]))
    return [(question, answer, [n, n + 2 * COUNT]) for question, answer, (n,) in QUESTIONS]


@layout(file="film.csv")
def questions_about_a_gif(folder):
    put(folder / "film.csv", "image,question,answer\n" + "".join(
        f"{n}.gif,{question},{answer}\n" for question, answer, (n,) in QUESTIONS))
    for number in NUMBERS:
        put(folder / f"{number}.gif", pages([number, number + COUNT], "GIF"))
    return [(question, answer, [n, n + COUNT]) for question, answer, (n,) in QUESTIONS]


# ----------------------------------------------------------------------------- conversations

def chat(n, *turns, images=1):
    name = f"{n}.png" if images == 1 else [f"{n}.png", f"{n + COUNT}.png"][:images]
    return {"id": n, "image": name, "conversations": [
        {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]}


@layout(file="llava.json")
def conversations_of_llava(folder):
    put(folder / "llava.json", json.dumps([
        chat(n, f"<image>\n{question}", answer) for question, answer, (n,) in QUESTIONS]))
    put_pictures(folder / "images")
    return QUESTIONS


@layout(file="llava.json")
def conversations_of_three_turns(folder):
    put(folder / "llava.json", json.dumps([chat(
        n, f"{question}\n<image>", answer, "where?", "left", "sure?", "no") for question, answer, (n,) in QUESTIONS]))
    put_pictures(folder)
    return [(question, answer, "where?", "left", "sure?", "no", [n]) for question, answer, (n,) in QUESTIONS]


@layout(file="sharegpt.jsonl")
def conversations_about_two_images(folder):
    put(folder / "sharegpt.jsonl", "".join(json.dumps(chat(
        n, f"<image><image>{question}", answer, images=2)) + "\n" for question, answer, (n,) in QUESTIONS))
    put_pictures(folder, numbers=range(2 * COUNT))
    return [(question, answer, [n, n + COUNT]) for question, answer, (n,) in QUESTIONS]


def messages(*contents, **more):
    return json.dumps({"messages": [{"role": ("user", "assistant")[place % 2], "content": content}
                                    for place, content in enumerate(contents)], **more}) + "\n"


@layout(file="messages.jsonl")
def messages_with_parts(folder):
    put(folder / "messages.jsonl", "".join(messages(
        [{"type": "image", "image": f"{n}.png"}, {"type": "text", "text": question}],
        [{"type": "text", "text": answer}]) for question, answer, (n,) in QUESTIONS))
    put_pictures(folder)
    return QUESTIONS


@layout(file="messages.jsonl")
def messages_that_hold_their_images(folder):
    def url(n):
        return {"url": f"data:image/png;base64,{base64.b64encode(picture(n)).decode()}"}

    put(folder / "messages.jsonl", "".join(messages(
        [{"type": "text", "text": question}, {"type": "image_url", "image_url": url(n)}], answer)
        for question, answer, (n,) in QUESTIONS))
    return QUESTIONS


@layout(file="messages.json")
def messages_beside_a_list_of_images(folder):
    put(folder / "messages.json", "[" + ",".join(messages(
        [{"type": "image"}, {"type": "text", "text": question}], answer, images=[f"{n}.png"])
        for question, answer, (n,) in QUESTIONS) + "]")
    put_pictures(folder)
    return QUESTIONS


# ----------------------------------------------------------------------------- boxes

BOXES = [("detect cyst", "cyst <box>[[250, 250, 750, 750]]</box>", [n]) for n in range(2 * COUNT)]


@layout()
def boxes_of_pascal_voc(folder):
    put_pictures(folder, numbers=range(2 * COUNT))
    for number in range(2 * COUNT):
        put(folder / f"{number}.xml", voc(f"{number}.png", [("cyst", 9, 9, 24, 24)], (SIDE, SIDE)))
    return BOXES


@layout()
def boxes_of_coco(folder):
    put_pictures(folder / "images", numbers=range(2 * COUNT))
    put(folder / "coco.json", json.dumps({
        "images": [{"id": n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(2 * COUNT)],
        "categories": [{"id": 1, "name": "cyst"}], "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [8, 8, 16, 16]} for n in range(2 * COUNT)]}))
    return BOXES


@layout()
def boxes_of_yolo(folder):
    put(folder / "data.yaml", "names: [cyst]\n")
    put_pictures(folder / "images", numbers=range(2 * COUNT))
    for number in range(2 * COUNT):
        put(folder / f"labels/{number}.txt", "0 0.5 0.5 0.5 0.5\n")
    return BOXES


@layout(file="boxes.csv", window=WIDE)
def boxes_on_dicom(folder):
    put(folder / "boxes.csv", "image,label,x1,y1,x2,y2\n" + "".join(
        f"{n}.dcm,cyst,8,8,24,24\n" for n in range(2 * COUNT)))
    for number in range(2 * COUNT):
        put(folder / f"{number}.dcm", dicom([number], PatientID=f"P{number}"))
    return BOXES


# ----------------------------------------------------------------------------- studies with reports

REPORTS = [(f"Impression: number {n}.", [n, n + COUNT]) for n in NUMBERS]


@layout(report="impression")
def a_folder_for_each_study(folder):
    for number in NUMBERS:
        put(folder / f"study {number}/frontal.png", picture(number))
        put(folder / f"study {number}/lateral.png", picture(number + COUNT))
        put(folder / f"study {number}/report.txt", f"FINDINGS: clear.\n\nIMPRESSION: number {number}.")
    return REPORTS


@layout(file="reports.csv", report="impression")
def a_csv_of_reports(folder):
    put(folder / "reports.csv", "study,image,findings,impression\n" + "".join(
        f"s{n},{n}.png,clear,number {n}.\ns{n},{n + COUNT}.png,clear,number {n}.\n" for n in NUMBERS))
    put_pictures(folder, numbers=range(2 * COUNT))
    return REPORTS


@layout(report="impression")
def two_tables_as_indiana(folder):
    put(folder / "reports.csv", "uid,findings,impression\n" + "".join(f"{n},clear,number {n}.\n" for n in NUMBERS))
    put(folder / "projections.csv", "uid,filename,projection\n" + "".join(
        f"{n},{n}.png,Frontal\n{n},{n + COUNT}.png,Lateral\n" for n in NUMBERS))
    put_pictures(folder / "images", numbers=range(2 * COUNT))
    return REPORTS
