"""A classification run is tied to what it stands on, nothing of it is lost, and each mistake is one line."""

import csv
import errno
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from formats.frames import Scan, ScanSettings
import run as trainers
import train_cls
import weights
from model import CONFIGS, ViT
from plumbing import files
from plumbing.files import checkpoints, hash_file, lock, read_manifest, seal, write_manifest
from plumbing.flags import UserError
from plumbing.own import SECRET, hash_id, secret_of
from prepare.leaks import guard
from tasks import calibration, encoders, labelled
from tasks.encoders import print_run, read_results
from tasks.labels import interval_of, score
from test_cls import TINY, picture, refused, settings, tiny_encoder, toy_records, write  # noqa: F401, a fixture
from train_cls import main
from weights import save_module

EACH = {"train": 10, "validation": 4, "test": 4}


def prepare_toy(folder, classes, each, **changes):
    """A dataset below the folder."""
    return write(folder, "toy", changes.pop("records", None) or toy_records(classes, each), classes, **changes)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The same dataset as it was, with more images, and with another class."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "was").mkdir(), (folder / "grown").mkdir(), (folder / "other").mkdir()
    prepare_toy(folder / "was", ("dark", "light"), EACH)
    prepare_toy(folder / "grown", ("dark", "light"), EACH | {"test": 12})
    prepare_toy(folder / "other", ("dark", "grey", "light"), EACH)
    return folder


@pytest.fixture
def asked(shards, tmp_path):
    """A function that gives the Config of a run on one version of the dataset."""
    def ask(version="was", **flags):
        return settings(shards / version, **{"out": str(tmp_path / "cls"), "epochs": 3, "save_every": 2, **flags})

    ask.folder = tmp_path / "cls/toy/scratch/seed_0"
    return ask


def contents(folder):
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".seed_0.lock"}


