"""extras/look/ablate.py: its numbers are those of the files of answers, and what is done is not done again."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

import train_vlm
from extras.look import ablate, ablation_table, stand_ins
from extras.look.ablation_scores import macro_draws
from extras.scripts import load_script
from model import CONFIGS, LlamaConfig, ViTConfig
from plumbing.files import checkpoints, hash_file, read_manifest, write_manifest
from plumbing.flags import UserError, parse_flags
from tasks.across import units_of
from tasks.labels import macro_f1
from tasks.stats import draw_counts
from tasks.vqa import bleu1
from test_cls import toy_records, write
from test_eval import write_questions
from zoo.encoders import load_encoder
from zoo.siglip import SiglipConfig

pytest.importorskip("matplotlib")
SIZES = {"biomedclip": ViTConfig(32, 16, 64, 1), "medsiglip": SiglipConfig(30, 14, 144, 1, hidden=96)}
TRAIN = [(f"is figure {n} large?", "no" if n % 3 else "yes", n) for n in range(12)]
TEST = [(f"is figure {n % 5} large?", "no" if n % 2 else "yes", 100 + n // 2) for n in range(10)] + [
    ("is it?", "a large lung", 107)]
FLAGS = {"encoders": "biomedclip,medsiglip", "stand_ins": True, "data": "learn", "model": "sample", "steps": 2,
         "epochs": 2, "vlm_flags": "--language=full --learning_rate=5e-2 --batch_size=4 --held_out=0 --save_every=1 "
                                     "--log_every=1 --dtype=float32 --workers=1 --questions_per_image=0",
         "cls_flags": "--batch_size=8 --learning_rate=1e-2", "device": "cpu"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Questions and classes, at the sizes of both encoders."""
    folder = tmp_path_factory.mktemp("ablation")
    for size in (32, 30):
        shards = folder / f"shards_{size}"
        shards.mkdir()
        write_questions(shards, "learn", {"train": TRAIN, "test": TEST}, size=size)
        write(shards, "toy", toy_records(("dark", "light"), {"train": 12, "validation": 4, "test": 6}),
              ("dark", "light"), size)
    return folder


