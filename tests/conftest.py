"""
Lets a plain `pytest` find the modules at the top of the repository. Where pytest.ini has several processes
run the tests, each has one thread: together they would wait for one another more than work.
"""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
