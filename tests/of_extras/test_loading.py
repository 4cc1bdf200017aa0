"""extras/bench/loading.py measures a loader that steps over a made-up mix, by this checkout's code or another's."""

from pathlib import Path

import numpy as np
import pytest

from extras.bench import loading
from plumbing.shards import Shard

HAS_PROC = Path("/proc/self/status").is_file()


@pytest.mark.skipif(not HAS_PROC, reason="no /proc that tells the memory of a process")
@pytest.mark.parametrize("code", ["", str(Path(__file__).resolve().parent.parent.parent)])
def test_a_small_mix_is_measured_from_any_folder(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loading.main(loading.Config(samples=2000, steps=3, pause=0.0, code=code))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()][2:]
    assert [row[0] for row in rows] == [
        "opening", "the first step", "3 steps from the first on", "as many of rank 3 of 8",
        "resuming at step 700,000", "an epoch's end"]
    assert rows[0][6].startswith("14 shards, 2,000 samples, ")
    for row in rows:
        seconds, processor, peak, anonymous, mapped = map(float, row[1:6])
        assert seconds > 0 <= processor and peak > 0 < anonymous <= peak + 0.01 and mapped <= peak


def test_made_up_shards_are_such_as_prepare_writes(tmp_path):
    """Each sample's images and span are where its record says, and of those alike the first is their prefix."""
    for name, n, images in (("ubench", 60, 7), ("mimic_cxr", 40, 40), ("med_qa", 10, 0)):
        loading.make_shard(tmp_path / name / "train", name, n, images, np.random.default_rng(0))
        shard = Shard(tmp_path / name / "train")
        sample, image = shard.image_pairs()
        shown = [tuple(image[sample == number].tolist()) for number in range(n)]
        for number, row in enumerate(shard.samples):
            assert shown[number][:1] == ((row["image"],) if images else ())
            assert row["prefix"] == (shown.index(shown[number]) if images else number)
            begin = int(row["parts"]) + int(row["images"])
            assert shard.parts[begin:begin + 2].tolist() == [row["prompt"], row["length"]]
            stored = shard.tokens[row["offset"]:int(row["offset"]) + row["length"]]
            assert (stored == shard.place_of_image).sum() == row["images"] == len(shown[number])
        assert set(image) == set(range(images)) and len(shard.pixels) == images * loading.IMAGE_BYTES
