"""
Write one page about a run of train_cls.py: how good it is, how far its probabilities can be trusted, and where it errs.

    python extras/look/classifier.py --run=out/cls/busi/scratch/seed_0
    python extras/look/classifier.py --sensitivity=0.9 --specificity=0.98      of the newest run

needs the dataset as it was prepared for the run. The page is a single file that any browser opens, that loads nothing
and runs no script. Thresholds are chosen on the run's validation images alone and measured on its test images. The most
confident mistakes stand there as pictures; a heat map shows by occlusion (Zeiler and Fergus 2014) what speaks for the
class: a grey square hides each place in turn, and the redder one is, the more the log-odds fall. It asks the model
itself, whatever encoder that has. The page contains images: pass it on only where you may pass on the data.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import base64
import csv
import html
import io
import json
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tqdm import tqdm

from plumbing.devices import autocast_to, pick_device
from plumbing.files import differences, write_whole
from plumbing.flags import Device, ShareBelow1, UserError, Whole, parse_command_line, run
from tasks.calibration import BINS, are_uncertain, choose_point, operate, reliability, wilson
from tasks.encoders import data_of, describe_temperature, read_result, require_its_model, too_few
from tasks.labelled import open_dataset
from tasks.labels import decide
from weights import load_classifier

CELLS, SQUARE = 8, 2  # of a heat map: places along a side, and along that of the square that hides some
LEAST = 0.5  # fall of the log-odds, in nats, that is drawn in full red, unless the greatest is larger
SIDE, QUALITY = 224, 85  # of a picture: pixels, and of the JPEG
MOST_PATIENTS = 100  # in the table


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a run, <out>/<dataset>/<name>/seed_<n>; none: the newest in out/cls
    shards_dir: str = "shards"  # where prepare/all.py put the images
    sensitivity: ShareBelow1 = 0.95  # wanted of each class's first threshold: its share of images that are found
    specificity: ShareBelow1 = 0.95  # wanted of the second: the share of other images that are left out
    mistakes: Whole = 12  # most confident ones that are shown, each with a heat map of 49 answers of the model
    device: Device = "auto"  # cuda, mps or cpu
    out: str = ""  # the page; none: page.html in the run's folder


# ----------------------------------------------------------------------------- what was measured

def find_run(name):
    """The folder of a finished run, and what its result.json holds."""
    made = sorted(Path("out/cls").glob("*/*/seed_*/result.json"), key=lambda path: path.stat().st_mtime)
    if not name and not made:
        raise UserError("out/cls: no finished run; make one with `python train_cls.py`, or name one with --run")
    folder = Path(name) if name else made[-1].parent
    result = read_result(folder)
    if result is None:
        raise UserError(f"{folder}: no finished run of train_cls.py; name <out>/<dataset>/<name>/seed_<n> with --run")
    if "calibration" not in result["test"]:
        raise UserError(f"{folder}: made by an earlier version, which calibrated nothing; train again under another "
                        "--name")
    return folder, result


def read_probabilities(path, split, classes):
    """(n, m) probabilities of a Split as train_cls.py wrote them. Raises UserError where they are of other images."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        names, numbers = [row[0] for row in rows], np.array([row[3:] for row in rows], np.float64)
    except (OSError, ValueError, IndexError):
        header, names, numbers = [], [], np.zeros((0, 0))
    if header[3:] != classes or names != split.names or numbers.shape != split.labels.shape:
        raise UserError(f"{path}: damaged, or of other images; restore it, or delete {path.parent} and train again")
    return numbers


def read_run(config):
    """A run and its validation and test images, with probabilities and decisions."""
    folder, result = find_run(config.run)
    inputs = data_of(result)
    prepared = Path(config.shards_dir) / result["flags"]["dataset"]
    splits, facts = open_dataset(prepared, inputs["image"]["size"], inputs["leaks"]["decision"])
    if changed := differences(inputs, json.loads(json.dumps(facts))):
        raise UserError(f"{prepared}: {changed[0]}; the run is of other images, train again under another "
                        "--name")
    classes, thresholds = inputs["classes"], result["test"].get("thresholds")
    one = SimpleNamespace(folder=folder, result=result, test=result["test"], classes=classes, splits=splits,
                          several=inputs["multi_label"], thresholds=thresholds)
    one.validation, one.probabilities = (read_probabilities(folder / f"{name}.csv", splits[name], classes)
                                         for name in ("validation", "test"))
    one.actual, one.groups = splits["test"].labels, splits["test"].groups
    one.predicted = decide(one.probabilities, thresholds and np.array(thresholds))
    return one


