"""
What answers on the page: the model, loaded once for all visitors, and a conversation about one image or several, whose
keys and values are kept, with where the model looked for each word.

Letters: N tokens of all images of a conversation, end to end.
"""

import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data import Record, View
from extras.share.demo_line import Line, Shelf
from generate import Answer, Cache, Piece, Sampling, count_positions, extend, run_pieces
from plumbing.devices import autocast_to, pick_device
from plumbing.flags import UserError
from plumbing.pixels import resize_image
from run import open_trained_run
from tasks.seen import open_trained
from tasks.splits import QUESTIONS_PER_ROW, open_splits
from tasks.wording import Familiar
from weights import load_classifier, load_vlm
from zoo.harmony import HarmonyTokenizer

EXAMPLES = 12  # records to choose from, about
MAX_NEW_TOKENS = 32  # an answer is cut here, as generate()'s is
MAX_BOX_TOKENS = 1024  # and one that has begun to write boxes here
MAX_QUESTION = 512  # tokens of a question; some 2,000 letters
MAX_CACHED = 4096  # tokens of questions and answers beside the images, then they start another cache
SHELF = 4 << 30  # bytes of the caches of all conversations; beyond, those unused for longest are made anew when asked
RUNNERS_UP = 3  # tokens listed beside the one that was taken


# ----------------------------------------------------------------------------- the conversation

class WatchedCache(Cache):
    """A Cache of one row that notes where the last of the tokens that are run through it looks."""

    def place(self, row, branch, position):
        super().place(row, branch, position)
        self.weights = []  # of each layer, (S,)

    def attend(self, layer, q, k, v, sinks=None, near=False):
        y = super().attend(layer, q, k, v, sinks, near)
        last, heads = q[-1, :, None].float(), q.shape[1] // k.shape[1]  # (nh, 1, hs)
        keys = self.layers[layer][0][0, :, :self.S].float().repeat_interleave(heads, dim=0)  # (nh, S, hs)
        # No matrix product, which autocast would do in bfloat16
        scores = (last * keys).sum(-1) / q.shape[-1] ** 0.5 + self.masks[near][0, 0, -1].float()  # (nh, S)
        nothing = scores.new_full((len(scores), 1), -torch.inf) if sinks is None else sinks.float()[:, None]
        self.weights.append(torch.cat([scores, nothing], dim=-1).softmax(-1)[:, :-1].mean(0))
        return y


@dataclass
class Token:
    """A token of an answer."""
    id: int
    probability: float
    runners_up: list  # (id, probability) of the next likely ones
    looked: np.ndarray  # (N,) attention to each token of the images, mean over layers and heads


@dataclass
class Word:
    """The tokens of an answer from one start of a word to the next."""
    text: str
    probability: float  # of all its tokens
    looked: np.ndarray  # (N,) mean over its tokens


class Conversation:
    """
    Questions about images, each (H, W, 3) uint8, which are run through the model once for all questions. roles: what
    is written before each image, such as "prior", or "".
    """

    def __init__(self, model, tokenizer, images, dtype, roles=None):
        self.model, self.tokenizer, self.images = model, tokenizer, images
        self.roles = roles or [""] * len(images)
        self.sizes = [model.vision.tokens(*image.shape[:2]) for image in images]  # tokens of each
        self.sampling = Sampling(stops=tokenizer.stops, vocab_size=tokenizer.vocab_size)
        self.autocast = autocast_to(next(model.projector.parameters()).device, dtype)
        self.forget()

    def forget(self):
        """Drop what is cached; the next question starts anew."""
        self.cache, self.asked, self.cached = None, QUESTIONS_PER_ROW, 0  # so many questions, and another cache starts

    def cached_bytes(self):
        return sum(tensor.nbytes for layer in self.cache.layers for tensor in layer) if self.cache else 0

    def start(self, prefix):
        """Run what every question sees: the prompt's tokens up to the last image."""
        weight = next(self.model.language.blocks.parameters())
        cache = WatchedCache(self.model.language.config, 1, weight.dtype, weight.device)
        with self.autocast:
            run_pieces(self.model, cache, [Piece(0, 0, 0, prefix, self.images)], wanted=False)
        self.cache, self.asked, self.cached = cache, 0, 0

    def slots(self, prefix):
        """(N,) where in the cache the tokens of the images stand."""
        lengths = [1 if token >= 0 else self.sizes[-1 - token] for token in prefix]
        return np.flatnonzero(np.repeat(np.array(prefix) < 0, lengths))

    def count_tokens(self, question):
        """Tokens of a question, with what the template writes around it."""
        return len(write_prompt(self.tokenizer, question, self.roles)[1])

    @torch.no_grad()
    def ask(self, question):
        """
        Yield the Tokens of the answer, what stops it the last unless it is cut: generate()'s greedy ones.
        It may be left at any time: what it put into the cache is in no other question's sight.
        """
        prefix, own = write_prompt(self.tokenizer, question, self.roles)
        if self.asked == QUESTIONS_PER_ROW or self.cached + len(own) + MAX_BOX_TOKENS > MAX_CACHED:
            self.start(prefix)
        self.asked, self.cached = self.asked + 1, self.cached + len(own)
        slots, position = self.slots(prefix), count_positions(self.model, prefix, self.images)
        answer = Answer(0, 0, 1, Piece(0, self.asked, position, own, []))
        while not answer.done:
            with self.autocast:
                [logits] = extend(self.model, self.cache, [answer], MAX_BOX_TOKENS, self.sampling)  # (V,)
            self.cached += 1
            [token], probabilities = answer.next.tokens, logits.softmax(0)
            best, ids = probabilities.topk(RUNNERS_UP + 1)
            others = [pair for pair in zip(ids.tolist(), best.tolist()) if pair[0] != token]
            looked = torch.stack(self.cache.weights).mean(0).cpu().numpy()[slots]
            yield Token(token, float(probabilities[token]), others[:RUNNERS_UP], looked)
            if len(answer.tokens) == MAX_NEW_TOKENS and not writes_boxes(self.tokenizer.decode(answer.tokens)):
                break

    def parted(self, looked):
        """The attention (N,) to all images as a list, that to each."""
        return np.split(looked, np.cumsum(self.sizes)[:-1])


