"""
A prepared question put in other ways, how likely a model finds each option of a multiple choice, and the questions of
a table about a folder of images.

All options of a question stand behind one copy of its prompt, as samples that begin alike do in training (data.py):
a question costs one prompt and its options' own tokens, and the logits of those alone are computed.

Letters: Q questions, K options of one, M tokens of options in a micro-batch, V vocabulary.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Group, Record, View, make_batch, shared_prefix
from formats.frames import pixels_of
from generate import finished_groups, generate
from plumbing.devices import share_out, to_device
from plumbing.flags import UserError
from plumbing.shards import Sample
from tasks import reports
from tasks.asked import yes_no
from tasks.choices import answers_of, stem_of, ways_of
from tasks.splits import QUESTIONS_PER_ROW, Question, exchanged, task_of
from tasks.vqa import repeats

MICRO_BATCH_TOKENS = 8192  # of a pass of the model, unless one question has more


# ----------------------------------------------------------------------------- other words

def write_prompt(tokenizer, record, images):
    """
    The tokens of a line of records.jsonl up to its answer, as its template writes it now. images: the number of each
    of its images in the shard, in the order of the line.
    """
    parts = tuple(part if isinstance(part, str) else View(b"", part["image"], part["role"])
                  for part in record.get("parts", ()))
    image = b"" if images and not parts else None
    tokens, spans, _ = tokenizer.write(
        Record("", record["question"], image=image, context=record.get("context", ""), parts=parts))
    return [-1 - images[-1 - token] if token < 0 else token for token in tokens[:spans[-1][0]]]


def reword(shard, tokenizer, count):
    """The first `count` questions of a shard in the other ways that tasks.reports.ways_of knows, as Questions."""
    if task_of(shard) is not reports:
        return []
    questions = []
    for number, record in enumerate(shard.read_records()[:count]):
        prompt = shard.read_sample(number).prompt()
        images = (-1 - prompt[prompt < 0]).tolist()
        for row, (line, order) in reports.ways_of(record).items():
            questions.append(Question(row, number, write_prompt(tokenizer, line, [images[place] for place in order])))
    return questions


# ----------------------------------------------------------------------------- likelihoods

@dataclass
class Options:
    """A question with its options, in one way to ask it."""
    number: int  # of its sample in the shard
    row: str  # of the table
    way: str  # "as asked", or as tasks.choices.ways_of names it
    order: list  # which of the record's options stands where
    prompt: list  # token ids, up to the options' own words; image number n of the shard as -1 - n
    answers: list  # of K answers their token ids
    letter: int  # tokens with which each begins, to its letter; 0 where the question lists none


def list_options(shard, tokenizer, count, shown):
    """Yield the Options of a shard's first `count` questions; shown: what tasks.splits.show_images gives."""
    for number, record in enumerate(shard.read_records()[:count]):
        prompt = shard.read_sample(number).prompt()
        for row, instead in shown.items():
            asked = exchanged(prompt, instead)
            images = (-1 - asked[asked < 0]).tolist()
            ways = {"as asked": (record, list(range(len(record["choices"]))))}
            for way, (line, order) in (ways | (ways_of(record) if row == "model" else {})).items():
                answers = [tokenizer.encode(answer) for answer in answers_of(line)]
                tokens = asked.tolist() if way == "as asked" else write_prompt(tokenizer, line, images)
                yield Options(number, row, way, order, [*tokens, *tokenizer.lead], answers,
                              count_letter(answers) * stem_of(record)[1])


def count_letter(answers):
    """How many tokens lettered answers have until all of them differ: of "A." with LLaMA's tokenizer 1."""
    longest = range(1, min(map(len, answers)) + 1)
    return next((count for count in longest if len({tuple(some[:count]) for some in answers}) == len(answers)), 0)


def group_options(shard, options, image_tokens):
    """The options as a data.Group behind their shared prompt, and where each of its K samples stands in the Options."""
    begin = len(options.prompt)
    samples = [Sample(np.array(options.prompt + answer), np.array([[begin, begin + len(answer)]]), 0)
               for answer in options.answers]
    # In an order of their own, so that options listed in another order are the same numbers to the last bit
    places = sorted(range(len(samples)), key=lambda place: options.answers[place])
    samples = [samples[place] for place in places]
    return Group(samples, shared_prefix(samples), 0, image_tokens, shard.read_image), places


@torch.no_grad()
def rate(model, groups, vocab_size):
    """
    Log-probabilities, (M,) float32, of all supervised tokens of data.Groups, in one pass of the model. Raises UserError
    where they are no numbers.
    """
    device = next(model.projector.parameters()).device
    batch = to_device(make_batch(groups, 128 if device.type == "cuda" else 1), device)  # as train_vlm.py pads it
    logits = model(batch)[:, :vocab_size]  # (M, V)
    values = -F.cross_entropy(logits, batch.targets, reduction="none").cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError("the model finds options likely by no number; its weights are damaged, or float16 too narrow "
                        "for them: try --dtype=bfloat16 or float32")
    return values


def likelihoods_of(options, places, values):
    """
    The entry of "likelihoods" in a line of answers: of each option, in the record's order, the log-probability in nats
    of its letter and of its whole answer, and how many "tokens" that has. Where the question lists no letters,
    "letter" is "whole". Also the "order" in which the options were shown, where that is another.
    """
    letter, whole = [0.0] * len(places), [0.0] * len(places)
    lengths = [len(options.answers[place]) for place in places]
    for place, some in zip(places, np.split(values, np.cumsum(lengths)[:-1]), strict=True):
        whole[options.order[place]] = round(float(some.sum(dtype=np.float64)), 5)
        short = some[:options.letter] if options.letter else some
        letter[options.order[place]] = round(float(short.sum(dtype=np.float64)), 5)
    tokens = [len(options.answers[options.order.index(place)]) for place in range(len(places))]
    turned = {"order": options.order} if options.order != sorted(options.order) else {}
    return {"letter": letter, "whole": whole, "tokens": tokens, **turned}