@pytest.fixture
def asked(prepared, tmp_path, monkeypatch):
    """(a function that runs the ablation with more flags, the calls of scripts that it made, in this process)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stand_ins, "STAND_INS", SIZES)
    monkeypatch.setattr(ablate, "STAND_INS", SIZES)
    monkeypatch.setitem(CONFIGS, "sample", (ViTConfig(width=64), LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)))
    shutil.copytree(prepared, "out/ablation")
    calls = []

    def call(script, *flags):
        calls.append((script, flags))
        module = load_script(script)
        module.main(parse_flags(module.Config, flags))

    monkeypatch.setattr(ablate, "call", call)
    return lambda **flags: ablate.main(ablate.Config(**FLAGS | flags)), calls


def table(name):
    with open(f"out/ablation/{name}.csv", encoding="utf-8", newline="") as file:
        return {row["encoder"]: row for row in csv.DictReader(file)}


def answers(label, seed, row=""):
    [path] = Path(f"out/ablation/vlm/{label}/seed_{seed}").glob(f"eval/*/predictions{row}.jsonl")
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def minutes(label, seed):
    """Of training, four samples a step, and of answering."""
    folder = Path(f"out/ablation/vlm/{label}/seed_{seed}")
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    [results] = folder.glob("eval/*/results.json")
    speeds = [entry["samples_per_second"] for entry in entries if "loss" in entry]
    return (sum(4 / speed for speed in speeds) + json.loads(results.read_text())["seconds"]) / 60


def middle(values, units):
    """[mean, low, high] of (n,) values by drawing units, in numpy alone."""
    groups = [values[units == unit] for unit in np.unique(units)]
    means = [np.repeat([group.sum() for group in groups], counts).sum()
             / np.repeat([len(group) for group in groups], counts).sum() for counts in draw_counts(len(groups))]
    return [values.mean(), *np.percentile(means, (2.5, 97.5))]


def numbers(row, head):
    return [float(row[f"{head}{bound}"]) for bound in ("", " low", " high")]


def test_the_numbers_are_those_of_the_answers_and_a_second_call_trains_nothing(asked, capsys):
    run, calls = asked
    run(seeds=2)
    rows, scores = table("vlm_learn"), {}
    for label in SIZES:
        row = rows[label]
        for kind in ("", "_image_shuffled", "_question_only"):
            lines = answers(label, 0, kind)
            scores[label, kind] = np.mean([[100 * bleu1(line["prediction"], line["answer"]) for line in answers(
                label, seed, kind)] for seed in (0, 1)], axis=0)
        units = units_of(lines)[1]
        assert numbers(row, "BLEU-1") == pytest.approx(middle(scores[label, ""], units))
        assert numbers(row, "image shuffled") == pytest.approx(middle(scores[label, "_image_shuffled"], units))
        assert numbers(row, "question only") == pytest.approx(middle(scores[label, "_question_only"], units))
        gain = scores[label, ""] - scores[label, "_image_shuffled"]
        assert numbers(row, "image adds") == pytest.approx(middle(gain, units))
        each = [np.mean([100 * bleu1(line["prediction"], line["answer"]) for line in answers(label, seed)])
                for seed in (0, 1)]
        assert float(row["± seeds"]) == pytest.approx(np.std(each, ddof=1))
        assert float(row["minutes"]) == pytest.approx(np.mean([minutes(label, seed) for seed in (0, 1)]))
        encoder = load_encoder(f"out/ablation/stand_ins/{label}.safetensors")
        assert row["stand-in"] == "random" and int(row["parameters"]) == sum(p.numel() for p in encoder.parameters())
    assert [(rows[label]["pixels"], rows[label]["tokens"]) for label in SIZES] == [("32", "5"), ("30", "4")]
    assert scores["biomedclip", "_question_only"].std() > 0 and len({*units}) == 6
    text, out = Path("out/ablation/vlm_learn.txt").read_text(), capsys.readouterr().out
    apart = middle(scores["biomedclip", ""] - scores["medsiglip", ""], units)
    assert "biomedclip - medsiglip: {:.1f} [{:.1f} {:.1f}]".format(*apart) in text and text in out
    assert ablation_table.LABEL in text and ("No two encoders differ" in text) == (apart[1] <= 0 <= apart[2])
    assert Path("out/ablation/vlm_learn.png").stat().st_size > 10_000
    assert [script for script, _ in calls] == ["train_vlm.py", "eval_vqa.py"] * 4
    given = [{flag.partition("=")[0]: flag for flag in flags} for script, flags in calls if script == "train_vlm.py"]
    apart = [{name for name in one if one[name] != given[0][name]} for one in given]
    assert apart == [set(), {"--seed", "--run"}, {"--shards_dir", "--vision_weights", "--run"},
                     {"--shards_dir", "--vision_weights", "--run", "--seed"}]
    before, files = text, [path for path in Path("out").rglob("*") if path.name in ("results.json", "manifest.json")]
    hashes = list(map(hash_file, files))
    calls.clear(), run(seeds=2)
    assert calls == [] and Path("out/ablation/vlm_learn.txt").read_text() == before
    assert list(map(hash_file, files)) == hashes
    shutil.rmtree(next(Path("out/ablation/vlm/medsiglip/seed_1/eval").glob("*")))
    run(seeds=2)  # one that was killed between training and answering
    assert [script for script, _ in calls] == ["train_vlm.py", "eval_vqa.py"]
    assert "finished already" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_other_flags_or_data_are_refused(asked, monkeypatch, capsys):
    run, calls = asked
    run(encoders="biomedclip")
    whole = answers("biomedclip", 0)
    shutil.rmtree("out/ablation/vlm")
    take, steps = train_vlm.train_step, []

    def killed(model, optimizer, step, *rest):
        steps.append(step.number)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return take(model, optimizer, step, *rest)

    monkeypatch.setattr(train_vlm, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(encoders="biomedclip")
    assert [path.name for path in checkpoints("out/ablation/vlm/biomedclip/seed_0")] == ["step_000001"]
    run(encoders="biomedclip")
    assert steps == [0, 1, 1] and answers("biomedclip", 0) == whole
    run(encoders="biomedclip", questions=4)  # other answers of the same run
    [path] = Path("out/ablation/vlm").glob("*/*/eval/*_first_4/predictions.jsonl")
    assert len(path.read_text().splitlines()) == 4 and len(steps) == 3
    assert "Nothing is compared: one encoder." in capsys.readouterr().out
    count = len(calls)
    for flags, told in (({"steps": 3}, r"flags.max_steps"), ({"merge": 2}, "flags.merge"),
                        ({"vlm_flags": FLAGS["vlm_flags"].replace("5e-2", "1e-3")}, "flags.learning_rate")):
        with pytest.raises(UserError, match=rf"vlm/biomedclip/seed_0: begun otherwise: .*{told}.*choose another --out"):
            run(encoders="biomedclip", **flags)
    Path("out/ablation/stand_ins/biomedclip.safetensors").unlink()
    monkeypatch.setitem(SIZES, "biomedclip", ViTConfig(32, 8, 64, 1))
    with pytest.raises(UserError, match="begun otherwise: encoder"):
        run(encoders="biomedclip")
    record = read_manifest("out/ablation/vlm/biomedclip/seed_0", "config.json")
    record["inputs"]["data"]["learn"]["checksum"] = "another"
    write_manifest("out/ablation/vlm/biomedclip/seed_0", "config.json", record)
    with pytest.raises(UserError, match="data.learn"):
        run(encoders="biomedclip")
    assert len(calls) == count


def test_classes_are_a_table_like_that_of_questions(asked, capsys):
    run, calls = asked
    run(data="", dataset="toy", seeds=2)
    assert [script for script, _ in calls] == ["train_cls.py"] * 2 and not Path("out/ablation/vlm").exists()
    rows = table("cls_toy")
    for label, tokens in (("biomedclip", "5"), ("medsiglip", "4")):
        each = []
        for seed in (0, 1):
            folder = Path(f"out/ablation/cls/toy/{label}/seed_{seed}")
            result = json.loads((folder / "result.json").read_text())
            each.append(100 * result["test"]["macro_f1"])
            with open(folder / "test.csv", encoding="utf-8", newline="") as file:
                tested = list(csv.DictReader(file))
            said = [max(("dark", "light"), key=lambda name: float(row[name])) for row in tested]
            assert each[-1] == pytest.approx(100 * f1_score([row["labels"] for row in tested], said, average="macro"))
        score, blind = numbers(rows[label], "macro-F1"), numbers(rows[label], "most frequent class")
        assert score[0] == pytest.approx(np.mean(each)) and score[1] <= score[0] <= score[2]
        assert blind[0] == pytest.approx(100 * result["test"]["blind_macro_f1"]) and blind[1] < blind[0] < blind[2]
        assert numbers(rows[label], "image adds")[0] == pytest.approx(score[0] - blind[0])
        assert rows[label]["tokens"] == tokens
    run(data="", dataset="toy")  # of one seed the interval is train_cls.py's own
    result = json.loads(Path("out/ablation/cls/toy/biomedclip/seed_0/result.json").read_text())["test"]
    assert numbers(table("cls_toy")["biomedclip"], "macro-F1") == pytest.approx(
        [100 * result["macro_f1"], *(100 * bound for bound in result["interval"])])
    assert capsys.readouterr().out.count("finished already") == 2


def test_what_is_missing_is_prepared_at_the_encoders_size(asked, monkeypatch):
    run, _ = asked
    told = []

    def call(*words):
        told.append(words)
        raise UserError("as if it had failed")

    monkeypatch.setattr(ablate, "call", call)
    shutil.rmtree("out/ablation/shards_30/learn")
    with pytest.raises(UserError, match="as if"):
        run(encoders="medsiglip")
    with pytest.raises(UserError, match="as if"):
        run(encoders="biomedclip", limit=5)  # prepared, but of all samples
    places = "--raw_dir=raw", "--tokenizer=weights/llama_tokenizer/tokenizer.model"
    assert told == [("prepare/all.py", "--only=learn", f"--image_size={size}", f"--limit={limit}",
                     f"--shards_dir=out/ablation/shards_{size}", *places) for size, limit in ((30, 0), (32, 5))]


def test_mistakes_are_one_line_before_anything_is_trained(asked):
    run, calls = asked
    elsewhere = {"stand_ins": False, "encoders": "nothing"}
    for flags, told in (({"encoders": "biomedclip,nothing"}, "no stand-in of that name; there are biomedclip, "),
                        (elsewhere, "no weights/nothing.safetensors, and no such file"),
                        ({"encoders": "biomedclip,biomedclip"}, "two are called biomedclip"),
                        ({"data": "", "dataset": ""}, "nothing to do"), ({"encoders": ","}, "nothing to do"),
                        ({"vlm_flags": "--steps=3"}, "unknown flag '--steps=3'"),
                        ({"vlm_flags": "--seed=3"}, "--seed: given twice"),
                        ({"dataset": "toy", "cls_flags": "--epoch=3"}, "unknown flag '--epoch=3'")):
        with pytest.raises(UserError, match=told):
            run(**flags)
    shutil.copy("out/ablation/stand_ins/biomedclip.safetensors", "mine.safetensors")
    with pytest.raises(UserError, match="argument --encoder: invalid choice: 'mine'"):
        run(stand_ins=False, encoders="mine.safetensors", data="", dataset="toy")
    assert calls == []


def test_a_script_that_fails_ends_the_command_in_one_line(capfd):
    ablate.call("extras/look/mix.py", "--shards_dir=nowhere")
    said = capfd.readouterr()
    assert said.out == "" and "path_vqa" in said.err
    with pytest.raises(UserError, match="`python extras/look/mix.py '--nothing=a b'` ended with 2, see above"):
        ablate.call("extras/look/mix.py", "--nothing=a b")


def test_draws_are_of_labels_too_and_one_patient_has_no_interval():
    generator = np.random.default_rng(0)
    predicted, actual = generator.random((2, 30, 3)) < 0.5
    for several in (False, True):
        draws = macro_draws(predicted, actual, several, list(range(30)))
        assert draws.shape == (1001,) and draws[0] == pytest.approx(100 * macro_f1(predicted, actual, several))
    assert ablation_table.cell_of(macro_draws(predicted, actual, True, ["one"] * 30)) == [pytest.approx(
        draws[0]), None, None]


def test_what_differs_beyond_its_interval_is_said():
    pairs = [("a", "b", [1.0, -0.5, 2.5]), ("a", "c", [3.0, 0.5, 5.5]), ("b", "c", [-2.0, -3.0, -0.1])]
    assert ablation_table.verdict([("a", "b", [1.0, -0.5, 2.5]), ("a", "c", [-1.0, -2.5, 0.5]), ("b", "c", [1, 0, 2])
                                   ]) == "No two encoders differ beyond the intervals: 0 is within all 3 differences."
    assert ablation_table.verdict(pairs).startswith(
        "Beyond the intervals are 2 of 3 differences: a - c 3.0 [0.5 5.5]; b - c -2.0 [-3.0 -0.1].")
    assert ablation_table.verdict([("a", "b", [1.0, None, None])]).endswith("all of the test is about one image.")
