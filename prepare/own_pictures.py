"""
The pictures that a table or a file of boxes names, whatever it calls them: image files, scans, slices of volumes.

    images/0001.png  0001.png  0001  0001.dcm       a path, a name, with another end or none
    C:\\study\\images\\0001.png  /data/old/0001.png    a path of another machine: what its end is here
    ct_12                                           a folder of one DICOM series

Capitals count where two names differ in nothing else, and é is one letter however it is written. Where two pictures
could be meant, none is taken: that is refused.
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from data import View
from plumbing.flags import UserError
from plumbing.own import files_below, hash_id, printable, written
from prepare.datasets import read_image
from scans.frames import Frame, Scan, ScanSettings, find_scans

LEFT_BY_PROGRAMS = ("thumbs.db", "desktop.ini", "ehthumbs.db", "dicomdir")
KINDS = re.compile(r"(\.nii)?\.[a-z][a-z0-9]{1,4}(\.gz)?$", re.I)  # the end of a name that says what the file is


def is_left_by_programs(file):
    """Whether a file's name alone says that it is no picture: hidden, or written by what shows folders."""
    return file.name[0] == "." or file.name.lower() in LEFT_BY_PROGRAMS


def file_of(source):
    """The Path of a picture's file."""
    return source.file if isinstance(source, Frame) else source


def same_letters(name):
    return unicodedata.normalize("NFC", name)


class Pictures:
    """The pictures below a folder, found by what a table calls them."""

    def __init__(self, folder, settings=ScanSettings(), outside=True):
        """settings: ScanSettings; outside: whether a path may lead out of the folder."""
        self.folder, self.settings, self.outside = folder, settings, outside
        files = list(files_below(folder))
        self.passed = [written(file.relative_to(folder).as_posix()) for file in files if is_left_by_programs(file)]
        scans, self.refused = find_scans([file for file in files if not is_left_by_programs(file)], settings, folder)
        self.warnings, self.by_name_alone = Counter(), {}  # what a table calls a picture -> another path's name
        self.scans, self.folders = {}, defaultdict(list)  # name of a file -> its Scan; of a folder -> Scans in it
        self.called, self.without_case = defaultdict(set), defaultdict(set)  # what may be written -> names of files
        for scan in scans:
            self.enter(scan)

    def enter(self, scan):
        """Take a Scan into the index, by the names of its files and of their folders."""
        self.warnings.update(scan.warnings)
        for file in dict.fromkeys(map(file_of, scan.sources)):
            name = same_letters(written(file.relative_to(self.folder).as_posix()))
            self.scans[name] = scan
            last = name.rpartition("/")[2]
            for key in {name, last, KINDS.sub("", name), KINDS.sub("", last)}:
                self.called[key].add(name)
                self.without_case[key.casefold()].add(name)
        for folder in {file_of(source).parent for source in scan.sources}:
            self.folders[same_letters(written(folder.relative_to(self.folder).as_posix()))].append(scan)

    def look_up(self, where, key, near):
        """The name of the one file that is called so, "" where none is. near: the folder whose files come first."""
        found = self.called.get(key) or self.without_case.get(key.casefold()) or ()
        if len(found) > 1 and key not in found:
            found = [name for name in found if name.rpartition("/")[0] == near] or found
            if len(found) > 1:
                raise UserError(f"{where}: {len(found)} images are called {key!r:.80}; name it by its path")
        return key if key in found else next(iter(found), "")

    def name(self, where, called, beside=None):
        """
        The name of the file, or of the folder of a series, that is called so; "" where there is none. Raises
        UserError where two could be meant.

        beside: the folder from which paths start, besides the one that was looked through.
        """
        called = same_letters(written(called.strip()).replace("\\", "/"))
        if not called or "\0" in called:
            return ""
        inside = os.path.relpath(beside or self.folder, self.folder)
        near = same_letters("" if inside == "." else inside)
        real = os.path.abspath(os.path.join(self.folder, called))
        starts = [os.path.normpath(os.path.join(near, called)), os.path.relpath(real, self.folder)]
        parts = [part for part in called.split("/") if part not in ("", ".", "..") and not part.endswith(":")]
        ends = ["/".join(parts[place:]) for place in range(len(parts))]
        for key in dict.fromkeys([*starts, *ends, *(KINDS.sub("", end) for end in ends[-1:])]):
            if found := self.look_up(where, key, near):
                asked, there = ("/".join(KINDS.sub("", name).casefold().split("/")) for name in (ends[0], found))
                if not f"/{asked}".endswith(f"/{there}") and not f"/{there}".endswith(f"/{asked}"):
                    self.by_name_alone.setdefault(called, found)
                return found
            if len(self.folders.get(key, ())) > 1:
                raise UserError(f"{where}: {len(self.folders[key])} series or images are in {key!r:.80}; name one")
            if key in self.folders:
                return key
        return ""

    def find(self, where, called, beside=None):
        """
        The Scan that a table calls so; None where there is none. Of a file that is a part of a series its slices
        alone. Raises UserError where two could be meant. where: for messages; beside: as `name` takes it.
        """
        name = self.name(where, called, beside)
        if name in self.scans:
            scan, sources = self.scans[name], [*zip(self.scans[name].sources, self.scans[name].labels)]
            of = [(source, label) for source, label in sources
                  if same_letters(written(file_of(source).relative_to(self.folder).as_posix())) == name]
            return scan if len(of) == len(sources) else replace(
                scan, name=name, sources=tuple(source for source, _ in of), labels=tuple(label for _, label in of))
        if name:
            return self.folders[name][0]
        return self.find_outside(called, beside) if self.outside and called.strip() else None

    def find_outside(self, called, beside):
        """The Scan of a path that leads out of the folder, or to a slice that --slices leaves out; None: neither."""
        path = Path(os.path.normpath(os.path.join(beside or self.folder, called.strip())))
        if not os.path.isfile(path):
            return None
        scans, refused = find_scans([path], self.settings, path.parent)
        self.refused |= refused
        for scan in scans:
            self.warnings.update(scan.warnings)
        return scans[0] if scans else None

    def notes(self):
        """Lines about what was found: what cannot be used, is not looked at, or is worth a look."""
        return notes_of(self.refused, self.passed, self.warnings, self.folder) + ([
            f"{len(self.by_name_alone):,} pictures are found by the name of their file alone, "
            f"{' for '.join(map(printable, next(iter(self.by_name_alone.items()))[::-1])):.160} the first"
        ] if self.by_name_alone else [])


