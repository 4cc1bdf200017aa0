"""
Scores that other systems' authors published, as facts: whose, on which of our datasets, by which protocol.

They stand beside ours for orientation and are no comparison: prompts, parsers, judges, splits and test files differ,
and one set of answers may score 31 or 69 as one script or another counts (extras/look/scales.py). So they are printed
in a block of their own, and a doubt is told where two sources do not agree.
"""

from typing import NamedTuple

TITLE = "published, by their authors, on other scales"


class Figure(NamedTuple):
    """One published number."""
    dataset: str
    metric: str  # as its source calls it
    value: str  # as its source prints it, shares as percent
    system: str
    source: str
    protocol: str
    scale: str = ""  # the one of extras/look/scales.py that it was computed on; none: unknown or none of these
    doubt: str = ""
    second_hand: bool = False  # not read in the source itself


# ----------------------------------------------------------------------------- protocols

JUDGED = "MedEvalKit with gpt-5-mini as the judge"
MEDEVALKIT = "MedEvalKit: letter or option's text, else the nearest option"
CHOICE = MEDEVALKIT + "; gpt-5-mini as the judge of VQA"
REPORTS = "probably MedEvalKit's: Findings and Impression, its own rouge package, CIDEr x 100"
BOXES = "mean IoU in percent; split, prompt and the matching of several boxes are not stated"
CARD, PAPER = "MedMO's model card", "MedMO's paper, arXiv 2602.06965, later version"
KIT, GPT_OSS = "MedEvalKit's own table", "a summary of arXiv 2603.00842"
PREFIX, PALM = "arXiv 2303.05977", "arXiv 2307.14334"
TWO_SETS = "MedMO's model card and paper differ"
TWO_TABLES = "tables 3 and 4 of the paper differ: 13.3 and 38.9 after RL in table 4"
TWO_KITS = "MedMO's model card gives this system {}, MedEvalKit's table {}"
NO_SIZE = "whether of 4 or 5 options is not stated"
ABOVE_F1 = "a sentence BLEU-1 over words is never above token F1, so this is another one"
NINE = "; its medical MMLU has 9 subjects, ours 6"


def figures(system, source, protocol, values, metric="accuracy", doubt=""):
    """Figures that have all but dataset and value in common. values: {dataset: value}."""
    return [Figure(dataset, metric, value, system, source, protocol, doubt=doubt) for dataset, value in values.items()]


