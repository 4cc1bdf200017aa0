"""
Images in tiles: InternVL's rule in other words, what is stored and what the model sees against crops by hand, a run
from prepare/ to an answer, and a map of attention laid back over the image.
"""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import eval_vqa
import test_packing
import train_vlm
from extras.share import card, demo_draw, demo_images, export
from formats.frames import pixels_of
from generate import ask
from lora import add_lora, lora_layers, token_keys
from model import LLaMA, VLM, ViT, ViTConfig, normalise
from plumbing.files import newest_checkpoint
from plumbing.flags import UserError, parse_flags
from plumbing.pixels import enough_pixels, open_stored, resize_flags, resize_image, tile_grid
from plumbing.shards import Shard
from plumbing.tiles import count_tiles, cut_tiles, map_of_tiles
from prepare import all as all_py
from prepare.shards import ImageSettings, encode_image
from tasks.evaluations import choose_evaluations
from test_model import LLAMA, TOLERANCE, VIT, randomise, relative_error
from test_packing import (MAX_LENGTH, Raw, double, mix, record_of, require_alike,  # noqa: F401, one is a fixture
                          write_records)
from test_train import flags, prepare_sample, read_log, stop_after_saving
from weights import load_run


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# ----------------------------------------------------------------------------- the rule

@pytest.mark.parametrize("width, height, columns, rows, squares", [
    (336, 336, 1, 1, 1), (512, 512, 2, 2, 5), (1024, 1024, 3, 3, 10), (640, 480, 4, 3, 13), (1024, 768, 4, 3, 13),
    (224, 1000, 1, 5, 6), (1500, 500, 6, 2, 13)])
def test_grids_of_known_images(width, height, columns, rows, squares):
    assert tile_grid(height, width, 336, 12) == (rows, columns)
    stored = resize_image(Image.new("RGB", (width, height)), 336, "tiles:12")
    assert stored.size == (336 * columns, 336 * rows) and count_tiles(*stored.size[::-1], 336) == squares
    tokens = ViT(ViTConfig(336, 14, 64, 0, merge=2, tiled=True)).tokens(*stored.size[::-1])
    assert tokens == 144 * squares  # 1,872 of 4:3


