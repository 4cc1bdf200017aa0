"""
How fast a gpt-oss with LoRA trains, what its experts cost as MXFP4, and how soon a matrix of them is decoded.

    python extras/bench/experts.py                   40M parameters, 8 experts of which a token has 4; about 5 minutes

The peer is GptOssForCausalLM with PEFT's LoRA and experts that are not quantised, as TRL's SFTTrainer drives it: rows
padded to the longest of their batch, labels of -100 outside the answers, logits of all positions, eager attention,
which is the only one that it has with sinks on a CPU. Its experts by grouped_mm and by loops, its samples as they come
and by length, are tried first, and what suits it best is its row (batched_mm copies the matrices of 4 experts for each
token: a row of 700 has 5 GB of them). Ours is what train_vlm.py runs. Loss and gradients of both are held against each
other before anything is timed. Shared: samples that ask about the same text, which stands once in ours.

The same model then has its experts in MXFP4, in bfloat16 and in float32 (--base_bits=4, 16 and 0). All of these take
turns, each in a process of its own, which tells its peak; a round is a process of each. Last, matrices are decoded,
beside a table of 256 pairs and bytes of scales shifted into exponents of bfloat16, and beside two look-ups and ldexp.

Everything is drawn: weights, bfloat16's and MXFP4's numbers, and texts. Needs tests/requirements.txt.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from plumbing.flags import require_packages

if __name__ == "__main__":
    require_packages("tests/requirements.txt", "peft", "transformers")

import contextlib
import itertools
import json
import os
import resource
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from data import Group, make_batch, shared_prefix
from extras.bench.progress import Progress, tell
from generate import Sampling, generate
from plumbing.devices import describe_machine, to_device
from plumbing.flags import Count, UserError, parse_command_line, run
from plumbing.shards import Sample
from plumbing.sources import FOUR
from run import make_optimizer
from weights import build_vlm
from zoo.adapters import adapter_parameters
from zoo.gpt_oss import GptOss, GptOssConfig
from zoo.gpt_oss_files import MATRICES, save_gpt_oss
from zoo.mxfp4 import VALUES, decode, encode

SAME = 1e-4  # relative error of loss and gradients between two sides, in float32
LORA = {"targets": FOUR, "r": 8, "alpha": 16.0, "dropout": 0.0}
SHORT, LONG = 8, 40  # tokens of an answer
KINDS = {"MXFP4, as they lie in the file": 4, "bfloat16": 16, "float32": 0}  # experts -> --base_bits
# glibc gives large tensors back to the system one by one, which then clears each anew: as it is, it decides more
# than either side. Both keep what they have had
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}


@dataclass(frozen=True)
class Config:
    width: Count = 320  # of the model
    inner: Count = 768  # of an expert
    layers: Count = 6  # half of them within a window of 128
    vocab_size: Count = 4096  # tokens
    samples: Count = 16  # of a step
    shortest: Count = 150  # tokens of a sample
    longest: Count = 700  # tokens of a sample
    prefix: Count = 500  # tokens of a text that is asked about several times
    share: Count = 8  # questions about it
    micro_batch_tokens: Count = 4096  # of ours
    batch_size: Count = 4  # samples of the peer's forward pass
    new_tokens: Count = 16  # of an answer, of which four are timed
    matrix: Count = 2880  # rows and columns of what is decoded
    rounds: Count = 2  # processes of each row
    steps: Count = 1  # timed in each process, behind one to warm up
    threads: Count = 2  # of each process
    role: Literal["all", "ours", "peer"] = "all"  # ours, peer: what this script starts for itself
    folder: str = ""  # with the models, for those
    bits: Literal[0, 4, 16] = 0  # of our experts
    shared: bool = False  # texts are asked about several times
    implementation: Literal["grouped_mm", "eager"] = "grouped_mm"  # of the peer's experts
    by_length: bool = False  # its batches are of samples about as long


# ----------------------------------------------------------------------------- what all have

def write_models(config, folder):
    """The same random model as folders "plain", whose experts are not quantised, and "packed", where they are MXFP4."""
    torch.manual_seed(0)
    model = GptOss(GptOssConfig(
        config.vocab_size, config.width, config.inner, config.layers, 8, 2, 32, num_local_experts=8))
    for name, parameter in model.named_parameters():
        if name.endswith(("sinks", "bias")):
            torch.nn.init.normal_(parameter, std=1.0 if name.endswith("sinks") else 0.1)
    save_gpt_oss(model, folder / "plain")
    plain = {name: tensor.bfloat16() for name, tensor in load_file(folder / "plain/model.safetensors").items()}
    packed = dict(plain)
    for name in [name for name in plain if name.endswith(MATRICES)]:
        weights = packed.pop(name).transpose(1, 2)  # (E, in, out) -> (E, out, in)
        blocks, scales = (tensor.unflatten(0, weights.shape[:2]) for tensor in encode(weights.flatten(0, 1)))
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = decode(blocks, scales, torch.bfloat16).transpose(1, 2).contiguous()
    for kind, tensors in (("plain", plain), ("packed", packed)):
        (folder / kind).mkdir(exist_ok=True)
        save_file(tensors, folder / kind / "model.safetensors", metadata={"format": "pt"})
        (folder / kind / "config.json").write_bytes((folder / "plain/config.json").read_bytes())


def draw_samples(config):
    """The Samples of a step; shared: texts of `prefix` tokens, each with so many questions."""
    draws, samples = np.random.default_rng(0), []
    for number in range(config.samples):
        answer = int(draws.integers(SHORT, LONG + 1))
        length = int(draws.integers(LONG, 2 * LONG + 1) if config.shared else
                     draws.integers(max(config.shortest, LONG + 2), config.longest + 1))
        if number % config.share == 0:
            text = draws.integers(3, config.vocab_size, config.prefix)
        tokens = draws.integers(3, config.vocab_size, length)
        if config.shared:
            tokens[0] = 3 + number % config.share  # so that no two of them begin alike
            tokens = np.concatenate([text, tokens])
        samples.append(Sample(tokens, np.array([[len(tokens) - answer, len(tokens)]]), 1))
    return samples


def fill(adapter):
    """Give LoRA's {PEFT's name: parameter} values, the same on both sides, as if it had been trained."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(adapter):
            adapter[name].normal_(std=0.02, generator=draws)


