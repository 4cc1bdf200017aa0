"""extras/bench/intake.py: its ways make the same picture of one file, and its table has all of them."""

import numpy as np
import pytest

from extras.bench import intake

pytest.importorskip("pydicom")


def test_all_kinds_are_timed_and_alike(capsys, monkeypatch):
    monkeypatch.setattr(intake, "KINDS", {"DICOM": None, "DICOM, RLE": "RLELossless", "16-bit PNG": "png"})
    intake.main(intake.Config(images=2, size=64, rounds=1))
    printed = capsys.readouterr().out
    assert printed.count("prepare, file to stored JPEG") == 3 and printed.count("of alone") == 12
    differences = [float(line.split()[-3]) for line in printed.splitlines() if "differ by" in line]
    assert len(differences) == 3 and max(differences) < 3


def test_what_is_drawn_fits_in_twelve_bits():
    pixels = intake.draw(64, np.random.default_rng(0))
    assert pixels.dtype == np.uint16 and pixels.max() < 4096 and pixels[0, 0] < 100 and pixels[32, 32] > 800
