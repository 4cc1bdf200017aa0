"""
How fast eval_vqa.py rates the options of multiple choices and writes reports, beside what people use for both.

    python extras/bench/choices.py --data=med_qa                      MedQA's options, by likelihood
    python extras/bench/choices.py --data=med_qa --what=reports       reports on 296 studies of two drawn images

All have the same model, random weights in float32. Ours rates a question's options as asked, in the one order that its
record has, behind one copy of the prompt (asking.py). The peers have transformers' LLaMA, and are given tokens:

    one forward an option    the prompt again with each option, sorted by length, padded; logits of every token
    lm_eval                  EleutherAI's lm-evaluation-harness itself, its class HFLM, which does the same
    lm_eval, letters alone   of "A. aspirin" the "A": one pass a question, all letters from it. This is its best case,
                             and how its own task medqa_4options asks; ours rates letters and whole options meanwhile
    prompt kept              a user's best effort: the prompt once, its keys and values repeated for the options

Reports are greedy, and no answer ends by itself. Ours is generate.py as eval_vqa.py uses it, the peer transformers'
generate on what our encoder makes of the same images, padded on the left (peers.py).

A round is each way once, in turns. All have to agree: on each option's log-probability, and on the reports' tokens.
Tokens, and those whose logits are computed, are counted as the model is given them, padding included. On a machine
that others use, too, processor time tells more than the clock, with --threads=1, since threads that wait for one
another use it, too. Needs tests/requirements.txt; lm_eval is measured where it is installed.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from plumbing.flags import require_packages

if __name__ == "__main__":
    require_packages("tests/requirements.txt", "peft", "transformers")

import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from asking import list_options, rate_options
from data import Record, View
from extras.bench.answering import Config as Answering
from extras.bench.answering import answer_by_peer
from extras.bench.grpo import make_llama, make_tokenizer
from extras.bench.peers import make_peer
from extras.bench.progress import Progress
from generate import Sampling, finished_groups, generate
from model import VLM, LlamaConfig, LLaMA, ViT, ViTConfig, init_weights
from plumbing.devices import describe_machine
from plumbing.flags import Count, UserError, Whole, parse_command_line, run
from plumbing.shards import Sample, Shard
from tasks.splits import Question, read_groups
from zoo.chatml import tokenizer_of

SAME = 1e-3  # nats, of an option's log-probability
FIRST = 50  # questions on which all have to agree before any is timed; in the end they have to on all
ROW = "as asked"  # any row but eval_vqa.py's "model", whose questions are asked in other orders, too
INDICATIONS = "cough fever for three days , chest pain dyspnoea rule out pneumonia follow up of a left nodule".split()


@dataclass(frozen=True)
class Config:
    what: Literal["both", "choices", "reports"] = "both"  # is measured
    data: str = "med_qa"  # prepared dataset of multiple choice; of its tokens are the reports, too
    shards_dir: str = "shards"  # where prepare/all.py put it
    peers: str = ""  # of multiple choice: those whose name has these words; none: all
    limit: Whole = 0  # only the first so many questions; 0: all
    studies: Count = 296  # as many as MedEvalKit asks of IU X-Ray
    new_tokens: Count = 60  # of each report
    hidden_size: Count = 384  # of the language model, in heads of 64
    layers: Count = 8  # of the language model
    image_size: Count = 224  # of the studies' images, 16 x 16 pixels a token
    batch_size: Count = 32  # studies answered together, as eval_vqa.py's
    rounds: Count = 2  # of each way
    threads: Count = 2  # of torch


def build(config, vocab_size, stops):
    """A VLM of random weights whose answers do not end by themselves."""
    torch.manual_seed(0)
    width, heads = config.hidden_size, config.hidden_size // 64
    model = VLM(ViT(ViTConfig(image_size=config.image_size, width=192, depth=6)), LLaMA(LlamaConfig(
        vocab_size, width, -(-8 * width // 96) * 32, config.layers, heads, heads))).apply(init_weights)
    with torch.no_grad():
        for parameter in model.parameters():  # so that what is asked makes a difference, and a mistake one, too
            parameter *= 3 if parameter.ndim > 1 else 1
        model.language.lm_head.weight[list(stops)] = 0  # never the largest of so many random logits
    return model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------- options

def rate_ours(model, tokenizer, shard, count):
    """{"whole": Q lists of each option's log-probability, "letter": of its letter's} as eval_vqa.py finds them."""
    rated = rate_options(model, tokenizer, shard, count, {ROW: np.arange(len(shard.image_index))})[ROW]
    return {reading: [entry["as asked"][reading] for entry in rated] for reading in ("whole", "letter")}


@torch.no_grad()
def rate_each(llama, asked, batch_size):
    """{"whole": ...} of Options: one forward pass an option, the longest first, padded behind."""
    rows = [(options.prompt + answer, len(answer)) for options in asked for answer in options.answers]
    order, values = sorted(range(len(rows)), key=lambda number: -len(rows[number][0])), np.zeros(len(rows))
    for begin in range(0, len(rows), batch_size):
        numbers = order[begin:begin + batch_size]
        tokens = torch.zeros(len(numbers), len(rows[numbers[0]][0]) - 1, dtype=torch.long)
        for row, number in zip(tokens, numbers):
            row[:len(rows[number][0]) - 1] = torch.tensor(rows[number][0][:-1])
        logits = F.log_softmax(llama(input_ids=tokens).logits, -1)
        for some, number in zip(logits, numbers):
            whole, length = rows[number]
            some = some[len(whole) - 1 - length:len(whole) - 1]
            values[number] = some.gather(1, torch.tensor(whole[-length:])[:, None]).sum()
    return {"whole": split(values, asked)}


@torch.no_grad()
def rate_kept(llama, asked):
    """{"whole": ...} of Options: a prompt once, then its options in a batch behind its keys and values."""
    rated = []
    for options in asked:
        lengths = [len(answer) for answer in options.answers]
        tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, answer in zip(tokens, options.answers):
            row[:len(answer)] = torch.tensor(answer)
        first = llama(input_ids=torch.tensor([options.prompt]), use_cache=True, logits_to_keep=1)
        logits = first.logits.expand(len(lengths), -1, -1)
        if max(lengths) > 1:
            first.past_key_values.batch_repeat_interleave(len(lengths))
            rest = llama(input_ids=tokens[:, :-1], past_key_values=first.past_key_values)
            logits = torch.cat([logits, rest.logits], 1)
        values = F.log_softmax(logits, -1).gather(2, tokens[..., None])[..., 0]
        rated.append([float(some[:length].sum()) for some, length in zip(values, lengths)])
    return {"whole": rated}


def rate_by_harness(harness, asked, reading):
    """{reading: ...} of Options by lm_eval's requests, whose texts are the numbers of tokens (make_tokenizer)."""
    from lm_eval.api.instance import Instance

    def write(tokens):
        return " ".join(map(str, tokens))

    requests = [Instance("loglikelihood", {}, (write(options.prompt), " " + write(
        answer[:options.letter or None] if reading == "letter" else answer)), place)
        for options in asked for place, answer in enumerate(options.answers)]
    values = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    return {reading: split(values, asked)}