def peak_memory():
    """Bytes, the most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(config, adapter, loss_of, batches, supervised):
    """
    Of a side the "loss" of its step, the "seconds" of others, the "peak" of memory and what it was "before", in bytes;
    the first step's gradients go into its folder. adapter: {PEFT's name: parameter}; loss_of: batch -> summed loss.
    """
    optimizer = make_optimizer([(name, parameter, 1.0) for name, parameter in adapter.items()], 0.01)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # so that all steps are the same
    before, seconds = peak_memory(), []
    for step in range(1 + config.steps):
        begin, total = time.perf_counter(), 0.0
        for batch in batches:
            loss = loss_of(batch) / supervised
            loss.backward()
            total += loss.item()
        if not step:
            save_file({name: parameter.grad for name, parameter in adapter.items()},
                      Path(config.folder, f"{config.role}.safetensors"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
    return {"loss": total, "seconds": seconds[1:], "peak": peak_memory(), "before": before}


# ----------------------------------------------------------------------------- ours

def make_batches(config, samples):
    """Samples in order as Batches of tensors of at most --micro_batch_tokens; those about one text as one group."""
    size, groups, batches, room = config.share if config.shared else 1, [], [], 0
    for begin in range(0, len(samples), size):
        asked = samples[begin:begin + size]
        groups.append(Group(asked, shared_prefix(asked), 0, np.array([], np.int64), None))
    for group in groups:
        length = group.first + sum(group.rest)
        if not batches or length > room:
            batches.append([])
            room = config.micro_batch_tokens
        batches[-1].append(group)
        room -= length
    return [to_device(make_batch(batch), torch.device("cpu")) for batch in batches]


def run_ours(config):
    """What measure() returns of ours, "experts", their bytes, and seconds of a "forward" pass and of 4 "answers"."""
    samples = draw_samples(config)
    model = build_vlm("gpt_oss_small", config.vocab_size, language_weights=str(
        Path(config.folder, "packed" if config.bits else "plain")), lora=LORA, bits=config.bits)
    for part in (model.vision, model.projector):
        part.requires_grad_(False)
    adapter, batches = adapter_parameters(model.language), make_batches(config, samples)
    fill(adapter)
    seen = measure(config, adapter, model.train().loss, batches, sum(len(batch.targets) for batch in batches))
    matrices = [tensor for block in model.language.blocks for expert in block.mlp.experts
                for name in MATRICES for tensor in (*getattr(expert, name).buffers(), getattr(expert, name).weight)]
    seen["experts"] = sum(tensor.nbytes for tensor in matrices if not tensor.is_meta)
    prompts = [([], [sample.prompt().tolist()]) for sample in samples[:4]]
    with torch.no_grad():
        begin = time.perf_counter()
        for batch in batches:
            model.eval()(batch)
        seen["forward"] = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in generate(model, prompts, config.new_tokens, Sampling(stops=())):
        pass
    return seen | {"answers": time.perf_counter() - begin}


# ----------------------------------------------------------------------------- the peer

def collate(samples):
    """Samples as the tensors that transformers' data collators make of them, padded to the longest."""
    T = max(len(sample.tokens) for sample in samples)
    rows = {"input_ids": np.zeros((len(samples), T), np.int64), "labels": np.full((len(samples), T), -100)}
    rows["attention_mask"] = np.zeros_like(rows["input_ids"])
    for row, sample in enumerate(samples):
        (begin, end), length = sample.spans[0], len(sample.tokens)
        rows["input_ids"][row, :length], rows["attention_mask"][row, :length] = sample.tokens, 1
        rows["labels"][row, begin:end] = sample.tokens[begin:end]
    return {name: torch.from_numpy(array) for name, array in rows.items()}


