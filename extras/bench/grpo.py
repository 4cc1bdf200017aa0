"""
How fast train_grpo.py takes a step, beside TRL's GRPOTrainer with the same weights, prompts and settings.

    python extras/bench/grpo.py      8 prompts of 256 tokens, 8 answers of 48 to each, the small LLaMA, on this CPU
    python extras/bench/grpo.py --model=llama_1b --device=cuda --dtype=bfloat16       1.1B parameters, on a GPU

Ours is what train_grpo.py does: the prompt of a group is run once to sample its answers, and once to train on them.
The peer is GRPOTrainer with transformers' generate, which runs it with each answer. All weights of the language
model train, in float32; the reward, the share of even tokens, costs nothing; no answer ends by itself. A round is a
process of each side, in turns, so that the peak of its memory is its own. The first step of each process is not
counted: in it both learn from the same answers, and log-probabilities and the gradient's norm are compared.

TRL has what makes it quick here: attention by SDPA, a cache, fused AdamW, no gradient checkpointing (it is on by
default), no reference model, no second pass for old log-probabilities, and answers in micro-batches of
--peer_batch_size. On a CPU, unlike on a GPU, TRL 1.16 computes the logits of prompts, too: --peer_head=answers spares
it that, by TRL's own function for whole logits, which makes it several times as fast; --peer_head=all does not.

Needs tests/requirements.txt and the package trl, which brings datasets along; ours alone, --peer=false, goes without.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from plumbing.flags import require_packages

if __name__ == "__main__":
    require_packages("tests/requirements.txt", "transformers")

import json
import resource
import subprocess
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

from data import Mixture
from extras.bench.limits import clock
from extras.bench.progress import Progress
from extras.scripts import load_script
from grpo import Prompt, find_advantages, find_shares, log_probabilities, make_micro_batches, roll_out
from model import CONFIGS, LLaMA, LlamaConfig, VLM, ViT
from plumbing.devices import autocast_to, describe_machine, pick_device, to_device
from plumbing.flags import Count, Device, UserError, parse_command_line, run
from plumbing.kernels import HAS_TRITON, compile_blocks
from plumbing.shards import Sample
from plumbing.tensors import plain_names
from run import device_of, make_optimizer
from weights import hub_config

SAME = 1e-4  # error of a log-probability, and relative error of the gradient's norm, in float32
RATE = 1e-6  # learning rate
# name -> sizes of the language model; those of TinyLlama's 1.1B, which trains in full on a GPU
SIZES = {"llama_1b": LlamaConfig(32000, 2048, 5632, 22, 32, 4)} | {name: text for name, (_, text) in CONFIGS.items()}


@dataclass(frozen=True)
class Config:
    model: Literal["paper", "llama_1b", "small", "sample"] = "small"  # sizes of the language model; weights are random
    vocab_size: Count = 32000  # its tokens
    prompts: Count = 8  # of a step
    answers: Count = 8  # to each prompt
    prompt_tokens: Count = 256  # of each prompt
    new_tokens: Count = 48  # of each answer
    micro_batch_tokens: Count = 2048  # of ours
    peer_batch_size: Count = 16  # answers of a micro-batch of the peer's
    peer_head: Literal["answers", "all"] = "answers"  # tokens whose logits the peer computes; all: as TRL does on a CPU
    threads: Count = 2  # of each process
    steps: Count = 3  # that are timed in each process
    rounds: Count = 3  # processes of each side
    device: Device = "cpu"  # cuda, mps or cpu
    dtype: Literal["float32", "bfloat16"] = "float32"  # that is computed in; weights are float32
    peer: bool = True  # time TRL, too
    side: Literal["both", "ours", "peer"] = "both"  # ours, peer: what this script starts for itself


# ----------------------------------------------------------------------------- what both sides have

def draw_prompts(config, step):
    """(P, prompt_tokens) ids."""
    return np.random.default_rng([1, step]).integers(3, config.vocab_size, (config.prompts, config.prompt_tokens))


def draw_answers(config):
    """(P, G, new_tokens) ids: what the first step learns from."""
    return np.random.default_rng(2).integers(3, config.vocab_size, (config.prompts, config.answers, config.new_tokens))


def share_of_even(tokens):
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def make_model(config):
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    device, _ = pick_device(config.device, config.dtype)
    with torch.device(device):
        language = LLaMA(replace(SIZES[config.model], vocab_size=config.vocab_size))
        model = VLM(ViT(CONFIGS["sample"][0]), language).eval()
    model.requires_grad_(False)
    model.language.requires_grad_(True)
    return model


def memory(device, peak=False):
    """Bytes that this process holds, or the most that it has held: on its GPU, else the most either way."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ----------------------------------------------------------------------------- ours

