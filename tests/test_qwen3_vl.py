"""Qwen3-VL by hand: transformers' numbers, packed as alone, and the published models' counts."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import train_grpo
import train_vlm
import zoo.qwen3_vl as qwen3_vl
from data import Mixture, Tokenizer
from generate import Sampling, ask, finished_groups, generate
from lora import add_lora
from model import VLM
from plumbing import sources
from plumbing.flags import UserError
from tasks import rewards
from test_model import randomise, relative_error
from test_packing import (MAX_LENGTH, VOCABULARY, Raw, double, gradients_of, learn, record_of,  # noqa: F401, a fixture
                          tensors, write_records)
from test_train import flags, shards  # noqa: F401, the fixture
from weights import build_vlm, load_vlm, save_vlm
from zoo.qwen3_files import read_config, write_config
from zoo.qwen3_vl import Mergers, Text, TextConfig, Vision, VisionConfig, in_blocks

EXACT = 1e-5  # of the logits' standard deviation, in float32: a wrong GELU in the tower moves them by 2e-4
IMAGE, START, END = 500, 502, 503
TINY = (VisionConfig(4, 48, 80, 4, num_position_embeddings=36, out_hidden_size=64, deepstack_visual_indexes=(0, 1, 2),
                     min_pixels=1024),
        TextConfig(512, 64, 96, 4, 4, 2, head_dim=32, rope_theta=5e6, mrope_section=(6, 5, 5)))


def make_vlm(vision, text):
    return VLM(Vision(vision), Text(text), Mergers(vision)).eval()


def names_on_disk(model):
    """{the checkpoint's name: parameter}."""
    return {("" if part == "language" else "model.visual.") + name: parameter
            for part in ("vision", "projector", "language")
            for name, parameter in getattr(model, part).named_parameters()}


@torch.no_grad()
def fill(parameters, seed=1):
    """Random values in which no norm is one and no bias zero, which would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(parameters):
        values = torch.randn(parameters[name].shape, generator=generator) * 0.1
        parameters[name].copy_(values + (1 if "norm" in name and name.endswith(".weight") else 0))


def random_images(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8) for size in sizes]


def lay_out(tokens, images, vision):
    """
    (T,) tokens in which image number k is -1 - k -> (T,) with IMAGE for each of its tokens, and (T, 3) positions, by
    a loop: as the model's own code has it, and no way of ours.
    """
    flat, positions, cursor = [], [], 0
    for token in tokens:
        if token >= 0:
            flat.append(token)
            positions.append((cursor,) * 3)
            cursor += 1
            continue
        rows, columns = (side // vision.config.side for side in images[-1 - token].shape[:2])
        flat += [IMAGE] * rows * columns
        positions += [(cursor, cursor + row, cursor + column) for row in range(rows) for column in range(columns)]
        cursor += max(rows, columns)
    return torch.tensor(flat), torch.tensor(positions)


def logits_of(model, tokens, images):
    """(T, V) logits of one sequence, image by image."""
    flat, positions = lay_out(tokens, images, model.vision)
    shown = [images[-1 - token] for token in tokens if token < 0]
    encoded = torch.cat([model.encode_images([image]) for image in shown]) if shown else None
    return model.language(flat, positions, None, None, encoded, torch.nonzero(flat == IMAGE)[:, 0])


# ----------------------------------------------------------------------------- numbers that are known

TOKENS = [3, 4, 5, START, -1, END, 6, 7, 8, START, -2, END, 9, 10, 11, 12]


def golden(monkeypatch):
    """
    The tiny model and its (T, V) logits on patches that are random numbers, two different frames in each, as
    no image has them: so the patch embedding is replaced by the product with all of its weight.
    """
    model = make_vlm(*TINY)
    fill(names_on_disk(model))
    pixels = torch.randn(40, 1536, generator=torch.Generator().manual_seed(2)).split([24, 16])
    frames = iter(pixels)

    def embed(images):
        proj = model.vision.patch_embed.proj
        return (next(frames) @ proj.weight.flatten(1).T + proj.bias)[None]

    monkeypatch.setattr(model.vision.patch_embed, "forward", embed)
    images = [torch.zeros(64, 96, 3, dtype=torch.uint8), torch.zeros(128, 32, 3, dtype=torch.uint8)]
    encoded = torch.cat([model.encode_images([image]) for image in images])  # (N, K, C)
    flat, positions = lay_out(TOKENS, images, model.vision)
    at = torch.nonzero(flat == IMAGE)[:, 0]
    place = model.vision.place(torch.arange(24), *torch.zeros(2, 24, dtype=torch.long), at, images)
    assert torch.equal(place, positions)
    return flat, encoded, model.language(flat, place, None, None, encoded, at)


@torch.no_grad()
def test_golden_numbers_of_a_tiny_model(monkeypatch):
    """transformers 5.24's, float32, which need no transformers to be compared with."""
    flat, encoded, logits = golden(monkeypatch)

    def close(value, known, rounding=1e-5):
        assert value == pytest.approx(known, rel=2e-6, abs=rounding)

    close(encoded[:, 0].sum().item(), -83.98352, rounding=1e-4)  # of 640 numbers that add up to 631 without signs
    close(encoded[:, 0].abs().sum().item(), 631.1163)
    close(encoded[0, 0, :3].tolist(), [1.27088, 0.13967, 0.04891])
    close(encoded[:, 1:].sum((0, 2)).tolist(), [35.92291, -88.60329, -32.14033], rounding=1e-4)
    close(logits.sum().item(), 4.2832, rounding=1e-3)  # of 12,288 numbers that add up to 7,895 without signs
    close(logits.abs().sum().item(), 7895.08)
    close(logits.std().item(), 0.80647)
    for row, known in ((0, [-0.73718, 0.74217, 0.31054, -1.13221]), (4, [-0.52397, 0.65996, -1.15898, -0.35625]),
                       (23, [-0.88470, -1.49595, -0.27181, -0.72480])):
        close(logits[row, :4].tolist(), known)
    close(F.cross_entropy(logits[:-1], flat[1:]).item(), 6.021742)


def test_positions_of_images_and_what_follows_them():
    """Four of text, an image of 2 x 3, four of text, one of 4 x 1, text."""
    images = [torch.zeros(64, 96, 3), torch.zeros(128, 32, 3)]
    _, positions = lay_out([1, 1, 1, 1, -1, 1, 1, 1, 1, 1, -2, 1], images, make_vlm(*TINY).vision)
    time, row, column = positions.T.tolist()
    assert time == [0, 1, 2, 3, *[4] * 6, 7, 8, 9, 10, 11, *[12] * 4, 16]
    assert row[4:10] == [4, 4, 4, 5, 5, 5] and column[4:10] == [4, 5, 6, 4, 5, 6] and row[15:19] == [12, 13, 14, 15]


def test_each_branch_is_placed_behind_its_own_images_alone():
    """A shared prefix with an image, and branches of which one has two more: as each sample would be by itself."""
    vision = make_vlm(*TINY).vision
    images = [torch.zeros(*size, 3) for size in ((64, 96), (96, 96), (128, 64))]  # each takes less than its tokens
    prefix, branches = [1, 1, -1, 1], [[1, -2, 1, -3, 1], [1] * 20, [1, -2, 1]]
    lone = [1, -3, 1, 1]
    own_pieces = [(0, number + 1, own, prefix) for number, own in enumerate(branches)]
    pieces = [(0, 0, prefix, []), *own_pieces, (1, 0, lone, [])]
    columns, wanted, shown = [], [], []
    for group, branch, own, before in pieces:
        flat, placed = lay_out(before + own, images, vision)
        begin = len(lay_out(before, images, vision)[0]) if before else 0
        columns += [(position, group, branch, flat[position] == IMAGE) for position in range(begin, len(flat))]
        wanted += placed[begin:].tolist()
        shown += [images[-1 - token] for token in own if token < 0]
    positions, group, branch, is_image = torch.tensor(columns).T
    placed = vision.place(positions, group, branch, is_image.nonzero()[:, 0], shown)
    assert placed.tolist() == [list(row) for row in wanted]


def theta(monkeypatch):
    monkeypatch.setattr(qwen3_vl, "interleaved_angles", lambda positions, config, own=qwen3_vl.interleaved_angles:
                        own(positions, replace(config, rope_theta=1e4)))


def one_dimension(monkeypatch):
    monkeypatch.setattr(qwen3_vl, "interleaved_angles", lambda positions, config, own=qwen3_vl.interleaved_angles:
                        own(torch.arange(len(positions)), config))


def in_chunks(monkeypatch):
    def angles(positions, config):
        axis = torch.arange(3).repeat_interleave(torch.tensor(config.mrope_section))
        speed = config.rope_theta ** -(torch.arange(config.head_size // 2) * 2 / config.head_size)
        return qwen3_vl.half_split(positions[:, axis].float() * speed)
    monkeypatch.setattr(qwen3_vl, "interleaved_angles", angles)


def no_deepstack(monkeypatch):
    monkeypatch.setattr(Mergers, "forward", lambda self, x, own=Mergers.forward: torch.cat(
        [own(self, x)[:, :1], 0 * own(self, x)[:, 1:]], dim=1))


def raster(monkeypatch):
    monkeypatch.setattr(qwen3_vl, "in_blocks", lambda grid, m: grid.flatten(-2))


def exact_gelu(monkeypatch):
    monkeypatch.setattr(qwen3_vl.VisionMLP, "forward", lambda self, x: self.linear_fc2(F.gelu(self.linear_fc1(x))))


def tanh_gelu(monkeypatch):
    def forward(self, x):
        x = self.norm(x.unflatten(-1, (-1, *self.norm.normalized_shape))).flatten(-2)
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))
    monkeypatch.setattr(qwen3_vl.Merger, "forward", forward)


def corners_apart(monkeypatch):
    monkeypatch.setattr(qwen3_vl.F, "interpolate", lambda x, size, mode, align_corners, own=F.interpolate: own(
        x, size, mode=mode, align_corners=False))


def no_head_norms(monkeypatch):
    own = qwen3_vl.RMSNorm.forward
    monkeypatch.setattr(qwen3_vl.RMSNorm, "forward", lambda self, x: x if x.dim() == 3 else own(self, x))


@torch.no_grad()
@pytest.mark.parametrize("mistake, least", [
    (no_deepstack, 2.0), (theta, 1.0), (one_dimension, 1.0), (in_chunks, 0.2), (raster, 0.1), (exact_gelu, 1e-4),
    (tanh_gelu, 1e-5), (corners_apart, 0.01), (no_head_norms, 0.1)])
def test_each_mistake_that_others_have_made_moves_the_logits_by_more_than_we_allow(mistake, least, monkeypatch):
    _, _, logits = golden(monkeypatch)
    mistake(monkeypatch)
    _, _, wrong = golden(monkeypatch)
    assert (wrong - logits).abs().max() / logits.std() > max(least, 4 * EXACT)


# ----------------------------------------------------------------------------- transformers

SHAPES = [  # (heads, vision head size, kv heads, text head size, tower depth, taps, layers, tied)
    (4, 12, 2, 32, 4, (0, 1, 2), 4, False), (2, 64, 1, 64, 3, (0, 1), 2, True), (1, 72, 4, 16, 3, (2,), 3, False),
    (2, 72, 2, 128, 2, (0, 1), 3, True), (3, 16, 3, 32, 5, (1, 2, 4), 3, False), (4, 8, 1, 16, 2, (), 2, True),
    (2, 20, 2, 24, 4, (0, 3), 5, False), (1, 64, 1, 128, 6, (0, 2, 4), 4, True), (4, 16, 4, 48, 3, (0, 1, 2), 3, True),
    (2, 36, 2, 32, 3, (1,), 1, False), (3, 24, 1, 64, 4, (0, 1, 2, 3), 6, False), (2, 32, 2, 40, 3, (0, 2), 3, True)]


def random_config(number):
    heads, vision_size, kv_heads, head_size, depth, taps, layers, tied = SHAPES[number]
    rng = np.random.default_rng(number)
    width = int(rng.choice([48, 64, 80]))
    third = head_size // 2 // 3
    grid = int(rng.choice([3, 5, 6, 7]))
    return (VisionConfig(depth, heads * vision_size, int(rng.integers(20, 90)), heads,
                         num_position_embeddings=grid ** 2, out_hidden_size=width,
                         deepstack_visual_indexes=taps, min_pixels=1024),
            TextConfig(512, width, int(rng.integers(20, 120)), layers, kv_heads * int(rng.choice([1, 2])), kv_heads,
                       head_dim=head_size, rope_theta=5e6, tie_word_embeddings=tied,
                       mrope_section=(head_size // 2 - 2 * third, third, third)))


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """number -> transformers' model of random_config(number), and a folder where it saved itself."""
    transformers = pytest.importorskip("transformers")
    models = {}

    def make(number):
        if number not in models:
            folder = tmp_path_factory.mktemp("peer")
            vision, text = random_config(number)
            write_config(folder, vision, text)
            ids = {"image_token_id": IMAGE, "video_token_id": 501, "vision_start_token_id": START,
                   "vision_end_token_id": END}
            config = transformers.Qwen3VLConfig.from_dict(json.loads((folder / "config.json").read_text()) | ids)
            peer = transformers.Qwen3VLForConditionalGeneration(config).eval()
            fill(dict(peer.named_parameters()), seed=number)
            peer.save_pretrained(folder)
            models[number] = peer, folder
        return models[number]
    return make


def shown_to_peer(tokens, images, vision):
    """What transformers' model takes, of a sequence of ours."""
    flat, _ = lay_out(tokens, images, vision)
    inputs = {"input_ids": flat[None], "attention_mask": torch.ones_like(flat)[None],
              "mm_token_type_ids": (flat == IMAGE).int()[None]}
    patches, grids = [], []
    for image in [images[-1 - token] for token in tokens if token < 0]:
        x = ((image.float() / 255 - 0.5) / 0.5).permute(2, 0, 1).unfold(1, 16, 16).unfold(2, 16, 16)
        x = in_blocks(x.permute(0, 3, 4, 1, 2), 2).permute(3, 0, 1, 2)  # (N m^2, 3, P, P)
        patches.append(x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1))
        grids.append([1, image.shape[0] // 16, image.shape[1] // 16])
    return inputs | ({"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)} if grids else {})


SIZES = [(64, 96), (128, 32), (96, 96), (32, 64)]
SEQUENCES = [  # one image; two; three with text between them; four; none; turns, the images of later ones, too
    [3, START, -1, END, 4, 5, 6], [START, -1, END, START, -2, END, 7, 8, 9],
    [3, START, -1, END, 4, 5, START, -2, END, 6, START, -3, END],
    [START, -4, END, START, -3, END, START, -2, END, START, -1, END, 9, 10], [3, 4, 5, 6, 7, 8],
    [START, -1, END, 5, 6, 7, 8, START, -2, END, 9, 10, START, -1, END, 11, 12]]


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_logits_and_greedy_answers_are_those_of_transformers(number, peers):
    peer, folder = peers(number)
    model = build_vlm(str(folder), 512, str(folder), str(folder)).eval()
    images = random_images(SIZES, number)
    arrays = [image.numpy() for image in images]
    passes = generate(model, [(arrays, [tokens]) for tokens in SEQUENCES], 6, Sampling(stops=()))
    answers = {group: answer.tokens for group, (answer,) in finished_groups(passes)}
    for place, tokens in enumerate(SEQUENCES):
        inputs = shown_to_peer(tokens, images, model.vision)
        theirs = peer(**inputs).logits[0]
        assert (logits_of(model, tokens, images) - theirs).abs().max() / theirs.std() < EXACT
        reply = peer.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert answers[place] == reply[0, -6:].tolist()


@torch.no_grad()
def test_prompts_that_share_images_answer_as_alone(peers):
    """A group of several prompts: the prefix, images in it, stands in the cache once."""
    _, folder = peers(4)
    model = build_vlm("", 512, str(folder), str(folder)).eval()
    images = random_images(SIZES)
    begin = [START, -1, END, 7, START, -2, END]
    prompts = [[*begin, 8, 9], [*begin, 10], [*begin, START, -3, END, 11], [*begin[:2], 20], [*begin[:2], 21, 22]]
    groups = [(images, prompts[:3]), (images, prompts[3:])]  # the second's prefix ends with its image
    arrays = [image.numpy() for image in images]
    together = dict(finished_groups(generate(model, [(arrays, some) for _, some in groups], 5, Sampling(stops=()))))
    for number, (_, some) in enumerate(groups):
        for place, prompt in enumerate(some):
            tokens = list(prompt)
            for _ in range(5):
                tokens.append(int(logits_of(model, tokens, images)[-1].argmax()))
            assert together[number][place].tokens == tokens[-5:]


def test_every_gradient_is_that_of_transformers(peers):
    peer, folder = peers(0)
    model = build_vlm("", 512, str(folder), str(folder))
    images = random_images(SIZES)
    tokens = SEQUENCES[2]
    logits = peer(**shown_to_peer(tokens, images, model.vision)).logits[0]
    flat, _ = lay_out(tokens, images, model.vision)
    peer.zero_grad()
    F.cross_entropy(logits[:-1], flat[1:]).backward()
    F.cross_entropy(logits_of(model, tokens, images)[:-1], flat[1:]).backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in names_on_disk(model).items():
        assert relative_error(parameter.grad, theirs[name].grad) < 2e-4, name
    assert names_on_disk(model).keys() == theirs.keys()


# ----------------------------------------------------------------------------- packing

def tiny_qwen(train):
    torch.manual_seed(0)
    vision, text = TINY
    model = make_vlm(replace(vision, num_position_embeddings=16), text).train()
    randomise(model)
    if train == "lora":
        model.vision.requires_grad_(False)
        add_lora(model.language, "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", r=4)
    return randomise(model) if train == "lora" else model


def qwen_samples():
    """Lists of Raws that begin alike: images of five sizes, conversations, studies, and words alone."""
    rng = np.random.default_rng(5)

    def text(count):
        return rng.integers(3, VOCABULARY, count).tolist()

    def image(height, width):
        return rng.integers(0, 256, (height, width, 3), np.uint8)

    square, tall, wide, flat, large = map(image, (128, 128, 64, 32, 128), (96, 64, 128, 128, 128))
    study = [[201], tall, text(4), [202], wide, text(2)]
    return [[Raw([large], [(text(3), text(2))], weight=weight) for weight in (1, 1, 2.5)],
            [Raw([tall], [(text(3), text(2)) for _ in range(3)]) for _ in range(2)],
            [Raw(study, [(text(3), text(2))]) for _ in range(3)], [Raw([*study[:-2], flat], [(text(3), text(3))])],
            [Raw([], [(text(4), text(2)), (text(2), text(2)), (text(1), text(4))])],
            [Raw([square], [(text(2), text(3))])], [Raw([wide], [(text(5), text(1))])]]


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    raws = [raw for some in qwen_samples() for raw in some]
    shard = write_records(tmp_path_factory.mktemp("qwen") / "train", [record_of(raw) for raw in raws], "fit", 128,
                          kind="text questions")
    read = shard.read_sample
    shard.read_sample = lambda number: replace(read(number), weight=raws[number].weight)
    assert len({(row["height"], row["width"]) for row in shard.image_index}) == 5
    return shard, raws


def qwen_loss_alone(model, raw):
    """Summed cross-entropy of one sample, times its weight, its images one by one."""
    stream, predicted = raw.stream()
    images, tokens = [], []
    for token in stream:
        if not isinstance(token, int):
            images.append(torch.from_numpy(token))
            token = -len(images)
        tokens.append(token)
    logits, at, targets, T = logits_of(model, tokens, images), [], [], 0
    for token, answer in zip(tokens, predicted):
        if answer:
            at.append(T - 1)
            targets.append(token)
        T += 1 if token >= 0 else model.vision.tokens(*images[-1 - token].shape[:2])
    return raw.weight * F.cross_entropy(logits[at], torch.tensor(targets), reduction="sum")


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("questions_per_image, micro_batch_tokens", [(0, 100_000), (0, 60), (1, 100), (2, 80)])
def test_packed_loss_and_gradients_equal_samples_run_alone(questions_per_image, micro_batch_tokens, train, shard,
                                                           double):  # noqa: F811
    model, (data, raws) = tiny_qwen(train), shard
    mixture = Mixture([data], model.vision.tokens, batch_size=len(raws), max_length=MAX_LENGTH, multiple=16,
                      micro_batch_tokens=micro_batch_tokens, questions_per_image=questions_per_image)
    step = mixture.step(0)
    assert (len(step.batches) == 1) == (micro_batch_tokens == 100_000)
    total, packed = learn(model, step)
    alone = sum(qwen_loss_alone(model, raw) for raw in raws) / step.divisor
    alone.backward()
    assert relative_error(total, alone.detach()) < 1e-10
    gradients = gradients_of(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[0] for name in trained} == {"projector", "language"} | ({"vision"} if train == "full"
                                                                                    else set())
    for name in trained:
        assert relative_error(packed[name], gradients[name]) < 1e-10, name


@torch.no_grad()
def test_editing_one_branch_leaves_the_others_bit_identical(shard):
    model, (data, _) = tiny_qwen("lora").eval(), shard
    mixture = Mixture([data], model.vision.tokens, batch_size=len(data), max_length=MAX_LENGTH, questions_per_image=0)
    (batch,) = mixture.step(0).batches
    everywhere = replace(tensors(batch), answer_at=torch.arange(len(batch.tokens)))
    before, owner = model(everywhere), np.stack([batch.group, batch.branch], -1)
    for branch in np.unique(owner[batch.branch > 0], axis=0):
        own = (owner == branch).all(-1)
        tokens = everywhere.tokens.clone()
        edited = own & ~np.isin(np.arange(len(own)), batch.image_at)
        tokens[edited] = (tokens[edited] + 100) % VOCABULARY
        same = (model(replace(everywhere, tokens=tokens)) == before).all(-1).numpy()
        assert same[~own].all() and not same[edited].any()
    first = np.argsort([image.size for image in batch.images])[-1]
    images = [255 - image if number == first else image for number, image in enumerate(everywhere.images)]
    changed = (model(replace(everywhere, images=images)) != before).any(-1).numpy()
    assert len({*batch.group[changed].tolist()}) == 1


def test_recomputed_blocks_have_the_same_gradients(shard):
    data, raws = shard
    results = []
    for recomputed in (0, 2):
        model = tiny_qwen("full")
        model.vision.recomputed = model.language.recomputed = recomputed
        mixture = Mixture([data], model.vision.tokens, batch_size=len(raws), max_length=MAX_LENGTH)
        results.append(learn(model, mixture.step(0)))
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


# ----------------------------------------------------------------------------- published sizes and files

@pytest.mark.parametrize("vision, text, parameters, tensors", [
    (VisionConfig(24, 1024, 4096, 16, out_hidden_size=2048, deepstack_visual_indexes=(5, 11, 17)),
     TextConfig(151936, 2048, 6144, 28, 16, 8, head_dim=128, rope_theta=5e6, tie_word_embeddings=True),
     2_127_532_032, 625),
    (VisionConfig(24, 1024, 4096, 16, out_hidden_size=2560, deepstack_visual_indexes=(5, 11, 17)),
     TextConfig(151936, 2560, 9728, 36, 32, 8, head_dim=128, rope_theta=5e6, tie_word_embeddings=True),
     4_437_815_808, 713),
    (VisionConfig(), TextConfig(151936, 4096, 12288, 36, 32, 8, head_dim=128, rope_theta=5e6), 8_767_123_696, 750)])
def test_parameters_and_tensors_of_the_published_models(vision, text, parameters, tensors, tmp_path):
    with torch.device("meta"):
        model = names_on_disk(make_vlm(vision, text))
    assert sum(parameter.numel() for parameter in model.values()) == parameters and len(model) == tensors
    write_config(tmp_path, vision, text)
    assert read_config(tmp_path) == (vision, text)


def edit(folder, target, **changes):
    """A copy of a hub folder, with tensors put in (name=tensor) or taken out (name=None)."""
    target.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (target / name).write_text((folder / name).read_text())
    state = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, target / "model.safetensors")
    return str(target)


def test_a_head_beside_tied_embeddings_has_to_equal_them(peers, tmp_path):
    _, folder = peers(1)
    embeddings = load_file(folder / "model.safetensors")["model.language_model.embed_tokens.weight"]
    same = edit(folder, tmp_path / "same", **{"lm_head.weight": embeddings.clone()})
    assert not hasattr(build_vlm("", 512, same, same).language, "lm_head")
    other = edit(folder, tmp_path / "other", **{"lm_head.weight": embeddings + 1})
    with pytest.raises(UserError, match="lm_head.weight is not the embeddings"):
        build_vlm("", 512, other, other)


@pytest.mark.parametrize("name, tensor, message", [
    ("lm_head.weight", None, "lm_head.weight is missing"),
    ("model.visual.merger.norm.bias", None, "merger.norm.bias is missing"),
    ("model.visual.blocks.0.norm3.weight", torch.ones(4), "blocks.0.norm3.weight is unknown"),
    ("model.visual.deepstack_merger_list.7.norm.bias", torch.ones(4), "list.7.norm.bias is unknown"),
    ("visual.pos_embed.weight", torch.ones(4), "visual.pos_embed.weight is unknown"),
    ("model.language_model.norm.weight", torch.ones(4), r"norm.weight is \(4,\)")])
def test_every_tensor_is_known_and_every_one_is_there(name, tensor, message, peers, tmp_path):
    folder = edit(peers(0)[1], tmp_path / "edited", **{name: tensor})
    with pytest.raises(UserError, match=message):
        build_vlm("", 512, folder, folder)


@pytest.mark.parametrize("section, name, value", [
    ("vision_config", "hidden_act", "gelu"), ("vision_config", "temporal_patch_size", 1),
    ("vision_config", "in_channels", 1),
    ("vision_config", "num_heads", 5), ("vision_config", "deepstack_visual_indexes", [2, 1]),
    ("vision_config", "deepstack_visual_indexes", [9]), ("vision_config", "out_hidden_size", 32),
    ("vision_config", "num_position_embeddings", 35), ("vision_config", "depth", None),
    ("vision_config", "window_size", 112),
    ("text_config", "hidden_act", "gelu"), ("text_config", "attention_bias", True), ("text_config", "head_dim", None),
    ("text_config", "rope_theta", None), ("text_config", "num_hidden_layers", "4"),
    ("text_config", "sliding_window", 128),
    ("text_config", "rope_scaling", {"rope_type": "yarn", "mrope_section": [6, 5, 5], "mrope_interleaved": True}),
    ("text_config", "rope_scaling", {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": False}),
    ("text_config", "rope_scaling", {"rope_type": "default", "mrope_section": [6, 5, 4], "mrope_interleaved": True}),
    ("text_config", "tie_word_embeddings", True), ("", "quantization_config", {"bits": 4}),
    ("", "tie_word_embeddings", None)])
def test_a_config_that_says_something_else_is_refused_by_the_name_of_its_field(section, name, value, tmp_path):
    write_config(tmp_path, *TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    (config[section] if section else config).update({name: value})
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = {"rope_scaling": "rope_type|mrope", "num_heads": "num_heads|hidden_size"}.get(name, name)
    with pytest.raises(UserError, match=shown) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("name, value", [("image_mean", [0.48, 0.46, 0.41]), ("patch_size", 14), ("merge_size", 1),
                                         ("size", {"height": 224}), ("do_normalize", False)])
def test_a_preprocessor_that_reads_images_otherwise_is_refused(name, value, tmp_path):
    write_config(tmp_path, *TINY)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=name if name != "size" else "pixels"):
        read_config(tmp_path)


def test_what_does_not_go_with_a_qwen_is_refused(peers):
    folder = str(peers(0)[1])
    for name, vision, language in (("qwen_sample", "vit.safetensors", ""), ("small", "", folder)):
        with pytest.raises(UserError, match="a Qwen3-VL is loaded as a whole"):
            build_vlm(name, 512, vision, language)
    for name, near in (("qwen_smal", "did you mean qwen_small"), ("medmo_4b", "here or in weights/; `python prepare")):
        with pytest.raises(UserError, match=near):
            build_vlm(name, 512)
    with pytest.raises(UserError, match="--base_bits=4: no base"):
        build_vlm("qwen_sample", 512, bits=4)
    with pytest.raises(UserError, match="processes do not split a Qwen3-VL"):
        build_vlm("", 512, folder, folder, split=print)


def test_images_that_the_checkpoint_does_not_read_are_refused():
    vision = Vision(replace(TINY[0], max_pixels=64 * 64))

    def sizes(height, width):
        return np.array([(height, width)], [("height", "<u2"), ("width", "<u2")])

    vision.require_shapes("shard", sizes(64, 64))
    for height, width in ((48, 64), (64, 96)):
        with pytest.raises(UserError, match="--resize=fit --max_pixels=4096"):
            vision.require_shapes("shard", sizes(height, width))


def test_a_folder_is_trained_goes_on_bit_for_bit_begins_a_stage_and_answers(
        shards, tmp_path, monkeypatch):  # noqa: F811
    """train_vlm.py --model=<folder>: by default the tower is frozen, and LoRA is on all seven matrices."""
    monkeypatch.setattr(sources, "require_own_tokenizer", lambda folder, tokenizer: None)  # the sample's is LLaMA's
    folder, (vision, text) = tmp_path / "tiny_qwen", TINY
    folder.mkdir()
    model = make_vlm(vision, text)
    fill(names_on_disk(model))
    tensors = {name: parameter.detach() for name, parameter in names_on_disk(model).items()}
    save_file(tensors, folder / "model.safetensors")
    write_config(folder, vision, text)

    def start(name, **changes):
        settings = dict(model=str(folder), language="lora", max_steps=4, save_every=2, evaluate_every=4)
        train_vlm.main(flags(shards, tmp_path / name, **settings | changes))
        return tmp_path / name / "step_000004"

    whole = start("whole")
    assert sorted(path.name for path in whole.iterdir() if path.is_dir() or path.suffix == ".safetensors") == [
        "adapter", "optimizer.safetensors", "projector.safetensors"]
    adapter = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * text.num_hidden_layers
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "step_000004")
    again = start("cut", resume=True)
    for name in ("adapter/adapter_model.safetensors", "projector.safetensors", "optimizer.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    stage = start("stage", start=str(tmp_path / "whole"), model="paper", projector="frozen", learning_rate=0.0)
    assert (stage / "projector.safetensors").read_bytes() == (whole / "projector.safetensors").read_bytes()
    assert torch.equal(load_file(stage / "adapter" / "adapter_model.safetensors")[min(adapter)], adapter[min(adapter)])
    tower = start("tower", start=str(tmp_path / "whole"), vision="full")
    assert (tower / "vision.safetensors").is_file()
    image = tmp_path / "image.png"
    Image.fromarray(random_images([(40, 90)])[0].numpy()).save(image)
    tokenizer = Tokenizer(tmp_path / "whole" / "tokenizer.model")
    answers = [ask(load_vlm(step).eval(), tokenizer, "what is shown?", str(image)) for step in (whole, again)]
    assert answers[0] == answers[1]
    # train_grpo.py --start=<folder>
    monkeypatch.setattr(train_grpo, "require_own_tokenizer", lambda folder, tokenizer: None)
    monkeypatch.setitem(rewards.REWARDS, "exact", lambda record, text, progress: len(text) % 5 / 4)
    train_grpo.main(train_grpo.Config(
        start=str(folder), shards_dir=str(shards), data="sample", run=str(tmp_path / "grpo"), reward="exact",
        batch_size=2, answers=3, max_new_tokens=4, max_steps=2, held_out=4, learning_rate=1e-3, mask_truncated=False,
        dtype="bfloat16"))
    found = load_file(tmp_path / "grpo/step_000002/adapter/adapter_model.safetensors")
    assert len(found) == len(adapter) and any(tensor.any() for name, tensor in found.items() if "lora_B" in name)
    assert load_vlm(tmp_path / "grpo/step_000002").weights["language"] == str(folder)


@pytest.mark.parametrize("trained", ["lora", "vision", "projector", "language", "nothing loaded"])
def test_a_saved_run_comes_back_bit_for_bit(trained, peers, tmp_path):
    """What trained is saved, in float32; what did not is read from where it was."""
    _, folder = peers(3)
    source = "" if trained == "nothing loaded" else str(folder)
    model = build_vlm("qwen_sample" if not source else "", 512, source, source).requires_grad_(not source)
    if trained == "lora":
        for part, targets in (("vision", "qkv"), ("language", "q_proj,down_proj")):
            model.lora[part] = {"targets": targets, "r": 2, "alpha": 4, "dropout": 0.0}
            add_lora(getattr(model, part), **model.lora[part])
    elif source:
        getattr(model, trained).requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    save_vlm(model, tmp_path / "saved")
    again = load_vlm(tmp_path / "saved")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys() and again.lora == model.lora
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    folder = tmp_path / "saved"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    assert files == {"lora": [f"{name}/adapter_model.safetensors" for name in ("adapter", "vision_adapter")],
                     "language": ["language/model.safetensors"],
                     "nothing loaded": ["language/model.safetensors", "projector.safetensors", "vision.safetensors"]
                     }.get(trained, [f"{trained}.safetensors"])
    if trained == "lora":
        keys = load_file(tmp_path / "saved" / "adapter" / "adapter_model.safetensors").keys()
        assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in keys
        keys = load_file(tmp_path / "saved" / "vision_adapter" / "adapter_model.safetensors").keys()
        assert "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight" in keys
