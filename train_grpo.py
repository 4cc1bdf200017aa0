"""
Reinforcement learning with rewards that can be verified: GRPO (arXiv 2402.03300), from a run of train_vlm.py.

    python train_grpo.py --start=out/boxes --data=sample_boxes --run=out/boxes_rl
    python train_grpo.py --start=out/boxes --data=sample_boxes,sample:0      watch what else the model can do
    python train_grpo.py --start=out/x --data=a,b --reward=boxes:1,letter:0.5

A step samples several answers to each of some prompts, with the log-probability of each token; rewards each
by its task's score (tasks/rewards.py); takes from a reward the mean of its group, the answers to one prompt;
and makes the better ones likelier. A group is what data.py calls samples that begin alike: the prompt and its
images are encoded once to sample, once to train.

Defaults, and why: nothing is divided by a group's spread, for that makes the most of groups that hardly
differ; each token counts alike (--length=constant), for else long wrong answers cost less a token (both arXiv
2503.20783); the upper bound of the ratio is the wider one, so that rare tokens can rise (arXiv 2503.14476); answers
that were cut are not learnt from; no KL. Other recipes, as flags:

    GRPO      --normalise=group --length=answer --clip_high=0.2 --kl=0.04 --mask_truncated=false
    Dr. GRPO  --clip_high=0.2 --mask_truncated=false
    DAPO      --normalise=group --length=step
    MedMO     --normalise=group --length=group --clip_low=0.15 --clip_high=0.25 --kl=0.04 --reward=medmo

(MedMO's KL weight is not published; 0.04 is GRPO's.) A dataset of weight 0 gives no prompts, but its held-out
samples are answered, too: so that what is forgotten is seen.

Letters: P prompts of a step, G answers of each, M answer tokens of a micro-batch, V vocabulary.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from plumbing.flags import (BatchSize, Count, Datasets, Device, Range, Scale, Seconds, Share, UserError, Whole,
                            parse_command_line, run)


@dataclass(frozen=True)
class Config:
    start: str = ""  # run or checkpoint of train_vlm.py to begin with; or a Qwen3-VL's folder, also in weights/
    data: Datasets = "sample_boxes"  # prepared datasets, each with an optional weight; 0: watched alone
    shards_dir: str = "shards"  # where prepare/all.py put them
    reward: str = "boxes"  # of tasks/rewards.py, each with an optional weight: boxes:1,letter:0.5
    reward_timeout: Seconds = 10  # that the reward of one answer may take
    balance: bool = True  # with several datasets, map each one's median reward to 0.5
    batch_size: BatchSize = 16  # prompts in a step
    answers: Annotated[int, Range(2, 1024)] = 8  # sampled of each prompt: a group
    max_new_tokens: Annotated[int, Range(0, 1 << 16)] = 0  # longest answer; 0: 32, or what boxes need
    temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0  # that answers are sampled and trained at
    max_length: Annotated[int, Range(16, 1 << 20)] = 3584  # tokens of a sample; a longer prompt is cut at its front
    micro_batch_tokens: Count = 8192  # tokens of a forward pass; trades memory for speed, not results
    updates: Count = 1  # of the weights from one step's answers; from the second on clipping matters
    normalise: Literal["none", "group", "step"] = "none"  # by whose standard deviation rewards are divided
    length: Literal["constant", "step", "group", "answer"] = "constant"  # tokens by whose number a sum is divided
    clip_low: Share = 0.2  # a ratio below 1 minus this is not lowered further
    clip_high: Scale = 0.28  # a ratio above 1 plus this is not raised further
    kl: Scale = 0.0  # weight of the divergence from what the run began with; 0: it is not computed
    mask_truncated: bool = True  # learn nothing from answers that reached the limit
    vision: Literal["full", "lora", "frozen"] = "frozen"  # what trains of the ViT
    projector: Literal["full", "frozen"] = "frozen"  # what trains of the projection
    language: Literal["lora", "full", "frozen"] = "lora"  # what trains of the language model
    base_bits: Literal["auto", "0", "16", "8", "4"] = "auto"  # of the frozen base; auto: as trained; 0: as --dtype
    lora_targets: str = "auto"  # matrices with LoRA, where --start has none; auto: a block's, a gpt-oss's attention
    lora_vision_targets: str = "qkv"  # matrices of the vision transformer with --vision=lora
    lora_r: Annotated[int, Range(1, 1 << 16)] = 16  # rank
    lora_alpha: Scale = 32.0  # the update is scaled by alpha / r
    recompute: Share = 0.0  # share of the blocks whose activations are computed twice, to save memory
    compile: bool = True  # the blocks' small operations into few kernels, on a GPU; takes a minute at first
    max_steps: Count = 200  # steps of the run
    learning_rate: Scale = 1e-5  # peak
    warmup: Share = 0.03  # share of the steps in which it rises from 0; then a cosine to 0
    clip: Scale = 1.0  # largest norm of the gradient; 0: no clipping
    held_out: Whole = 128  # samples kept from training, over all datasets, whose greedy answers are scored
    evaluate_every: Count = 20  # steps; and before the first
    seed: Whole = 0  # of order and sampling
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: on a GPU bfloat16, else float16
    run: str = ""  # folder of this run; none: out/grpo_<date>
    resume: bool = False  # go on from the newest checkpoint of the run, with its flags where none are given
    config: str = ""  # config.json of a run whose flags count where none are given
    save_minutes: Scale = 30.0  # between two checkpoints; 0: by steps alone
    save_every: Whole = 0  # also after so many steps; 0: by minutes alone
    keep: Count = 2  # newest checkpoints that stay, beside the best by held-out score
    rank_timeout: Seconds = 600  # that torchrun's processes wait for one another
    wandb: bool = False  # also log to Weights & Biases, if installed


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)  # before torch is imported: --help and a typo are answered at once

import contextlib
import math
import time
from dataclasses import asdict, replace

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import Mixture
from grpo import (balanced, find_advantages, find_shares, log_probabilities, make_micro_batches, policy_loss,
                  read_prompts, reward_all, roll_out)
from plumbing.devices import LossScale, agree, autocast_to, join_group, pick_device, share_out, sum_of_ranks, to_device
from plumbing.files import find_run, hash_file, lock, read_manifest, sync
from plumbing.pixels import resize_flags
from plumbing.runs import (choose_folder, describe_run, image_settings, learnt_before, open_log, open_run,
                           require_same_inputs, write_run)
from plumbing.signals import agree_on_stop, catch_signals, end_stopped
from plumbing.sources import FOUR, SEVEN, checkpoint_of, hub_folder, open_shards, require_own_tokenizer
from quantize import LowLinear
from run import (device_of, learning_rate_at, load_optimizer, make_optimizer, make_trainable, require_images,
                 save_checkpoint, update)
from tasks.reasoning import answer_of
from tasks.rewards import parse
from tasks.splits import answer_limit, task_of
from weights import build_vlm, load_vlm, save_vlm
from zoo.chatml import tokenizer_of
from zoo.gpt_oss import GptOss
from zoo.qwen3_files import is_qwen

FREE_ON_RESUME = {"config", "compile", "device", "resume", "run", "evaluate_every", "save_every", "save_minutes",
                  "keep", "rank_timeout", "wandb", "shards_dir", "recompute", "micro_batch_tokens", "reward_timeout"}


# ----------------------------------------------------------------------------- one step

def sample_step(state, prompts, step, config):
    """[[Rollout] * G] of P prompts, rewarded. What is drawn depends on seed, step and place alone."""
    def answer(some, rank, ranks):
        draws = [np.random.default_rng([config.seed, step, place]).random((config.answers, state.limit))
                 for place in range(rank, len(prompts), ranks)]
        rollouts = roll_out(state.model, state.tokenizer, some, config.answers, state.limit, config.temperature, draws)
        reward_all(some, rollouts, parse(config.reward), step / config.max_steps, config.reward_timeout)
        return rollouts

    return share_out(prompts, answer)


def anchor_all(state, micro_batches, config):
    """Note the log-probabilities of the model that the run began with."""
    trained = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    now = {name: p.detach().clone() for name, p in trained.items()}
    with torch.no_grad(), state.autocast:
        for name, p in trained.items():
            p.copy_(state.reference[name])
        for micro in micro_batches:
            batch = to_device(micro.batch, device_of(state.model))
            micro.anchor = log_probabilities(state.model, batch, state.tokenizer.vocab_size,
                                             config.temperature).float().cpu().numpy()
        for name, p in trained.items():
            p.copy_(now[name])


def update_once(state, micro_batches, rate, config):
    """
    One update from a step's MicroBatches, of all ranks: this rank's sums, (3,), as policy_loss gives them, and the
    gradient's norm. Raises FloatingPointError as run.update does.
    """
    sums = torch.zeros(3, device=device_of(state.model))
    for micro in micro_batches:
        with state.autocast:
            loss, some = policy_loss(state.model, to_device(micro, sums.device), state.tokenizer.vocab_size, config)
        if loss.requires_grad:  # not where images alone train, and there is none
            (loss * state.scale.scale if state.scale else loss).backward()
        sums += some
    _, norm = update(state.optimizer, rate, sums[0], config.clip, state.scale)
    return sums.tolist(), norm


# ----------------------------------------------------------------------------- the run

@dataclass
class State:
    """What a run goes on with from step to step."""
    model: object
    tokenizer: object
    mixture: Mixture
    records: list  # of each shard its lines of records.jsonl
    limit: int  # tokens of a sampled answer
    optimizer: object
    scale: LossScale | None
    reference: dict | None  # {name: tensor} of what trains, as it was when the run began; with --kl alone
    record: dict  # what each checkpoint is sealed with
    autocast: object


def open_prompts(config, opened, vision, rank, ranks, device):
    """The Mixture of what open_shards has opened. UserError where the vision part cannot read its images."""
    mixture = Mixture(**opened, count_tokens=vision.tokens, batch_size=config.batch_size, seed=config.seed,
                      max_length=config.max_length, micro_batch_tokens=config.micro_batch_tokens,
                      held_out=config.held_out, rank=rank, ranks=ranks, multiple=128 if device.type == "cuda" else 1)
    for shard, count, validation in zip(mixture.shards, mixture.counts, mixture.validation):
        vision.require_shapes(shard.folder, shard.image_index)
        print(f"{shard.folder}: {count:,} prompts, {len(validation):,} samples held out")
    require_images(config, mixture)
    return mixture


def load_policy(config, tokenizer, checkpoint, device, dtype):
    """The VLM that trains: of a checkpoint of this run, else what --start names."""
    trained = [part for part in ("vision", "projector", "language") if getattr(config, part) == "full"]
    dtype = torch.float32 if config.language == "full" else dtype
    if not checkpoint and is_qwen(whole := hub_folder(config.start)):
        require_own_tokenizer(whole, tokenizer)
        return build_vlm(config.start, tokenizer.vocab_size, whole, whole, dtype, device, trained=trained,
                         bits=int(config.base_bits.replace("auto", "0")))
    begun = checkpoint or checkpoint_of(config.start, tokenizer)
    model = load_vlm(begun, dtype, device, None, trained, config.base_bits)
    if config.language == "full" and any(isinstance(module, LowLinear) for module in model.language.modules()):
        raise UserError(f"--language=full: the base of {begun} has {model.base_bits} bits; add --base_bits=0")
    return model


def compare_start(config, image):
    """
    Print where --start may have been trained on what is held out here, which depends on the datasets' order.
    UserError where its images were stored in another way.
    """
    if is_qwen(hub_folder(config.start)):
        return
    record, here = read_manifest(find_run(config.start)[1]), asdict(config)
    if resize_flags(record["image"]) != resize_flags(image):
        raise UserError(f"--start={config.start}: its images were made by {resize_flags(record['image'])}, those of "
                        f"--data by {resize_flags(image)}; prepare them as the former: `python prepare/all.py "
                        f"--only=... {resize_flags(record['image'])}`")
    before = record["flags"]
    named = [[entry.partition(":")[0] for entry in flags["data"].split(",")] for flags in (before, here)]
    if named[0] != named[1] or before["held_out"] != config.held_out:
        print(f"{config.start} has --data={before['data']} --held_out={before['held_out']}: with other datasets or "
              "another order here, it may have learnt from what is held out here; judge by eval_vqa.py")


def open_reference(model, folder, record, rank):
    """
    State.reference: of LoRA a few megabytes, in place of a second model. It lies in the run's folder, its hash in
    the run's record. UserError where it is another by now.
    """
    path = folder / "reference.safetensors"
    if rank == 0 and "reference" not in record:
        save_file({name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}, path)
    found = agree(lambda: hash_file(path) if path.is_file() else "none")
    if record.setdefault("reference", found) != found:
        raise UserError(f"{path}: missing or altered, and --kl needs it; bring it back, or start another --run")
    return load_file(path, str(device_of(model)))


def held_out_scores(state, config):
    """{dataset: mean score of its held-out samples, greedily answered, in percent}, by the task's main metric."""
    scores, mixture = {}, state.mixture
    for shard, numbers, start in zip(mixture.shards, mixture.validation, mixture.starts):
        prompts, task = read_prompts(mixture, state.records, numbers + start), task_of(shard)
        with state.autocast:
            answered = share_out(prompts, lambda some, rank, ranks: roll_out(
                state.model, state.tokenizer, some, 1, answer_limit(shard, config)))
        if prompts:
            texts = [answer_of(prompt.record, rollout.text) for prompt, (rollout,) in zip(prompts, answered)]
            scores[shard.folder.parent.name] = float(np.mean([
                task.score(prompt.record, text)[task.MAIN] for prompt, text in zip(prompts, texts)]))
    return scores


