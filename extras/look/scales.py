"""
Score the same answers on every scale that is in use for medical VQA.

    python extras/look/scales.py out/x                                 a run that eval_vqa.py has evaluated
    python extras/look/scales.py answers.jsonl --data=path_vqa         a file of id and prediction suffices
    python extras/look/scales.py out/x out/y                           two runs compared, or two files

"BLEU-1" is not one number: the same answers score 31 or 69 on PathVQA, as one published script or
another counts. So each scale stands here by the name of who uses it, with a 95% bootstrap interval
over images, with what a perfect system scores (the first reference of every question, given as the
answer), and with the published results that were computed on it.

Input: one JSON object a line, as eval_vqa.py writes them: id, prediction, answer; optional dataset,
image, group, question and references, a list of all that counts as right. A folder stands for the newest
evaluation of each dataset in it. A group is a patient: where all lines have one, patients are resampled.
A mean over questions takes each question's best score over its references. A corpus scale adds up
counts, and takes those of the reference with the best sentence BLEU-1, the first of equals. (NLTK and
sacrebleu, given several references, clip each word by all of them together, which is more lenient.)

Left out: what a language model judges; what needs a fixed list of answers; the search of MedEvalKit
for an answer in a long text; the 120 contractions of the VQA normaliser ("dont" for "don't").
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import functools
import json
import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from plumbing.flags import Count, UserError, parse_command_line, run
from plumbing.shards import Shard
from prepare.questions import references
from tasks.evaluations import choose_evaluations, read_predictions
from tasks.published import published_for
from tasks.stats import bootstrap
from tasks.vqa import MANY_LACKING, as_asked, bleu1, exact_match, is_closed, open_recall, token_f1


@dataclass(frozen=True)
class Config:
    data: str = ""  # prepared dataset to take answers from; none: they are in the file
    split: str = "test"  # its split
    shards_dir: str = "shards"  # where prepare/all.py put it
    alternatives: bool = False  # "#" parts alternatives, brackets may go; always so for vqa_med
    resamples: Count = 1000  # of the bootstrap
    show: int = 10  # questions to print of those that only one of two files has right
    seed: int = 0  # of the bootstrap


# ----------------------------------------------------------------------------- words

STOP_WORDS = frozenset("""
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her
    hers herself it its itself they them their theirs themselves what which who whom this that these
    those am is are was were be been being have has had having do does did doing a an the and but if or
    because as until while of at by for with about against between into through during before after
    above below to from up down in out on off over under again further then once here there when where
    why how all any both each few more most other some such no nor not only own same so than too very s
    t can will just don should now d ll m o re ve y ain aren couldn didn doesn hadn hasn haven isn ma
    mightn mustn needn shan shouldn wasn weren won wouldn""".split())  # NLTK's without an apostrophe
DIGITS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}


def words(text):
    return text.lower().split()


@functools.cache
def vqa_words(text):
    """
    The normaliser of the VQA challenge, as LLaVA-Med, MultiMedEval and ImageCLEF copied it.

    A sign is deleted from the whole text where one of its kind is beside a space, else it becomes a
    space; points go unless a digit follows; number words become digits; articles go.
    """
    cleaned = text
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        beside = f"{sign} " in text or f" {sign}" in text or re.search(r"\d,\d", text)
        cleaned = cleaned.replace(sign, "" if beside else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=32)  # they pass re.UNICODE, 32, as the count
    plain = [DIGITS.get(word, word) for word in cleaned.lower().split()]
    return [word for word in plain if word not in ("a", "an", "the")]


@functools.cache
def stemmer():
    try:
        from nltk.stem.snowball import SnowballStemmer
    except ImportError:
        raise UserError("no nltk here; run `pip install -r extras/requirements.txt`") from None
    return functools.cache(SnowballStemmer("english").stem)


@functools.cache
def imageclef_words(text):
    """
    ImageCLEF's evaluators: no ASCII punctuation, NLTK's word tokenizer, no stop words, stems.

    Without punctuation the tokenizer splits at spaces, curly quotes, long dashes and in six words.
    "no" is a stop word, and "x-ray" is one word.
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    text = re.sub(r"([«»“”‘’„\u2012-\u2015])", r" \1 ", text)
    text = re.sub(r"\b(can(?=not\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)|wan(?=na\b))",
                  r"\1 ", text)
    return [stemmer()(word) for word in text.split() if word not in STOP_WORDS]