def give_answers(rollouts, config):
    """Put draw_answers in the place of what was sampled."""
    for group, answers in zip(rollouts, draw_answers(config).tolist()):
        for rollout, tokens in zip(group, answers):
            rollout.tokens, rollout.log_probabilities = tokens, [0.0] * len(tokens)


def run_ours(config):
    """
    Of the first step "seen", the log-probabilities of draw_answers, and the gradient's "norm"; of the later "steps"
    seconds and "tokens"; the "peak" of memory in bytes, and what it was "before" the first step.
    """
    train_grpo, model = load_script("train_grpo.py"), make_model(config)
    device = device_of(model)
    if device.type == "cuda" and HAS_TRITON:
        compile_blocks(model.language.blocks)  # as train_grpo.py does
    flags = train_grpo.Config(micro_batch_tokens=config.micro_batch_tokens, normalise="group", clip_high=0.2,
                              mask_truncated=False)
    tokenizer = SimpleNamespace(stops=(), vocab_size=config.vocab_size, decode=lambda tokens: "")
    mixture = SimpleNamespace(image_tokens=[()], max_length=flags.max_length, rank=0, ranks=1,
                              multiple=128 if device.type == "cuda" else 1, micro_batch_tokens=flags.micro_batch_tokens)
    mixture.divide = partial(Mixture.divide, mixture)
    state = SimpleNamespace(model=model, tokenizer=tokenizer, scale=None,
                            autocast=autocast_to(device, getattr(torch, config.dtype)),
                            optimizer=make_optimizer([(name, p, 1.0) for name, p in model.named_parameters()], 0.0))
    shard, spans = SimpleNamespace(read_image=None), np.array([[config.prompt_tokens, config.prompt_tokens + 1]])
    steps, norms, before = [], [], memory(device)
    for step in range(1 + config.steps):
        begin = clock(device)
        prompts = [Prompt(shard, 0, number, Sample(np.append(tokens, 0), spans, 1), {})
                   for number, tokens in enumerate(draw_prompts(config, step))]
        draws = np.random.default_rng([3, step]).random((config.prompts, config.answers, config.new_tokens))
        with state.autocast:
            rollouts = roll_out(model, tokenizer, prompts, config.answers, config.new_tokens, 1.0, draws)
        sampled = clock(device)
        if not step:
            give_answers(rollouts, config)
        rewards = np.array([[share_of_even(rollout.tokens) for rollout in group] for group in rollouts])
        lengths = np.array([[len(rollout.tokens) for rollout in group] for group in rollouts])
        shares = find_shares(lengths, config.new_tokens, flags.length)
        advantages, alive = find_advantages(rewards, flags.normalise)
        micro_batches = make_micro_batches(mixture, prompts, rollouts, advantages, alive, shares, flags)
        if not step:
            seen = note_log_probabilities(model, micro_batches, state.autocast)
        _, norm = train_grpo.update_once(state, micro_batches, RATE, flags)
        done = clock(device)
        norms.append(norm)
        steps.append({"rollout": sampled - begin, "update": done - sampled, "whole step": done - begin,
                      "tokens": int(lengths.sum())})
    return {"steps": steps[1:], "seen": seen, "norm": norms[0], "peak": memory(device, peak=True), "before": before}


