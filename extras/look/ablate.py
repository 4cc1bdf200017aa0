"""
Image encoders at the same budget, data and seeds, in one table: which to build a model on.

    python extras/look/ablate.py --encoders=biomedclip,clip_l_336 --vlm_flags="--language=full"    on PathVQA
    python extras/look/ablate.py --data= --dataset=busi --seeds=3                                  on BUSI's classes
    python extras/look/ablate.py --stand_ins=true --dataset=busi --steps=200 --epochs=5            without any weights

MedGPT-oss (arXiv 2603.00842) chose CLIP by such an ablation. Each encoder sees images of its own size, which are
prepared where they are missing. With --data it is the encoder of a train_vlm.py run, which eval_vqa.py evaluates; with
--dataset train_cls.py fine-tunes it. What is done is not done again, and a killed run goes on.

Below --out: vlm_<dataset> or cls_<dataset>.txt, .csv and .png, the runs in vlm/ and cls/, the images in shards_<size>/.
A score's interval draws test images, or patients where they are known, the same ones for all encoders.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import itertools
import shlex
import subprocess
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from extras.bench.progress import Progress
from extras.look.ablation_scores import SHUFFLED, class_draws, minutes_of, question_draws
from extras.look.ablation_table import Row, Table, write_table
from extras.look.stand_ins import STAND_INS, make_stand_in
from extras.scripts import load_script
from plumbing.files import differences, read_manifest, require_writable
from plumbing.flags import Count, Device, Range, Text, UserError, Whole, parse_command_line, parse_flags, run
from plumbing.runs import FREE_ON_RESUME
from plumbing.shards import Shard
from plumbing.sources import settle
from plumbing.tensors import hash_weights
from tasks.encoders import read_result, run_folder
from tasks.evaluations import file_of, find_evaluations, read_evaluation
from tasks.labelled import open_dataset
from tasks.summary import name_of, summary_of
from zoo.encoders import features_by, load_encoder

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Config:
    encoders: str = "biomedclip,clip_l_336,siglip_so400m,medsiglip"  # in weights/, or safetensors files or hub folders
    data: str = "path_vqa"  # datasets to learn and then to answer, as train_vlm.py takes them; none: none
    dataset: str = ""  # datasets to classify, as train_cls.py takes them; none: none
    stand_ins: bool = False  # small random encoders instead of weights: the machinery alone
    out: str = "out/ablation"  # where all of it goes
    raw_dir: str = "raw"  # downloads of what has to be prepared
    tokenizer: str = "weights/llama_tokenizer/tokenizer.model"  # that questions are prepared with
    limit: Whole = 0  # prepare the first so many samples of each split of --data; 0: all
    questions: Whole = 0  # answer the first so many of a test split; 0: all
    seeds: Annotated[int, Range(1, 100)] = 1  # runs of each encoder
    model: str = "small"  # sizes of the language part, as train_vlm.py takes them
    steps: Count = 500  # of a train_vlm.py run
    epochs: Count = 20  # of a train_cls.py run
    vision_layer: Literal["auto", "normed", "-1", "-2"] = "auto"  # as train_vlm.py takes them: this flag and
    vision_tokens: Literal["auto", "all", "patches"] = "auto"  # what of an encoder's tokens,
    merge: Annotated[int, Range(0, 4)] = 0  # how many patches along a side become one,
    projector_type: Literal["auto", "linear", "mlp", "mlp1"] = "auto"  # and what projects them
    vlm_flags: Text = ""  # more of train_vlm.py's, the same for all, as "--language=full --learning_rate=5e-4"
    cls_flags: Text = ""  # more of train_cls.py's, the same for all, as "--frozen=true"
    device: Device = "auto"  # cuda, mps or cpu


def call(script, *flags):
    """Run a script of the project; what it prints goes to stderr. UserError where it fails: it has said why."""
    command = [sys.executable, str(ROOT / script), *flags]
    if code := subprocess.run(command, stdout=2).returncode:
        raise UserError(f"`python {script} {shlex.join(flags)}` ended with {code}, see above; then give this command "
                        "again: what is done is not done again")


# ----------------------------------------------------------------------------- encoders and images

def find_encoders(config):
    """{name in the table: file or hub folder}. UserError where one is not there or two have the same name."""
    found, home = {}, Path(config.out) / "stand_ins" if config.stand_ins else Path("weights")
    for name in filter(None, map(str.strip, config.encoders.split(","))):
        label, places = Path(name).name.removesuffix(".safetensors"), [home / f"{name}.safetensors", home / name]
        places += [] if config.stand_ins else [Path(name)]
        if config.stand_ins and name not in STAND_INS:
            raise UserError(f"--encoders={name}: no stand-in of that name; there are {', '.join(STAND_INS)}")
        if config.stand_ins and not any(place.exists() for place in places):
            make_stand_in(home, name)
        there = [path for path in places if path.exists()]
        if not there:
            raise UserError(f"--encoders={name}: no {places[0]}, and no such file or folder; `python prepare/all.py "
                            f"--only={name}` brings it, where --list=true has it")
        if label in found:
            raise UserError(f"--encoders: two are called {label}; rename one")
        found[label] = there[0]
    return found


def shards_of(size, config):
    return Path(config.out) / f"shards_{size}"


def prepare(names, size, config):
    """Prepare the datasets that are not there at an image size."""
    for name in names:
        limit = config.limit if name in names_of(config.data) else 0
        there = read_manifest(shards_of(size, config) / name / "train")
        if there is None or there["limit"] != limit:
            call("prepare/all.py", f"--only={name}", f"--image_size={size}", f"--limit={limit}",
                 f"--shards_dir={shards_of(size, config)}", f"--raw_dir={config.raw_dir}",
                 f"--tokenizer={config.tokenizer}")


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ----------------------------------------------------------------------------- questions

def names_of(data):
    """The names in --data, whose parts may have weights, or in --dataset."""
    return [part.partition(":")[0].strip() for part in data.split(",") if part.strip()]


def stands_on(flags, encoder, data):
    """What a run's numbers depend on: flags that change them, hashes of its encoder and, by name, of its data."""
    return {"flags": {name: value for name, value in flags.items() if name not in FREE_ON_RESUME}, "encoder": encoder,
            "data": data}