def main(config):
    parse(config.reward)  # what is wrong with it is told first
    device, dtype = pick_device(config.device, config.dtype)
    rank, ranks, device = join_group(device, config.rank_timeout)
    folder = agree(lambda: choose_folder(config.run, "grpo", config.resume))
    with lock(folder / ".lock", "training") if rank == 0 else contextlib.nullcontext():
        train(config, folder, rank, ranks, device, dtype)


def train(config, folder, rank, ranks, device, dtype):
    """All steps of a run, or those that are left of it."""
    torch.manual_seed(config.seed)
    checkpoint = agree(lambda: open_run(folder, config, FREE_ON_RESUME))
    if not (checkpoint or config.start):
        raise UserError("--start: name the run to begin with, one of `python train_vlm.py`")
    opened = open_shards(config.data, config.shards_dir, "train")
    image, tokenizer = image_settings(opened["shards"]), tokenizer_of(opened["shards"][0])
    model = load_policy(config, tokenizer, checkpoint, device, dtype).eval()  # without dropout, as it is sampled
    mixture = open_prompts(config, opened, model.vision, rank, ranks, device)
    auto = {"lora_targets": FOUR if isinstance(model.language, GptOss) else SEVEN}
    make_trainable(model, replace(config, **auto) if config.lora_targets == "auto" else config, checkpoint)
    record = describe_run(config, mixture, image, tokenizer, model, device) | {"medians": {}}
    optimizer = make_optimizer([(name, p, 1.0) for name, p in model.named_parameters()], weight_decay=0.0)
    scale, first = LossScale() if dtype == torch.float16 else None, 0
    if checkpoint:
        record, first = require_same_inputs(checkpoint, record["inputs"]), int(checkpoint.name[5:])
        load_optimizer(optimizer, model, checkpoint)
        scale = scale and LossScale(**record.get("loss_scale", {}))
    else:
        compare_start(config, image)
        record |= learnt_before(config.start)
    if first >= config.max_steps:
        return print(f"finished already; now run `python eval_vqa.py --run={folder}`")
    reference = open_reference(model, folder, record, rank) if config.kl else None
    if rank == 0:
        write_run(folder, record, tokenizer, checkpoint)
    log = open_log(folder, first, config.wandb and asdict(config)) if rank == 0 else lambda entry: None
    print(f"{folder}: steps {first} to {config.max_steps} of {config.batch_size} x {config.answers} answers on "
          f"{device}, {dtype}, {ranks} process(es)")
    limit = max(answer_limit(shard, config) for shard, count in zip(mixture.shards, mixture.counts) if count)
    records = [shard.read_records() for shard in mixture.shards]
    take_steps(config, folder, first, log, State(model, tokenizer, mixture, records, limit, optimizer, scale, reference,
                                                 record, autocast_to(device, dtype)))