def split(values, asked):
    """One value an option as a list a question."""
    ends = np.cumsum([len(options.answers) for options in asked])[:-1]
    return [some.tolist() for some in np.split(np.array(values), ends)]


def ways_to_rate(model, llama, tokenizer, shard, count, peers=""):
    """{way: a function that rates the first `count` questions}: ours, and the peers whose name has these words."""
    asked = list(list_options(shard, tokenizer, count, {ROW: np.arange(len(shard.image_index))}))
    ways = {"ours": partial(rate_ours, model, tokenizer, shard, count)}
    ways |= {f"one forward an option, batch of {size}": partial(rate_each, llama, asked, size) for size in (1, 8)}
    if find_spec("lm_eval"):
        from lm_eval.models.huggingface import HFLM

        words = make_tokenizer(tokenizer.vocab_size)
        for reading, name in (("whole", ""), ("letter", ", letters alone")):
            for size in (1, 8):
                harness = HFLM(pretrained=llama, tokenizer=words, batch_size=size)
                ways[f"lm_eval{name}, batch of {size}"] = partial(rate_by_harness, harness, asked, reading)
    ways["prompt kept"] = partial(rate_kept, llama, asked)
    chosen = {way: rate for way, rate in ways.items() if way == "ours" or peers in way}
    if len(chosen) < 2:
        raise UserError(f"--peers={peers}: in no name of {', '.join(list(ways)[1:])}")
    return chosen


