"""
What a chest radiograph's report says of the 14 findings of CheXpert, read by rules: a score that a negation moves.

A finding is "positive", "negative" or "uncertain", and on the left, the right or both sides where the report says so.
The rules know phrases of findings, organs that are said to be normal or enlarged, and words that deny or doubt what
follows or what went before, to the end of the sentence or to a word such as "but"; the kinds are those of NegBio and
CheXpert's labeller (Irvin et al. 2019, section 3), the phrases were written on one half of IU X-Ray's reports.
docs/reports.md says what they find in the other half. Severity is not scored, and rules are no radiologist.

XXXX and ___ stand where de-identification removed a word; they are words like any other that no rule knows.
"""

import re
from dataclasses import dataclass, field

FINDINGS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding")
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")  # that are often reported alone
RANKS = ("negative", "uncertain", "positive")  # of what a report says twice the later one counts
NEAR, FEW = 80, 16  # characters, and findings or organs, that a word looks back over
SCANNED = 100_000  # characters of a text

TEMPORAL = frozenset("""
    bigger change cleared constant decrease decreased decreasing elevated elevation enlarged enlargement enlarging
    expanded greater growing improved improvement improving increase increased increasing larger new persistence
    persistent persisting progression progressive reduced removal resolution resolved resolving smaller stability stable
    stably unaltered unchanged unfolded worse worsen worsened worsening""".split())  # Bannur et al. 2023 (BioViL-T)

# A phrase names its finding, whatever else is said of it
PHRASES = {
    "Enlarged Cardiomediastinum": r"(?:mediastinal|mediastinum) widening|pneumomediastinum",
    "Cardiomegaly": r"cardiomegaly",
    "Lung Opacity": r"opaci\w+|opaque|(?:air ?|air-)space (?:disease|process|infiltrat\w+)|infiltrat\w+|interstitial "
                    r"(?:lung )?(?:disease|process|abnormalit\w+|thickening|change\w*|prominence|markings|pattern)|"
                    r"reticul\w+|(?:alveolar|lung|pulmonary|basilar|base|lobe|vague|ill-defined|hazy|patchy) densit\w+",
    "Lung Lesion": r"nodul\w+|mass|masses|lesions?|tumou?rs?|neoplas\w+|carcinoma|metasta\w+|malignan"
                   r"\w+|cavitat\w+|cavitary|cavity",
    "Edema": r"o?edema|(?:pulmonary|central|mild|vascular|venous) congestion|congestive (?:heart )?(?:failure|"
             r"changes?)|(?:heart|cardiac) failure|chf|cephalization|vascular (?:prominence|engorgement|"
             r"redistribution)|fluid overload|volume overload|kerley",
    "Consolidation": r"consolidat\w+",
    "Pneumonia": r"(?:broncho)?pneumonias?|pneumonitis|pneumonic|infecti\w+",
    "Atelectasis": r"(?:micro)?atelecta\w+|(?:lobar|lung|lobe|basilar|complete) collapse|collapsed? of|volume loss",
    "Pneumothorax": r"(?:hydro|hemo)?pneumothora\w+|pleural air(?: collections?)?",
    "Pleural Effusion": r"effusions?|pleural fluid|(?:pleural|right|left) fusions?|hydrothorax",
    "Pleural Other": r"pleural(?: \w+)? (?:thickening|plaques?|scar\w*|calcifi\w+|fibrosis|based)|"
                     r"(?:pleuro-?parenchymal|pleural-parenchymal) scar\w*|fibrothorax|thickening of the pleura",
    "Fracture": r"fractur\w+",
    "Support Devices": r"pacemakers?|pacers?|(?:aicd|icd|picc|mediport|port-?a-?cath|defibrillator|stimulator)\w*|"
                       r"catheters?|tubes?|cannula|(?:cardiac|pacer|pacemaker|pacing|pulse|left|right)? ?(?:generator|"
                       r"leads?)|(?:central|venous|access|picc|arterial|subclavian|jugular|ij)(?: \w+)? lines?|"
                       r"lines and|stents?|valve (?:replacement|prosthesis)|"
                       r"prosthe\w+|prosthetic|hardware|arthroplast\w+|(?:medical|implanted|support|infusion|closure) "
                       r"devices?|occluder|(?:infusion|chest|power|subclavian) ports?|port tip|drains?|"
                       r"endotracheal|nasogastric",
}
# What is another thing in words that a finding is named by
OTHER = (r"thyroid (?:mass|nodul)\w*|pericardial (?:effusions?|fluid)|soft tissue (?:swelling|o?edema|mass\w*|"
         r"lesions?)|(?:bony?|osseous|lytic|blastic|sclerotic|destructive|bone) (?:lesions?|mass\w*|"
         r"cavity)|port(?:able|ion\w*)|nodes?|calcified lymph|chest wall|lung (?:volumes?|disease|expansion)|pulmonary "
         r"(?:arter\w+|trunk)|aort\w+|hil\w+|"
         r"trachea\w*|diaphragm\w*|hemidiaphragm\w*|spine|abdom\w+|thoracic cavity|inflation|ventric\w+|atri\w+")