def rate_options(model, tokenizer, shard, count, shown):
    """
    How likely a model finds the options of a shard's first `count` questions: {row: Q dicts {way: likelihoods}}, one a
    question. Of several processes each rates a part, and all get all.
    """
    sizes = shard.image_index
    image_tokens = np.asarray(model.vision.tokens(sizes["height"].astype(int), sizes["width"].astype(int))).reshape(-1)
    asked = list(list_options(shard, tokenizer, count, shown))

    def rate_part(part, rank, ranks):
        entries, waiting, tokens = [], [], 0
        with tqdm(total=len(part), unit="prompt", leave=False, desc=f"{shard.folder.parent.name}, options",
                  disable=rank > 0) as progress:
            for number, options in enumerate(part, 1):
                waiting.append((options, *group_options(shard, options, image_tokens)))
                tokens += waiting[-1][1].first + sum(waiting[-1][1].rest)
                if tokens >= MICRO_BATCH_TOKENS or number == len(part):
                    values = rate(model, [group for _, group, _ in waiting], tokenizer.vocab_size)
                    ends = np.cumsum([sum(map(len, options.answers)) for options, _, _ in waiting])
                    entries += [likelihoods_of(options, places, some) for (options, _, places), some in
                                zip(waiting, np.split(values, ends[:-1]), strict=True)]
                    progress.update(len(waiting))
                    waiting, tokens = [], 0
        return entries

    rows = {row: [defaultdict(dict) for _ in range(count)] for row in shown}
    for options, entry in zip(asked, share_out(asked, rate_part), strict=True):
        rows[options.row][options.number][options.way] = entry
    return {row: [dict(entries) for entries in some] for row, some in rows.items()}


# ----------------------------------------------------------------------------- a table of questions

def prompt_of(tokenizer, question, labels):
    """The tokens of a question about images with these labels, such as "slice 3 of 40", image number k as -1 - k."""
    parts = tuple(View(b"", role=label) for label in labels)
    tokens, spans, _ = tokenizer.write(Record("", question, parts=parts))
    return tokens[:spans[0][0]]


def count_tokens(model, prompt, images):
    """How many tokens a prompt has, those of its images, (H, W, 3) each, among them."""
    return sum(1 if token >= 0 else model.vision.tokens(*images[-1 - token].shape[:2]) for token in prompt)


def groups_of(rows, done):
    """The numbers of rows that can be asked and are not `done`, in lists of those about the same pictures."""
    alike = defaultdict(list)
    for number, row in enumerate(rows):
        if not row.error and number not in done:
            alike[row.pictures].append(number)
    return [numbers[begin:begin + QUESTIONS_PER_ROW] for numbers in alike.values()
            for begin in range(0, len(numbers), QUESTIONS_PER_ROW)]


def answer_rows(model, tokenizer, rows, record, sampling, config, kept):
    """
    Answer tasks.asked.Rows, those about the same pictures behind one copy of what they begin with; `answer`, `facts`
    and, where there is no answer, `error` of each are set.

    record: what the checkpoint was sealed with; sampling: a Sampling; config: eval_vqa.py's; kept: a tasks.asked.Kept,
    which is told of each row. A probability is that of exactly this answer, the product of those of its tokens and of
    what ends it.
    """
    asked, image, room = [], record["image"], record["flags"]["max_length"]

    def fail(number, why):
        rows[number].error = why
        kept.note(number)

    def open_groups():
        for numbers in groups_of(rows, kept.done):
            pictures = rows[numbers[0]].pictures
            try:
                images = [pixels_of(source, image["size"], image["resize"]) for source, _ in pictures]
            except Exception as error:  # each decoder has its own ways to fail on a broken file
                for number in numbers:
                    fail(number, f"{rows[number].image}: not an image that can be read ({error})")
                continue
            prompts = {}
            for number in numbers:
                prompt = prompt_of(tokenizer, rows[number].question, [label for _, label in pictures])
                if (length := count_tokens(model, prompt, images)) <= room:
                    prompts[number] = prompt
                    continue
                mend = "show fewer slices with --slices=" if len(pictures) > 1 else "ask a shorter question"
                fail(number, f"{length:,} tokens; this model was trained on samples of {room:,}, so {mend}")
            if prompts:
                asked.append(prompts.keys())
                yield images, list(prompts.values())

    passes = generate(model, open_groups(), config.max_new_tokens or 512, sampling, config.batch_size)
    with tqdm(total=len(rows) - len(kept.done), unit="question", leave=False, disable=len(rows) == 1) as progress:
        for group, answers in finished_groups(passes):
            for number, answer in zip(asked[group], answers, strict=True):
                row, text = rows[number], tokenizer.decode(answer.tokens)
                row.answer, row.facts = text, row.facts | {
                    "probability": float(f"{math.exp(sum(answer.log_probabilities)):.4g}"),
                    "cut": yes_no(answer.stop is None), "repeated": yes_no(repeats(text)),
                    "empty": yes_no(not text.strip())}
                kept.note(number)
            progress.update(len(answers))
