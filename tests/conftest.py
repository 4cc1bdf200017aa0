"""
Lets a plain `pytest` find the modules at the top of the repository. Where pytest.ini has several processes
run the tests, each has one thread: together they would wait for one another more than work.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session", autouse=True)
def threads():
    """Images are encoded by threads, which start at once: that processes make the same bytes is test_prepare.py's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prepare.shards.ProcessPoolExecutor", lambda workers, *rest: ThreadPoolExecutor(workers))
        yield


@pytest.fixture(scope="session")
def references():
    """timm and open_clip, which import torchvision and use nothing of it for these models."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets"):
            if f"torchvision{name}" not in sys.modules:
                patch.setitem(sys.modules, f"torchvision{name}", MagicMock())
        why = ("needs `pip install --no-deps timm open_clip_torch ftfy wcwidth`; without --no-deps they "
               "bring a torchvision that a torch for CPUs cannot import")
        yield pytest.importorskip("timm", reason=why), pytest.importorskip("open_clip", reason=why)