# ----------------------------------------------------------------------------- tables

def text(value):
    return html.escape(str(value))


def table(header, rows):
    """Cells are HTML; one that is a (class, HTML) has that class."""
    def cell(content):
        kind, content = content if isinstance(content, tuple) else ("", content)
        return f"<td{kind}>{content}</td>"

    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def number(value, digits=3):
    return "–" if value is None else f"{value:.{digits}f}"


def with_interval(value, interval):
    bounds = "no interval" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    return number(value) if value is None else f"{value:.3f}<small>{bounds}</small>"


def section(title, *parts):
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def quiet(words):
    return f'<p class="quiet">{words}</p>'


def show_scores(one):
    test = one.test
    drawn = "images" if test["groups"] == test["images"] else f"{test['groups']:,} groups of them"
    rows = [["this run", with_interval(test["macro_f1"], test["interval"]), number(test["accuracy"]),
             number(test["balanced_accuracy"]), number(test["auroc"])],
            ["blind: labels of training alone", number(test["blind_macro_f1"]), "", "", ""]]
    return section("How good it is", table(["", "macro-F1", "accuracy", "balanced", "AUROC"], rows), quiet(
        f"{test['images']:,} test images. 95% interval by bootstrap; it draws {drawn}."))


def show_classes(one):
    header = ["", "F1", "recall", "AUROC", "images"]
    rows = [[text(name), *(number(scores[key]) for key in ("f1", "recall", "auroc")), f"{scores['images']:,}"]
            for name, scores in one.test["classes"].items()]
    parts = [table(header, rows)]
    if "confusion" in one.test:
        shares = [[0.5 * count / max(sum(counts), 1) for count in counts] for counts in one.test["confusion"]]
        shaded = [[f"{place} {text(name)}", *((f' class="shaded" style="--share:{share:.2f}"', count)
                                              for share, count in zip(*row))]
                  for place, (name, row) in enumerate(zip(one.classes, zip(shares, one.test["confusion"])), 1)]
        parts.append("<div>" + table(["is, and taken for", *range(1, len(shaded) + 1)], shaded) + "</div>")
    return section("Class by class", f'<div class="beside">{"".join(parts)}</div>')


def draw_reliability(bins):
    """An SVG of [mean confidence, share that is right, count] of bins, each with Wilson's interval."""
    def place(x, y):
        return f"{40 + 250 * x:.1f}", f"{260 - 250 * y:.1f}"

    marks = []
    for sure, share, count in bins:
        (x, y), (low, high) = place(sure, share), wilson(share * count, count)
        marks.append(f'<line class="bin" x1="{x}" x2="{x}" y1="{place(0, low)[1]}" y2="{place(0, high)[1]}"/>'
                     f'<circle class="bin" cx="{x}" cy="{y}" r="4"/>')
    ticks = "".join(f'<text x="{place(at, 0)[0]}" y="276" text-anchor="middle">{at:g}</text>'
                    f'<text x="34" y="{float(place(0, at)[1]) + 4}" text-anchor="end">{at:g}</text>'
                    for at in (0, 0.25, 0.5, 0.75, 1))
    return ('<svg viewBox="0 0 300 300" role="img" aria-label="how often it is right by how sure it is">'
            '<rect class="frame" x="40" y="10" width="250" height="250"/><line class="even" x1="40" y1="260" x2="290" '
            f'y2="10"/>{ticks}{"".join(marks)}<text x="165" y="295" text-anchor="middle">how sure it is</text>'
            '<text transform="translate(10 135) rotate(-90)" text-anchor="middle">how often it is right</text></svg>')


def show_calibration(one):
    facts = one.test["calibration"]
    rows = [[words, *(with_interval(*facts[when][name].values()) for when in ("before", "after"))]
            for name, words in (("ece", "calibration error"), ("nll", "negative log-likelihood, nats"),
                                ("brier", "Brier score"))]
    rows[0][1:] = [f"{cell}<small>by chance {facts[when]['ece_by_chance']:.3f}</small>"
                   for cell, when in zip(rows[0][1:], ("before", "after"))]
    unit = "images and labels" if one.several else "images"
    temperature = describe_temperature(facts["temperature"], facts["validation_images"])
    words = quiet(f"Calibration: {text(temperature)}. The calibration error is over {BINS} bins of as many {unit}; "
                  "&ldquo;by chance&rdquo; is what as many true probabilities would have, and the bootstrap's interval "
                  "lies too high by about as much.")
    picture = draw_reliability(reliability(one.probabilities, one.actual, one.several))
    return section("Whether its probabilities are true",
                   f'<div class="beside">{picture}<div>{table(["", "before", "calibrated"], rows)}</div></div>', words)