@functools.cache
def sacrebleu_words(text):
    """sacrebleu's default tokenizer 13a: each sign is a word, but not in 1,000.5 nor most ' and -."""
    text = text.rstrip()
    for old, new in (("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"),
                     ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(old, new)
    text = re.sub(r"""([^\w\s'.,-]|_)""", lambda sign: f" {sign[1]} " if sign[1].isascii() else sign[1],
                  f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])-", r"\1 - ", text).split()


def medevalkit_words(text):
    """MedEvalKit's `tokenize`: a point is a word, and two blanks hold an empty word."""
    return text.strip().lower().replace(".", " .").split(" ")


# ----------------------------------------------------------------------------- BLEU

def ngram_counts(predicted, wanted, orders=4):
    """Clipped matches and n-grams of the prediction for n = 1..orders, then the lengths of both."""
    def ngrams(text, n):
        return Counter(zip(*(text[k:] for k in range(n))))

    matches = [sum((ngrams(predicted, n) & ngrams(wanted, n)).values()) for n in range(1, orders + 1)]
    totals = [max(0, len(predicted) - n) for n in range(orders)]
    return *matches, *totals, len(predicted), len(wanted)


def brevity_penalty(predicted, wanted):
    return min(1.0, math.exp(1 - wanted / predicted)) if predicted else 0.0


def nltk_bleu(predicted, wanted, orders=4, skip=False):
    """
    NLTK's sentence_bleu without smoothing, the same weight 1 / orders for each order.

    skip: an order without a match is left out, as NLTK 3.2.2 did, so that "right kidney" scores
    0.5 ** 0.25 against "left kidney". Later ones count it as 2e-308, and the score is 0 to 70 digits.
    """
    *counts, here, there = ngram_counts(predicted, wanted, orders)
    matches, totals = counts[:orders], counts[orders:]
    if not matches[0] or not (skip or all(matches)):
        return 0.0
    logs = sum(math.log(hits / total) for hits, total in zip(matches, totals) if hits)
    return brevity_penalty(here, there) * math.exp(logs / orders)


def sacrebleu(counts, effective=False):
    """
    sacrebleu's score in 0..1 from counts, of one sentence or added up over a corpus.

    An order that can match but does not counts as 1/2, then 1/4, ... of a match. One that the
    prediction is too short for makes the score 0, or is left out with `effective` order, which is
    sacrebleu's own setting for sentences.
    """
    orders = len(counts) // 2 - 1
    matches, totals = counts[:orders], counts[orders:2 * orders]
    possible = [n for n in range(orders) if totals[n]]
    if not any(matches) or len(possible) < orders and not effective:
        return 0.0
    logs, half = 0.0, 1.0
    for n in possible:
        half /= 1 if matches[n] else 2
        logs += math.log((matches[n] or half) / totals[n])
    return brevity_penalty(*counts[-2:]) * math.exp(logs / len(possible))


def unigrams(split):
    """BLEU-1 of texts that a function splits into words."""
    return lambda prediction, reference: nltk_bleu(split(prediction), split(reference), 1)


def auto_reweigh(prediction, reference):
    """A prediction of fewer than four words has no more orders than words."""
    predicted = words(prediction)
    return nltk_bleu(predicted, words(reference), min(4, len(predicted)))


def imageclef_bleu(prediction, reference, skip=False):
    predicted, wanted = imageclef_words(prediction), imageclef_words(reference)
    return nltk_bleu(predicted, wanted, 4, skip) if predicted or wanted else 1.0


def character_bleu(prediction, reference):
    """
    van Sonsbeek et al. 2023, predict.py: sentence_bleu(reference, prediction) of two strings.

    NLTK takes each character for a word, and each of the reference's for a reference of its own:
    a character matches once, wherever it stands, and the brevity penalty is always 1.
    """
    return len(set(prediction) & set(reference)) / len(prediction) if prediction else 0.0


def sacrebleu_counts(prediction, reference, orders=4, lower=False):
    if lower:
        prediction, reference = prediction.lower(), reference.lower()
    return ngram_counts(sacrebleu_words(prediction), sacrebleu_words(reference), orders)


