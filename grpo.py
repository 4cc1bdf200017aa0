"""
GRPO (arXiv 2402.03300), step by step: answers to a prompt are sampled, rewarded, compared with one another, packed
behind one copy of their prompt, and made likelier or less likely by the clipped surrogate.

train_grpo.py has the flags, `config` here, and the loop. A group, the answers to one prompt, is what data.py calls
samples that begin alike: its prompt and images are encoded once to sample, and once to train.

Letters: P prompts of a step, G answers of each, M answer tokens of a micro-batch, V vocabulary.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from data import Group, make_batch, shared_prefix
from generate import Sampling, finished_groups, generate
from plumbing.flags import UserError
from plumbing.shards import Sample, Shard
from plumbing.signals import time_limit
from tasks.rewards import balance, reward
from tasks.splits import Question, read_groups
from tasks.vqa import as_asked

# ----------------------------------------------------------------------------- sampling and rewards

@dataclass
class Prompt:
    """What is asked in a step."""
    shard: Shard
    index: int  # of the shard
    number: int  # of its sample there
    sample: Sample
    record: dict  # its words

    def __str__(self):
        return f"{self.shard.folder}:{self.number} ({self.record['id']})"


@dataclass
class Rollout:
    """One sampled answer."""
    tokens: list  # ids, what stopped it included
    log_probabilities: list  # of each, as it was sampled
    text: str
    cut: bool  # whether it has reached the limit
    reward: float = 0.0


def read_prompts(mixture, records, samples):
    """The Prompts of samples of a Mixture, (n,) numbers. records: of each shard its lines of records.jsonl."""
    prompts = []
    for number in samples:
        index, local, sample = mixture.read(number)
        prompts.append(Prompt(mixture.shards[index], index, local, sample, as_asked(records[index][local])))
    return prompts


def roll_out(model, tokenizer, prompts, count, limit, temperature=0.0, draws=None):
    """
    [[Rollout] * count] of each prompt, of at most `limit` tokens: greedy, or sampled at a temperature by draws,
    (count, limit) uniform numbers of each prompt.
    """
    sampling = Sampling(temperature, stops=tokenizer.stops, vocab_size=tokenizer.vocab_size)
    groups = (next(read_groups(prompt.shard, [[Question("", prompt.number, prompt.sample.prompt().tolist())] * count]))
              for prompt in prompts)
    rollouts = [[] for _ in prompts]
    for number, answers in finished_groups(generate(model, groups, limit, sampling, draws=draws)):
        rollouts[number] = [Rollout(answer.tokens + [answer.stop] * (answer.stop is not None),
                                    answer.log_probabilities, tokenizer.decode(answer.tokens), answer.stop is None)
                            for answer in answers]
    return rollouts


def reward_all(prompts, rollouts, chosen, progress, seconds):
    """Reward all answers. UserError names the sample where a reward raises, takes too long, or is none in [0, 1]."""
    for prompt, group in zip(prompts, rollouts, strict=True):
        for rollout in group:
            try:
                with time_limit(seconds):
                    value = reward(chosen, prompt.record, rollout.text, progress)
            except Exception as error:  # whatever a reward of the user's own may raise
                raise UserError(f"--reward: {prompt}: {type(error).__name__}: {error}, for {rollout.text!r:.100}; mend "
                                "it, then the same command with --resume=true goes on") from None
            if value is None:
                raise UserError(f"--reward: {prompt}: none of these is for such a sample; add another, such as f1")
            if not 0 <= value <= 1:
                raise UserError(f"--reward: {prompt}: {value} for {rollout.text!r:.100}, which is not in [0, 1]; mend "
                                "it, then the same command with --resume=true goes on")
            rollout.reward = float(value)


# ----------------------------------------------------------------------------- advantages and batches

def find_advantages(rewards, normalise):
    """
    (P, G) rewards -> advantages, (P, G), and which groups have any, (P,) bool. normalise: "group" divides by each
    group's standard deviation (arXiv 2402.03300), "step" by that of all answers; 1e-4 as in TRL.
    """
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    alive = np.ptp(rewards, axis=1) > 0
    if normalise == "group":
        advantages = advantages / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    if normalise == "step":
        advantages = advantages / (rewards.std(ddof=1) + 1e-4)
    return advantages, alive


def balanced(rewards, prompts, medians):
    """(P, G) rewards with each dataset's running median at 0.5, where there are several; medians: {dataset: median}."""
    names = np.array([prompt.shard.folder.parent.name for prompt in prompts])
    for name in np.unique(names).tolist():
        median = float(np.median(rewards[names == name]))
        medians[name] = 0.9 * medians.get(name, median) + 0.1 * median
    return np.array([[balance(value, medians[name]) for value in group] for name, group in zip(names, rewards)])


