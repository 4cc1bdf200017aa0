"""
How fast eval_vqa.py answers, beside transformers' generate on the same weights and questions.

    python extras/bench/answering.py --run=out/path_vqa --limit=500
    python extras/bench/answering.py --model=paper --new_tokens=8 --rounds=1     random weights, on a GPU

Ours is generate.py with all questions of an image in a row of its cache. It is timed twice: with the
right images alone, and as eval_vqa.py runs it, where each question is asked about a second image, too,
which costs little since that image's row is there. The peer is LlamaForCausalLM.generate as LLaVA-style
evaluations call it: questions in their order, each with its image encoded, in padded batches of
embeddings. A round is each of them once, in turns. Needs tests/requirements.txt.

With random weights no answer ends by itself: all have --new_tokens tokens.

The limit is what the same work would take at the speeds of this machine's own matrix product and
copy, measured first: for each pass the larger of its arithmetic and of one reading of the weights.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from plumbing.flags import require_packages

if __name__ == "__main__":
    require_packages("tests/requirements.txt", "transformers")

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import transformers

from data import EOS, Tokenizer
from extras.bench.progress import Progress, tell
from generate import finished_groups, generate
from plumbing.devices import autocast_to, describe_machine, pick_device
from plumbing.flags import Count, Device, UserError, Whole, parse_command_line, run
from plumbing.kernels import Linear
from plumbing.shards import Shard
from tasks.splits import group_questions, read_groups
from tasks.vqa import exchange_images
from weights import build_vlm, hub_config, load_run


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a train_vlm.py run; none: random weights of --model
    model: Literal["paper", "small", "sample"] = "small"  # sizes of random weights
    data: str = "path_vqa"  # prepared dataset
    shards_dir: str = "shards"  # where prepare/all.py put it
    limit: Whole = 0  # only the first so many questions; 0: all
    new_tokens: Count = 32  # longest answer; with random weights of every answer
    batch_size: Count = 32  # images answered together, as eval_vqa.py's
    peer_batch_size: Count = 32  # questions
    peer: bool = True  # time the peer, too
    rounds: Count = 3  # of each
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the GPU has it


def make_peer(model):
    """transformers' LLaMA on the same tensors."""
    settings = transformers.LlamaConfig(**hub_config(model.language.config), pad_token_id=0,
                                        attn_implementation="sdpa")
    with torch.device("meta"):
        peer = transformers.LlamaForCausalLM(settings)
    peer.load_state_dict(model.language.state_dict(), assign=True)
    # Its one buffer is no weight, and so still on the meta device.
    peer.model.rotary_emb = type(peer.model.rotary_emb)(settings).to(model.projector.weight.device)
    return peer.eval()


@torch.no_grad()
def answer_by_peer(model, peer, shard, count, config):
    """Token ids of the answers to the first `count` questions, batch by batch, padded on the left."""
    device, answers = model.projector.weight.device, []
    for begin in range(0, count, config.peer_batch_size):
        numbers = range(begin, min(begin + config.peer_batch_size, count))
        images = [torch.from_numpy(shard.read_image(image)).to(device) for image in
                  shard.samples["image"][begin:numbers.stop].tolist()]
        N = model.vision.tokens(*images[0].shape[:2])
        image_tokens = model.encode_images(images).split(N)
        rows = []
        for number in numbers:
            bos, _, *text = shard.read_sample(number).prompt().tolist()
            rows.append([bos] + [0] * N + text)
        T = max(map(len, rows))
        tokens = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=device)
        x = peer.get_input_embeddings()(tokens)  # (B, T, C)
        for b, row in enumerate(rows):
            x[b, T - len(row) + 1:T - len(row) + 1 + N] = image_tokens[b].to(x.dtype)
        seen = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows], device=device)
        replies = peer.generate(inputs_embeds=x, attention_mask=seen, do_sample=False,
                                max_new_tokens=config.new_tokens)
        answers += [reply[:reply.index(EOS)] if EOS in reply else reply for reply in replies.tolist()]
    return answers


def answer(model, tokenizer, shard, count, shown, config):
    """{row: answers to the first `count` questions, as text}; shown: as group_questions takes it."""
    groups, answers = group_questions(shard, count, shown), {row: [""] * count for row in shown}
    passes = generate(model, read_groups(shard, groups), config.new_tokens, rows=config.batch_size,
                      log_probabilities=False)
    for number, finished in finished_groups(passes):
        for question, reply in zip(groups[number], finished, strict=True):
            answers[question.row][question.number] = tokenizer.decode(reply.tokens)
    return answers


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def measure_limits(device, dtype):
    """(FLOP/s of a matrix product, bytes/s of a copy) of this machine: the best of 10."""
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    product = Linear(size, size, bias=False).to(device, dtype)
    source = torch.ones(1 << 28, device=device, dtype=torch.uint8)

    def best(function):
        seconds = []
        for _ in range(10):
            begin = clock(device)
            function()
            seconds.append(clock(device) - begin)
        return min(seconds)

    return 2 * size ** 3 / best(lambda: product(matrix)), 2 * source.numel() / best(source.clone)