FIGURES = [
    # VQA: the scales on which they were computed, as far as known
    Figure("path_vqa", "BLEU-1", "70.3", "prefix tuning", PREFIX, "NLTK given strings: each character is a word",
           "BLEU-1 over characters", second_hand=True),
    Figure("path_vqa", "accuracy", "63.6", "prefix tuning", PREFIX, "equality but for case", "exact match"),
    Figure("path_vqa", "accuracy, open", "40.0", "prefix tuning", PREFIX, "equality but for case", "exact match, open"),
    Figure("path_vqa", "accuracy, closed", "87.0", "prefix tuning", PREFIX, "equality but for case", "closed accuracy"),
    Figure("path_vqa", "BLEU-1", "75.9", "OpenMedQ", "arXiv 2606.12953", "which BLEU-1 is not stated"),
    Figure("path_vqa", "BLEU-1", "72.3", "Med-PaLM M 562B", PALM, "tokens and smoothing not stated", second_hand=True,
           doubt=ABOVE_F1),
    Figure("path_vqa", "token F1", "62.7", "Med-PaLM M 562B", PALM, "tokens not stated", second_hand=True),
    Figure("path_vqa", "token F1", "58.4", "prefix tuning", PREFIX, "over GPT-2's tokens", second_hand=True),
    *figures("MedMO-8B-Next", CARD, JUDGED, {"path_vqa": "57.3"}, "accuracy, all", TWO_SETS),
    *figures("MedMO-8B-Next", PAPER, JUDGED, {"path_vqa": "56.3"}, "accuracy, all",
             TWO_SETS + "; the paper's text gives this number to MedMO-8B"),

    Figure("slake", "BLEU-1", "78.6", "prefix tuning", PREFIX, "NLTK given strings: each character is a word",
           "BLEU-1 over characters", second_hand=True),
    Figure("slake", "accuracy", "83.3", "prefix tuning", PREFIX, "English; equality but for case", "exact match"),
    Figure("slake", "token F1", "78.1", "prefix tuning", PREFIX, "over GPT-2's tokens", second_hand=True),
    Figure("slake", "BLEU-1", "92.7", "Med-PaLM M 562B", PALM, "English and Chinese", second_hand=True,
           doubt=ABOVE_F1),
    Figure("slake", "token F1", "89.3", "Med-PaLM M 562B", PALM, "English and Chinese", second_hand=True),
    *figures("MedMO-8B-Next", CARD, JUDGED, {"slake": "75.5"}, "accuracy, closed", TWO_SETS),
    *figures("MedMO-8B-Next", CARD, JUDGED, {"slake": "74.7"}, "accuracy, all", TWO_SETS),
    *figures("MedMO-8B-Next", PAPER, JUDGED, {"slake": "83.0"}, "accuracy, closed", TWO_SETS),
    *figures("MedMO-8B-Next", PAPER, JUDGED, {"slake": "81.6"}, "accuracy, all", TWO_SETS),
    *figures("Lingshu-7B", KIT, "MedEvalKit", {"slake": "83.1"}, "accuracy, all", TWO_KITS.format("33.2", "83.1")),

    Figure("vqa_rad", "BLEU-1", "71.3", "Med-PaLM M 562B", PALM, "tokens and smoothing not stated", second_hand=True,
           doubt=ABOVE_F1),
    Figure("vqa_rad", "token F1", "62.1", "Med-PaLM M 562B", PALM, "tokens not stated", second_hand=True),
    *figures("MedMO-8B-Next", CARD, JUDGED, {"vqa_rad": "80.4"}, "accuracy, closed", TWO_SETS),
    *figures("MedMO-8B-Next", CARD, JUDGED, {"vqa_rad": "65.0"}, "accuracy, all", TWO_SETS),
    *figures("MedMO-8B-Next", PAPER, JUDGED, {"vqa_rad": "86.4"}, "accuracy, closed", TWO_SETS),
    *figures("MedMO-8B-Next", PAPER, JUDGED, {"vqa_rad": "68.0"}, "accuracy, all", TWO_SETS),
    *figures("Lingshu-7B", KIT, "MedEvalKit", {"vqa_rad": "67.9"}, "accuracy, all", TWO_KITS.format("43.0", "67.9")),

    # BLEU beyond what later NLTK gives a perfect system, so an earlier one's
    Figure("vqa_med_2019", "accuracy", "57.0", "ImageCLEF 2019, JUST", "its working notes", "ImageCLEF's evaluator",
           "ImageCLEF strict accuracy"),
    Figure("vqa_med_2019", "accuracy", "62.4", "ImageCLEF 2019, the winner", "ImageCLEF 2019", "ImageCLEF's evaluator",
           "ImageCLEF strict accuracy", second_hand=True),
    Figure("vqa_med_2019", "BLEU", "59.1", "ImageCLEF 2019, JUST", "its working notes", "ImageCLEF's evaluator",
           "ImageCLEF BLEU, NLTK 3.2.2"),
    Figure("vqa_med_2019", "BLEU", "64.4", "ImageCLEF 2019, the winner", "ImageCLEF 2019", "ImageCLEF's evaluator",
           "ImageCLEF BLEU, NLTK 3.2.2", second_hand=True),
    Figure("vqa_med_2019", "BLEU-1", "64.5", "OpenMedQ", "arXiv 2606.12953", "which BLEU-1 is not stated"),

    # choices, about images and about text alone
    *figures("MedMO-8B-Next", CARD, CHOICE, {"pmc_vqa": "70.3", "omni_med_vqa": "88.8"}, doubt=TWO_SETS),
    *figures("MedMO-8B-Next", PAPER, CHOICE, {"pmc_vqa": "74.1", "omni_med_vqa": "93.3"}, doubt=TWO_SETS),
    *figures("MedMO-8B-Next", CARD, CHOICE, {
        "med_xpert_qa_mm": "48.9", "med_xpert_qa_text": "20.9", "pubmed_qa": "75.6", "med_mcqa": "62.0",
        "med_qa": "83.8", "medbullets_4": "65.2", "medbullets_5": "57.8"}),
    *figures("MedMO-8B-Next", CARD, CHOICE + NINE, {"mmlu_med": "80.2"}),
    *figures("MedMO-8B", PAPER, CHOICE, {
        "med_mcqa": "65.0", "med_qa": "84.3", "medbullets_4": "66.5", "medbullets_5": "60.2"}),
    *figures("Lingshu-7B", KIT, MEDEVALKIT, {
        "med_qa": "63.3", "med_mcqa": "55.9", "pubmed_qa": "76.6", "med_xpert_qa_text": "16.5",
        "med_xpert_qa_mm": "26.7"}),
    *figures("Lingshu-7B", KIT, MEDEVALKIT, {"medbullets_4": "56.2", "medbullets_5": "56.2"}, doubt=NO_SIZE),
    *figures("Lingshu-7B", KIT, MEDEVALKIT + NINE, {"mmlu_med": "74.5"}),
    *figures("LLaVA-Med-7B", KIT, MEDEVALKIT, {
        "med_qa": "42.0", "med_mcqa": "39.4", "med_xpert_qa_text": "9.9", "med_xpert_qa_mm": "20.3"}),
    *figures("LLaVA-Med-7B", KIT, MEDEVALKIT, {"pubmed_qa": "26.4"},
             doubt="half of what the commonest answer gets, which speaks for prompt or parser, not for knowledge"),
    *figures("LLaVA-Med-7B", KIT, MEDEVALKIT, {"medbullets_4": "34.4", "medbullets_5": "34.4"}, doubt=NO_SIZE),
    *figures("LLaVA-Med-7B", KIT, MEDEVALKIT + NINE, {"mmlu_med": "50.6"}),
    *figures("MedGPT-oss 20B", GPT_OSS, "how options are scored is not stated", {
        "med_frame_qa": "63.01", "med_xpert_qa_mm": "49.23", "med_xpert_qa_text": "25.38"}),
    *figures("MedGPT-oss 20B", GPT_OSS, "how options are scored is not stated", {
        "medbullets_4": "68.71", "medbullets_5": "68.71"}, doubt=NO_SIZE),

    # reports
    *figures("MedMO-8B-Next", PAPER, REPORTS, {"mimic_studies": "32.6", "chexpert_plus": "25.7"}, "ROUGE-L"),
    *figures("MedMO-8B", PAPER, REPORTS, {"iu_medevalkit": "37.0"}, "ROUGE-L"),
    *figures("MedMO-8B-Next", PAPER, REPORTS,
             {"mimic_studies": "143.4", "chexpert_plus": "88.3", "iu_medevalkit": "171.9"}, "CIDEr"),
    *figures("MedMO-8B-Next", PAPER, REPORTS,
             {"mimic_studies": "57.7", "chexpert_plus": "48.1", "iu_medevalkit": "56.0"}, "RaTEScore"),
    *figures("Fleming-VL-8B", PAPER, REPORTS, {"mimic_studies": "35.7"}, "ROUGE-L"),
    *figures("Fleming-VL-8B", PAPER, REPORTS,
             {"mimic_studies": "132.5", "chexpert_plus": "82.2", "iu_medevalkit": "198.6"}, "CIDEr"),
    *figures("Fleming-VL-8B", PAPER, REPORTS,
             {"mimic_studies": "56.7", "chexpert_plus": "47.1", "iu_medevalkit": "66.0"}, "RaTEScore"),
    *figures("MedGemma-4B", PAPER, REPORTS, {"chexpert_plus": "27.1"}, "ROUGE-L"),
    *figures("Lingshu-7B", PAPER, REPORTS, {"iu_medevalkit": "41.2"}, "ROUGE-L"),
    *figures("Libra 7B", "its readme", "Findings alone, beams of 10", {"mimic_studies": "36.7"}, "ROUGE-L"),
    *figures("Libra 7B", "its readme", "Findings alone, beams of 10", {"mimic_studies": "24.5"}, "BLEU-4"),
    *figures("Libra 7B", "its readme", "Findings alone, beams of 10", {"mimic_studies": "61.5"}, "RaTEScore"),
    Figure("mimic_studies", "RaTEScore", "52.2", "MedGPT-oss 20B", "quoted in a thesis' script",
           "which studies and sections is not stated", second_hand=True,
           doubt="a text without entities has 50 there"),

    # boxes
    *figures("MedMO-8B-Next", PAPER, BOXES, {"nih_boxes": "15.9", "deeplesion": "40.5"}, "mean IoU", TWO_TABLES),
    *figures("MedMO-8B", PAPER, BOXES, {"nih_boxes": "8.8", "deeplesion": "38.5"}, "mean IoU"),
    *figures("Qwen3-VL-8B", PAPER, BOXES, {"nih_boxes": "16.4", "deeplesion": "0"}, "mean IoU"),
    *figures("Lingshu-7B", PAPER, BOXES, {"nih_boxes": "5.3", "deeplesion": "0.7"}, "mean IoU"),
    *figures("Fleming-VL-8B", PAPER, BOXES, {"nih_boxes": "0", "deeplesion": "0"}, "mean IoU")]


def published_for(dataset):
    """The Figures of a dataset, "path_vqa", or of one of its splits, "path_vqa/test"; of "path_vqa/train" none."""
    name, _, split = dataset.partition("/")
    return [figure for figure in FIGURES if figure.dataset == name and split != "train"]


def describe(figures):
    """Figures as lines of text, a dataset at a time, and behind them their sources and protocols, numbered."""
    lines, notes = [], {}
    for figure in figures:
        if figure.dataset not in lines:
            lines.append(figure.dataset)
        number = notes.setdefault(f"{figure.source}; {figure.protocol}", len(notes) + 1)
        doubt = f"; in doubt: {figure.doubt}" if figure.doubt else ""
        lines.append(f"    {figure.value}{'*' * figure.second_hand} {figure.metric}: {figure.system} [{number}]{doubt}")
    lines += [f"[{number}] {note}" for note, number in notes.items()]
    return lines + ["* second-hand: not read in its source itself"] * any(one.second_hand for one in figures)
