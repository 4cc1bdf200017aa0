"""
Answering: the key-value cache, and the loop that gives each answer one token more.

Prompts come in groups. What the prompts of a group share, such as an image and "Question:", is run once, as
the prefix of a row of the cache; each prompt is a branch behind it, which sees the prefix and itself, as in
training (data.py). Tokens of many rows are run through the model end to end, so that none is padding; for
attention alone they are parted by row.

Letters: R rows, S slots of a row, T tokens that are run, K the most of them in a row, P pieces, V vocabulary.
"""

import itertools
import os
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from data import EOS, Record, View
from formats.frames import ScanSettings, pixels_of
from plumbing.kernels import add_sink
from plumbing.order import count_before
from plumbing.flags import UserError
from tasks.asked import open_image


class Cache:
    """Keys and values of R rows of S slots in every layer. place() comes before each pass of the model."""

    def __init__(self, config, rows, dtype, device):
        self.used = np.zeros(rows, np.int64)  # slots of each row that are in use, from the first on
        self.branch = torch.zeros(rows, 0, dtype=torch.long, device=device)  # of what a slot holds; 0: prefix
        self.position, self.window = self.branch, getattr(config, "sliding_window", 0)  # 0: all sees all before it
        self.layers = [[torch.zeros(rows, config.num_key_value_heads, 0, config.head_size, dtype=dtype,
                                    device=device) for _ in ("keys", "values")]
                       for _ in range(config.num_hidden_layers)]

    def place(self, row, branch, position):
        """
        Give the next T tokens slots in their rows, and note who will see whom: a token sees what stands
        before it in its row, if that is prefix or of its own branch. row, branch, position: (T,) int64.
        """
        device, lane = self.branch.device, count_before(row)  # (T,): the how-manieth of its row here
        slot = self.used[row] + lane
        np.add.at(self.used, row, 1)
        rows, K = np.unique(row), int(lane.max()) + 1
        if (more := -(-int(self.used.max()) // 64) * 64 - self.branch.shape[1]) > 0:
            self.branch, self.position = (F.pad(x, (0, more)) for x in (self.branch, self.position))  # layers: store()
        # All rows as they lie, or a copy of the few that these tokens are of
        few = 2 * len(rows) < len(self.used)
        self.rows = torch.from_numpy(rows).to(device) if few else slice(None)
        self.shape = (len(rows) if few else len(self.used), K)
        lane += K * (np.searchsorted(rows, row) if few else row)
        self.row, self.slot, self.lane, branch, position = (
            torch.from_numpy(array).to(device) for array in (row, slot, lane, branch, position))
        self.branch[self.row, self.slot], self.position[self.row, self.slot] = branch, position
        self.S = -(-int(self.used[rows].max()) // 8) * 8  # what lies behind is in nobody's sight
        own, last, at = torch.zeros(3, self.shape[0] * K, dtype=torch.long, device=device)
        own[self.lane], last[self.lane], at[self.lane] = branch, self.slot, position
        of_slot = self.branch[self.rows, None, :self.S]  # (R, 1, S)
        seen = (of_slot == 0) | (of_slot == own.view(self.shape)[:, :, None])  # (R, K, S)
        seen &= torch.arange(self.S, device=device) <= last.view(self.shape)[:, :, None]
        sights = [seen]
        if self.window:
            ahead = at.view(self.shape)[:, :, None] - self.position[self.rows, None, :self.S]
            sights.append(seen & (ahead < self.window))
        zero = torch.zeros(seen.shape, dtype=self.layers[0][0].dtype, device=device)  # added to the scores
        self.masks = [zero.masked_fill(~some, -torch.inf)[:, None] for some in sights]  # (R, 1, K, S)

    def attend(self, layer, q, k, v, sinks=None, near=False):
        """
        Attention of (T, nh, hs) queries to all in their sight, (T, nkv, hs) keys and values among it. sinks: as
        model.attend takes them; near: what is within the model's sliding window alone.
        """
        k, v = (self.store(layer, kind, new) for kind, new in enumerate((k, v)))  # (R, nkv, S, hs)
        lanes = q.new_zeros(self.shape[0] * self.shape[1], *q.shape[1:])
        lanes[self.lane] = q
        lanes = lanes.unflatten(0, self.shape).transpose(1, 2)  # (R, nh, K, hs)
        mask = self.masks[near]
        if sinks is not None:
            lanes, k, v, mask = add_sink(lanes, k, v, mask, sinks)
        y = F.scaled_dot_product_attention(lanes, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1],
                                           scale=q.shape[-1] ** -0.5)[..., :q.shape[-1]]
        return y.transpose(1, 2).flatten(0, 1)[self.lane]  # (T, nh, hs)

    def store(self, layer, kind, new):
        """Write (T, nkv, hs) keys (kind 0) or values (1) into their slots; all in sight come back, (R, nkv, S, hs)."""
        tensors = self.layers[layer]
        if (more := self.branch.shape[1] - tensors[kind].shape[2]) > 0:  # one by one: never all of them twice
            tensors[kind] = F.pad(tensors[kind], (0, 0, 0, more))
        tensors[kind][self.row, :, self.slot] = new.to(tensors[kind].dtype)
        return tensors[kind][self.rows, :, :self.S]


@dataclass
class Piece:
    """Tokens that are to be run: the next ones of a branch."""
    row: int
    branch: int
    position: int  # rotary, of the first
    tokens: list  # ids; image number k of the group as -1 - k
    images: list  # of the group, each (H, W, 3) uint8


def count_positions(model, tokens, images):
    """How many positions a list of tokens takes, where images have several."""
    return sum(1 if token >= 0 else model.vision.extent(*images[-1 - token].shape[:2]) for token in tokens)


def run_pieces(model, cache, pieces, wanted=True):
    """Run P Pieces into the cache. Returns the logits behind each, (P, V), where they are wanted."""
    columns, shown, image_at, last = [], [], [], []  # columns: (token, position, piece, row, branch)
    for number, piece in enumerate(pieces):
        position = piece.position
        for token in piece.tokens:
            count = 1
            if token < 0:
                shown.append(piece.images[-1 - token])
                count = model.vision.tokens(*shown[-1].shape[:2])
                image_at += range(len(columns), len(columns) + count)
            columns += [(max(token, 0), position + place, number, piece.row, piece.branch) for place in range(count)]
            position += count
        last.append(len(columns) - 1)
    tokens, positions, of_piece, row, branch = np.array(columns, np.int64).T.copy()
    cache.place(row, branch, positions)
    device = next(model.projector.parameters()).device
    tokens, positions, of_piece, image_at, last = (
        torch.as_tensor(numbers, dtype=torch.long, device=device)
        for numbers in (tokens, positions, of_piece, image_at, last if wanted else []))
    # What a piece's position says counts the images before it, so that each is placed as a group of its own
    positions = model.vision.place(positions, of_piece, 0 * of_piece, image_at, shown)
    images = model.encode_images([torch.from_numpy(image).to(device) for image in shown]) if shown else None
    return model.language(tokens, positions, None, last, images, image_at, cache)


@dataclass
class Answer:
    """An answer that is being generated."""
    group: int  # number of its group
    prompt: int  # number of its prompt in there
    prompts: int  # of the group
    next: Piece  # what is run for its next token
    tokens: list = field(default_factory=list)  # without what stops it
    log_probabilities: list = field(default_factory=list)  # of each token, what stops it included; if wanted
    done: bool = False
    stop: int | None = None  # the token that ended it; None: it was cut
    draws: np.ndarray | None = None  # a uniform number a token, by which it is chosen; None: torch's generator


def begin_group(model, cache, row, number, images, prompts, draws=None):
    """Where a group begins in a row of the cache: the Piece of its prefix, and its Answers."""
    cache.used[row] = 0
    prefix = os.path.commonprefix(prompts)[:min(map(len, prompts)) - 1]
    position = count_positions(model, prefix, images)
    answers = [Answer(number, place, len(prompts), Piece(row, place + 1, position, prompt[len(prefix):], images),
                      draws=None if draws is None else draws[number][place]) for place, prompt in enumerate(prompts)]
    return Piece(row, 0, 0, prefix, images), answers


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from logits, and which end an answer."""
    temperature: float = 0.0  # 0: the likeliest; else by torch's generator
    top_k: int = 0  # among the so many likeliest; 0: all
    top_p: float = 1.0  # among the fewest likeliest that have this much of the probability
    stops: tuple = (EOS,)
    vocab_size: int | None = None  # ids from here on are no tokens, and are never chosen

    def choose(self, logits, draws=None):
        """(n, V) logits -> (n, 1) token ids. draws: (n, 1) uniform numbers in place of torch's generator."""
        if not self.temperature:
            return logits.argmax(dim=-1, keepdim=True)
        if draws is None and not self.top_k and self.top_p == 1:
            draws = torch.rand(len(logits), 1)
        if draws is not None:  # of the whole distribution: where its running sum passes the number; no sorting
            below = F.softmax(logits / self.temperature, dim=-1).cumsum(-1)
            return torch.searchsorted(below, draws.to(below) * below[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
        scores, tokens = (logits / self.temperature).sort(dim=-1, descending=True)
        scores[:, self.top_k or scores.shape[1]:] = -torch.inf
        probabilities = F.softmax(scores, dim=-1)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[:, 1:][before[:, 1:] >= self.top_p] = 0
        return tokens.gather(1, torch.multinomial(probabilities, 1))


@torch.no_grad()
def extend(model, cache, answers, max_new_tokens, sampling=Sampling(), log_probabilities=True):
    """Give each of n Answers its next token, in one pass. Returns the logits that they were chosen from, (n, V)."""
    logits = run_pieces(model, cache, [answer.next for answer in answers])[:, :sampling.vocab_size]
    draws = None if answers[0].draws is None else torch.tensor([[a.draws[len(a.tokens)]] for a in answers])
    chosen = sampling.choose(logits, draws)
    if log_probabilities:
        scaled = logits / (sampling.temperature or 1)
        values = (scaled.gather(1, chosen) - scaled.logsumexp(-1, keepdim=True))[:, 0].tolist()
        for answer, value in zip(answers, values):
            answer.log_probabilities.append(value)
    for answer, token in zip(answers, chosen[:, 0].tolist()):
        piece = answer.next
        position = piece.position + count_positions(model, piece.tokens, piece.images)
        answer.next = Piece(piece.row, piece.branch, position, [token], [])
        answer.tokens += [token] * (token not in sampling.stops)
        answer.stop = token if token in sampling.stops else None
        answer.done = answer.stop is not None or len(answer.tokens) == max_new_tokens
    return logits


@torch.no_grad()
def generate(model, groups, max_new_tokens=32, sampling=Sampling(), rows=64, log_probabilities=True, draws=None):
    """
    Answer prompts. Yields, pass after pass, the Answers that got a token.

    groups: an iterable of (images, prompts): images (H, W, 3) uint8, and prompts as lists of token ids, <bos>
    first, in which image number k is -1 - k. `rows` groups are under way at a time; whenever a quarter of
    the rows is free, as many new groups are taken in. log_probabilities: whether those of the tokens are
    wanted, too; for a small model they take a tenth of the time. draws: of each group (prompts, max_new_tokens)
    uniform numbers, so that what is sampled does not depend on what else is under way.
    """
    groups = iter(groups)
    first = list(itertools.islice(groups, rows))
    waiting, weight = enumerate(itertools.chain(first, groups)), next(model.language.blocks.parameters())
    cache = Cache(model.language.config, len(first), weight.dtype, weight.device)
    live = []
    while True:
        free = sorted(set(range(len(first))) - {answer.next.row for answer in live})
        at_once = max(len(first) // 4, 1)
        new = list(itertools.islice(waiting, at_once)) if len(free) >= at_once else []
        begun = [begin_group(model, cache, row, number, images, prompts, draws)
                 for row, (number, (images, prompts)) in zip(free, new)]
        if prefixes := [prefix for prefix, _ in begun if prefix.tokens]:
            run_pieces(model, cache, prefixes, wanted=False)
        asked = [answer for _, answers in begun for answer in answers] or live
        if not asked:
            return
        extend(model, cache, asked, max_new_tokens, sampling, log_probabilities)
        yield asked
        live = [answer for answer in (live + asked if new else asked) if not answer.done]


def finished_groups(passes):
    """(number of a group, its Answers in order) as groups end, from what generate() yields."""
    done = defaultdict(dict)
    for answers in passes:
        for answer in answers:
            if answer.done:
                done[answer.group][answer.prompt] = answer
                if len(done[answer.group]) == answer.prompts:
                    yield answer.group, [ended for _, ended in sorted(done.pop(answer.group).items())]


def ask(model, tokenizer, question, image="", size=224, resize="squash", max_new_tokens=32, settings=ScanSettings(),
        **sampling):
    """
    The answer to one question, as text. image: path of an image or scan, "" for none; size, resize: how the
    training images were brought to size (plumbing.pixels.resize_image); settings: which slices of a scan are shown,
    and how; sampling: temperature, top_k, top_p. Raises UserError when it is no image.
    """
    pictures = open_image(image, settings) if image else ()
    try:
        images = [pixels_of(source, size, resize) for source, _ in pictures]
    except Exception as error:  # each decoder has its own ways to fail on a broken file
        raise UserError(f"{image}: not an image that can be read ({error})") from None
    parts = tuple(View(b"", role=label) for _, label in pictures)
    tokens, spans, _ = tokenizer.write(Record("", question, parts=parts))
    prompt = tokens[:spans[0][0]]
    choice = Sampling(stops=tokenizer.stops, vocab_size=tokenizer.vocab_size, **sampling)
    passes = generate(model, [(images, [prompt])], max_new_tokens, choice)
    ((_, (answer,)),) = finished_groups(passes)
    return tokenizer.decode(answer.tokens)
