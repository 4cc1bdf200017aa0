"""
What the loader takes with the paper's mix, and with ten times that: made-up indices of the true size.

    python extras/bench/loading.py                          3.35M samples in 14 shards
    python extras/bench/loading.py --times=10               33.5M
    python extras/bench/loading.py --code=../before         the same, by the data.py of another checkout

Records, parts and images.idx are written in full, and verified when they are opened. Of tokens.bin four streams are
written, which all samples share, images.bin is a hole: a step takes one made-up image for any, so that decoding is
left out, and works out checksums without holding them against the records. Each row is a process of its own.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent  # the repository, not this folder
CODE = next((flag[7:] for flag in sys.argv if flag.startswith("--code=")), "")
sys.path[0] = str(Path(CODE or ROOT).resolve())

import json
import os
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

import plumbing.shards
from data import BOS, Mixture
from plumbing.files import hash_file, hash_json, read_manifest, write_manifest
from plumbing.flags import Count, Whole, parse_command_line, run
from plumbing.shards import IMAGE, PROMPT_VERSION, SAMPLE, SHARD_VERSION
from plumbing.sources import open_shards

MIX = {  # dataset -> (samples, images); the published counts, what the paper has beyond them in ubench and pubmed_qa
    "path_vqa": (19_654, 2_599), "vqa_rad": (1_797, 313), "slake": (4_919, 450), "vqa_med_2019": (12_792, 3_200),
    "iu_xray": (7_470, 7_470), "mimic_cxr": (368_960, 368_960), "roco": (65_423, 65_423),
    "pmc_oa": (1_646_592, 1_646_592), "omni_med_vqa": (88_996, 41_000), "pmc_vqa": (176_948, 149_000),
    "ubench": (546_449, 15_000), "med_qa": (10_178, 0), "med_mcqa": (182_822, 0), "pubmed_qa": (217_000, 0)}
STUDIES = ("iu_xray", "mimic_cxr")  # of one to three images, and five of a patient
INDICES = ("samples.bin", "parts.bin", "images.idx")
LONGEST, IMAGE_BYTES, SIZE = 128, 43_000, 224  # tokens of a sample; bytes and pixels of an image
PICTURE = np.zeros((SIZE, SIZE, 3), np.uint8)
MEASURES = {"open": "opening", "begin": "the first step", "steps": "{steps:,} steps from the first on",
            "rank": "as many of rank 3 of 8", "resume": "resuming at step {resume:,}", "end": "an epoch's end"}


@dataclass(frozen=True)
class Config:
    times: Count = 1  # as many samples as the paper's mix
    samples: Whole = 0  # about so many instead; 0: by --times
    questions_per_image: Whole = 1  # as train_vlm.py takes it
    steps: Count = 1000  # that are timed
    resume: Whole = 700_000  # the step that a run goes on from
    pause: float = 0.1  # seconds that training takes for a step, at an epoch's end
    code: str = ""  # another checkout, whose loader is measured
    shards_dir: str = ""  # where the shards are made, and stay for another run; none: a temporary folder
    measure: Literal["all", "open", "begin", "steps", "rank", "resume", "end"] = "all"  # all: each in its own process


def make_samples(name, n, images, random):
    """The SAMPLE records of a made-up shard, and its parts."""
    rows, number = np.zeros(n, SAMPLE), np.arange(n)
    image = number * images // n  # questions about an image come one after another
    rows["images"] = np.minimum(number % 5 % 3 + 1, number + 1) if name in STUDIES else images > 0
    rows["image"] = image if images else -1
    rows["prefix"] = np.searchsorted(image, image) if images and name not in STUDIES else number
    rows["group"] = number // 5 + 1 if name in STUDIES else 0
    rows["offset"], rows["length"] = LONGEST * rows["images"], random.integers(30, 90, n)
    rows["head"], rows["prompt"], rows["spans"] = rows["images"] + 1, rows["length"] // 2, 1
    rows["words"] = random.integers(1 << 63, size=n)
    counts = rows["images"].astype(np.int64) + 2
    rows["parts"] = begin = np.cumsum(counts) - counts
    parts = np.zeros(counts.sum(), "<i4")
    for place in range(3):
        shown = rows["images"] > place
        parts[begin[shown] + place] = image[shown] - place
    parts[begin + counts - 2], parts[begin + counts - 1] = rows["prompt"], rows["length"]
    return rows, parts


def make_shard(folder, name, n, images, random):
    """Write a made-up training split, one in a hundred of its samples leaked."""
    folder.mkdir(parents=True)
    rows, parts = make_samples(name, n, images, random)
    rows.tofile(folder / "samples.bin")
    parts.tofile(folder / "parts.bin")
    index = np.full(images, np.array((0, IMAGE_BYTES, 0, SIZE, SIZE), IMAGE))
    index["offset"] = np.arange(images) * IMAGE_BYTES
    index.tofile(folder / "images.idx")
    streams = np.full((4, LONGEST), 5, "<u2")
    for shown, stream in enumerate(streams):
        stream[:shown + 1] = [BOS] + [0xffff] * shown
    streams.tofile(folder / "tokens.bin")
    os.truncate(folder / "tokens.bin", max(streams.nbytes, 2 * int(rows["length"].sum())))
    with open(folder / "images.bin", "wb") as file:
        file.truncate(images * IMAGE_BYTES)
    write_manifest(folder, "manifest.json", {
        "dataset": name, "split": "train", "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION,
        "kind": "image questions", "token_dtype": "uint16", "vocab_size": 32000, "tokenizer_sha256": "",
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path) if path.name in INDICES else ""}
                  for path in sorted(folder.iterdir())}})
    write_manifest(folder, "leaks.json", {
        "train": read_manifest(folder)["checksum"], "tests": {}, "leaks": "drop",
        "found": {"made-up/test": {"pixels": list(range(0, n, 100))}}})


def make_mix(shards_dir, config):
    """Write the shards that are not there yet. A share of the mix's samples has the same share of its images."""
    share = config.samples / 3_350_000 if config.samples else config.times
    for number, (name, counts) in enumerate(MIX.items()):
        if not (shards_dir / name).exists():
            samples, images = (max(round(count * share), min(count, 1)) for count in counts)
            make_shard(shards_dir / name / "train", name, samples, images, np.random.default_rng(number))