def take_steps(config, folder, first, log, state):
    """Train from step `first` on, with log entries, held-out scores and checkpoints when they are due."""
    device, rank, signals, saved = device_of(state.model), state.mixture.rank, catch_signals(), time.perf_counter()
    bar = tqdm(total=config.max_steps, initial=first, unit="step", dynamic_ncols=True, disable=rank > 0)
    scores = {}
    if not first:
        scores = held_out_scores(state, config)
        log({"step": 0, "held_out": scores})
    for step in range(first, config.max_steps):
        try:
            entry = take_step(state, step, config)
        except UserError as error:  # a reward's: nothing of this step has changed anything
            if step > first and not (folder / f"step_{step:06d}").exists():
                save(config, folder, state, step, {})
            raise UserError(f"step {step}: {error}") from None
        except FloatingPointError as error:
            raise UserError(f"step {step}: {error}; try a lower --learning_rate, from the newest checkpoint") from None
        done = step + 1
        shown = "".join(f", {name} {score:.1f}" for name, score in scores.items())
        bar.update()
        bar.set_postfix_str(f"reward {entry['reward']:.3f}, dead {entry['dead_groups']:.0%}{shown}")
        log({"step": done, **entry})
        due, stopped = agree_on_stop(signals, 0 < 60 * config.save_minutes < time.perf_counter() - saved, device)
        if evaluated := done % config.evaluate_every == 0 or done == config.max_steps:
            scores = held_out_scores(state, config)
            log({"step": done, "held_out": scores})
        if due or stopped or evaluated or (config.save_every and done % config.save_every == 0):
            save(config, folder, state, done, scores if evaluated else {})
            saved = time.perf_counter()
        if stopped and done < config.max_steps:
            bar.close()
            end_stopped(folder, done, stopped)
    bar.close()
    print(f"{folder}: finished; now run `python eval_vqa.py --run={folder}`")