def write_prompt(tokenizer, question, roles=("",)):
    """The tokens of a question about images with these roles: those up to the last image, which is one, and others."""
    record = Record("", question, parts=tuple(View(b"", role=role) for role in roles))
    tokens, [(end, _)], _ = tokenizer.write(record)
    begin = tokens.index(-len(roles)) + 1
    return tokens[:begin], tokens[begin:end]


def words_of(tokens, tokenizer):
    """The Words of an answer's Tokens, not of what a gpt-oss thinks; their texts, joined by spaces, are the answer."""
    groups = []
    if isinstance(tokenizer, HarmonyTokenizer):
        tokens = tokens[tokenizer.final([token.id for token in tokens])]
    for token in tokens:
        if token.id in tokenizer.stops:
            break
        known = token.id < tokenizer.vocab_size
        if not groups or known and (tokenizer.piece(token.id) or "").startswith(tokenizer.word_start):
            groups.append([])
        groups[-1].append(token)
    return [Word(tokenizer.decode([token.id for token in group]),
                 float(np.prod([token.probability for token in group])),
                 np.mean([token.looked for token in group], axis=0)) for group in groups]


def text_of(tokens, tokenizer):
    return tokenizer.decode([token.id for token in tokens if token.id not in tokenizer.stops])


def writes_boxes(text):
    """Whether an answer, perhaps not yet whole, is in one of the forms of boxes."""
    return "<box>" in text or text.lstrip().startswith(("[", "```"))


def within(tokens, seconds):
    """What an answer yields, until it ends or so many seconds are over."""
    end = time.monotonic() + seconds
    for token in tokens:
        yield token
        if time.monotonic() > end:
            return


# ----------------------------------------------------------------------------- what is loaded once

def find_examples(shards):
    """
    ([(name, images, roles, {question: recorded answer})], the questions that are asked most often) of records without
    context, texts between images or further turns.
    """
    examples, frequent = [], Counter()
    for shard in shards:
        asked = defaultdict(dict)  # (numbers of images, roles) -> {question: recorded answer}
        _, images = shard.image_pairs()
        shown_by = np.split(images, np.cumsum(shard.samples["images"], dtype=np.int64)[:-1]) if len(shard) else ()
        for words, shown in zip(shard.read_records(), shown_by):
            parts = words.get("parts", [{"role": ""}])
            if "context" in words or "turns" in words or any(isinstance(part, str) for part in parts):
                continue
            if len(shown):
                roles = tuple(part["role"] for part in parts)
                asked[tuple(shown.tolist()), roles][words["question"]] = words["answer"]
                frequent[words["question"]] += 1
        places = np.linspace(0, len(asked) - 1, max(EXAMPLES // len(shards), 1)) if asked else ()
        for shown, roles in dict.fromkeys(sorted(asked)[round(place)] for place in places):
            numbers = " and ".join(str(number + 1) for number in shown)
            name = f"{shard.folder.parent.name}/{shard.folder.name}, image{'s' * (len(shown) > 1)} {numbers}"
            examples.append((name, list(map(shard.read_image, shown)), list(roles), asked[shown, roles]))
    return examples, [question for question, _ in frequent.most_common(4)]


def load(config):
    """What all sessions share and none changes. There may be no examples and no classifier."""
    folder, checkpoint, record, tokenizer = open_trained_run(config.run, config.checkpoint)
    device, dtype = pick_device(config.device, "auto")
    model, settings = load_vlm(checkpoint, dtype, device).eval(), record["image"]
    print(f"demo.py: {checkpoint} answers, on {device}", flush=True)
    try:
        shards = open_splits("", "test", config.shards_dir, tokenizer, settings)
    except UserError:
        shards = []  # images of one's own alone
    examples, frequent = find_examples(shards)
    trained = open_trained(record, config.shards_dir)
    known = trained if isinstance(trained, dict) else {}
    classifiers = Path("out/cls").glob("*/*/seed_*/model")
    newest = max(classifiers, key=lambda path: path.stat().st_mtime, default=Path()).parent
    where = Path(config.classifier) if config.classifier else newest
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, device=device, dtype=dtype, examples=examples,
        size=settings["size"], resize=settings["resize"], window=settings.get("window", "auto"),
        facts=f"{folder} · {checkpoint.name.replace('_', ' ')} · {device}",
        questions=dict.fromkeys(frequent),  # for other images
        # Images of a question in training, at most; None: not known
        most=max((int(shard.samples["images"].max(initial=0)) for shard, _ in known.values()), default=None),
        familiar=Familiar(trained), line=Line(), shelf=Shelf(SHELF),
        classifier=(*load_classifier(where, device), where) if where.name else None)


def classify(loaded, image):
    """{class: probability} of an RGB image by train_cls.py's model."""
    model, facts, _ = loaded.classifier
    pixels = np.array(resize_image(image, facts["image"]["size"], facts["image"]["resize"]))
    autocast = autocast_to(loaded.device, loaded.dtype)
    [shares] = model.predict(pixels[None], 1, autocast)
    return dict(zip(facts["classes"], shares.tolist()))