def seconds(function, *arguments):
    """(seconds that a call takes, what it returns)"""
    begin = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begin, result


def memory(name, process="self"):
    """GB that /proc says of a process: VmHWM, RssAnon, ..."""
    status = Path(f"/proc/{process}/status").read_text().split(f"{name}:")
    return int(status[1].split()[0]) * 1024 / 1e9 if len(status) > 1 else 0.0  # none once a process has ended


def time_end(mixture, config):
    """Seconds that training waits for a step at most where an epoch ends, and what is to be said of it."""
    end = mixture.samples_per_epoch // mixture.batch_size
    steps, waits = mixture.steps(max(end - 300, 0), end + 20, 2), []
    next(steps)  # for which the epoch's own order is made
    for _ in range(min(end, 300)):
        time.sleep(config.pause)
        waits.append(seconds(next, steps)[0])
    return max(waits), f"longest wait of {len(waits):,} steps, {1e3 * config.pause:.0f} ms apart"


def time_steps(mixture, config):
    """Seconds that a step takes, as a median, and what is to be said of it."""
    choosing = [seconds(mixture.chosen, number)[0] for number in range(config.steps)]
    steps = mixture.steps(0, config.steps, 1)
    packing = [seconds(next, steps)[0] for _ in choosing]
    return np.median(packing), f"median of a step; {1e6 * np.median(choosing):.0f} µs of it choosing"


def measure(config):
    """Print one measure as JSON: seconds, processor seconds of all, what was done, GB of memory."""
    checksum = plumbing.shards.sample_checksum  # worked out, at its price, and found right
    plumbing.shards.sample_checksum = lambda sample, *stored: (checksum(sample, *stored), sample["checksum"])[1]
    rank, ranks = (3, 8) if config.measure == "rank" else (0, 1)
    began, begin = time.process_time(), time.perf_counter()
    mixture = Mixture(**open_shards(",".join(MIX), config.shards_dir, "train"), held_out=512, rank=rank, ranks=ranks,
                      count_tokens=lambda heights, widths: heights // 16 * (widths // 16) + 1,
                      questions_per_image=config.questions_per_image)
    took = time.perf_counter() - begin
    for shard in mixture.shards:
        shard.read_image = lambda number: PICTURE
    what = f"{len(MIX)} shards, {mixture.starts[-1]:,} samples, {sum(map(len, mixture.train)):,} to train on"
    if config.measure in ("begin", "resume"):
        step, packed = seconds(mixture.step, config.resume if config.measure == "resume" else 0)
        names = [f"{shard.folder}:{number}" for shard, number in packed.samples]
        took, what = took + step, f"{step:.2f} s without opening; samples {hash_json(names)[:8]}"
    elif config.measure != "open":
        took, what = (time_end if config.measure == "end" else time_steps)(mixture, config)
    found = {"processor": time.process_time() - began, "peak": memory("VmHWM"), "mapped": memory("RssFile")}
    if config.measure == "open":
        began = time.process_time()
        for shard in mixture.shards:
            {hash_file(shard.folder / name) for name in INDICES}
        what += f"; {time.process_time() - began:.2f} s of it hashing"
    print(json.dumps(found | {"seconds": took, "what": what}))


def main(config):
    if config.measure != "all":
        return measure(config)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        config = replace(config, shards_dir=str(Path(config.shards_dir or folder).resolve()))
        make_mix(Path(config.shards_dir), config)
        print("| | seconds | processor s, all in all | peak memory, GB | anonymous | mapped at the end | |\n"
              "|---|--:|--:|--:|--:|--:|---|")
        for name, title in MEASURES.items():
            flags = [f"--{flag}={value}" for flag, value in asdict(replace(config, measure=name)).items()]
            with subprocess.Popen([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True) as process:
                anonymous = 0  # its largest, asked for every 5 ms
                while process.poll() is None:
                    anonymous = max(anonymous, memory("RssAnon", process.pid))
                    time.sleep(0.005)
                row = json.loads(process.stdout.read())
            print(f"| {title.format(**asdict(config))} | {row['seconds']:.3g} | {row['processor']:.1f} | "
                  f"{row['peak']:.2f} | {anonymous:.2f} | {row['mapped']:.2f} | {row['what']} |", flush=True)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
