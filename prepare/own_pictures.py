"""Pictures of one's own, as formats/pictures.py finds them, into records."""

from data import View
from formats.frames import Frame
from prepare.datasets import read_image


def read_source(source):
    """What a View shows of a Scan's source: a Frame, or the bytes of an image file; None where it is gone."""
    return source if isinstance(source, Frame) else read_image(source)


def written_name(scan, name, hashed):
    """
    The name under which a Scan is written: as the source calls it, but where a header names a patient or study
    hashed[name], for the files of archives are called by patients' names and dates of birth.
    """
    return f"scan {hashed[name]}" if scan.patient or scan.study else name


def views_of(scan, name, role=""):
    """Views of all pictures of a Scan, each with its role and its place: "frontal", "slice 3 of 40"."""
    return [View(read_source(source), f"{name} {label}".strip(), f"{role} {label}".strip())
            for source, label in zip(scan.sources, scan.labels)]
