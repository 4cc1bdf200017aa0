"""
Your own folder or file as a prepared dataset, whatever of a dozen layouts it has: `python prepare/all.py --own=path`.

    prepare/folder.py          images with labels: a folder a class, or a csv (read by listing.py)
    prepare/own_boxes.py       images with boxes: VOC, COCO, YOLO, csv
    prepare/own_questions.py   a csv, JSON or JSON lines of questions
    prepare/own_chats.py       conversations: LLaVA's and ShareGPT's, messages with content parts
    prepare/own_studies.py     studies with reports: a folder each, or a csv
    formats/pictures.py          the pictures that they name: image files, scans, slices of volumes
    prepare/own_splits.py      splits and folds by patient, and patients' hashed names
    prepare/own_page.py        --dry_run: the first samples with their pictures, on a page
    prepare/own_forms.py       recognises which of them reads, has splits made and pictures found, and writes

A reader of questions, conversations or studies returns an Own: Drafts, which name their pictures and hold none.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from data import Record
from formats.frames import Frame, ScanSettings
from prepare.shards import ImageSettings


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a folder or file, by the flags of prepare/all.py of these names."""
    image: ImageSettings = ImageSettings(224, "squash", "jpeg", 97)
    scans: ScanSettings = ScanSettings()
    name: str = ""
    columns: dict = field(default_factory=dict)  # what a column is for -> its name
    folds: int = 0
    fold: int = -1
    limit: int = 0
    workers: int = 0
    dry_run: bool = False
    flags: tuple = ()  # those that make the same dataset again, as they are written

    def image_of(self, sources):
        """The ImageSettings for these pictures: with how scans are shown, where there are any among them."""
        scanned = any(isinstance(source, Frame) for source in sources)
        return replace(self.image, **asdict(self.scans)) if scanned else self.image

    def facts(self, sources):
        """What the manifests of a dataset of these pictures say of it."""
        flags = {"flags": list(self.flags)} if self.flags else {}
        return {"image": self.image_of(sources).facts(), "limit": self.limit, **flags}

    def facts_of_fold(self, number):
        return {"folds": {"fold": number, "folds": self.folds}} if self.folds else {}


class Draft(NamedTuple):
    """A sample before its pictures are read."""
    record: Record  # its views name their pictures, as the source does, and have no bytes; no group yet
    split: str = ""  # train, validation or test; "" where none is given
    patient: str = ""  # as it is written; "" where none is named
    where: str = ""  # for messages: "questions.csv: row 3"


class Own(NamedTuple):
    """What a folder or file says."""
    form: str  # in words: "a csv of questions"
    kind: str  # of the dataset: image questions, text questions, captions, reports, boxes
    task: str  # choices, or "" where the kind says it
    sources: list  # files that were read
    drafts: list  # of Draft
    grouped_by: str  # where patients come from; "" where none is named
    notes: list  # lines about how it was understood