def find_shares(lengths, limit, how):
    """(P, G) numbers of tokens -> what one token of each answer counts, (P, G); alike in all but "answer"."""
    P, G = lengths.shape
    return np.broadcast_to({"constant": 1 / (P * G * limit), "step": 1 / lengths.sum(),
                            "group": 1 / (P * lengths.sum(axis=1, keepdims=True)),
                            "answer": 1 / (P * G * lengths)}[how], lengths.shape)


@dataclass
class Answered(Sample):
    """A prompt with a sampled answer; `weight` is its advantage times its share."""
    share: float = 0.0  # what one of its tokens counts
    sampled: list = field(default_factory=list)  # log-probability of each of its tokens


@dataclass
class MicroBatch:
    """A data.Batch of answers, and of each of its M tokens what it counts and its log-probability so far."""
    batch: object
    shares: np.ndarray  # (M,) float32
    sampled: np.ndarray  # (M,) float32, when it was sampled
    anchor: np.ndarray  # (M,) float32, of the model that the run began with, once it is known


def make_micro_batches(mixture, prompts, rollouts, advantages, alive, shares, config):
    """This rank's MicroBatches of a step: groups whose rewards differ, with --kl all; answers that are learnt from."""
    pieces = []
    for place, (prompt, group) in enumerate(zip(prompts, rollouts, strict=True)):
        tokens, samples = prompt.sample.prompt(), []
        for number, rollout in enumerate(group) if alive[place] or config.kl else ():
            if not (rollout.cut and config.mask_truncated):
                share = float(shares[place, number])
                spans = np.array([[len(tokens), len(tokens) + len(rollout.tokens)]])
                samples.append(Answered(np.append(tokens, rollout.tokens), spans, prompt.sample.head, 0,
                                        float(advantages[place, number]) * share, share, rollout.log_probabilities))
        if samples:
            group = Group(samples, shared_prefix(samples), 0, mixture.image_tokens[prompt.index],
                          prompt.shard.read_image)
            pieces += group.cut(min(mixture.max_length, mixture.micro_batch_tokens))
    micro_batches = []
    for groups in mixture.divide(pieces):
        samples = [sample for group in groups for sample in group.samples]
        sampled = np.concatenate([sample.sampled for sample in samples]).astype(np.float32)
        shares_of = np.repeat([sample.share for sample in samples], [len(sample.sampled) for sample in samples])
        micro_batches.append(MicroBatch(make_batch(groups, mixture.multiple), shares_of.astype(np.float32), sampled,
                                        np.zeros(0, np.float32)))
    return micro_batches


# ----------------------------------------------------------------------------- the loss

def log_probabilities(model, batch, vocab_size, temperature):
    """(M,) of the tokens of a data.Batch, at the temperature that they were sampled at."""
    logits = model(batch)[:, :vocab_size]  # (M, V)
    logits = logits if temperature == 1 else logits / temperature  # each pass over them is slow
    return -F.cross_entropy(logits, batch.targets, reduction="none")


def policy_loss(model, micro, vocab_size, config):
    """
    The clipped surrogate (arXiv 1707.06347, eq. 7) of a MicroBatch of tensors, to be minimised, with the estimate of
    the divergence that is never negative (http://joschu.net/blog/kl-approx.html). Also, (3,): the loss, the number
    of clipped tokens, the sum of their divergences.
    """
    values = log_probabilities(model, micro.batch, vocab_size, config.temperature)  # (M,)
    ratio, weights = (values - micro.sampled).exp(), micro.batch.weights
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss, divergence = -torch.minimum(ratio * weights, bounded * weights).sum(), values.new_zeros(())
    if config.kl:
        d = micro.anchor - values
        divergences = d.exp() - d - 1  # (M,)
        loss, divergence = loss + config.kl * (micro.shares * divergences).sum(), divergences.sum()
    clipped = (bounded * weights < ratio * weights).sum()
    return loss, torch.stack([loss.detach(), clipped, divergence.detach()])