def run_peer(config):
    """What measure() returns of the peer, and "padded", the share of its tokens that is padding."""
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.GptOssForCausalLM.from_pretrained(
        Path(config.folder, "plain"), dtype=torch.float32, attn_implementation="eager",
        experts_implementation=config.implementation)
    model = peft.get_peft_model(model, peft.LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"],
                                                       target_modules=LORA["targets"].split(",")))
    adapter = {name.replace(".default.", "."): parameter for name, parameter in model.named_parameters()
               if parameter.requires_grad}
    fill(adapter)
    samples = draw_samples(config)
    if config.by_length:
        samples.sort(key=lambda sample: len(sample.tokens))
    batches = [collate(samples[at:at + config.batch_size]) for at in range(0, len(samples), config.batch_size)]
    model.train()
    seen = measure(config, adapter, lambda rows: model(**rows, use_cache=False, num_items_in_batch=1).loss, batches,
                   sum(int(np.diff(sample.spans).sum()) for sample in samples))
    shown = [rows["attention_mask"].float().mean().item() for rows in batches]
    sizes = [rows["attention_mask"].numel() for rows in batches]
    return seen | {"padded": 1 - float(np.average(shown, weights=sizes))}


# ----------------------------------------------------------------------------- the comparison

def start(config, **flags):
    """What run_ours or run_peer returns, in a process of its own."""
    flags = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
             for name, value in asdict(replace(config, **flags)).items()]
    done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True,
                          env={**os.environ, **KEEP, "OMP_NUM_THREADS": str(config.threads)})
    return json.loads(done.stdout.splitlines()[-1])


