"""extras/look/classifier.py: a page of a tiny run, whose numbers are those of the run, and its refusals."""

import base64
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Record
from extras.look import classifier as page
from model import CONFIGS
from plumbing.files import read_manifest, write_manifest
from plumbing.flags import UserError
from tasks.encoders import write_split
from test_cls import TINY, picture, settings, write
from train_cls import main as train


def records(classes, multi_label):
    """70 images of each class, the darker the earlier it is; every sixth is labelled wrongly; two of each patient."""
    rows = []
    for number in range(210):
        place = number % 3
        split = ("train", "validation", "test")[number % 7 // 3] if number % 7 < 6 else "test"
        label = classes[(place + (number % 6 == 5)) % 3]
        labels = (label, classes[0]) if multi_label and label != classes[0] and number % 2 else (label,)
        rows.append((split, Record(f"id{number}", image=picture(number, 50 + 70 * place), image_name=f"<{number}>.png",
                                   labels=labels, group=f"patient {split} {number // 14}")))
    return rows


@pytest.fixture(scope="module", params=[False, True])
def made(request, tmp_path_factory):
    """(folder of the run, shards_dir, whether an image has several labels)"""
    folder = tmp_path_factory.mktemp("page")
    classes = ("a<b", "grey", "light")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "sample", TINY)
        write(folder, "toy", records(classes, request.param), classes, multi_label=request.param)
        train(settings(folder, epochs=4))
    return folder / "cls/toy/scratch/seed_0", folder, request.param


def config_of(made, tmp_path, **flags):
    return page.Config(**{"run": str(made[0]), "shards_dir": str(made[1]), "mistakes": 2, "device": "cpu",
                          "out": str(tmp_path / "page.html"), **flags})


def test_a_page_shows_the_run_and_loads_nothing(made, tmp_path, capsys):
    config = config_of(made, tmp_path, sensitivity=0.9, specificity=0.99)
    page.main(config)
    text = Path(config.out).read_text(encoding="utf-8")
    test = read_manifest(made[0], "result.json")["test"]
    assert f"{test['macro_f1']:.3f}<small>" in text and f"{test['blind_macro_f1']:.3f}" in text
    assert "default-src 'none'" in text and "<script" not in text and not re.search(r'(src|href)="(?!data:)', text)
    assert "a&lt;b" in text and "a<b" not in text and "&lt;" in text
    assert text.count("<figure>") == 2 and text.count('<circle class="bin"') == len(
        page.reliability(page.read_run(config).probabilities, page.read_run(config).actual, made[2]))
    assert "specificity 0.99" in text and "too few" in text and "sensitivity 0.9" in text
    assert ("is, and taken for" in text) != made[2] and "Patient by patient" in text
    assert "page.html: " in capsys.readouterr().out
    page.main(replace(config, mistakes=0))
    assert "<figure>" not in Path(config.out).read_text(encoding="utf-8")


def test_thresholds_come_from_validation_and_are_measured_on_test(made, tmp_path):
    config = config_of(made, tmp_path, sensitivity=0.8)
    one = page.read_run(config)
    known = one.splits["validation"].labels[:, 1]
    positives = np.sort(one.validation[known, 1])
    threshold = positives[int(np.floor((len(positives) + 1) * (1 - 0.8) + 1e-9)) - 1]  # the k-th lowest
    said = one.probabilities[:, 1] >= threshold
    row = re.search(r"<td>grey</td><td>sensitivity 0.8</td>.*?</tr>", page.show_points(one, config))[0]
    assert f"<td>{known.sum()} with</td><td>{threshold:.4f}</td>" in row
    assert f"<td>{said[one.actual[:, 1]].mean():.3f}<small>" in row
    assert f"<td>{(~said[~one.actual[:, 1]]).mean():.3f}<small>" in row


def test_the_worst_mistakes_are_the_most_confident_wrong_ones(made, tmp_path):
    one = page.read_run(config_of(made, tmp_path))
    found = page.find_mistakes(one, 1000)
    wrong = (one.predicted != one.actual).any(1)
    assert len(found) == wrong.sum() and all(wrong[image] for image, _ in found)
    sure = [one.probabilities[image, place] if not one.actual[image, place] else 1 - one.probabilities[image, place]
            for image, place in found]
    assert sure == sorted(sure, reverse=True) and all(one.predicted[image, place] != one.actual[image, place]
                                                      for image, place in found)


class Corner:
    """A model that looks at the upper left of an image alone: the lighter, the surer."""
    def predict(self, pixels, batch_size, autocast):
        share = pixels[:, :8, :8].mean((1, 2, 3)) / 255
        return np.stack([1 - share, share], 1)


def test_the_heat_is_where_the_model_looks():
    pixels = np.full((64, 64, 3), 20, np.uint8)
    pixels[:8, :8] = 200
    falls, whole, lowest = page.occlude(Corner(), pixels, 1, None)
    assert np.unravel_index(falls.argmax(), falls.shape) == (0, 0) and falls[3:, 3:].max() == 0
    assert whole == pytest.approx(200 / 255) and lowest < 0.1
    other, *_ = page.occlude(Corner(), pixels, 0, None)
    assert np.allclose(other, -falls)  # what speaks for one class speaks against the other


def test_a_place_that_hardly_counts_is_hardly_red():
    pixels, falls = np.full((64, 64, 3), 128, np.uint8), np.zeros((8, 8))

    def redness(fall):
        falls[2, 3] = fall
        with Image.open(io.BytesIO(base64.b64decode(page.draw_heat(pixels, falls))), formats=["JPEG"]) as image:
            heat = np.asarray(image, np.float64)[:, page.SIDE + 4:]
        return (heat[..., 0] - heat[..., 1]).max()

    assert redness(0.01) < 8 < 100 < redness(page.LEAST) <= redness(9.0) + 8


def test_probabilities_are_read_as_they_were_measured(made, tmp_path):
    split = page.read_run(config_of(made, tmp_path)).splits["test"]
    probabilities = np.random.default_rng(0).random(split.labels.shape)
    probabilities[:3, 0] = 5e-9, 4e-9, 1 - 1e-12
    path, classes = tmp_path / "test.csv", ["a<b", "grey", "light"]
    write_split(path, split, probabilities, classes)
    assert np.array_equal(page.read_probabilities(path, split, classes), probabilities)


def test_a_page_of_another_dataset_or_version_is_refused_in_one_line(made, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(made[0], folder)
    config = config_of(made, tmp_path, run=str(folder))

    def refused(**flags):
        with pytest.raises(UserError) as error:
            page.main(replace(config, **flags))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no finished run of train_cls.py" in refused(run=str(tmp_path / "none"))
    assert "not prepared" in refused(shards_dir=str(tmp_path))
    table = (folder / "test.csv").read_text()
    (folder / "test.csv").write_text(table.replace("<1", "<2"))
    assert "test.csv: damaged, or of other images" in refused()
    (folder / "test.csv").write_text(table)
    result = read_manifest(folder, "result.json")
    inputs = result["inputs"] | {"test": result["inputs"]["test"] | {"images": 3}}
    write_manifest(folder, "result.json", result | {"inputs": inputs})
    assert "toy: test.images was 3, now" in refused()
    write_manifest(folder, "result.json", result | {"model": "another"})
    assert "model/ is not the one that its result.json is of" in refused()
    old = {name: value for name, value in result["test"].items() if name not in ("calibration", "conformal")}
    write_manifest(folder, "result.json", result | {"test": old})
    assert "made by an earlier version" in refused()
