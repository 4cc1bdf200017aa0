"""
From a scan's numbers to 256 greys: windows by name, by centre and width, or the robust range of the pixels.

A window is (centre, width, function): what lies below it is black, above it white. Three windows make the red, green
and blue of one picture, as MedGemma reads CT: `0/2048,soft,brain`, from its public notebook
high_dimensional_ct_hugging_face.ipynb, which clips to -1024..1024, -135..215 and 0..80 HU.
"""

import numpy as np

from plumbing.pixels import Unreadable, stretch

# Centre and width in Hounsfield units, as Radiopaedia lists them (radiopaedia.org/articles/windowing-ct); soft
# is MedGemma's, as wide as that list's mediastinum: at 400, as wide as its abdomen, a lesion of 30 HU has 19 greys.
WINDOWS = {"lung": (-600, 1500), "soft": (40, 350), "bone": (400, 1800), "brain": (40, 80)}
NO_WINDOW = "its header has no window; use --window=auto"


def windows_of(text):
    """What --window says, as a tuple of one or three: "auto", "file", or (centre, width, "LINEAR")."""
    return tuple(part if part in ("auto", "file") else
                 (*(WINDOWS[part] if part in WINDOWS else map(float, part.split("/"))), "LINEAR")
                 for part in text.split(","))


def named_windows(text):
    """Whether --window names one of WINDOWS, which mean something in Hounsfield units alone."""
    return any(part in WINDOWS for part in text.split(","))


def apply_window(values, window, counted=None):
    """
    Numbers of any shape as uint8, by (centre, width, function), see DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, or by the
    robust range of the counted ones where window is None, see plumbing.pixels.stretch. NaN becomes 0.
    """
    if window is None:
        return stretch(values, counted=counted)
    centre, width, function = window
    with np.errstate(invalid="ignore", over="ignore"):
        if function == "SIGMOID":
            grey = 255 / (1 + np.exp(-4 * (values - centre) / width))
        else:
            if function != "LINEAR_EXACT" and width >= 1:  # a width counts numbers, and is not their distance
                centre, width = centre - 0.5, width - 1
            grey = (values - centre) / width * 255 + 127.5 if width else np.where(values > centre, 255, 0)
        return np.nan_to_num(np.clip(grey, 0, 255).round()).astype(np.uint8)


def show(values, windows, own=None, counted=None):
    """
    Numbers of any shape (...) as uint8, (...) for one window or (..., 3) for three. windows: as windows_of gives them;
    own: a function that shows numbers as their file says, None where it says nothing. Raises Unreadable.
    """
    if "file" in windows and own is None:
        raise Unreadable(NO_WINDOW)
    greys = [own(values) if own and window in ("auto", "file") else
             apply_window(values, None if window == "auto" else window, counted) for window in windows]
    return greys[0] if len(greys) == 1 else np.stack(greys, -1)