def require_same(config, ours, peer):
    """
    Raise AssertionError unless the losses of two sides, and the gradients that they have left in the folder, are the
    same. Returns the largest relative error.
    """
    mine, its = (load_file(Path(config.folder, f"{role}.safetensors")) for role in ("ours", "peer"))
    assert mine.keys() == its.keys(), f"{min(mine.keys() ^ its.keys())} trains on one side alone"
    errors = {name: float((mine[name] - its[name]).norm() / mine[name].norm()) for name in mine}
    errors["loss"] = abs(peer["loss"] / ours["loss"] - 1)
    worst = max(errors, key=errors.get)
    assert errors[worst] < SAME, f"the peer's {worst} differs by {errors[worst]:.1e}"
    return errors[worst]


def compare_steps(config):
    """Hold the peer against ours: the flags that suit it best, and what was measured, {(shared, role): [process]}."""
    ways = [dict(implementation=name, by_length=sort) for name in ("grouped_mm", "eager") for sort in (False, True)]
    ours, tried = start(config, role="ours"), []
    for way in ways:
        tried.append(start(config, role="peer", **way))
        error = require_same(config, ours, tried[-1])
        tell(f"the peer by {way['implementation']}, {'by length' if way['by_length'] else 'as samples come'}: "
             f"{min(tried[-1]['seconds']):.2f} s a step, loss and gradients are ours, to {error:.0e}")
    best = int(np.argmin([min(peer["seconds"]) for peer in tried]))
    rows = {(False, "ours"): [ours], (False, "peer"): [tried[best]]}
    ours, peer = start(config, role="ours", shared=True), start(config, role="peer", shared=True, **ways[best])
    tell(f"where {config.share} share a text, too, to {require_same(config, ours, peer):.0e}")
    return ways[best], rows | {(True, "ours"): [ours], (True, "peer"): [peer]}


def spread(values, unit="s"):
    """Median and range in words."""
    return f"{np.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})"


def held(processes):
    """Gigabytes at the peak of processes, and over what they held before the first step, in words."""
    peak, before = (np.median([process[name] for process in processes]) / 1e9 for name in ("peak", "before"))
    return f"{peak:.2f} | {peak - before:.2f}"


def show_steps(config, rows, way):
    """The table of steps, of processes by (shared, role)."""
    print(f"| a LoRA step of {config.samples} samples | median and range | samples/s | times the peer | padded | "
          "peak, GB | of it training |\n|---|--:|--:|--:|--:|--:|--:|")
    names = {"ours": "ours", "peer": f"transformers + PEFT, {way['implementation']}, "
             + ("by length" if way["by_length"] else "as samples come")}
    for shared in (False, True):
        took = {role: [s for process in rows[shared, role] for s in process["seconds"]] for role in names}
        for role, name in names.items():
            seconds, padded = np.median(took[role]), rows[shared, role][0].get("padded", 0)
            print(f"| {name}{f'; {config.share} questions a text of {config.prefix}' if shared else ''} | "
                  f"{spread(took[role])} | {config.samples / seconds:.2f} | "
                  f"{np.median(took['peer']) / seconds:.2f} | {padded:.0%} | {held(rows[shared, role])} |")


def show_kinds(config, rows):
    """The table of what experts are kept in, of processes by bits."""
    print("\n| experts | their bytes, MB | a step | forward | 4 answers of "
          f"{config.new_tokens} tokens | peak, GB | of it training |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, bits in KINDS.items():
        processes = rows[bits]
        took = [spread(seconds) for seconds in ([s for process in processes for s in process["seconds"]], *(
            [process[what] for process in processes] for what in ("forward", "answers")))]
        print(f"| {name} | {processes[0]['experts'] / 1e6:.1f} | {' | '.join(took)} | {held(processes)} |")


# ----------------------------------------------------------------------------- decoding

def by_table(blocks, scales):
    """The yardstick: a table of the two values of a byte, and a scale's byte as the exponent of a bfloat16."""
    values = torch.tensor(VALUES, dtype=torch.bfloat16)
    table = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)  # (256, 2)
    powers = (scales.to(torch.int16) << 7).view(torch.bfloat16)
    return (table[blocks.int()].flatten(-2) * powers[..., None]).flatten(-2)