def corpus_counts(prediction, reference):
    """Matches, words (an empty prediction has one, as in NLTK's corpus_bleu), lengths of both."""
    matches, _, here, there = ngram_counts(words(prediction), words(reference), 1)
    return matches, max(1, here), here, there


# ----------------------------------------------------------------------------- right or wrong

def medevalkit_closed(prediction, reference):
    """Right where one of "yes" and "no" occurs, be it in "normal", and it is the right one."""
    said = re.sub(r"[\n.]", "", prediction.lower())
    return float(("yes" in said) != ("no" in said) and reference.lower().strip() in said)


def llava_med_recall(prediction, reference):
    """As its calculate_f1score: a word that is found counts as often as the prediction has it."""
    have, want = Counter(vqa_words(prediction)), Counter(vqa_words(reference))
    hits = sum(count for word, count in have.items() if word in want)
    return hits / max(1, hits + sum(count for word, count in want.items() if word not in have))


def llava_med_closed(prediction, reference, early=False):
    """
    Right where yes or no and then the reference occur somewhere, "no" also in "normal".

    early: before December 2023 a wrong yes or no was dropped from the mean, not counted as wrong.
    """
    said, wanted = (" ".join(vqa_words(text)) for text in (prediction, reference))
    right = ("yes" in said or "no" in said) and wanted in said
    return math.nan if early and not right and ("yes" in said or "no" in said) else float(right)


def vqa_set(text):
    """MultiMedEval's words, each once."""
    return " ".join(set(vqa_words(text)))


def multimedeval_closed(prediction, reference):
    """Right where the word is in the prediction, whatever else is; "not" will do for "no"."""
    said, wanted = vqa_words(prediction), vqa_words(reference)
    return float(any(word in said for word in wanted) or "no" in wanted and "not" in said)


# ----------------------------------------------------------------------------- the scales

class Scale(NamedTuple):
    name: str
    used_by: str
    of: Callable  # (prediction, reference) -> score in 0..1, or the counts of a corpus scale
    total: Callable = None  # corpus scale: counts, added up -> score in 0..1
    only: str = ""  # "open" or "closed" questions; none: all. Closed: the answer is yes or no


SCALES = [
    Scale("BLEU-1", "PathVQA's authors, eval_vqa.py", bleu1),
    Scale("BLEU-1, no brevity penalty", "", lambda p, r: open_recall(r, p)),
    Scale("BLEU-1, corpus", "NLTK corpus_bleu", corpus_counts,
          lambda counts: counts[0] / counts[1] * brevity_penalty(*counts[2:])),
    Scale("BLEU-1, corpus, no brevity penalty", "", corpus_counts, lambda counts: counts[0] / counts[1]),
    Scale("sacrebleu order 1, lower-cased", "sacrebleu, mean of sentences",
          lambda p, r: sacrebleu(sacrebleu_counts(p, r, 1, lower=True), effective=True)),
    Scale("sacrebleu order 1, corpus", "sacrebleu, lower-cased",
          functools.partial(sacrebleu_counts, orders=1, lower=True), sacrebleu),
    Scale("sacrebleu order 4", "sacrebleu, effective order, mean",
          lambda p, r: sacrebleu(sacrebleu_counts(p, r), effective=True)),
    Scale("sacrebleu order 4, corpus", "sacrebleu by default", sacrebleu_counts, sacrebleu),
    Scale("NLTK BLEU", "NLTK sentence_bleu by default", lambda p, r: nltk_bleu(words(p), words(r))),
    Scale("NLTK BLEU, auto_reweigh", "NLTK sentence_bleu", auto_reweigh),
    Scale("ImageCLEF BLEU, NLTK 3.2.2", "ImageCLEF 2021", functools.partial(imageclef_bleu, skip=True)),
    Scale("ImageCLEF BLEU, NLTK 3.4 and later", "ImageCLEF 2020", imageclef_bleu),
    Scale("BLEU-1 over characters", "prefix tuning (van Sonsbeek)", character_bleu),
    Scale("MultiMedEval BLEU-1", "MultiMedEval", unigrams(vqa_words)),
    Scale("LLaVA-Med BLEU-1, open", "LLaVA-Med 1.0", unigrams(vqa_words), only="open"),
    Scale("MedEvalKit BLEU-1, open", "MedEvalKit", unigrams(medevalkit_words), only="open"),
    Scale("exact match", "prefix tuning, eval_vqa.py", exact_match),
    Scale("exact match, open", "prefix tuning, MedEvalKit", exact_match, only="open"),
    Scale("ImageCLEF strict accuracy", "ImageCLEF 2020 and 2021",
          lambda p, r: float(vqa_words(p) == vqa_words(r))),
    Scale("token F1", "eval_vqa.py", token_f1),
    Scale("MultiMedEval F1", "MultiMedEval, of word sets",
          lambda p, r: token_f1(vqa_set(p), vqa_set(r))),
    Scale("closed accuracy", "prefix tuning, eval_vqa.py", exact_match, only="closed"),
    Scale("LLaVA-Med closed", "LLaVA-Med 1.0", llava_med_closed, only="closed"),
    Scale("LLaVA-Med closed, early", "LLaVA-Med until December 2023",
          functools.partial(llava_med_closed, early=True), only="closed"),
    Scale("MedEvalKit closed", "MedEvalKit, VQA-RAD and PathVQA", medevalkit_closed, only="closed"),
    Scale("MultiMedEval closed", "MultiMedEval", multimedeval_closed, only="closed"),
    Scale("open recall", "eval_vqa.py", open_recall, only="open"),
    Scale("LLaVA-Med open recall", "LLaVA-Med 1.0", llava_med_recall, only="open"),
    Scale("MultiMedEval open", "MultiMedEval, 3/4 recalled",
          lambda p, r: float(open_recall(vqa_set(p), vqa_set(r)) >= 0.75), only="open")]

