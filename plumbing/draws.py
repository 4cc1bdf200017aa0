"""Random numbers that are a pure function of what they are for, so that a run that is resumed draws the same."""

import numpy as np


def random_keys(seed, purpose, lap, count):
    """uint64 random keys, a pure function of the arguments; NumPy promises this stream for good."""
    return np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, lap]).random_raw(count)
