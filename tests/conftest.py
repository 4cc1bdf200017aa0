"""
Lets a plain `pytest` find the modules at the top of the repository. Where pytest.ini has several processes
run the tests, each has one thread: together they would wait for one another more than work.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