PUBLISHED = {  # dataset -> (scale, none: unknown or none of these; whose; score); * second-hand
    dataset: [(one.scale, one.system if one.scale else f"{one.system}, {one.metric} ({one.protocol})",
               one.value + "*" * one.second_hand) for one in published_for(dataset)]
    for dataset in ("path_vqa", "slake", "vqa_rad", "vqa_med_2019")}


# ----------------------------------------------------------------------------- input

def cut(text, width):
    """At most so many characters of a text, in one line."""
    return " ".join(str(text).split())[:width].encode(errors="replace").decode()


def refuse(names, where, what, mend):
    """Raise UserError where there is any of what must not be: how many, what, the first three, what to do."""
    if names:
        first = ", ".join(cut(name, 40) for name in names[:3]) + ", ..." * (len(names) > 3)
        raise UserError(f"{where}: {len(names):,} {what}: {first}; {mend}")


def find_problem(line, config):
    """What is wrong with a line of the input; none: nothing. An empty prediction is an answer."""
    if not isinstance(line, dict):
        return "are no JSON object"
    for name in ("id", "prediction") if config.data else ("id", "prediction", "answer"):
        if name not in line:
            return f"have no {name}"
    for name in ("id", "prediction", "answer", "dataset", "image", "group", "question"):
        if not isinstance(line.get(name, ""), (str, int) if name == "id" else str):
            return f"have another {name} than text"
    accepted = line.get("references") or []
    if not isinstance(accepted, list) or not all(
            isinstance(text, str) and text.strip() for text in [line.get("answer", "-"), *accepted]):
        return "have an empty answer or reference"
    return ""


def read_answers(path, config):
    """The lines of a file by (dataset, id), each with its references."""
    files = [folder / "predictions.jsonl" for folder, _ in choose_evaluations(path).values()] if \
        Path(path).is_dir() else [path]
    rows = [row for file in files for row in read_predictions(file).splitlines()]
    name = f"{config.data}/{config.split}" if config.data else ""
    lines, problems, repeated = {}, defaultdict(list), []
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
        except (ValueError, RecursionError):
            line = None
        if problem := find_problem(line, config):
            problems[problem].append(number)
            continue
        line |= {"id": str(line["id"]), "dataset": line.get("dataset") or name}
        key = line["dataset"], line["id"]
        repeated += [line["id"]] if key in lines else []
        lines[key] = line
    for problem, numbers in problems.items():
        refuse(numbers, path, f"lines {problem}, by number", "each needs id, prediction and answer, all "
               "text, or id and prediction where --data=path_vqa has the rest")
    refuse(repeated, path, "lines repeat an id", "keep one answer to each question")
    if not lines:
        raise UserError(f"{path}: no answers in it; name a predictions.jsonl")
    if config.data:
        lines = take_questions(lines, name, path, config)
    for line in lines.values():
        expand = config.alternatives or line["dataset"].startswith("vqa_med")
        line["references"] = line.get("references") or (
            list(references(line["answer"])) if expand else [line["answer"]])
    return lines