def take_step(state, step, config):
    """Sample, reward, compare, update. Returns the step's entry for the log."""
    began, mixture = time.perf_counter(), state.mixture
    prompts = read_prompts(mixture, state.records, mixture.chosen(step)[0])
    with state.autocast:
        rollouts = sample_step(state, prompts, step, config)
    sampled = time.perf_counter()
    rewards = np.array([[rollout.reward for rollout in group] for group in rollouts])  # (P, G)
    lengths = np.array([[len(rollout.tokens) for rollout in group] for group in rollouts])
    several = config.balance and sum(count > 0 for count in mixture.counts) > 1
    medians = dict(state.record["medians"])  # of the state only once the step is done
    compared = balanced(rewards, prompts, medians) if several else rewards
    advantages, alive = find_advantages(compared, config.normalise)
    micro_batches = make_micro_batches(mixture, prompts, rollouts, advantages, alive,
                                       find_shares(lengths, state.limit, config.length), config)
    if config.kl:
        anchor_all(state, micro_batches, config)
    rate = learning_rate_at(step, config.max_steps, config.learning_rate, config.warmup)
    for _ in range(config.updates):
        sums, norm = update_once(state, micro_batches, rate, config)
    state.record["medians"] = medians
    loss, clipped, divergence = map(sum_of_ranks, sums)
    trained = max(sum_of_ranks(sum(len(micro.sampled) for micro in micro_batches)), 1)
    drawn = np.concatenate([rollout.log_probabilities for group in rollouts for rollout in group])
    cut = [rollout.cut for group in rollouts for rollout in group]
    return {"reward": rewards.mean(), "reward_spread": rewards.std(axis=1).mean(), "dead_groups": 1 - alive.mean(),
            "length": lengths.mean(), "truncated": np.mean(cut), "entropy": -drawn.mean(), "loss": loss,
            "gradient_norm": norm if math.isfinite(norm) else None, "learning_rate": rate, "clipped": clipped / trained,
            **({"kl": divergence / trained} if config.kl else {}),
            "sampled_tokens_per_second": lengths.sum() / (sampled - began),
            "trained_tokens_per_second": trained / (time.perf_counter() - sampled)}


def save(config, folder, state, step, scores):
    """Write a checkpoint, of the first rank. Its held-out loss is 1 less the mean score, so that the best is kept."""
    if state.mixture.rank:
        return
    sync(folder / "log.jsonl")
    record = state.record | ({"loss_scale": vars(state.scale)} if state.scale else {})
    record |= {"held_out_loss": 1 - np.mean([*scores.values()]) / 100} if scores else {}
    save_checkpoint(folder, step, lambda partial: save_vlm(state.model, partial), state.model, state.optimizer, record,
                    config.keep)


if __name__ == "__main__":
    run(main, CONFIG)