# An organ says nothing until something is said of it: (its findings, what it is called)
HEART, MEDIASTINUM = ("Cardiomegaly",), ("Enlarged Cardiomediastinum",)
ORGANS = (
    (MEDIASTINUM + HEART, r"cardio-? ?(?:mediastin\w+|medial)"),
    (MEDIASTINUM, r"mediastin\w+|hilar and mediastin\w+"),
    (HEART, r"hearts?|cardiac(?! (?:pacer|pacemaker|leads?|device|catheter))"),
    (("Lung Opacity", "Consolidation"), r"lungs?(?: (?:fields?|bases?|parenchyma|zones?|apices))?|airspaces"),
    (("Pleural Effusion", "Pneumothorax"), r"pleural (?:spaces?|surfaces?|cavit\w+)"),
    (("Pleural Effusion",), r"costophrenic (?:angles?|sulci)"),
    (("Edema",), r"vascularity|vasculature|vascular"),
    (("Fracture",), r"osseous|bony|bones|skelet\w+|ribs?"),
    (("No Finding",), r"chest|thorax|exam\w*|study|radiographs?"),
)
NORMAL = (r"(?<!not )normal(?:ly)?|upper limits|within (?:normal )?limits|negative(?= chest)|unremarkable|clear(?! of)|"
          r"intact|sharp|preserved|well[- ]aerated")
LARGE = r"enlarge\w*|widen\w*|prominent|prominence|increased in size|large|generous|accentuated|engorge\w*"
LIMIT = r"borderline(?: (?:in size|enlarged|enlargement|large))?"
ABNORMAL = r"abnormal\w*|findings?|disease|process(?:es)?|injur\w+"

DENY = (r"no(?! longer)(?! (?:\w+ ){0,2}(?:changes?|increase|decrease)\b)|without(?! (?:\w+ )?changes?\b)|"
        r"(?:free|clear|devoid) of|negative(?! chest)(?: for)?|(?:absence|lack|resolution|clearing|removal) of|not|nor|"
        r"neither|none|never|denies|excludes?|rules? out")
DENY_BACK = (r"(?:is|are|was|were)? ?(?:no longer|not)(?: \w+ly)? (?:seen|identified|visuali[sz]ed|present|appreciated|"
             r"evident|demonstrated|noted|detected|apparent|visible)|(?:is|are) absent|no longer|(?:has|have) (?:\w+ly "
             r")?(?:resolved|cleared|disappeared)|(?:is|are) (?:now )?(?:\w+ly )?resolved|(?:has|have) (?:now |since )?"
             r"been removed|(?:is|are|has been|have been) (?:excluded|ruled out)|(?:is|are) negative(?! for)")
DOUBT = (r"(?:may|might|could|can)(?: also| still| well| possibly| either)? (?:be|represent|reflect|indicate|suggest|"
         r"relate|have|signify)\w*|possib\w+|probabl\w+|likely|unlikely|suggest\w*|suspicio\w+|suspected|suspect|"
         r"concern\w*(?: for| of)?|question\w*|(?:cannot|can not|can't|could not|not|difficult to|unable to|hard to) "
         r"(?:\w+ly )?(?:be )?(?:exclude|rule out)|presum\w+|perhaps|equivocal|differential|consider\w*|"
         r"worrisome|evaluate for|r/o|may|potential\w*|if there is|appears? to represent|favor\w*")