@torch.no_grad()
def note_log_probabilities(model, micro_batches, autocast):
    """Let the answers of MicroBatches be sampled by this model; a list of all their log-probabilities."""
    for micro in micro_batches:
        with autocast:
            values = log_probabilities(model, to_device(micro.batch, device_of(model)),
                                       model.language.config.vocab_size, 1.0)
        micro.sampled = values.float().cpu().numpy()
    return np.concatenate([micro.sampled for micro in micro_batches]).tolist()


# ----------------------------------------------------------------------------- TRL

def make_llama(model):
    """transformers' LLaMA with the weights of ours."""
    import transformers

    state, sizes = model.language.state_dict(), model.language.config
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **hub_config(sizes) | {"head_dim": sizes.head_size, "bos_token_id": None, "eos_token_id": None},
        attn_implementation="sdpa"))
    llama.load_state_dict({name: state[inside] for name, inside in plain_names(state).items()})
    llama.to(device_of(model))
    llama.generation_config = transformers.GenerationConfig()
    return llama


def make_tokenizer(vocab_size):
    """transformers' tokenizer of texts of numbers, each the token of that id; its <eos> has no logit."""
    import tokenizers
    import transformers

    words = {str(number): number for number in range(vocab_size)} | {"<eos>": vocab_size}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_timed_trainer(config, marks, seen):
    """
    GRPOTrainer as a class that notes its times in `marks`, {what: [seconds]}, and in `seen` the log-probabilities of
    the first step, {answer: (new_tokens,)}, whose answers are given.
    """
    import trl
    from trl.trainer.utils import selective_log_softmax_and_entropy

    class Timed(trl.GRPOTrainer):
        def _generate_single_turn(self, *inputs, **more):
            answers, nothing = super()._generate_single_turn(*inputs, **more)
            marks["tokens"].append(sum(map(len, answers)))
            if not self.state.global_step:
                answers = draw_answers(config).reshape(-1, config.new_tokens).tolist()
            return answers, nothing

        def _generate(self, prompts):
            begin = time.perf_counter()
            generated = super()._generate(prompts)
            marks["rollout"].append(time.perf_counter() - begin)
            return generated

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *inputs, **more):
            answers = input_ids[:, -logits_to_keep:]
            if config.peer_head == "all":
                found = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep,
                                                                   *inputs, **more)
            else:
                logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
                               logits_to_keep=logits_to_keep + 1).logits[:, :-1]
                found = *selective_log_softmax_and_entropy(logits, answers, entropy_requires_grad=False), None
            if not self.state.global_step:
                seen.update(zip(map(tuple, answers.tolist()), found[0].tolist()))
            return found

    return Timed


def run_peer(config):
    """What run_ours returns, of TRL."""
    import datasets
    import transformers
    import trl

    llama, marks, seen = make_llama(make_model(config)), defaultdict(list), {}

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *inputs, **more):
            marks["ends"].append(clock(llama.device))

    prompts = [" ".join(map(str, prompt)) for step in range(1 + config.steps) for prompt in draw_prompts(config, step)]
    with tempfile.TemporaryDirectory() as folder:
        flags = trl.GRPOConfig(
            folder, use_cpu=config.device == "cpu", bf16=config.dtype == "bfloat16", gradient_checkpointing=False,
            per_device_train_batch_size=config.peer_batch_size,
            gradient_accumulation_steps=config.prompts * config.answers // config.peer_batch_size,
            num_generations=config.answers, max_completion_length=config.new_tokens, max_steps=1 + config.steps,
            learning_rate=RATE, lr_scheduler_type="constant", shuffle_dataset=False, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True)
        trainer = make_timed_trainer(config, marks, seen)(
            llama, lambda completion_ids, **_: list(map(share_of_even, completion_ids)), flags,
            datasets.Dataset.from_dict({"prompt": prompts}), processing_class=make_tokenizer(config.vocab_size),
            callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)
        before = memory(llama.device)
        trainer.train()
    steps = [{"rollout": rollout, "update": whole - rollout, "whole step": whole, "tokens": tokens}
             for rollout, whole, tokens in zip(marks["rollout"][1:], np.diff(marks["ends"]), marks["tokens"][1:])]
    given = draw_answers(config).reshape(-1, config.new_tokens).tolist()
    return {"steps": steps, "seen": [value for answer in given for value in seen[tuple(answer)]],
            "norm": float(trainer.state.log_history[0]["grad_norm"]), "peak": memory(llama.device, peak=True),
            "before": before}