def take_questions(lines, name, path, config):
    """The lines with all but the prediction from the prepared dataset, whose ids must be the file's."""
    shard = Shard(Path(config.shards_dir) / name)
    shard.require_questions()
    records = {(name, record["id"]): as_asked(record) for record in shard.read_records()}
    require_same_ids(lines, records, path, shard.folder)
    refuse([key[1] for key, record in records.items()
            if lines[key].get("answer", record["answer"]) != record["answer"]], path,
           f"answers are not those of {shard.folder}", "leave out --data")
    # Numbers tell images apart where names do not: each row of PathVQA names an image of its own. Questions
    # that share an image with one another, at any remove, have the same number.
    return {key: {**record, "dataset": name, "prediction": lines[key]["prediction"],
                  "image": f"{number}" if images else ""}
            for (key, record), number, images in zip(records.items(), shard.connect(), shard.samples["images"])}


def require_same_ids(lines, wanted, path, other):
    missing, extra = (sorted(key[1] for key in keys)
                      for keys in (wanted.keys() - lines.keys(), lines.keys() - wanted.keys()))
    refuse(missing, path, f"ids of {other} are missing, {len(extra):,} are not in it",
           "answer all of its questions; an empty prediction counts as wrong")
    refuse(extra, path, f"ids are not in {other}", "leave them out")


# ----------------------------------------------------------------------------- scores

def best(scale, prediction, accepted, closed):
    """One answer on one scale: its score, or its counts; nan where the scale leaves it out."""
    if scale.total:
        return scale.of(prediction, max(accepted, key=lambda text: bleu1(prediction, text)))
    if scale.only and closed != (scale.only == "closed"):
        return math.nan
    if not prediction.strip():
        return 0.0  # also where "" and "no" are the same to ImageCLEF
    return max((scale.of(prediction, text) for text in accepted), key=lambda s: (s == s, s))  # nan last


def measure(lines):
    """Numbers of n answers on each scale: a list of (n, 1) scores and of (n, w) counts."""
    closed = [all(map(is_closed, line["references"])) for line in lines]
    return [np.array([best(scale, line["prediction"], line["references"], yes)
                      for line, yes in zip(lines, closed)], float).reshape(len(lines), -1)
            for scale in SCALES]


def summarise(values, groups, config):
    """The (scales,) scores in percent of what `measure` gives, and those of R resamples (R, scales)."""
    drawn = bootstrap(np.hstack(values), groups, config.resamples, config.seed)
    parts = np.split(drawn, np.cumsum([part.shape[1] for part in values])[:-1], axis=1)
    scores, resampled = [], []
    for scale, part, means in zip(SCALES, values, parts):
        scored = part[~np.isnan(part[:, 0])]
        total = scale.total or (lambda sums: sums[0] / max(1, len(scored)))
        scores.append(total(scored.sum(0)) if len(scored) else math.nan)
        # Means times the number of questions are sums again, about as large as the file's.
        resampled.append([total(row * len(scored)) for row in means])
    return 100 * np.array(scores), 100 * np.array(resampled).T


def group_lines(lines):
    """The number of each line's patient, else image, else its own, where all lines have one; and the unit."""
    unit = next((name for name in ("group", "image") if all(line.get(name) for line in lines)), "id")
    return np.unique([line[unit] for line in lines], return_inverse=True)[1], \
        "patient" if unit == "group" else unit


# ----------------------------------------------------------------------------- tables

def interval(drawn):
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return f"[{low:.1f}, {high:.1f}]"


def print_lacking(drawn):
    """Say which intervals rest on part of the (R, scales) resamples alone, for want of such questions."""
    for scale, share in zip(SCALES, np.isnan(drawn).mean(axis=0)):
        if MANY_LACKING < share < 1:
            print(f"{scale.name}: {share:.0%} of the resamples hold no such question; a rough interval")