def by_look_ups(blocks, scales):
    """As one would write it first: a look-up for each of a byte's nibbles, float32."""
    values = torch.tensor(VALUES)
    pairs = torch.stack([values[(blocks & 15).int()], values[(blocks >> 4).int()]], dim=-1)
    return torch.ldexp(pairs.flatten(-2), scales[..., None].int() - 127).flatten(-2)


def show_decoding(config, rounds=7):
    """The table of decoding a matrix; all ways give the same weights."""
    draws, groups = torch.Generator().manual_seed(0), config.matrix // 32
    blocks = torch.randint(256, (config.matrix, groups, 16), dtype=torch.uint8, generator=draws)
    scales = torch.randint(118, 126, (config.matrix, groups), dtype=torch.uint8, generator=draws)
    ways = {"ours, float32": lambda: decode(blocks, scales),
            "ours, bfloat16": lambda: decode(blocks, scales, torch.bfloat16),
            "table of 256 pairs, shifted scales, bfloat16": lambda: by_table(blocks, scales),
            "two look-ups and ldexp, float32": lambda: by_look_ups(blocks, scales)}
    for name, way in ways.items():
        assert torch.equal(way().float(), decode(blocks, scales)), f"{name} gives other weights"
    seconds = {key: [] for key in itertools.product(ways, (1, 2))}
    for _ in range(rounds):
        for name, threads in seconds:
            torch.set_num_threads(threads)
            begin = time.perf_counter()
            ways[name]()
            seconds[name, threads].append(1e3 * (time.perf_counter() - begin))
    torch.set_num_threads(config.threads)
    print(f"\n| decoding {config.matrix} x {config.matrix} | one thread, median and range | two |\n|---|--:|--:|")
    for name in ways:
        print(f"| {name} | {spread(seconds[name, 1], 'ms')} | {spread(seconds[name, 2], 'ms')} |")


def main(config):
    if wrong := [name for name in ("width", "inner", "matrix") if getattr(config, name) % 32]:
        raise UserError(f"--{wrong[0]}={getattr(config, wrong[0])}: no multiple of 32, the block of MXFP4")
    torch.set_num_threads(config.threads)
    if config.role != "all":
        with contextlib.redirect_stdout(sys.stderr):
            seen = {"ours": run_ours, "peer": run_peer}[config.role](config)
        return print(json.dumps(seen))
    print(", ".join(f"{name} {value}" for name, value in describe_machine(torch.device("cpu")).items()))
    print(", ".join(f"{name} {version(name)}" for name in ("transformers", "peft")) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, folder=folder)
        write_models(config, Path(folder))
        way, rows = compare_steps(config)  # which is the first round of these
        jobs = {(shared, role): dict(role=role, shared=shared, **(way if role == "peer" else {}))
                for shared in (False, True) for role in ("ours", "peer")}
        jobs |= {bits: dict(role="ours", bits=bits) for bits in KINDS.values() if bits}
        rows |= {bits: [] for bits in KINDS.values() if bits}
        progress = Progress(config.rounds * len(jobs) - 4, "processes")
        for number in range(config.rounds):
            for key, flags in jobs.items():
                if len(rows[key]) > number:
                    continue
                rows[key].append(start(config, **flags))
                progress.row(f"{np.median(rows[key][-1]['seconds']):.2f} s a step")
    losses = [process["loss"] for key in ((False, "ours"), 4, 16) for process in rows[key]]
    assert np.ptp(losses) < SAME * min(losses), f"losses differ by what experts are kept in: {losses}"
    show_steps(config, rows, way)
    show_kinds(config, rows | {0: rows[False, "ours"]})
    show_decoding(config)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