DOUBT_BACK = (r"(?:cannot|can not|can't|could not|may not|not)(?: \w+ly)?(?: be)? (?:\w+ly )?(?:excluded|ruled out)|"
              r"(?:is|are|remains?) (?:\w+ly )?(?:possib\w+|probable|likely|unlikely|suspected|questioned|questionable|"
              r"suggested|considered|difficult to exclude)|(?:may|might|could) (?:also )?be (?:present|considered|"
              r"there)|may not be (?:seen|visible|demonstrated)|not (?:entirely |completely )?excluded")
# What is denied or doubted ends before these: "no effusion, small pneumothorax", "no edema and the heart is enlarged"
SOME = r"a|an|stable|unchanged|mild|minimal|small|moderate|persistent|associated|new|increased|increasing"
SUBJECT = r"heart|cardiac silhouette|cardio\w+|lungs|mediastin\w+|bon[ey]\w*|osseous"
EITHER = r"versus|vs|or"
TURN = (r"but|however|although|though|except|aside from|other than|apart from|besides|while|whereas|yet|with the "
        r"exception|there (?:is|are|has|have|remains?)|status post|otherwise")
SIDES = {"left": "left", "right": "right", "lingula": "left", "lingular": "left", "middle lobe": "right"}  # or both
SIDE = r"(?:left|right)(?: and (?:left|right))?|bilateral\w*|both|bibasilar|bibasal|biapical|lingular?|middle lobe"
AFRESH = rf"(?:and|with)(?= (?:the )?(?:{SUBJECT}) )|with(?= (?:{SOME}|bilateral|bibasilar|left|right) )"
COMMA = rf",(?= (?:(?:the )?(?:{SUBJECT})|{SOME}) )"
STOP = r"[.;:!?](?!\d)"
BEHIND = re.compile(r"\b(?:in|on|at|within|of|along|over|near|involving|to|throughout)\b")
JOINED = re.compile(r"\W*(?:(?:and|or|nor|the|a|any|of|versus|vs|xxxx|\w*pleural|focal|\w+ed|acute|large|small|left|"
                    r"right|bilateral|airspace|pulmonary)\W+)*")

KINDS = {"turn": TURN, "afresh": AFRESH, "deny_back": DENY_BACK, "doubt_back": DOUBT_BACK, "limit": LIMIT,
         "doubt": DOUBT, "deny": DENY,  # at the same word the first kind counts
         **{f"finding_{number}": PHRASES[name] for number, name in enumerate(FINDINGS[:-1])}, "other": OTHER,
         **{f"organ_{number}": words for number, (_, words) in enumerate(ORGANS)},
         "normal": NORMAL, "large": LARGE, "abnormal": ABNORMAL, "either": EITHER, "side": SIDE}
TOKENS = re.compile(rf"(?P<stop>{STOP})|(?P<afresh_comma>{COMMA})|(?<!\w)(?=\w)(?:" + "|".join(
    f"(?P<{kind}>{words})" for kind, words in KINDS.items()) + r")(?!\w)")


@dataclass
class Mention:
    """A finding, or an organ's findings, in a text; an organ's status is "" until something is said of it."""
    findings: tuple
    begin: int
    end: int
    status: str = ""
    sides: set = field(default_factory=set)


def are_joined(mention, begin, text):
    """Whether commas, "and", "or" and the like alone are between a mention and what begins behind it."""
    return begin - mention.end <= NEAR and JOINED.fullmatch(text, mention.end, begin) is not None


@dataclass
class Clause:
    """What holds from a word of a sentence on, up to its end or a turn."""
    denied: bool = False
    doubted: bool = False
    adjective: str = ""  # the kind of one that stands before its organ
    sides: set = field(default_factory=set)  # that stand before their finding
    mentions: list = field(default_factory=list)
    either: Mention | None = None  # what an "or" follows

    def status(self):
        return "negative" if self.denied else "uncertain" if self.doubted else "positive"

    def joined(self, text):
        """The last finding and those before it that commas, "and" and "or" join to it."""
        chain = []
        for mention in reversed(self.mentions[-FEW:]):
            if chain and not are_joined(mention, chain[-1].begin, text):
                break
            chain.append(mention)
        return chain