def print_head(name, lines, empty, groups, unit):
    closed = sum(all(map(is_closed, line["references"])) for line in lines)
    print(f"\n{name or 'answers'}: {len(lines):,} questions, {closed:,} of them closed; {empty} empty "
          f"predictions, which count as wrong\n95% intervals by resampling {groups.max() + 1:,} {unit}s")


def print_scales(name, lines, config):
    groups, unit = group_lines(lines)
    scores, drawn = summarise(measure(lines), groups, config)
    perfect, _ = summarise(measure([{**line, "prediction": line["references"][0]} for line in lines]),
                           groups, config)
    print_head(name, lines, sum(not line["prediction"].strip() for line in lines), groups, unit)
    known = PUBLISHED.get(name.removesuffix("/test"), [])
    print(f"{'scale':36}{'score':>6}   {'95% interval':14}{'perfect':>8}   used by")
    for number, scale in enumerate(SCALES):
        if not math.isnan(scores[number]):
            print(f"{scale.name:36}{scores[number]:6.1f}   {interval(drawn[:, number]):14}"
                  f"{perfect[number]:8.1f}   {scale.used_by}".rstrip())
        for _, who, figure in (entry for entry in known if entry[0] == scale.name):
            print(f"    {who:32}{figure:>{6 + figure.endswith('*')}}")
    print_lacking(drawn)
    if known:
        print("scale unknown, or none of these")
        print("\n".join(f"    {who}: {figure}" for scale, who, figure in known if not scale))
        print("* second-hand: not read in the paper itself")


def print_comparison(name, pair, paths, config):
    """Two files' answers to the same questions, each a list of lines in the same order."""
    groups, unit = group_lines(pair[0])
    (first, one), (second, other) = (summarise(measure(lines), groups, config) for lines in pair)
    print_head(name, pair[0], " and ".join(
        f"{sum(not line['prediction'].strip() for line in lines):,}" for lines in pair), groups, unit)
    print(f"A: {paths[0]}\nB: {paths[1]}\n{'scale':36}{'A':>6}{'B':>7}{'B - A':>8}   95% interval")
    for number, scale in enumerate(SCALES):
        if not math.isnan(first[number] + second[number]):
            print(f"{scale.name:36}{first[number]:6.1f}{second[number]:7.1f}"
                  f"{second[number] - first[number]:+8.1f}   {interval((other - one)[:, number])}")
    print_lacking(other - one)
    right = [[any(exact_match(line["prediction"], text) for text in line["references"])
              for line in lines] for lines in pair]
    for who, won, lost in (("A", *right), ("B", *right[::-1])):
        flipped = [both for both, here, there in zip(zip(*pair), won, lost) if here and not there]
        print(f"\n{len(flipped):,} questions that {who} alone has right, by exact match")
        for a, b in flipped[:config.show]:
            print("  " + cut(f"{a['id']}: {a.get('question', '')}", 100))
            print(f"    {cut(a['answer'], 36)} | A: {cut(a['prediction'], 26)} | "
                  f"B: {cut(b['prediction'], 26)}")


def main(paths, config):
    if len(paths) not in (1, 2):
        raise UserError(f"{len(paths)} files named; name one predictions.jsonl, or two to compare them")
    files = [read_answers(path, config) for path in paths]
    if len(files) == 2:
        require_same_ids(files[1], files[0], paths[1], paths[0])
        refuse([key[1] for key, line in files[0].items() if line["references"]
                != files[1][key]["references"]], paths[1], f"answers are not those of {paths[0]}",
               "compare answers to the same questions")
    for name in dict.fromkeys(dataset for dataset, _ in files[0]):
        pair = [[lines[key] for key in files[0] if key[0] == name] for lines in files]
        if len(files) == 2:
            print_comparison(name, pair, paths, config)
        else:
            print_scales(name, pair[0], config)


if __name__ == "__main__":
    named = [word for word in sys.argv[1:] if not word.startswith("-")]
    sys.argv[1:] = [word for word in sys.argv[1:] if word.startswith("-")]
    run(functools.partial(main, named), parse_command_line(Config))
