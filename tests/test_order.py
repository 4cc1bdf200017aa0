"""The order of training is what it has always been, however a shard is gone through."""

import hashlib

import numpy as np
import pytest

import plumbing.shards
from data import Mixture
from plumbing.flags import UserError
from plumbing.order import argsort_groups, argsort_keys, argsort_numbers, count_before, random_keys
from plumbing.shards import IMAGE, SAMPLE, Shard

PINNED = {  # what draw_mixture(seed) gave at commit 9c18a25, when all was in int64 and sorted at once
    0: "7c7a00ae4208278e", 1: "c53a1ef2edbfbb5c", 2: "b531da8fdd7b913b", 3: "8f14b02c53417137",
    4: "89a98a2a5ece3938", 5: "a0815f5e98edeebf", 6: "33c5668c2d641461", 7: "0d5a60e7120dfecb"}


def draw_shard(random):
    """Samples of no, one or several images, drawn, some of them alike, some in groups."""
    n, images = random.integers(50, 400), random.integers(1, 200)
    shard, rows = Shard.__new__(Shard), np.zeros(n, SAMPLE)
    shard.samples, shard.image_index = rows, np.zeros(images, IMAGE)
    shard.image_index["height"], shard.image_index["width"] = random.integers(1, 5, (2, images)) * 16
    rows["images"], rows["spans"] = random.integers(0, random.integers(2, 4), n), 1
    counts = rows["images"] + 2
    rows["parts"], first = np.cumsum(counts) - counts, {}
    shard.parts = random.integers(0, images, counts.sum()).astype("<i4")
    for number, (begin, count) in enumerate(rows[["parts", "images"]].tolist()):
        rows["prefix"][number] = first.setdefault(tuple(shard.parts[begin:begin + count]) or number, number)
    rows["length"], rows["head"] = random.integers(4, 60, n), random.integers(1, 4, n)
    rows["prompt"] = rows["head"] + random.integers(0, 50, n)
    rows["group"] = random.integers(0, n, n) * random.integers(2)
    return shard


def draw_mixture(seed):
    random = np.random.default_rng(seed)
    shards = [draw_shard(random) for _ in range(random.integers(1, 5))]
    leaks = [("drop", "keep")[random.integers(2)] for _ in shards]
    return Mixture(
        shards, lambda heights, widths: heights // 16 * (widths // 16) + 1, batch_size=int(random.integers(1, 80)),
        weights=[None, random.choice([0.3, 0.5, 1, 1.5, 2, 3.7], len(shards)).tolist()][seed % 2],
        questions_per_image=[1, 0, 4, 2][seed // 2], max_length=int(random.choice([40, 64, 1024])), seed=seed,
        held_out=[0, 30][seed % 3 > 0], leaks=[(what, np.arange(0, 50, 7)) for what in leaks])


def digest(mixture):
    found = [*mixture.train, *mixture.validation, *mixture.excess, *mixture.image_tokens, mixture.counts]
    found += [array for epoch in (0, 1, 5) for array in mixture.epoch_order(epoch)]
    found += [array for step in (*range(9), 700_000) for array in mixture.chosen(step)]
    found += [shard.connect() for shard in mixture.shards]
    return hashlib.sha256(b"".join(np.asarray(array, np.int64).tobytes() for array in found)).hexdigest()[:16]


@pytest.mark.parametrize("piece", [1 << 18, 37])
def test_the_order_is_as_it_was(piece, monkeypatch):
    monkeypatch.setattr(plumbing.shards, "PIECE", piece, raising=False)
    assert {seed: digest(draw_mixture(seed)) for seed in PINNED} == PINNED


def test_sorting_in_less_memory_is_sorting():
    random = np.random.default_rng(0)
    keys = random_keys(0, 0, 0, 5000)
    keys[random.integers(0, 5000, 400)] = keys[:400]  # ties keep their order
    keys[:3] = 0, (1 << 64) - 1, 1 << 60
    assert np.array_equal(argsort_keys(keys), np.argsort(keys, kind="stable"))
    for groups in (np.arange(5000), np.sort(np.concatenate([random.integers(0, 5000, 9000), np.arange(5000)]))):
        begins = np.diff(groups, prepend=-1) > 0
        assert np.array_equal(argsort_groups(keys, begins), np.argsort(keys[groups], kind="stable"))
    for highest in (1, 7, 1 << 32, 1 << 62):  # the last of which leaves no room for a place beside it
        values = random.integers(0, highest, 3000)
        assert np.array_equal(argsort_numbers(values), np.argsort(values, kind="stable"))
        assert count_before(values[:300]).tolist() == [(values[:n] == values[n]).sum() for n in range(300)]
    assert len(argsort_keys(keys[:0])) == len(argsort_numbers(groups[:0])) == len(count_before(groups[:0])) == 0


def test_pages_that_were_let_go_of_are_read_again(tmp_path):
    rows = np.zeros(100_000, SAMPLE)
    rows["prefix"] = np.arange(len(rows))
    rows.tofile(tmp_path / "samples.bin")
    shard = Shard.__new__(Shard)
    shard.folder, shard.mapped = tmp_path, []
    shard.samples = shard.map("samples.bin", SAMPLE)
    for _ in range(2):
        assert np.array_equal(shard.column("prefix"), rows["prefix"])
        shard.release()
    assert shard.samples[77_777]["prefix"] == 77_777


@pytest.mark.parametrize("small, mapped", [(0, 1), (1 << 24, 0)])
def test_an_index_is_verified_whether_it_is_mapped_or_read(small, mapped, tmp_path, monkeypatch):
    """A small one stays no open file: a Mac allows a process 256 of them."""
    monkeypatch.setattr(plumbing.shards, "SMALL", small)
    content = np.arange(100_000, dtype="<i4").tobytes()
    (tmp_path / "parts.bin").write_bytes(content)
    shard = Shard.__new__(Shard)
    shard.folder, shard.mapped, shard.mend = tmp_path, [], "mend it"
    shard.manifest = {"files": {"parts.bin": {"sha256": hashlib.sha256(content).hexdigest()}}}
    assert np.array_equal(shard.map("parts.bin", "<i4", verify=True), np.arange(100_000))
    assert len(shard.mapped) == mapped
    (tmp_path / "parts.bin").write_bytes(content[:-1] + b"\1")
    with pytest.raises(UserError, match="parts.bin: damaged; mend it"):
        shard.map("parts.bin", "<i4", verify=True)