# ----------------------------------------------------------------------------- the comparison

def start(side, config):
    """What run_ours or run_peer returns, in a process of its own."""
    flags = [f"--{name}={value}" for name, value in (asdict(config) | {"side": side}).items()]
    done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def require_same(ours, peer, limit=SAME):
    """
    Raise AssertionError unless both have sampled as many tokens, and have given the tokens of the first step the same
    log-probabilities, and that step the same gradient; limit: of both errors. Returns the largest of a log-probability,
    and the norm's.
    """
    assert [step["tokens"] for step in ours["steps"]] == [step["tokens"] for step in peer["steps"]]
    apart = float(np.abs(np.subtract(ours["seen"], peer["seen"])).max())
    norm = abs(ours["norm"] / peer["norm"] - 1)
    assert apart < limit, f"a log-probability of TRL's differs by {apart:.1e}"
    assert norm < limit, f"the gradient's norm is {peer['norm']:.6f} in TRL, not {ours['norm']:.6f}"
    return apart, norm


def compare(ours, peer):
    """Print what was measured in the processes of both sides: lists of what run_ours and run_peer return, or []."""
    sides, both = [side for side in (ours, peer) if side], bool(peer)
    print("| a step | ours, median and range |" + " TRL | times |" * both + "\n|---|--:|" + "--:|--:|" * both)
    for name in ("rollout", "update", "whole step"):
        took = [np.array([step[name] for process in side for step in process["steps"]]) for side in sides]
        cells = [f"{np.median(seconds):.2f} s ({seconds.min():.2f} to {seconds.max():.2f})" for seconds in took]
        print(f"| {name} | {' | '.join(cells)} |" + f" {np.median(took[-1]) / np.median(took[0]):.2f} |" * both)
    for name, spared in (("peak memory", 0), ("peak memory, less that before the first step", 1)):
        held = [np.median([process["peak"] - spared * process["before"] for process in side]) for side in sides]
        cells = [f"{size / 1e9:.2f} GB" for size in held]
        print(f"| {name} | {' | '.join(cells)} |" + f" {held[-1] / held[0]:.2f} |" * both)


def main(config):
    if config.prompts * config.answers % config.peer_batch_size:
        raise UserError(f"--peer_batch_size={config.peer_batch_size}: no divisor of the {config.prompts} x "
                        f"{config.answers} answers of a step")
    if config.side != "both":
        return print(json.dumps({"ours": run_ours, "peer": run_peer}[config.side](config)))
    if config.peer and find_spec("trl") is None:
        raise UserError("no trl here; run `pip install trl`, or add --peer=false")
    device, dtype = pick_device(config.device, config.dtype)
    print(", ".join(f"{name} {value}" for name, value in describe_machine(device).items()))
    sides = {"ours": [], **({"peer": []} if config.peer else {})}
    print(", ".join(f"{name} {version(name)}" for name in ("trl", "transformers")[not config.peer:]))
    progress = Progress(len(sides) * config.rounds, "processes")
    for _ in range(config.rounds):
        for side, processes in sides.items():
            processes.append(start(side, config))
            whole = np.median([step["whole step"] for step in processes[-1]["steps"]])
            progress.row(f"{side}, {whole:.2f} s a step")
    if config.peer:
        apart, norm = require_same(sides["ours"][0], sides["peer"][0], SAME if dtype == torch.float32 else 1.0)
        print(f"log-probabilities of the same answers are TRL's, to {apart:.0e}, the gradient's norm to {norm:.0e}\n")
    else:
        print("no TRL beside it: --peer=false\n")
    compare(sides["ours"], sides.get("peer", []))


if __name__ == "__main__":
    run(main, parse_command_line(Config))
