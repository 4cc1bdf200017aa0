"""What orders samples: random numbers that are a pure function of what they are for, and counts of what came before."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np


def whole_type(count):
    """The smaller type that holds the whole numbers below count: int32 or int64."""
    return np.int32 if count <= 1 << 31 else np.int64


def random_keys(seed, purpose, lap, count):
    """uint64 random keys, a pure function of the arguments; NumPy promises this stream for good."""
    return np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, lap]).random_raw(count)


def argsort_keys(keys):
    """
    The places of (n,) uint64 keys in ascending order, equal ones as they come: (n,) of whole_type(n). What
    random_keys gives is sorted a sixteenth at a time, by its first four bits, in little memory.
    """
    order, begin = np.empty(len(keys), whole_type(len(keys))), 0
    for bits in range(16):
        some = np.flatnonzero((keys >= bits << 60) & (keys <= (bits + 1 << 60) - 1))
        order[begin:begin + len(some)] = some[np.argsort(keys[some], kind="stable")]
        begin += len(some)
    return order


def walk(values, begin, end, seed, purpose):
    """What a walk through (n,) values passes from place begin to end, each lap of it a permutation of its own."""
    n, passed = max(len(values), 1), [values[:0]]
    for lap in range(begin // n, -(-end // n)):
        order = argsort_keys(random_keys(seed, purpose, lap, len(values)))
        passed.append(values[order[max(begin - lap * n, 0):end - lap * n]])
    return np.concatenate(passed)


def argsort_numbers(values):
    """
    The places of (n,) whole numbers from 0 on in ascending order, equal ones as they come: (n,) int64. Where a
    value and its place fit into 63 bits together, they are sorted as one number, in half the time and memory.
    """
    bits = len(values).bit_length()
    if int(values.max(initial=0)).bit_length() + bits > 63:
        return np.argsort(values, kind="stable")
    both = values.astype(np.int64)
    both <<= bits
    both |= np.arange(len(values), dtype=whole_type(len(values)))
    both.sort()
    both &= (1 << bits) - 1
    return both


def argsort_groups(keys, begins):
    """The places of (n,) samples in the order of their groups' keys, (n,). begins: (n,) bool, where a group does."""
    order = argsort_keys(keys)
    if len(order) == len(begins):
        return order
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order), dtype=order.dtype)
    return argsort_numbers(rank[np.cumsum(begins) - 1])


def pick(values, places):
    """values[places], of (n,) and (m,), a million at a time, since NumPy copies places into int64."""
    picked = np.empty(len(places), values.dtype)
    for begin in range(0, len(places), 1 << 20):
        picked[begin:begin + (1 << 20)] = values[places[begin:begin + (1 << 20)]]
    return picked


def place_in_run(values):
    """How many equal ones stand right before each of (n,) values, (n,) of whole_type(n)."""
    number, first = np.arange(len(values), dtype=whole_type(len(values))), np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    return number - np.maximum.accumulate(np.where(first, number, 0))


def count_before(values):
    """How often each of (n,) whole numbers from 0 on has come before it, (n,) int64."""
    order, count = argsort_numbers(values), np.empty(len(values), np.int64)
    count[order] = place_in_run(values[order])
    return count


def in_background(function, *arguments):
    """A Future of what a function returns; a thread of its own works it out."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return future