def restated(heights, widths, size, most):
    """
    (n, 2) rows and columns, by InternVL's rule from its words, all images at once: all pairs (columns, rows), sorted by
    their product; the first of the nearest ones, unless later ones are as near, of which the last counts that
    has less than twice the image's pixels.
    """
    pairs = sorted(((c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most),
                   key=lambda pair: pair[0] * pair[1])
    columns, rows = np.array(pairs).T
    apart = np.abs((widths / heights)[:, None] - columns / rows)
    nearest = apart == apart.min(1, keepdims=True)
    first = nearest.argmax(1)
    later = nearest & ((widths * heights)[:, None] > 0.5 * size * size * columns * rows)
    later &= np.arange(len(pairs)) > first[:, None]
    last = len(pairs) - 1 - later[:, ::-1].argmax(1)
    chosen = np.where(later.any(1), last, first)
    return np.stack([rows[chosen], columns[chosen]], 1)


def test_grids_of_30000_sizes_are_those_of_the_rule_in_other_words():
    rng = np.random.default_rng(0)
    for size in (336, 448):
        for most in range(1, 13):
            widths, heights = np.exp(rng.uniform(0, np.log(6000), (2, 1250))).astype(int)
            # Half of them at a round aspect, where several grids are as near
            widths[::2], heights[::2] = rng.integers(1, 9, (2, 625)) * rng.integers(1, 800, 625)
            wanted = restated(heights, widths, size, most)
            assert [tile_grid(height, width, size, most) for height, width in zip(heights.tolist(), widths.tolist())
                    ] == list(map(tuple, wanted.tolist()))


def test_grids_at_the_ends():
    assert tile_grid(1, 10 ** 6, 336, 12) == (1, 12) and tile_grid(10 ** 6, 1, 336, 40) == (40, 1)
    assert tile_grid(1, 1, 336, 12) == tile_grid(5000, 4000, 336, 1) == (1, 1)
    assert tile_grid(5000, 5000, 336, 40) == (6, 6)
    assert tile_grid(600, 900, 336, 2) == (1, 2)  # 1.5 lies in the middle of 1 and 2
    assert tile_grid(200, 300, 336, 2) == (1, 1)


# ----------------------------------------------------------------------------- what is stored

@pytest.mark.parametrize("height, width, shape", [(90, 120, (48, 64)), (40, 40, (48, 48)), (20, 20, (16, 16)),
                                                  (20, 90, (16, 80))])
def test_an_image_is_stored_whole_in_whole_tiles(height, width, shape):
    image = Image.fromarray(noise(height, width))
    stored = np.asarray(resize_image(image, 16, "tiles:12"))
    assert np.array_equal(stored, np.asarray(image.resize(shape[::-1], Image.Resampling.BICUBIC)))
    grey = image.convert("L").convert("RGB")
    assert np.array_equal(np.asarray(resize_image(grey, 16, "tiles:12")),
                          np.asarray(grey.resize(shape[::-1], Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("most", [4, 12])
def test_a_large_jpeg_is_decoded_whole(most, tmp_path):
    """At half its size it would be the less sharp for it, and its aspect another one: here that of another grid."""
    stream = io.BytesIO()
    Image.effect_noise((1203, 1805), 80).convert("RGB").save(stream, "JPEG", quality=90)
    (tmp_path / "a.jpg").write_bytes(stream.getvalue())
    whole = resize_image(Image.open(stream), 32, f"tiles:{most}")
    stored, shape, *_ = encode_image(stream.getvalue(), ImageSettings(32, f"tiles:{most}", "png", 0))
    assert np.array_equal(open_stored(stored, *shape), np.asarray(whole))
    assert np.array_equal(pixels_of(tmp_path / "a.jpg", 32, f"tiles:{most}"), np.asarray(whole))
    assert [enough_pixels(32, how) for how in ("squash", "fit", "smart", f"tiles:{most}")] == [64, 64, 0, 0]


def test_flags_make_settings_and_settings_say_the_flags():
    def settings(*words):
        config = parse_flags(all_py.Config, words)
        all_py.require_flags_that_fit(config)
        return all_py.image_settings(config)

    image = settings("--max_tiles=12", "--image_size=336")
    assert (image.size, image.resize) == (336, "tiles:12")
    assert resize_flags(image.facts()) == "--image_size=336 --max_tiles=12"
    assert settings("--max_tiles=0").resize == "squash" and settings("--max_tiles=1").resize == "tiles:1"
    for words, told in (
            (["--max_tiles=4", "--resize=pad"], "--max_tiles=4: leave out --resize=pad"),
            (["--max_tiles=4", "--resize=fit", "--max_pixels=70000"], "--max_tiles=4: leave out --resize=fit"),
            (["--max_tiles=4", "--max_pixels=70000"], "--max_pixels: "),
            (["--max_tiles=6", "--image_size=4096"], "--max_tiles=6: of --image_size=4096 at most 5"),
            (["--max_tiles=41"], "--max_tiles=41"), (["--max_tiles=-1"], "--max_tiles=-1")):
        with pytest.raises(UserError, match=f"^{told}") as caught:
            settings(*words)
        assert "\n" not in str(caught.value)


def test_scans_become_tiles(tmp_path):
    """A film of DICOM's, a slice of NIfTI's and a picture, prepared by --own: each in the grid of its aspect."""
    nibabel, _ = pytest.importorskip("nibabel"), pytest.importorskip("pydicom")
    from test_dicom import made, save
    data, ramp = tmp_path / "scans", np.arange(30 * 61).reshape(30, 61).astype(np.int16)
    data.mkdir()
    save(data / "film.dcm", made(ramp))
    nibabel.Nifti1Image(np.stack([ramp] * 3, -1), np.eye(4)).to_filename(data / "volume.nii.gz")
    Image.fromarray(noise(50, 50)).save(data / "photo.png")
    (data / "questions.csv").write_text("image,question,answer\n" + "".join(
        f"{name},what is {name}?,it\n" for name in ("film.dcm", "volume.nii.gz", "photo.png") * 2))
    words = ["--image_size=16", "--max_tiles=4", "--slices=middle", "--codec=png", f"--shards_dir={tmp_path}/shards",
             "--tokenizer=" + str(prepare_sample(tmp_path / "words", "--limit=1") / "sample/tokenizer.model")]
    all_py.main(parse_flags(all_py.Config, [f"--own={data}", "--name=own", "--workers=1", *words]))
    shapes = {}
    for folder in (tmp_path / "shards/own").glob("*/manifest.json"):
        shard = Shard(folder.parent)
        for record, sample in zip(shard.read_records(), shard.samples):
            shapes[record["question"].split()[2][:4]] = shard.read_image(sample["image"]).shape[:2]
    sideways = shapes.pop("volu")
    assert shapes == {"film": (16, 32), "phot": (32, 32)} and sorted(sideways) == [16, 32]


# ----------------------------------------------------------------------------- what the model sees

def tiles_by_hand(pixels, size):
    """The squares of an image (H, W, 3) uint8, cut by Pillow, and the whole of it where there are several."""
    image = Image.fromarray(pixels)
    cut = [np.asarray(image.crop((left, top, left + size, top + size)))
           for top in range(0, image.height, size) for left in range(0, image.width, size)]
    return cut + [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))] * (len(cut) > 1)


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_tiles_are_crops_in_reading_order_and_the_whole_comes_last(rows, columns):
    soft = Image.fromarray(64 + noise(4 * rows, 4 * columns) // 2)  # Pillow would cut off what lies beyond 0 and 255
    images = [np.asarray(soft.resize((32 * columns, 32 * rows), way)) for way in (Image.BICUBIC, Image.BILINEAR)]
    found = cut_tiles(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float(), 32)
    found = found.permute(0, 2, 3, 1).unflatten(0, (2, -1)).numpy()  # (I, n, S, S, 3)
    for ours, pixels in zip(found, images):
        wanted = tiles_by_hand(pixels, 32)
        assert len(ours) == len(wanted) == count_tiles(32 * rows, 32 * columns, 32)
        assert np.array_equal(ours[:rows * columns], wanted[:rows * columns])
        assert np.abs(ours[-1] - wanted[-1]).max() <= 1.2  # Pillow rounds twice, after rows and after columns


@torch.no_grad()
@pytest.mark.parametrize("merge, class_token, count", [(1, True, 5), (1, False, 4), (2, False, 1)])
def test_tokens_of_tiles_are_those_of_squares_seen_alone(merge, class_token, count):
    config = replace(VIT, merge=merge, class_token=class_token)
    plain = randomise(ViT(config)).eval()
    tiled = ViT(replace(config, tiled=True)).eval()
    tiled.load_state_dict(plain.state_dict())
    for rows, columns in ((1, 1), (2, 1), (2, 3)):
        pixels = normalise(torch.from_numpy(np.stack([noise(16 * rows, 16 * columns, seed) for seed in (1, 2)])))
        wanted = torch.stack([plain(cut_tiles(image[None], 16)).flatten(0, 1) for image in pixels])
        assert wanted.shape[1] == tiled.tokens(16 * rows, 16 * columns) == count * (rows * columns + (rows > 1))
        assert relative_error(tiled(pixels), wanted) < TOLERANCE
    sizes = np.array([(16, 16), (32, 48), (16, 80)], [("height", "<u2"), ("width", "<u2")])
    tiled.require_shapes("a", sizes)
    assert tiled.tokens(*(sizes[side].astype(int) for side in sizes.dtype.names)).tolist() == [
        count, 7 * count, 6 * count]
    sizes["width"][1] = 40
    with pytest.raises(UserError, match="^a: an image has 40 pixels along a side, no multiple of 16, .* model's tiles"):
        tiled.require_shapes("a", sizes)


@pytest.mark.parametrize("merge", [1, 2])
def test_dropout_in_tiles_is_the_same_recomputed_and_alone_and_no_two_are_alike(merge, double):  # noqa: F811
    torch.manual_seed(0)
    model = VLM(ViT(replace(VIT, merge=merge, tiled=True)), LLaMA(LLAMA))
    add_lora(model.vision, "qkv", r=4, dropout=0.5)
    randomise(model)
    images = [torch.from_numpy(noise(*shape, seed)) for seed, shape in enumerate([(16, 32), (16, 16), (16, 32)])]
    counts = [model.vision.tokens(*image.shape[:2]) for image in images]
    keys = token_keys(torch.tensor(7, dtype=torch.int32), torch.arange(sum(counts)))

    def run(images, keys, recomputed=0):
        model.vision.recomputed = recomputed
        model.zero_grad()
        y = model.encode_images(images, keys)
        y.square().sum().backward()
        return y.detach(), [layer.lora_A.grad.clone() for layer in lora_layers(model).values()]

    whole, again = run(images, keys), run(images, keys, recomputed=VIT.depth)
    alone = [run([image], key) for image, key in zip(images, keys.split(counts))]
    assert torch.equal(whole[0], again[0])
    assert relative_error(torch.cat([y for y, _ in alone]), whole[0]) < 1e-10
    for ours, recomputed, *each in zip(whole[1], again[1], *(gradients for _, gradients in alone)):
        assert torch.equal(ours, recomputed) and relative_error(sum(each), ours) < 1e-10
    alike = torch.from_numpy(np.tile(noise(16, 16), (1, 2, 1)))  # two equal tiles, which drop other channels
    first, second = run([alike], keys[:counts[0]])[0][:2 * counts[1]].split(counts[1])
    assert relative_error(first, second) > 0.01


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("questions_per_image", [0, 1])
def test_packing_of_tiled_images_is_exact(questions_per_image, train, tmp_path, monkeypatch, double):  # noqa: F811
    vit = replace(VIT, tiled=True)
    monkeypatch.setattr(test_packing, "VIT", vit)
    monkeypatch.setattr(test_packing, "count_tokens", ViT(replace(vit, depth=0)).tokens)
    rng = np.random.default_rng(0)

    def turns(count):
        return [(rng.integers(3, 300, 4).tolist(), rng.integers(3, 300, 2).tolist()) for _ in range(count)]

    square, wide, tall, one = noise(32, 32), noise(16, 48), noise(32, 16), noise(16, 16)
    study = [[201], tall, [202], wide]
    raw = [Raw([square], turns(1)), Raw([square], turns(1)), Raw([one], turns(2)), Raw([wide], turns(1)),
           Raw(study, turns(1)), Raw([square], turns(1)), Raw(study, turns(1)), Raw([], turns(1))]
    shard = write_records(tmp_path / "train", list(map(record_of, raw)), "tiles:4", 16, kind="text questions")
    assert sorted(shard.image_index[["height", "width"]].tolist()) == [(16, 16), (16, 48), (32, 16), (32, 32)]
    step = mix(type("Corpus", (), {"shards": [shard]}), batch_size=len(raw), max_length=MAX_LENGTH,
               micro_batch_tokens=90, questions_per_image=questions_per_image).step(0)
    assert len(step.batches) > 1 and (max(batch.branch.max() for batch in step.batches) > 1) == (
        not questions_per_image)
    require_alike(step, train, raw)


# ----------------------------------------------------------------------------- from prepare/ to an answer

@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The sample's first questions in tiles and whole, in two folders."""
    folder = tmp_path_factory.mktemp("tiles")
    return (prepare_sample(folder / "tiled", "--limit=8", "--max_tiles=4"),
            prepare_sample(folder / "whole", "--limit=8"))


PATCHES = dict(vision_tokens="patches", max_length=512, micro_batch_tokens=1024, max_steps=2, save_every=1, held_out=2)


def test_a_run_on_tiles_trains_goes_on_and_answers(shards, tmp_path, monkeypatch, capsys):
    tiled, whole = shards
    shard = Shard(tiled / "sample/train")
    assert {*shard.image_index["height"].tolist(), *shard.image_index["width"].tolist()} == {448}
    train_vlm.main(flags(tiled, tmp_path / "run", **PATCHES))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_saving(patch, 1)
        train_vlm.main(flags(tiled, tmp_path / "cut", **PATCHES))
    train_vlm.main(flags(tiled, tmp_path / "cut", resume=True, **PATCHES))
    losses = [[line["loss"] for line in read_log(tmp_path / run) if "loss" in line] for run in ("run", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 2

    eval_vqa.main(eval_vqa.Config(run=str(tmp_path / "run"), shards_dir=str(tiled), split="test"))
    ((folder, _),) = choose_evaluations(tmp_path / "run").values()
    with pytest.raises(UserError, match="images made by --image_size=224 --resize=squash, the run's by "
                                        "--image_size=224 --max_tiles=4"):
        eval_vqa.main(eval_vqa.Config(run=str(tmp_path / "run"), shards_dir=str(whole), data="sample", split="test"))
    Image.fromarray(noise(300, 620)).save(tmp_path / "x.png")
    capsys.readouterr()
    eval_vqa.main(eval_vqa.Config(run=str(tmp_path / "run"), image=str(tmp_path / "x.png"), question="what is it?",
                                  max_new_tokens=3))
    model, tokenizer = load_run(tmp_path / "run").eval(), train_vlm.tokenizer_of(shard)
    assert model.vision.config.tiled and model.vision.tokens(448, 448) == 5 * 49
    answer = ask(model, tokenizer, "what is it?", tmp_path / "x.png", 224, "tiles:4", max_new_tokens=3)
    assert capsys.readouterr().out == answer + "\n"

    public = card.make_public(card.read_manifest(newest_checkpoint(tmp_path / "run")))
    card.write_card(newest_checkpoint(tmp_path / "run"), public, tmp_path / "card.md")
    words = " ".join((tmp_path / "card.md").read_text().split())
    assert "(49 tokens for each of up to 4 tiles of 224 x 224 pixels, and as many for the whole image" in words
    export.write_vision(newest_checkpoint(tmp_path / "run"), shard.manifest["image"], tmp_path / "vision")
    settings = json.loads((tmp_path / "vision/config.json").read_text())["pretrained_cfg"]
    assert settings["input_size"] == [3, 224, 224] and settings["crop_mode"] == "squash"


@pytest.mark.parametrize("first", [0, 1])
def test_a_stage_on_tiles_begins_with_one_on_whole_images_and_the_other_way_round(first, shards, tmp_path):
    settings = PATCHES | dict(max_steps=1)
    train_vlm.main(flags(shards[first], tmp_path / "one", **settings))
    train_vlm.main(flags(shards[1 - first], tmp_path / "two", start=str(tmp_path / "one"), **settings))
    assert [load_run(tmp_path / run).vision.config.tiled for run in ("one", "two")] == [first == 0, first == 1]


# ----------------------------------------------------------------------------- back to the whole image

def test_attention_to_a_patch_lies_where_the_patch_is():
    """Two tiles beside one another, 2 x 2 patches each, then the whole image in 2 x 2, each over 1 x 2 places."""
    looked = np.arange(1, 13)
    wanted = np.array([[1, 2, 5, 6], [3, 4, 7, 8]]) + np.array([[9, 9, 10, 10], [11, 11, 12, 12]]) / 2
    assert np.array_equal(map_of_tiles(looked, 1, 2), wanted)
    with_class = np.insert(looked, [0, 4, 8], 1000)
    assert np.array_equal(map_of_tiles(with_class, 1, 2), wanted)
    assert np.array_equal(map_of_tiles(looked[:4], 1, 1), [[1, 2], [3, 4]])
    assert np.array_equal(map_of_tiles(np.array([1000, 7]), 1, 1), [[7]])


@pytest.mark.parametrize("rows, columns, side", [(3, 4, 12), (2, 1, 3), (1, 1, 5), (2, 2, 1)])
def test_each_patch_is_found_in_the_map_and_the_sum_stays(rows, columns, side):
    rng, image = np.random.default_rng(0), np.zeros((rows * 32, columns * 32, 3), np.uint8)
    squares = count_tiles(rows, columns, 1)
    looked = rng.random(squares * side ** 2).astype(np.float32)
    spread = demo_draw.patches_of(image, looked, 32)
    assert spread.shape == (rows * side, columns * side) and spread.sum() == pytest.approx(looked.sum(), rel=1e-5)
    for tile in range(rows * columns):
        row, column = rng.integers(0, side, 2)
        alone = np.zeros_like(looked)
        alone[(tile * side + row) * side + column] = 1
        ((y, x),) = np.argwhere(demo_draw.patches_of(image, alone, 32))
        assert (y, x) == (tile // columns * side + row, tile % columns * side + column)
    assert demo_draw.heat_map(image, spread, 0, 1).shape == image.shape


def test_what_the_demo_shows_of_a_tiled_image_is_the_whole_of_it():
    image = Image.fromarray(noise(300, 620))
    one = demo_images.show(image, "", 32, "tiles:6")
    assert one.seen.shape == (32, 64, 3)
    assert one.part == (0, 0, 1000, 1000) and one.whole.shape == (300, 620, 3)
    stored = Image.fromarray(noise(96, 96))  # 3 x 3 tiles, which would become 4 x 4 if they were cut anew
    again = demo_images.show(stored, "", 32, "tiles:16", stored=True)
    assert np.array_equal(again.seen, np.asarray(stored)) and tile_grid(96, 96, 32, 16) == (4, 4)