def require_same(wanted, encoder):
    """Raise UserError where the run in the folder of a Config, if there is one, has other flags, encoder or data."""
    now = stands_on(asdict(wanted), hash_weights(encoder), {
        name: Shard(Path(wanted.shards_dir) / name / "train").manifest["checksum"] for name in names_of(wanted.data)})
    if (record := read_manifest(wanted.run, "config.json")) is None:
        return
    inputs = record["inputs"]
    before = stands_on(record["flags"], inputs["weights"].get("vision"), {
        name: facts["checksum"] for name, facts in inputs["data"].items()})
    if changes := differences(before, now):
        raise UserError(f"{wanted.run}: begun otherwise: {'; '.join(changes[:3])}; choose another --out, or delete it")


def done_evaluation(wanted, name, config):
    """(folder, results) of a run's evaluation on a dataset, of its last step and all rows; None where it is to make."""
    test = Shard(Path(wanted.shards_dir) / name / "test")
    for place in find_evaluations(wanted.run):
        results = read_evaluation(place)
        if (name_of(results), results["checkpoint"]) == (f"{name}/test", f"step_{wanted.max_steps:06}") and (
                results["stands_on"]["data"] == test.manifest["checksum"]
                and results["stands_on"]["flags"]["limit"] == config.questions
                and file_of(SHUFFLED) in results["predictions"]):
            return place, results
    return None


def vlm_flags(label, encoder, size, seed, config):
    """train_vlm.py's flags for a run."""
    own = ("data", "model", "vision_layer", "vision_tokens", "merge", "projector_type", "device")
    return [*(f"--{name}={getattr(config, name)}" for name in own), f"--shards_dir={shards_of(size, config)}",
            f"--vision_weights={encoder}", f"--max_steps={config.steps}", f"--seed={seed}",
            f"--run={Path(config.out) / 'vlm' / label / f'seed_{seed}'}", *shlex.split(config.vlm_flags)]


def learn(flags, encoder, config):
    """({dataset: (folder, results) of its evaluation}, train_vlm.py's Config) of a run, made where it is not done."""
    wanted, names = settle(parse_flags(load_script("train_vlm.py").Config, flags)), names_of(config.data)
    require_same(wanted, encoder)
    if not all(done_evaluation(wanted, name, config) for name in names):
        call("train_vlm.py", *flags, "--resume=true")
        call("eval_vqa.py", f"--run={wanted.run}", f"--data={','.join(names)}", f"--shards_dir={wanted.shards_dir}",
             f"--limit={config.questions}", f"--device={config.device}")
    return {name: done_evaluation(wanted, name, config) for name in names}, wanted


