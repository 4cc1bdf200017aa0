"""
The pictures that a table or a file of boxes names, whatever it calls them: image files, scans, slices of volumes.

    images/0001.png  0001.png  0001  0001.dcm       a path, a name, with another end or none
    C:\\study\\images\\0001.png  /data/old/0001.png    a path of another machine: what its end is here
    ct_12                                           a folder of one DICOM series

A path that is there is taken as it is. Else all pictures below the folder are looked through, once. Capitals count
where two names differ in nothing else, and é is one letter however it is written. Where two pictures could be meant,
none is taken: that is refused.
"""

import functools
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

from formats.frames import Frame, ScanSettings, find_scans
from plumbing.flags import UserError
from plumbing.own import OURS, files_below, printable, written

LEFT_BY_PROGRAMS = ("thumbs.db", "ehthumbs.db", "desktop.ini")
ENDING = re.compile(r"(\.nii)?\.[a-z][a-z0-9]{1,4}$", re.I)  # the end of a name that says what the file is


def file_of(source):
    """The Path of a picture's file."""
    return source.file if isinstance(source, Frame) else source


def is_left_by_programs(file):
    """Whether a file's name alone says that it is no picture: hidden, or written by what shows folders."""
    return file.name[0] == "." or file.name.lower() in LEFT_BY_PROGRAMS


def plain(name):
    """A name or path as it is compared: é is one letter, and / parts folders."""
    return unicodedata.normalize("NFC", written(name).replace("\\", "/"))


class Pictures:
    """The pictures below a folder, found by what a table calls them."""

    def __init__(self, folder, settings=ScanSettings(), outside=True):
        """settings: ScanSettings; outside: whether a path may lead out of the folder."""
        self.folder, self.settings, self.outside = folder, settings, outside
        self.refused, self.passed = {}, []  # Path -> why; names of files that were not looked at
        self.warned = defaultdict(set)  # kind of a warning -> files
        self.left_out = set()  # sources that --slices does not show
        self.read, self.by_name_alone = {}, {}  # Path -> its Scans; what a table calls a picture -> its Path
        self.entered = {}  # name -> Scan, of those that a reader found itself

    def name_of(self, file):
        """A path from the folder, as it is written."""
        return written(Path(os.path.relpath(file, self.folder)).as_posix())

    def read_files(self, files):
        """The Scans of files, of which none was left by programs."""
        files = [file for file in files if os.path.isfile(file)]  # a link may lead nowhere
        scans, refused = find_scans(files, self.settings, self.folder)
        self.refused |= refused
        for scan in scans:
            self.left_out.update(scan.left_out)
            for warning in scan.warnings:
                self.warned[warning].add(file_of(scan.sources[0]))
        return scans

    @functools.cached_property
    def files(self):
        """{name: Path} of all pictures below the folder."""
        files = [file for file in files_below(self.folder) if file.name not in OURS]
        self.passed += [self.name_of(file) for file in files if is_left_by_programs(file)]
        scans, found = self.read_files([file for file in files if not is_left_by_programs(file)]), {}
        for scan in scans:
            of = dict.fromkeys(map(file_of, scan.sources))
            found |= {self.name_of(file): file for file in of}
            if len(of) == 1:
                self.read[next(iter(of))] = [scan]
        return found

    @functools.cached_property
    def called(self):
        """{what may be written: Paths} of all pictures below the folder, and of the folders that they are in."""
        called = defaultdict(set)
        for name, file in self.files.items():
            key = plain(name)
            folder, _, last = key.rpartition("/")
            for key in {key, last, ENDING.sub("", key), ENDING.sub("", last)}:
                called[key].add(file)
                called["any case", key.casefold()].add(file)
            for key in {folder, folder.rpartition("/")[2]} - {""}:
                called["folder", key].add(file.parent)
        return called

    # ------------------------------------------------------------------------- one of them

    def look_up(self, where, key, beside):
        """The Path of the file or folder that is called so; None where none is. beside: whose files come first."""
        found = self.called.get(key) or self.called.get(("any case", key.casefold())) or self.called.get(
            ("folder", key)) or ()
        if len(found) > 1:
            exact = [file for file in found if plain(self.name_of(file)) == key]
            found = exact or [file for file in found if file.parent == beside] or found
        if len(found) > 1:
            raise UserError(f"{where}: {len(found)} images are called {key!r:.80}; name it by its path")
        return next(iter(found), None)

    def place(self, where, called, beside=None):
        """
        The Path of the file, or of the folder of a series, that is called so; None where none is there. Raises
        UserError where two could be meant. beside: the folder in which paths start; none: the one looked through.
        """
        called, beside = called.strip(), beside or self.folder
        if not called or "\0" in called:
            return None
        direct = Path(os.path.normpath(os.path.join(beside, called)))
        if (self.outside or direct.is_relative_to(self.folder)) and direct != self.folder and os.path.exists(direct):
            return direct
        parts = [part for part in plain(called).split("/") if part not in ("", ".", "..") and not part.endswith(":")]
        ends = ["/".join(parts[place:]) for place in range(len(parts))]
        for key in dict.fromkeys([*ends, *(ENDING.sub("", end) for end in ends[-1:])]):
            if found := self.look_up(where, key, beside):
                asked, there = (ENDING.sub("", f"/{plain(text)}".casefold()) for text in (ends[0], self.name_of(found)))
                if not asked.endswith(there) and not there.endswith(asked):
                    self.by_name_alone.setdefault(called, found)
                return found
        return None

    def find(self, where, called, beside=None):
        """
        The Scan that a table calls so; None where there is none. Of a file that is a part of a series its slices
        alone. Raises UserError where two could be meant. where: for messages; beside: as `place` takes it.
        """
        if called in self.entered:
            return self.entered[called]
        place = self.place(where, called, beside)
        scans = self.scans_at(place) if place else ()
        if len(scans) > 1:
            raise UserError(f"{where}: {len(scans)} images or series are in {called!r:.80}; name one")
        return next(iter(scans), None)

    def scans_at(self, place):
        """The Scans of a file, or of all files below a folder."""
        if place not in self.read:
            files = list(files_below(place)) if place.is_dir() else [place]
            self.read[place] = self.read_files([file for file in files if not is_left_by_programs(file)])
        return self.read[place]

    def notes(self):
        """Lines about what was found: what cannot be used, is not looked at, or is worth a look."""
        alone = [f"{len(self.by_name_alone):,} pictures are found by the name of their file alone: "
                 f"{printable(self.name_of(found)):.80} is taken for {printable(called):.80}, the first"
                 for called, found in list(self.by_name_alone.items())[:1]]
        chosen = [f"{len(self.left_out):,} slices or pages are left out by --slices={self.settings.slices}"
                  ] if self.left_out else []
        return alone + chosen + notes_of(self.refused, self.passed, self.warned, self.name_of)


def notes_of(refused, passed, warned, name_of):
    """
    Lines about what find_scans said: {Path: why}, names of files that were not looked at, {kind of a warning: files};
    name_of: how a file is called.
    """
    reasons = defaultdict(list)
    for file, why in refused.items():
        reasons[why].append(file)
    notes = [f"{len(files):,} files cannot be used, {printable(name_of(files[0])):.80} the first: {why}"
             for why, files in reasons.items()]
    notes += [f"{len(passed):,} files passed over, {printable(passed[0]):.80} the first: hidden, or left by programs"
              ] if passed else []
    return notes + [f"{len(files):,} scans {kind}, {printable(name_of(min(files))):.80} the first"
                    for kind, files in warned.items()]
