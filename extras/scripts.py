"""
The scripts themselves as modules, for benchmarks that time their loops and campaigns that attack them. No extra
builds on a script: what it needs beside one lies in a room below both.
"""

import importlib


def load_script(path):
    """A script as a module, by its path in the repository."""
    return importlib.import_module(path.removesuffix(".py").replace("/", "."))