def judge(mention, adjective, clause):
    """Give an organ the status that an adjective of this kind means, if any."""
    grows = mention.findings[0] in (*HEART, *MEDIASTINUM, "Edema")
    if adjective == "normal":
        mention.status = "negative"
    elif grows and adjective:
        mention.status = "uncertain" if adjective == "limit" and not clause.denied else clause.status()


def describe(kind, clause):
    """An adjective: of the organs before it that nothing was said of, or else of those behind it."""
    waiting = [mention for mention in clause.mentions[-FEW:] if not mention.status]
    clause.adjective = "" if waiting else kind
    for mention in waiting:
        judge(mention, kind, clause)


def deny_abnormality(clause, begin, end):
    """"No abnormality": of the bones, the pleura or the lungs that were named, or else of nothing in particular."""
    waiting = [mention for mention in clause.mentions[-FEW:] if not mention.status
               and mention.findings[0] not in (*HEART, *MEDIASTINUM)]
    for mention in waiting or [Mention(("No Finding",), begin, end)]:
        mention.status = "negative"
        clause.mentions += [] if waiting else [mention]


def mention_finding(name, token, text, clause):
    sides = set() if name in (*HEART, *MEDIASTINUM) else clause.sides
    mention = Mention((name,), *token.span(), clause.status(), sides)
    if clause.adjective == "limit" and not clause.denied:
        mention.status = "uncertain"
    if clause.either and mention.status == "positive" and are_joined(clause.either, mention.begin, text):
        mention.status = clause.either.status = "uncertain"
    clause.mentions.append(mention)
    clause.sides, clause.adjective, clause.either = set(), "", None


def mention_organ(number, token, clause):
    mention = Mention(ORGANS[number][0], *token.span(), sides=set(clause.sides))
    if mention.findings[0] in (*HEART, *MEDIASTINUM):
        mention.sides, clause.sides = set(), set()
    judge(mention, clause.adjective, clause)
    clause.mentions.append(mention)


def mention_side(token, text, clause):
    """A side: of the findings before it where a word such as "in" leads to it, or else of the next one."""
    side = SIDES.get(token[0], "bilateral")
    last = clause.mentions[-1] if clause.mentions else None
    near = last and last.status and not last.sides and token.start() - last.end <= NEAR
    if near and BEHIND.search(text, last.end, token.start()):
        for mention in clause.joined(text):
            mention.sides = mention.sides or {side}
    else:
        clause.sides = clause.sides | {side}


def look_back(kind, clause, text):
    """What denies or doubts the findings before it; without any, those behind it."""
    for mention in clause.joined(text):
        if mention.status == "positive" or mention.status and kind == "deny":
            mention.status = "negative" if kind == "deny" else "uncertain"
    if not clause.mentions:
        clause.denied, clause.doubted = clause.denied or kind == "deny", clause.doubted or kind == "doubt"


def close(clause):
    """The mentions of a clause that say something; a side left over belongs to the last of them."""
    said = [mention for mention in clause.mentions if mention.status]
    if said and clause.sides and said[-1].findings[0] not in (*HEART, *MEDIASTINUM):
        said[-1].sides = said[-1].sides or clause.sides
    return said


def scan(text):
    """The mentions of a text, in order, in time that grows with its length."""
    found, clause = [], Clause()
    text = " ".join(re.sub(r"\n\s*\n", ";", text[:SCANNED].lower()).split())  # an empty line ends a sentence
    for token in TOKENS.finditer(text):
        kind, _, which = token.lastgroup.partition("_")
        if kind in ("stop", "turn"):
            found += close(clause)
            clause = Clause()
        elif kind == "afresh":
            clause.denied = clause.doubted = False
        elif which == "back":
            look_back(kind, clause, text)
        elif kind == "deny":
            clause.denied = True
        elif kind == "doubt":
            clause.doubted = True
        elif kind == "either":
            last = clause.mentions[-1] if clause.mentions else None
            clause.either = last if last and last.status == "positive" else None
        elif kind == "finding":
            mention_finding(FINDINGS[int(which)], token, text, clause)
        elif kind == "organ":
            mention_organ(int(which), token, clause)
        elif kind == "abnormal":
            if clause.denied:
                deny_abnormality(clause, *token.span())
        elif kind == "side":
            mention_side(token, text, clause)
        elif kind == "other":
            clause.sides, clause.adjective = set(), ""
        else:
            describe(kind, clause)
    return found + close(clause)