def notes_of(refused, passed, warnings, folder):
    """
    Lines about what find_scans said of the files below a folder: {Path: why}, names of files that were not looked
    at, and {kind of a warning: count}.
    """
    reasons = defaultdict(list)
    for file, why in refused.items():
        reasons[why].append(written(os.path.relpath(file, folder)))
    notes = [f"{len(files):,} files cannot be used, {printable(files[0]):.80} the first: {why}"
             for why, files in reasons.items()]
    notes += [f"{len(passed):,} files passed over, {printable(passed[0]):.80} the first: hidden, or left by programs"
              ] if passed else []
    return notes + [f"{count:,} scans {kind}" for kind, count in warnings.items()]


# ----------------------------------------------------------------------------- into records

def read_source(source):
    """What a View shows of a Scan's source: a Frame, or the bytes of an image file; None where it is gone."""
    return source if isinstance(source, Frame) else read_image(source)


def written_name(scan, name, secret):
    """
    The name under which a Scan is written: what its files are called, but where a header names a patient a hash of it,
    for names of such files are made of patients' names and dates.
    """
    return f"scan {hash_id(secret, name)}" if scan.patient else name


def views_of(scan, name, role=""):
    """Views of all pictures of a Scan, each with its role and its place: "frontal", "slice 3 of 40"."""
    return [View(read_source(source), f"{name} {label}".strip(), f"{role} {label}".strip())
            for source, label in zip(scan.sources, scan.labels)]