def stop_in(monkeypatch, epoch, config):
    """Start a run that is stopped in an epoch, counted from 0."""
    original = train_cls.train_epoch

    def stop(model, optimizer, split, number, *rest):
        if number == epoch:
            raise KeyboardInterrupt
        return original(model, optimizer, split, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_cls, "train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            main(config)


# ----------------------------------------------------------------------------- what a run stands on

def test_a_stopped_or_finished_run_is_not_taken_for_one_of_other_images(asked, monkeypatch, tmp_path):
    stop_in(monkeypatch, 2, asked())
    before = contents(asked.folder)
    assert {"step_000002/model.safetensors", "step_000002/best.safetensors"} <= before.keys()
    told = refused(asked("grown"))
    assert "test.images was 8, now 24" in told and f"choose another --name, or delete {asked.folder}" in told
    assert "classes was ['dark', 'light'], now ['dark', 'grey', 'light']" in refused(asked("other"))
    assert contents(asked.folder) == before  # nothing recorded is rewritten
    main(asked())
    main(asked(out=str(tmp_path / "undisturbed")))
    ours, undisturbed = contents(asked.folder), contents(tmp_path / "undisturbed/toy/scratch/seed_0")
    assert {**ours, "result.json": ""} == {**undisturbed, "result.json": ""}
    assert "test.images was 8, now 24" in refused(asked("grown"))
    assert "leaks.decision was drop, now keep" in refused(asked(leaks="keep"))
    assert contents(asked.folder) == ours
    main(asked("grown", name="again"))  # under another name it is another run
    result = read_results(asked().out)["toy", "again", 0]
    assert result["inputs"]["test"]["images"] == result["test"]["images"] == 24


def test_images_that_are_prepared_again_are_the_same(asked, shards, tmp_path, capsys):
    main(asked(epochs=1))
    shutil.copytree(shards / "was", tmp_path / "again")
    manifest = read_manifest(tmp_path / "again/toy/test")
    write_manifest(tmp_path / "again/toy/test", "manifest.json", manifest | {"licence": "another"})
    guard(tmp_path / "again", "")
    main(replace(asked(epochs=1), shards_dir=str(tmp_path / "again")))
    assert "finished already" in capsys.readouterr().out


def test_an_encoder_that_was_trained_further_is_another(asked, tmp_path):
    for step in (2, 4):
        partial = tmp_path / "vlm/partial"
        partial.mkdir(parents=True)
        vision = ViT(CONFIGS["sample"][0])
        save_module(vision, partial / "vision.safetensors")
        (partial / "config.json").write_text(json.dumps({"weights": {"vision": ""}, "lora": {}}))
        seal(partial, tmp_path / f"vlm/step_{step:06d}")
        config = asked(encoder="openmedq", run=str(tmp_path / "vlm"), epochs=1)
        if step == 2:
            main(config)
    told = refused(config)
    assert "encoder.checkpoint was step_000002, now step_000004" in told and "choose another --name" in told
    (tmp_path / "biomedclip.safetensors").write_bytes((tmp_path / "vlm/step_000002/vision.safetensors").read_bytes())
    config = asked(encoder="biomedclip", weights_dir=str(tmp_path), epochs=1)
    main(config)
    shutil.copy(tmp_path / "vlm/step_000004/vision.safetensors", tmp_path / "biomedclip.safetensors")
    assert "encoder.sha256 was" in refused(config)


def test_seeds_that_stand_on_other_images_are_not_averaged(asked, capsys):
    main(asked(seeds=2, epochs=1))
    main(asked("grown", seed=2, epochs=1))
    main(asked("grown", seed=3, epochs=1, save_every=1, name="scratch"))
    capsys.readouterr()
    main(asked(report=True))
    printed = capsys.readouterr().out
    assert "left out: " in printed and "seed_2: does not stand on the same as seed_0: test.images was 8" in printed
    assert "2 of 4 finished runs are left out" in printed and printed.count(" ± ") == 2  # one in the legend
    main(asked("was", name="other", seeds=1, epochs=1))
    main(asked("grown", name="third", seed=1, epochs=1))
    capsys.readouterr()
    main(asked(report=True))
    printed = capsys.readouterr().out
    assert "scratch - third: 1 pairs of runs are left out, whose images or labels differ" in printed
    assert "scratch - other: " in printed and "over n = 1 dataset(s), each the mean of 1 seed(s)" in printed
    assert "p not known from one dataset" in printed
    write_manifest(asked.folder.with_name("seed_1"), "result.json", {
        **read_manifest(asked.folder, "result.json"), "test": {"macro_f1": 9}})
    main(asked(report=True))
    assert "seed_1: the result in it is that of" in capsys.readouterr().out


def test_most_seeds_decide_which_are_averaged(tmp_path, capsys):
    for seed, images in enumerate((8, 24, 24)):
        folder = tmp_path / f"toy/scratch/seed_{seed}"
        folder.mkdir(parents=True)
        write_manifest(folder, "result.json", {
            "dataset": "toy", "name": "scratch", "seed": seed, "flags": {"seed": seed},
            "inputs": {"test": {"images": images}}})
    assert [seed for _, _, seed in read_results(tmp_path)] == [1, 2]
    told = "seed_0: does not stand on the same as seed_1: test.images was 24, now 8"
    assert told in capsys.readouterr().out


def test_a_record_is_read_by_later_versions_and_without_inputs_refused(asked):
    main(asked())
    result = read_manifest(asked.folder, "result.json")
    flags = {name: value for name, value in result["flags"].items() if name != "patience"}
    write_manifest(asked.folder, "result.json", result | {"flags": flags | {"a_flag_that_was": 3}})
    main(asked())
    assert "--patience=5: the run in " in refused(asked(patience=5))
    write_manifest(asked.folder, "result.json", {name: fact for name, fact in result.items() if name != "inputs"})
    assert "result.json: damaged, or of an earlier version; delete" in refused(asked())


def test_an_older_state_without_inputs_is_refused(asked, monkeypatch):
    stop_in(monkeypatch, 2, asked())
    state = asked.folder / "step_000002"
    facts = read_manifest(state)
    write_manifest(state, "manifest.json", {name: facts[name] for name in facts if name not in ("inputs", "checksum")})
    assert "begun by an earlier version; delete" in refused(asked())


# ----------------------------------------------------------------------------- nothing is lost

@pytest.mark.parametrize("name, told", [
    ("result.json", "result.json: damaged"), ("model/head.safetensors", None), ("config.json", None),
    ("log.jsonl", None)])
def test_a_flipped_bit_in_a_finished_run_is_one_line_or_harmless(name, told, asked, capsys):
    main(asked())
    path = asked.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 4]) + content[201:] if len(content) > 200 else
                     bytes([content[0] ^ 4]) + content[1:])
    if told:
        assert told in refused(asked())
        with pytest.raises(UserError, match="no run yet"):
            main(asked(report=True))
        assert "left out: " in capsys.readouterr().out
        path.write_bytes(content)
    main(asked())
    if name.startswith("model"):
        assert "head.safetensors was altered" in refused(asked(predict=str(asked.folder / "test.csv")))