def require_alike(rated):
    """The largest difference from ours of {way: {reading: lists}}. Raises AssertionError where it is above SAME."""
    worst = 0.0
    for way, readings in rated.items():
        for reading, lists in readings.items():
            apart = max(np.abs(np.subtract(*pair)).max() for pair in zip(lists, rated["ours"][reading], strict=True))
            assert apart < SAME, f"{way}: a log-probability of a {reading} option differs by {apart:.1e}"
            worst = max(worst, apart)
    return worst


# ----------------------------------------------------------------------------- reports

def draw_studies(config, tokenizer):
    """Of each study its prompt, with two images and an indication, behind which a report would stand; all images."""
    generator, samples = np.random.default_rng(0), []
    for number in range(config.studies):
        words = generator.choice(INDICATIONS, generator.integers(6, 20))
        record = Record("", "write the findings.", "normal.", context=f"Indication: {' '.join(words)}.",
                        parts=(View(b"", role="frontal"), View(b"", role="lateral")))
        tokens, spans, (head, _) = tokenizer.write(record)
        own = [token if token >= 0 else token - 2 * number for token in tokens]
        samples.append(Sample(np.array(own), np.array(spans), head))
    size = config.image_size
    images = generator.integers(0, 256, (2 * config.studies, size // 16, size // 16, 3), np.uint8)
    return SimpleNamespace(read_sample=samples.__getitem__, count=len(samples),
                           read_image=lambda number: images[number].repeat(16, 0).repeat(16, 1))


def answer_ours(model, studies, stops, config):
    """The tokens of each report, as eval_vqa.py answers."""
    groups = [[Question("model", number, studies.read_sample(number).prompt().tolist())]
              for number in range(studies.count)]
    passes = generate(model, read_groups(studies, groups), config.new_tokens, Sampling(stops=stops),
                      config.batch_size, log_probabilities=False)
    return [answer.tokens for _, (answer,) in finished_groups(passes)]  # as long as one another, they end in order


def ways_to_report(model, peer, studies, stops, config):
    """{way: a function that answers}."""
    ways = {"ours": lambda: answer_ours(model, studies, stops, config)}
    for size in (8, config.batch_size):
        flags = Answering(new_tokens=config.new_tokens, peer_batch_size=size)
        ways[f"generate, batch of {size}"] = partial(answer_by_peer, peer, model, studies, studies.count, stops, flags)
    return ways


# ----------------------------------------------------------------------------- the comparison

def note_passes(languages, passes):
    """Let passes through language models note the (tokens, logits) that each is given and computes; the hooks."""
    def note(module, inputs, more, output):
        given = next(x for x in (*inputs, more.get("inputs_embeds"), more.get("input_ids")) if x is not None)
        logits = getattr(output, "logits", output)
        passes.append((given.shape[:2].numel(), logits.numel() // logits.shape[-1]))

    return [language.register_forward_hook(note, with_kwargs=True) for language in languages]


def measure(ways, languages, rounds):
    """{way: (rounds, 2) seconds by the clock and of the processor}, {way: (tokens, logits)}, {way: what it gave}."""
    seconds, work, given, progress = defaultdict(list), {}, {}, Progress(rounds * len(ways), "passes")
    for _ in range(rounds):
        for way, answer in ways.items():
            passes = []
            hooks = note_passes(languages, passes)
            begin = time.perf_counter(), time.process_time()
            given[way] = answer()
            seconds[way].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
            work[way] = np.sum(passes, 0)
            for hook in hooks:
                hook.remove()
            progress.row(f"{way}, {seconds[way][-1][0]:.2f} s")
    return {way: np.array(some) for way, some in seconds.items()}, work, given


def print_table(seconds, work, count, what):
    """The table of what measure() found of `count` things."""
    print(f"| {what} | {what} a second | s by the clock, median and range | processor s | tokens | with logits "
          "| ours is faster, times | by processor time |\n|---|--:|--:|--:|--:|--:|--:|--:|")
    ours = np.median(seconds["ours"], 0)
    for way, some in seconds.items():
        median = np.median(some, 0)
        clock, processor = median / ours
        print(f"| {way} | {count / median[0]:.2f} | {median[0]:.1f} ({some[:, 0].min():.1f} to {some[:, 0].max():.1f}) "
              f"| {median[1]:.1f} | {work[way][0]:,} | {work[way][1]:,} | {clock:.2f} | {processor:.2f} |")


def compare_choices(config, shard, tokenizer, model):
    count, llama = min(config.limit or len(shard), len(shard)), make_llama(model).eval()
    ways = ways_to_rate(model, llama, tokenizer, shard, count, config.peers)
    if count > FIRST:  # before much is waited for
        first = ways_to_rate(model, llama, tokenizer, shard, FIRST, config.peers)
        require_alike({way: rate() for way, rate in first.items()})
    seconds, work, rated = measure(ways, (model.language, llama), config.rounds)
    print(f"\n{count:,} questions of {config.data}, {sum(map(len, rated['ours']['whole'])):,} options, whose "
          f"log-probabilities are the same in all ways, to {require_alike(rated):.0e}\n")
    print_table(seconds, work, count, "questions")


def compare_reports(config, tokenizer, model):
    studies = draw_studies(config, tokenizer)
    peer = make_peer(model, None, tokenizer.stops, model.encode_images).eval()
    ways = ways_to_report(model, peer, studies, tokenizer.stops, config)
    seconds, work, given = measure(ways, (model.language, peer.model), config.rounds)
    ours = given["ours"]
    same = min(sum(map(list.__eq__, ours, answers)) for answers in given.values())
    assert same > 0.9 * len(ours), f"only {same} of {len(ours)} reports are the same"  # two tokens may tie
    print(f"\n{len(ours)} studies of two images, reports of {config.new_tokens} tokens, {len({*map(tuple, ours)})} "
          f"different ones; {same} are the same as transformers', token for token\n")
    print_table(seconds, work, len(ours), "reports")


def main(config):
    if config.hidden_size % 64:
        raise UserError(f"--hidden_size={config.hidden_size}: no multiple of 64")
    torch.set_num_threads(config.threads)
    shard = Shard(Path(config.shards_dir) / config.data / "test")
    if shard.manifest.get("task") != "choices":
        raise UserError(f"--data={config.data}: not of multiple choice; name one that is, such as med_qa")
    tokenizer = tokenizer_of(shard)
    model = build(config, tokenizer.vocab_size, tokenizer.stops)
    print(", ".join(f"{name} {value}" for name, value in describe_machine(torch.device("cpu")).items()))
    print(", ".join(f"{name} {version(name)}" for name in ("transformers", "lm_eval") if find_spec(name)))
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.language, model.language.lm_head)]
    print(f"a language model of {sizes[0]:,} parameters, {sizes[1]:,} of them its head")
    if config.what != "reports":
        compare_choices(config, shard, tokenizer, model)
    if config.what != "choices":
        compare_reports(config, tokenizer, model)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