def ablate_questions(encoders, config):
    """{dataset: Table} of --data."""
    names, tables, progress = names_of(config.data), {}, Progress(len(encoders) * config.seeds, "runs")
    for label, (encoder, size) in encoders.items():
        prepare(names, size, config)
        runs = []
        for seed in range(config.seeds):
            runs.append(learn(vlm_flags(label, encoder, size, seed, config), encoder, config))
            progress.row(f"{label}, seed {seed}")
        wanted = runs[0][1]
        vision = load_encoder(encoder, device="meta", **features_by(wanted, {"resize": "squash"}))
        for name in names:
            evaluations = [evaluated[name] for evaluated, _ in runs]
            draws, seeds, unit, order = question_draws(evaluations, tables[name].order if name in tables else None)
            metric, machine = summary_of(evaluations[0][1])["lines"][0]["metric"], evaluations[0][1]["machine"]
            tables.setdefault(name, Table(metric, unit, order, machine, []))
            tables[name].rows.append(Row(label, size, count_parameters(vision), vision.tokens(size, size), draws, seeds,
                                         minutes_of(evaluations, wanted.batch_size)))
    return tables


# ----------------------------------------------------------------------------- classes

def cls_flags(label, encoder, size, name, config):
    """train_cls.py's flags for the runs of all seeds on a dataset."""
    return [f"--dataset={name}", f"--encoder={encoder.name.removesuffix('.safetensors')}", f"--name={label}",
            f"--weights_dir={encoder.parent}", f"--seeds={config.seeds}", f"--epochs={config.epochs}",
            f"--shards_dir={shards_of(size, config)}", f"--out={Path(config.out) / 'cls'}",
            f"--device={config.device}", *shlex.split(config.cls_flags)]


def ablate_classes(encoders, config):
    """{dataset: Table} of --dataset."""
    names, tables = names_of(config.dataset), {}
    progress = Progress(len(encoders) * len(names), "encoders and datasets")
    for (label, (encoder, size)), name in itertools.product(encoders.items(), names):
        prepare([name], size, config)
        flags = cls_flags(label, encoder, size, name, config)
        call("train_cls.py", *flags)  # which leaves alone what is finished
        wanted = parse_flags(load_script("train_cls.py").Config, flags)
        runs = [(folder, read_result(folder)) for folder in (
            run_folder(wanted.out, name, label, seed) for seed in range(config.seeds))]
        learnt = open_dataset(shards_of(size, config) / name, size, wanted.leaks)[0]["train"].labels
        draws, seeds, unit, order = class_draws(runs, learnt, tables[name].order if name in tables else None)
        tables.setdefault(name, Table("macro-F1", unit, order, runs[0][1]["machine"], []))
        vision = load_encoder(encoder, device="meta")
        tables[name].rows.append(Row(label, size, count_parameters(vision), vision.tokens(size, size), draws, seeds,
                                     sum(result["seconds"] for _, result in runs) / len(runs) / 60))
        progress.row(f"{label} on {name}")
    return tables


# ----------------------------------------------------------------------------- all

def main(config):
    if not names_of(config.encoders) or not names_of(config.data + config.dataset):
        raise UserError("nothing to do: give --encoders, and --data or --dataset")
    require_writable(Path(config.out), "out")
    encoders = {label: (path, load_encoder(path, device="meta").config.image_size)
                for label, path in find_encoders(config).items()}
    for label, (encoder, size) in encoders.items():  # what is wrong with flags is said before hours are spent
        if config.data:
            parse_flags(load_script("train_vlm.py").Config, vlm_flags(label, encoder, size, 0, config))
        if config.dataset:
            parse_flags(load_script("train_cls.py").Config, cls_flags(label, encoder, size, config.dataset, config))
    for kind, names, ablate in (("vlm", config.data, ablate_questions), ("cls", config.dataset, ablate_classes)):
        for name, table in ablate(encoders, config).items() if names else ():
            write_table(name, table, Path(config.out) / f"{kind}_{name}", config)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