def show_uncertain(one):
    facts = one.test["conformal"]
    if facts["threshold"] is None:
        return section("Uncertain images", quiet(text(too_few(facts)) + "."))
    flagged = facts["flagged"]
    rows = [["uncertain", f"{flagged:,}", number(facts["accuracy_flagged"])],
            ["others", f"{one.test['images'] - flagged:,}", number(facts["accuracy_others"])]]
    return section("Uncertain images", table(["", "test images", "accuracy"], rows), quiet(
        f"An image is uncertain where other labels than exactly the predicted ones conform. On validation images what "
        f"is true conforms in {facts['coverage']:.0%}; on test in {facts['covered']:.1%}."))


def show_points(one, config):
    """Thresholds of each class for the wanted sensitivity and specificity."""
    known, rows = one.splits["validation"].labels, []
    for place, name in enumerate(one.classes):
        for of, wanted in (("sensitivity", config.sensitivity), ("specificity", config.specificity)):
            there = known[:, place] if of == "sensitivity" else ~known[:, place]
            threshold = choose_point(one.validation[:, place], known[:, place], of, wanted)
            row = [text(name), f"{of} {wanted:g}", f"{there.sum():,} {'with' if of == 'sensitivity' else 'without'}"]
            if threshold is None:
                rows.append([*row, "too few", "", ""])
                continue
            found = operate(threshold, one.probabilities[:, place], one.actual[:, place], one.groups)
            shown = f"{threshold:.4f}" if 1e-4 <= threshold < 0.9999 else f"{threshold:.12g}"
            rows.append([*row, shown, *(with_interval(found[key]["value"], found[key]["interval"])
                                                     for key in ("sensitivity", "specificity"))])
    header = ["class", "wanted", "validation images", "threshold", "sensitivity on test", "specificity on test"]
    return section("Operating points", table(header, rows), quiet(
        "Each class against all others. A threshold is chosen on the validation images with the class, or without it, "
        "so that new ones reach the wanted share on average over such choices; where they are too few for it (0.95 "
        "takes 19), there is none. Intervals are Wilson's, or, where a patient has several images, by bootstrap over "
        "patients."))


def show_patients(one):
    """Means over the test images of each patient, or other group, wrong ones first."""
    places = defaultdict(list)
    for place, group in enumerate(one.groups):
        places[group].append(place)
    if len(places) == len(one.groups):
        return ""
    means = np.array([one.probabilities[some].mean(0) for some in places.values()])
    there = np.array([one.actual[some].any(0) for some in places.values()])
    said, names = decide(means, one.thresholds and np.array(one.thresholds)), np.array(one.classes, object)
    wrong = (said != there).any(1)
    order = np.argsort(~wrong, kind="stable")[:MOST_PATIENTS]
    groups = list(places)
    rows = [[text(groups[row]), len(places[groups[row]]), (' class="words"', text(", ".join(names[there[row]]))),
             (f' class="words{" wrong" if wrong[row] else ""}"', text(", ".join(names[said[row]])))] for row in order]
    return section("Patient by patient", table(["group", "images", "is", "taken for"], rows), quiet(
        f"By the mean of its images' probabilities {(~wrong).sum():,} of {len(wrong):,} groups are right in all labels."
        " A group is what the dataset keeps together, such as a patient; it has every label that one of its images has."
        f" {len(order):,} are shown, wrong ones first."))


# ----------------------------------------------------------------------------- mistakes

def find_mistakes(one, count):
    """(image, class) of the most confident mistakes, one an image: the class that was most surely taken wrongly."""
    wrong = one.predicted != one.actual
    if one.several:
        sure = np.where(one.actual, 1 - one.probabilities, one.probabilities)
    else:
        sure = np.where(one.predicted, one.probabilities, -1)
    sure = np.where(wrong, sure, -1)
    images = np.argsort(-sure.max(1), kind="stable")[:min(count, int(wrong.any(1).sum()))]
    return [(int(image), int(sure[image].argmax())) for image in images]


