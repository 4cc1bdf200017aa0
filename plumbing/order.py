"""What orders samples: random numbers that are a pure function of what they are for, and counts of what came before."""

import numpy as np


def random_keys(seed, purpose, lap, count):
    """uint64 random keys, a pure function of the arguments; NumPy promises this stream for good."""
    return np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, lap]).random_raw(count)


def count_before(values):
    """How often each of (n,) int64 has come before it, (n,) int64."""
    order = np.argsort(values, kind="stable")
    number = np.arange(len(values))
    first = np.diff(values[order], prepend=-1) != 0
    count = np.empty_like(number)
    count[order] = number - np.maximum.accumulate(np.where(first, number, 0))
    return count
