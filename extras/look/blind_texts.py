"""
What answers in words are worth without a look at an image, from public files alone.

    python extras/look/blind_texts.py --raw_dir=raw

Reports: IU X-Ray's 296 studies of MedEvalKit, findings and impression joined as MedEvalKit joins them. The studies are
split in half at random, and each half is answered with one report of the other half, that which is most like the
others. A cell has the mean over several draws of the halves, and the lowest and the highest of them.

Multiple choice: the option that is right most often in the test itself, so that no constant answer gets more, and the
longest option.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import json
import random
from dataclasses import dataclass

import numpy as np

from plumbing.flags import Count, UserError, parse_command_line, run
from prepare.datasets import DATASETS
from prepare.shards import clean_record, words_of as line_of
from tasks.choices import blind_rows, read, right_of
from tasks.ngrams import bleu, cider_d, count_matches, lcs_f1, rouge_l_sets, words_of
from tasks.reports import cut_in_half, medoid, score, scores_of, stack
from tasks.vqa import print_cells

IU = "iu_xray/medevalkit/datas/IU_XRAY/test.json"


@dataclass(frozen=True)
class Config:
    raw_dir: str = "raw"  # with iu_xray/medevalkit
    draws: Count = 5  # of the halves
    seed: int = 0  # of the first of them


# ----------------------------------------------------------------------------- reports

def split_points(text):
    """The words of a text as MedEvalKit splits it for BLEU: at spaces, each "." a word of its own."""
    return text.lower().replace(".", " .").split()


PICKS = {"words": (lcs_f1, words_of), "points": (lcs_f1, split_points), "sets": (rouge_l_sets, str)}
COLUMNS = ("ROUGE-L", "BLEU-4", "CIDEr-D", "ROUGE-L of sets", "findings F1", "macro F1")
WITH_POINTS = ("ROUGE-L .", "BLEU-4 .", "mean BLEU-4 .", "CIDEr-D .")  # a "." is a word


def read_studies(path):
    """Records of MedEvalKit's studies, with its references: both sections, and "None" for one that is empty."""
    try:
        return [{"id": study["id"], "question": "", "answer": "Findings: {} Impression: {}.".format(
            *(study[name] if study[name].strip() else "None" for name in ("findings", "impression")))}
            for study in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not there or no list of studies; --raw_dir names the folder of iu_xray") from None


def answer_halves(records, pick, seed):
    """The answers to all records, a half's with the report of the other half that is most like its others."""
    alike, split = PICKS[pick]
    halves = cut_in_half(records, seed)
    texts = [medoid([record["answer"] for record, half in zip(records, halves) if half != own],
                    random.Random(seed), alike, split) for own in (0, 1)]
    return [texts[half] for half in halves]


def score_reports(records, texts):
    """{score: its value in percent, CIDEr-D x 100} of texts, one a record."""
    scored = [score(*pair) for pair in zip(records, texts, strict=True)]
    consensus = cider_d({"": [one["text"] for one in scored]}, [[words_of(one["answer"])] for one in records])[""]
    sums = {name: block.sum(0, keepdims=True) for name, block in stack(scored, consensus).items()}
    predicted, wanted = (list(map(split_points, some)) for some in (texts, [record["answer"] for record in records]))
    counts = np.array([count_matches(one, [other]) for one, other in zip(predicted, wanted)])
    return {name: values[0] for name, values in scores_of(sums).items()} | dict(zip(WITH_POINTS, (
        100 * np.mean(list(map(lcs_f1, predicted, wanted))), 100 * bleu(counts.sum(0))[-1],
        100 * bleu(counts)[:, -1].mean(),
        100 * cider_d({"": predicted}, [[words] for words in wanted])[""].mean())))


def show_reports(raw, draws, seed):
    """Print what a constant report gets, a line for each ROUGE-L by which it is picked."""
    records = read_studies(raw / IU)
    print(f"\nIU X-Ray, MedEvalKit's {len(records):,} studies: a constant report; percent, CIDEr-D x 100")
    lines = {f"picked by {pick}": [score_reports(records, answer_halves(records, pick, seed + number))
                                   for number in range(draws)] for pick in PICKS}
    for title, names in (("", COLUMNS), ("points are words", WITH_POINTS)):
        print_cells(title, names)
        for pick, some in lines.items():
            values = [[one[name] for one in some] for name in names]
            print_cells(pick, [[np.mean(each), min(each), max(each)] for each in values])


# ----------------------------------------------------------------------------- multiple choice

CHOICES = ("med_qa", "mediq", "med_mcqa", "mmlu_med", "medbullets_4", "medbullets_5", "med_xpert_qa_text",
           "med_xpert_qa_mm", "pubmed_qa")


def show_choices(raw):
    """Print what the commonest and the longest option get in each dataset whose raw files are there."""
    print("\nmultiple choice: percent right")
    print_cells("", ("questions", "options", "commonest option", "longest option"))
    for name in CHOICES:
        try:
            records = [line_of(clean_record(record)) for split, record in DATASETS[name].read(DATASETS[name].raw(raw))
                       if split == "test"]
        except UserError as error:
            print(f"{name}: {error}")
            continue
        rows = blind_rows(None, records).values()
        right = [100 * np.mean([read(*pair) == right_of(pair[0]) for pair in zip(records, texts)]) for texts in rows]
        counts = [len(record["choices"]) for record in records]
        options = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        print_cells(name, (f"{len(records):,}", options, *(f"{share:.1f}" for share in right)))


def main(config):
    show_choices(Path(config.raw_dir))
    show_reports(Path(config.raw_dir), config.draws, config.seed)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