def occlude(model, pixels, place, autocast):
    """
    (CELLS, CELLS) how far the log-odds of class `place` fall where a square hides a place of an image, (H, W, 3) uint8,
    in its mean colour: the mean over the squares that cover it. And the probability, whole and at its lowest.
    """
    edges = np.linspace(0, len(pixels), CELLS + 1).round().astype(int)
    spots = [(row, column) for row in range(CELLS - SQUARE + 1) for column in range(CELLS - SQUARE + 1)]
    hidden = np.repeat(pixels[None], len(spots) + 1, 0)
    for image, (row, column) in zip(hidden[1:], spots):
        image[edges[row]:edges[row + SQUARE], edges[column]:edges[column + SQUARE]] = pixels.mean((0, 1))
    shares = model.predict(hidden, 16, autocast)[:, place]
    odds = np.log(shares.clip(1e-12, 1)) - np.log((1 - shares).clip(1e-12, 1))
    falls, counts = np.zeros((CELLS, CELLS)), np.zeros((CELLS, CELLS))
    for (row, column), value in zip(spots, odds[0] - odds[1:]):
        falls[row:row + SQUARE, column:column + SQUARE] += value
        counts[row:row + SQUARE, column:column + SQUARE] += 1
    return falls / counts, shares[0], shares[1:].min()


def draw_heat(pixels, falls):
    """An image beside itself with its falls in red, as base64 of a JPEG."""
    image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    heat = np.maximum(falls, 0) / max(falls.max(), LEAST)
    mask = Image.fromarray((200 * heat).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    page, stream = Image.new("RGB", (2 * SIDE + 4, SIDE)), io.BytesIO()
    page.paste(image, (0, 0))
    page.paste(Image.composite(Image.new("RGB", image.size, (230, 30, 30)), image, mask), (SIDE + 4, 0))
    page.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def show_mistakes(one, config):
    """Pictures of the most confident mistakes, with heat maps."""
    mistakes, figures = find_mistakes(one, config.mistakes), []
    if not mistakes:
        return ""
    require_its_model(one.folder)
    device, dtype = pick_device(config.device, "auto")
    model, _ = load_classifier(one.folder, device)
    split, names = one.splits["test"], np.array(one.classes, object)
    flagged = np.zeros(len(one.actual), bool)
    if (threshold := one.test["conformal"]["threshold"]) is not None:
        flagged = are_uncertain(one.probabilities, one.predicted, threshold, one.several)
    for image, place in tqdm(mistakes, "heat maps", leave=False):
        pixels = split.shard.read_image(int(split.images[image]))
        falls, whole, lowest = occlude(model, pixels, place, autocast_to(device, dtype))
        is_, said = (text(", ".join(names[labels])) or "none" for labels in (one.actual[image], one.predicted[image]))
        figures.append(
            f'<figure><img alt="" src="data:image/jpeg;base64,{draw_heat(pixels, falls)}"><figcaption>'
            f'<b>is {is_}, taken for <span class="wrong">{said}</span></b>{", uncertain" if flagged[image] else ""}<br>'
            f"{text(names[place])}: {whole:.3f}; {lowest:.3f} at the lowest with a place hidden"
            f"<br>{text(split.names[image])}</figcaption></figure>")
    return section("The most confident mistakes", quiet(
        "Beside each picture: where it is red, hiding it lowers the log-odds of the class that is named below it, the "
        f"most where it is reddest, which takes a fall of {LEAST:g} nats. It shows what the model uses, not where a "
        "disease is."),
        f'<div class="pictures">{"".join(figures)}</div>')


# ----------------------------------------------------------------------------- the page

def main(config):
    one = read_run(config)
    result, template = one.result, Path(__file__).with_name("classifier.html").read_text(encoding="utf-8")
    title = text(f"{result['dataset']}, {result['name']}, seed {result['seed']}")
    head = f"<header><h1>{title}</h1>" + quiet(
        f"{result['train_images']:,} training images, best epoch {result['best_epoch']} by validation. A measurement "
        "on the test images of one dataset, no proof of use in patients. The page contains images: pass it on only "
        "where you may pass on the data.") + "</header>"
    content = head + "<main>" + "".join([
        show_scores(one), show_classes(one), show_calibration(one), show_uncertain(one), show_points(one, config),
        show_patients(one), show_mistakes(one, config)]) + "</main>"
    before, after = template.replace("TITLE", title).split("CONTENT\n")
    page = (before + content + after).encode("utf-8", "backslashreplace")
    out = Path(config.out) if config.out else one.folder / "page.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)
    print(f"{out}: {one.test['images']:,} test images, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