def test_the_log_is_whole_although_a_run_was_killed_right_after_it_went_on(asked, monkeypatch):
    stop_in(monkeypatch, 2, asked(epochs=5))
    log = (asked.folder / "log.jsonl").read_bytes()
    assert log.count(b"\n") == 2
    (asked.folder / "log.jsonl").write_bytes(b"")
    for epoch in (2, 3):
        stop_in(monkeypatch, epoch, asked(epochs=5))
    assert (asked.folder / "log.jsonl").read_bytes().startswith(log)
    (asked.folder / "log.jsonl").write_bytes(b'{"epo')  # torn
    main(asked(epochs=5))
    lines = [json.loads(line) for line in (asked.folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("what", ["state", "model", "csv"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(what, asked, monkeypatch, tmp_path):
    main(asked(out=str(tmp_path / "undisturbed")))

    def full(tensors, path, metadata=None):
        if what == "state" or "encoder" in path.name:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return save_file(tensors, path, metadata)

    def full_csv(path, content):
        if path.name == "test.csv":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return files.write_whole(path, content)

    with monkeypatch.context() as patch:
        if what == "csv":
            patch.setattr(encoders, "write_whole", full_csv)
            with pytest.raises(OSError, match="No space left"):  # plumbing.flags.run makes one line of it
                main(asked())
        else:
            for module in (train_cls, trainers, weights):
                patch.setattr(module, "save_file", full)
            told = refused(asked())
            assert "not saved: " in told and "No space left" in told and "the same command goes on" in told
    assert not list(asked.folder.glob(".*.partial")) and not (asked.folder / "result.json").exists()
    assert len(checkpoints(asked.folder)) == (what != "state")
    main(asked())
    ours, undisturbed = contents(asked.folder), contents(tmp_path / "undisturbed/toy/scratch/seed_0")
    assert {**ours, "result.json": ""} == {**undisturbed, "result.json": ""}


@pytest.mark.parametrize("what", ["a file", "a dangling link", "a file above"])
def test_a_place_that_cannot_be_written_to_is_told_before_the_work(what, asked, tmp_path, monkeypatch):
    if what == "a file above":
        (tmp_path / "cls").write_text("mine")
    else:
        asked.folder.parent.mkdir(parents=True)
        if what == "a file":
            asked.folder.write_text("mine")
        else:
            asked.folder.symlink_to(tmp_path / "gone" / "away")
    monkeypatch.setattr(labelled.Split, "read_pixels", None)  # no image is read
    told = refused(asked())
    assert "cannot be written to" in told and "name another place with --out=" in told


def test_two_commands_do_not_share_a_run(asked):
    asked.folder.mkdir(parents=True)
    with lock(asked.folder.with_name(".seed_0.lock"), "training seed_0"):
        told = refused(asked())
        assert f"process {os.getpid()} is training seed_0 there already" in told
        assert not os.listdir(asked.folder)
        main(asked(seed=1, epochs=1))
    main(asked(epochs=1))


# ----------------------------------------------------------------------------- new images

@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "sample", TINY)
        config = settings(shards / "was", out=str(tmp_path_factory.mktemp("trained") / "cls"), epochs=1)
        main(config)
    return config


def tables(config):
    return {path.name: [row["image"] for row in csv.DictReader(open(path))]
            for path in Path(config.out).glob("toy/scratch/seed_0/predicted_*.csv")}


def test_new_images_of_folders_files_and_links_are_predicted(trained, tmp_path, capsys):
    for name in ("a/images/1.png", "b/images/2.png", "b/images/3.png", "elsewhere/4.png", "mixed/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1, 60))
    (tmp_path / "mixed/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mixed/loop").symlink_to(tmp_path / "mixed")
    (tmp_path / "mixed/gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "mixed/cut.png").write_bytes(picture(1, 60)[:200])
    (tmp_path / "mixed/.hidden.png").write_bytes(b"")
    before = tables(trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a/images", "b/images", "mixed", "elsewhere/4.png", "a/images/"):
            main(replace(trained, predict=str(tmp_path / name)))
    printed = capsys.readouterr().out
    found = {name: rows for name, rows in tables(trained).items() if name not in before}
    assert sorted(found.values()) == [["1.png"], ["2.png", "3.png"], ["4.png"], ["5.png", "linked/4.png"]]
    assert "2 could not be read, see above; 0 files are no pictures\n" in printed and "cut.png: not an image" in printed
    assert "gone.png: not an image that can be read (cannot be read: No such file or directory)" in printed


def test_batches_and_the_order_of_reading_change_no_row(trained, tmp_path):
    (tmp_path / "new").mkdir()
    for number in range(11):
        content = picture(number, 40 + 20 * number)
        (tmp_path / f"new/{number:02}.png").write_bytes(content[:100] if number in (0, 1, 5) else content)
    found = []
    for batch_size in (1, 2, 64):
        main(replace(trained, predict=str(tmp_path / "new"), batch_size=batch_size))
        table, = Path(trained.out).glob("toy/scratch/seed_0/predicted_new_*.csv")
        found.append(list(csv.reader(open(table))))
        table.unlink()
    assert [row[0] for row in found[0][1:]] == [f"{number:02}.png" for number in (2, 3, 4, 6, 7, 8, 9, 10)]
    numbers = [np.array([row[3:] for row in rows[1:]], float) for rows in found]
    assert np.ptp(numbers, axis=0).max() < 1e-5 and [row[:3] for row in found[0]] == [row[:3] for row in found[2]]
    assert found[0][0] == ["image", "predicted", "uncertain", "dark", "light"]


def test_a_model_predicts_without_the_file_that_its_encoder_was_and_the_test_images_as_before(
        asked, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "FEWEST", 8)
    rows = toy_records(("dark", "light"), EACH)  # one label in five of validation is wrong: there is a temperature
    rows = [(split, replace(record, labels=("dark",)) if split == "validation" and number % 5 == 0 else record)
            for number, (split, record) in enumerate(rows)]
    prepare_toy(tmp_path, ("dark", "light"), {}, records=rows)
    save_module(ViT(CONFIGS["sample"][0]), tmp_path / "biomedclip.safetensors")
    config = asked(encoder="biomedclip", weights_dir=str(tmp_path), shards_dir=str(tmp_path), epochs=1)
    main(config)
    (tmp_path / "biomedclip.safetensors").unlink()
    (tmp_path / "new").mkdir()
    split = labelled.open_dataset(tmp_path / "toy", 32)[0]["test"]
    split.read_pixels()
    for number, pixels in enumerate(split.pixels):
        Image.fromarray(pixels).save(tmp_path / f"new/{number}.png")
    main(replace(config, predict=str(tmp_path / "new"), shards_dir=str(tmp_path / "none")))  # nor its dataset
    folder = tmp_path / "cls/toy/biomedclip/seed_0"
    assert not 0.9 < read_manifest(folder, "result.json")["test"]["calibration"]["temperature"] < 1.1
    table, = folder.glob("predicted_new_*.csv")
    predicted, tested = (list(csv.DictReader(open(path))) for path in (table, folder / "test.csv"))
    assert len(predicted) == 8
    for row, other in zip(predicted, tested):  # calibrated alike
        assert float(row["dark"]) == pytest.approx(float(other["dark"]), abs=2e-6)


SCANS = [Scan("a/ct", ("1", "2", "3"), ("slice 1 of 3", "slice 2 of 3", "slice 3 of 3"), "Jane Doe", "1.2.3"),
         Scan("b.dcm", ("4",), ("",), "Jane Doe", "1.2.3"), Scan("c.dcm", ("5",), ("",), "Jane Doe", "1.2.4"),
         Scan("d.png", ("6",), ("",))]


@pytest.fixture
def hospital(tmp_path, monkeypatch):
    """A folder of SCANS, whose pictures are darker the earlier; the settings that they were asked for with."""
    wanted = []
    monkeypatch.setattr(labelled, "find_scans", lambda files, settings, folder: (wanted.append(settings), (
        SCANS, {Path("e.dcm"): "its header is cut short"}))[1])
    monkeypatch.setattr("formats.frames.decode_picture", lambda source, at_least: Image.new(
        "RGB", (40, 40), (35 * int(source),) * 3))
    (tmp_path / "hospital").mkdir()
    (tmp_path / "hospital/f.txt").write_text("")
    return tmp_path / "hospital", wanted


def test_slices_are_summed_up_by_study_and_patient_whose_names_are_hashed(trained, hospital, capsys):
    folder, wanted = hospital
    main(replace(trained, predict=str(folder)))
    told = capsys.readouterr().out
    tables = {path.stem.split("_")[3] if path.stem.count("_") > 2 else "": list(csv.DictReader(open(path)))
              for path in Path(trained.out).glob("toy/scratch/seed_0/predicted_hospital_*.csv")}
    assert [row["image"] for row in tables[""]] == ["a/ct slice 1 of 3", "a/ct slice 2 of 3", "a/ct slice 3 of 3",
                                                    "b.dcm", "c.dcm", "d.png"]
    light = [float(row["light"]) for row in tables[""]]
    assert [row["images"] for row in tables["studies"]] == ["4", "1", "1"]
    assert float(tables["studies"][0]["light"]) == pytest.approx(np.mean(light[:4]), abs=2e-6)
    patient, = tables["patients"]
    assert float(patient["light"]) == pytest.approx(np.mean(light[:5]), abs=2e-6) and patient["images"] == "5"
    secret = (folder / SECRET).read_bytes().strip()
    assert patient["patient"] == hash_id(secret, "Jane Doe") and patient["first image"] == "a/ct slice 1 of 3"
    assert [row["study"] for row in tables["studies"]] == [hash_id(secret, "1.2.3"), hash_id(secret, "1.2.4"), "d.png"]
    assert "e.dcm: not an image that can be read (its header is cut short)" in told and "Jane" not in told
    assert "studies.csv: 3 studies" in told and "1 images are of no known patient" in told
    assert wanted == [ScanSettings()]


def test_a_folder_that_cannot_be_written_to_has_its_secret_in_the_run_s(trained, hospital, monkeypatch):
    def read_only(path):
        if path == hospital[0]:
            raise UserError("read-only")
        return secret_of(path)

    monkeypatch.setattr(labelled, "secret_of", read_only)
    main(replace(trained, predict=str(hospital[0])))
    assert not (hospital[0] / SECRET).exists() and (Path(trained.out) / "toy/scratch/seed_0" / SECRET).is_file()


def test_scans_are_shown_as_those_that_the_model_learnt_from(asked, hospital, shards, tmp_path):
    shutil.copytree(shards / "was/toy", tmp_path / "ct/toy")
    for split in (tmp_path / "ct/toy").iterdir():
        manifest = read_manifest(split)
        write_manifest(split, "manifest.json", manifest | {"image": manifest["image"] | {"window": "40/400"}})
    guard(tmp_path / "ct", "")
    config = replace(asked(epochs=1), shards_dir=str(tmp_path / "ct"))
    main(config)
    assert "image.window was 40/400, now not there" in refused(asked(epochs=1))
    main(replace(config, predict=str(hospital[0])))
    assert hospital[1] == [ScanSettings(window="40/400")]
    told = refused(asked(epochs=1, predict=str(hospital[0])))
    assert "image.window was 40/400, now not there; train again" in told


def test_a_model_of_an_earlier_version_says_that_it_is_not_calibrated(asked, tmp_path, capsys):
    main(asked())
    model = asked.folder / "model"
    facts = json.loads((model / "config.json").read_text())
    assert facts["temperature"] is None and facts["conformal"] == {
        "coverage": 0.9, "threshold": None, "validation_images": 8}
    partial = tmp_path / "partial"
    shutil.copytree(model, partial)
    shutil.rmtree(model)
    (partial / "manifest.json").unlink()
    (partial / "config.json").write_text(json.dumps({name: facts[name] for name in ("classes", "image", "thresholds")}))
    seal(partial, model)
    result = read_manifest(asked.folder, "result.json")
    test = {name: value for name, value in result["test"].items() if name not in ("calibration", "conformal")}
    write_manifest(asked.folder, "result.json",
                   result | {"test": test, "model": read_manifest(model)["checksum"]})
    capsys.readouterr()
    main(asked(report=True))
    assert "\ntoy                1.000    0.333\n" in capsys.readouterr().out
    print_run(read_results(asked().out)["toy", "scratch", 0])
    assert "calibration" not in capsys.readouterr().out
    (tmp_path / "new.png").write_bytes(picture(1, 60))
    main(asked(predict=str(tmp_path / "new.png")))
    assert "probabilities are not calibrated: the model is of an earlier version" in capsys.readouterr().out
    table, = asked.folder.glob("predicted_new_*.csv")
    assert next(csv.DictReader(open(table)))["uncertain"] == ""


def test_what_cannot_be_predicted_is_refused_and_leaves_what_there_was(trained, tmp_path, shards):
    def refusal(name):
        return refused(replace(trained, predict=str(tmp_path / name)))

    (tmp_path / "empty/.hidden").mkdir(parents=True)
    assert "empty: an empty folder" in refusal("empty")
    assert "gone: no such folder or file" in refusal("gone")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/1.png").write_bytes(picture(1, 60))
    main(replace(trained, predict=str(tmp_path / "new")))
    before = contents(Path(trained.out))
    (tmp_path / "new/1.png").write_bytes(b"no image")
    assert "1 files, none of them an image that can be read, the first: " in refusal("new")
    (tmp_path / "new/1.png").write_bytes(picture(1, 60))
    told = refused(replace(trained, predict=str(tmp_path / "new"), shards_dir=str(shards / "other")))
    assert "classes was ['dark', 'light'], now ['dark', 'grey', 'light']" in told
    assert contents(Path(trained.out)) == before


def test_a_model_and_a_result_of_two_runs_do_not_predict(trained, tmp_path):
    copy = replace(trained, out=str(tmp_path / "cls"), predict=str(tmp_path))
    shutil.copytree(trained.out, copy.out)
    folder = tmp_path / "cls/toy/scratch/seed_0"
    result = read_manifest(folder, "result.json")
    write_manifest(folder, "result.json", result | {"model": "of another"})
    assert "model/ is not the one that its result.json is of" in refused(copy)
    (folder / "result.json").unlink()
    assert "model/ is not the one that its result.json is of" in refused(copy)


# ----------------------------------------------------------------------------- what cannot be learnt

def test_too_few_images_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(labelled.Split, "read_pixels", None)
    rows = toy_records(("dark", "light"), {"train": 7, "test": 2})

    def refusal(records, **flags):
        shutil.rmtree(tmp_path / "toy", ignore_errors=True)
        prepare_toy(tmp_path, ("dark", "light"), {}, records=records)
        return refused(settings(tmp_path, **flags))

    train, test = ([row for row in rows if row[0] == split] for split in ("train", "test"))
    copies = [("test", record) for _, record in train]
    assert "a test split has all of its images, too, so that none is left; bring others" in refusal(train + copies)
    dark = [("test", record) for _, record in train if record.labels == ("dark",)]
    assert "no image of class 'dark' to train on" in refusal(train + test + dark)
    assert "fewer than 6 images of each class, or all of one patient" in refusal(train[:10] + test)
    assert "--images_per_class=9: " in refusal(rows, images_per_class=9)
    few = [row for number, row in enumerate(train) if number != 1]  # one light image less
    assert "has at most 6 of a class" in refusal(few + test, images_per_class=7)
    with pytest.raises(TypeError):  # as soon as it would read images
        prepare_toy(tmp_path, ("dark", "light"), {}, records=few + test)
        main(settings(tmp_path, images_per_class=6))
    assert "class 'light' has 5 images, fewer than --images_per_class" in capsys.readouterr().out


# ----------------------------------------------------------------------------- evidence

def test_the_interval_draws_patients():
    """Ten films of each of 20 patients, all right or all wrong: no more is known than of 20 images."""
    right = np.random.default_rng(0).random(20) < 0.7
    actual = np.eye(2, dtype=bool)[np.arange(20) % 2]
    predicted = np.where(right[:, None], actual, ~actual)
    alone = interval_of(predicted, actual, False, list(range(20)))
    films = [np.repeat(rows, 10, axis=0) for rows in (predicted, actual)]
    patients = [f"patient {n // 10}" for n in range(200)]
    grouped, images = interval_of(*films, False, patients), interval_of(*films, False, list(range(200)))
    assert np.ptp(grouped) == pytest.approx(np.ptp(alone), rel=0.1) and np.ptp(images) < 0.5 * np.ptp(alone)
    scores = score(films[0].astype(np.float32), films[1], None, ["a", "b"], patients)
    assert scores["groups"] == 20 and scores["interval"] == grouped
    one = score(films[0].astype(np.float32), films[1], None, ["a", "b"], ["patient"] * 200)
    assert one["interval"] is None and one["groups"] == 1
    print_run({"dataset": "d", "name": "n", "seed": 0, "best_epoch": 1, "test": one})


def test_a_draw_without_a_class_gives_a_number():
    actual = np.eye(3, dtype=bool)[[0, 0, 0, 1, 2]]
    for groups in (range(5), ["a", "a", "b", "b", "c"]):
        low, high = interval_of(actual, actual, False, list(groups))
        assert low == high == 1


def test_the_same_tensors_have_the_same_bytes(tmp_path):
    """safetensors itself writes three entries of metadata in any of six orders."""
    for number in range(12):
        path = tmp_path / f"{number}.safetensors"
        save_file({"weight": torch.arange(3.0)}, path, {"format": "pt", "heads": "2", "activation": "gélu"})
        files.sort_metadata(path)
        assert path.read_bytes() == (tmp_path / "0.safetensors").read_bytes()
    assert torch.equal(load_file(path)["weight"], torch.arange(3.0))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "heads": "2", "activation": "gélu"}


def test_what_a_run_from_scratch_stands_on_is_what_earlier_ones_wrote_down(asked):
    """A field of ViTConfig that came later, and is a VLM's alone, does not stop what was begun before."""
    sizes = train_cls.make_encoder(asked())[1]["sizes"]
    assert {*sizes} == {"image_size", "patch_size", "width", "depth", "clip", "head_size", "activation", "merge"}