def count_work(model, passes):
    """
    Let each pass through the language model enter its work into `passes`: FLOP of its matrix products,
    and of the image encoder's before it; bytes of the weights that it reads. Attention is left out.
    """
    def count(module):
        parameters = list(module.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)

    blocks, block_bytes = count(model.language.blocks)
    _, head_bytes = count(model.language.lm_head)
    images = []  # FLOP of those that this pass shows

    def saw_images(module, inputs, output):
        images.append(2 * output.shape[0] * output.shape[1] * count(module)[0])

    def embedded(module, inputs, output):
        passes.append([sum(images) + 2 * len(output) * blocks, block_bytes])
        images.clear()

    def predicted(module, inputs, output):
        passes[-1][0] += 2 * output.numel() * inputs[0].shape[-1]
        passes[-1][1] += head_bytes

    return [module.register_forward_hook(hook) for module, hook in (
        (model.vision, saw_images), (model.language.model.embed_tokens, embedded),
        (model.language.lm_head, predicted))]


def open_questions(config, split):
    """The shard of a split of --data, whose questions are about one image each, all of a size; its tokenizer."""
    folder = Path(config.shards_dir) / config.data
    shard = Shard(folder / split)
    shard.require_questions()
    if (shard.samples["images"] != 1).any() or len(np.unique(shard.image_index[["height", "width"]])) > 1:
        raise UserError(f"--data: {config.data} asks about no image, several, or different sizes, too, which the "
                        "peer cannot")
    return shard, Tokenizer(folder / "tokenizer.model")


def main(config):
    device, dtype = pick_device(config.device, config.dtype)
    shard, tokenizer = open_questions(config, "test")
    if config.run:
        model = load_run(config.run, dtype, device)
    else:
        torch.manual_seed(0)
        model = build_vlm(config.model, tokenizer.vocab_size, dtype=dtype, device=device)
        with torch.no_grad():
            model.language.lm_head.weight[EOS] = 0  # never the largest of 32,000 random logits
    model.eval().requires_grad_(False)
    model.vision.require_shapes(shard.folder, shard.image_index)
    count = min(config.limit or len(shard), len(shard))
    images, own = shard.samples["image"][:count].astype(np.int64), np.arange(len(shard.image_index))
    other = exchange_images(len(own), images, images, 0)
    peer = make_peer(model) if config.peer else None

    print(", ".join(f"{name} {value}" for name, value in describe_machine(device).items()))
    flops, bandwidth = measure_limits(device, dtype)
    print(f"{count:,} questions about {len(np.unique(images)):,} images of {config.data}, {dtype}; a "
          f"matrix product runs at {flops / 1e12:.2f} TFLOP/s, a copy at {bandwidth / 1e9:.0f} GB/s")
    ways = {"ours": lambda: answer(model, tokenizer, shard, count, {"model": own}, config),
            "ours, with a second image": lambda: answer(
                model, tokenizer, shard, count, {"model": own, "image shuffled": other}, config)}
    if peer:
        ways["transformers' generate"] = lambda: {"model": [
            tokenizer.decode(reply) for reply in answer_by_peer(model, peer, shard, count, config)]}
    seconds, answers, passes = defaultdict(list), {}, []
    progress = Progress(len(ways) * config.rounds, "passes")
    tell(f"{len(ways)} ways x {config.rounds} rounds over all questions; a line for each")
    for number in range(config.rounds):
        for way, run_once in ways.items():
            hooks = count_work(model, passes) if way == "ours" and number == 0 else []
            begin = clock(device)
            with autocast_to(device, dtype):
                answers[way] = run_once()
            seconds[way].append(clock(device) - begin)
            progress.row(f"{way}, {seconds[way][-1]:.2f} s")
            for hook in hooks:
                hook.remove()
    medians = {way: float(np.median(times)) for way, times in seconds.items()}
    for way, median in medians.items():
        asked = count * len(answers[way])
        line = f"{way:26}{asked:7,} answers {median:8.2f} s {asked / median:8.1f} a second"
        if peer:
            last = medians["transformers' generate"] * asked / count
            line += f" {last / median:6.2f}x"
        print(line)
    compute, memory = (sum(numbers) for numbers in zip(*[(flop / flops, size / bandwidth)
                                                         for flop, size in passes]))
    limit = sum(max(flop / flops, size / bandwidth) for flop, size in passes)
    print(f"limit of ours {limit:.2f} s ({compute:.2f} s of arithmetic, {memory:.2f} s of reading weights "
          f"in {len(passes)} passes): {limit / medians['ours']:.0%} of it reached")
    if peer:
        pairs = zip(answers["ours"]["model"], answers["transformers' generate"]["model"])
        print(f"{sum(a == b for a, b in pairs):,} of {count:,} answers are the same as transformers'")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