# ----------------------------------------------------------------------------- what a text says

def collect(text):
    """
    {finding: (status, side)} of those that any text mentions; side: "left", "right", "bilateral" or "" for none.

    Of several statuses the one latest in RANKS counts, with the sides that stand beside it. "No Finding" is positive
    where no finding but Support Devices is positive or uncertain and the text does say something of the others, were it
    "no acute disease" alone; else it is not mentioned. So a text about nothing has no finding at all.
    """
    statuses, sides = {}, {}
    mentions = scan(text)
    for mention in mentions:
        for finding in mention.findings:
            rank = RANKS.index(mention.status)
            if rank > statuses.get(finding, -1):
                statuses[finding], sides[finding] = rank, set()
            if rank == statuses[finding]:
                sides[finding] |= mention.sides
    statuses.pop("No Finding", None)
    said = any(mention.findings != ("Support Devices",) for mention in mentions)
    if said and not any(rank for finding, rank in statuses.items() if finding != "Support Devices"):
        statuses["No Finding"], sides["No Finding"] = RANKS.index("positive"), set()
    return {finding: (RANKS[statuses[finding]], "bilateral" if len(sides[finding]) > 1 else "".join(sides[finding]))
            for finding in FINDINGS if finding in statuses}


def read(text):
    """
    {finding: "positive", "negative" or "uncertain"} of a report, without the findings that it does not mention.

    >>> read("No pleural effusion. Possible pneumonia.")
    {'Pneumonia': 'uncertain', 'Pleural Effusion': 'negative'}
    """
    return {finding: status for finding, (status, _) in collect(text).items()}


def sides(text):
    """{finding: "left", "right" or "bilateral"} of a report, without the findings that it gives no side."""
    return {finding: side for finding, (_, side) in collect(text).items() if side}


def temporal(text):
    """The set of TEMPORAL words in a text."""
    return TEMPORAL.intersection(re.findall(r"[a-z]+", text[:SCANNED].lower()))


# ----------------------------------------------------------------------------- score

def compare(prediction, reference):
    """
    What one report's scores are made of, as a dict. prediction, reference: texts.

    "matched", "predicted" and "true" count (finding, status, side) triples, those in both, in the prediction and in the
    reference. A pair of triples matches where all three are the same: "no effusion" for "effusion", "right" for "left"
    or for no side, and "possible effusion" for "effusion" each are one triple too many and one too few. A negative and
    an uncertain finding count as much as a positive one, and "No Finding" is one of the 14.
    "temporal matched", "temporal predicted" and "temporal true" count words of TEMPORAL, each once.
    "by finding" is {finding: (status in the prediction or "", status in the reference or "")}, of those in either.
    """
    found, wanted = collect(prediction), collect(reference)
    words, true_words = temporal(prediction), temporal(reference)
    return {"matched": len(found.items() & wanted.items()), "predicted": len(found), "true": len(wanted),
            "temporal matched": len(words & true_words), "temporal predicted": len(words),
            "temporal true": len(true_words),
            "by finding": {finding: (found.get(finding, ("",))[0], wanted.get(finding, ("",))[0])
                           for finding in FINDINGS if finding in found or finding in wanted}}


def compare_findings(prediction, references):
    """What `compare` counts beside the reference whose findings are the nearest; of several alike the first."""
    return max((compare(prediction, reference) for reference in references),
               key=lambda one: f1(one["matched"], one["predicted"], one["true"]))


def f1(matched, predicted, true):
    """2 x matched / (predicted + true) in 0..1; 1.0 where there are neither."""
    return 2 * matched / (predicted + true) if predicted + true else 1.0
