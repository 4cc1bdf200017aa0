"""extras/bench/experts.py measures what is the same on both sides, and says so where it is not."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from extras.bench import experts

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a model that takes no time, in a folder."""
    folder = tmp_path_factory.mktemp("experts")
    config = experts.Config(width=64, inner=32, layers=2, vocab_size=96, samples=4, shortest=60, longest=200,
                            prefix=140, share=2, micro_batch_tokens=300, batch_size=2, new_tokens=2, matrix=64,
                            threads=1, folder=str(folder))
    experts.write_models(config, folder)
    return config


@pytest.fixture(scope="module")
def steps(config):
    """{(shared, role): what is measured}, the unshared ones last: their gradients are in the folder."""
    seen = {}
    for shared in (True, False):
        for role, measure in (("ours", experts.run_ours), ("peer", experts.run_peer)):
            seen[shared, role] = measure(replace(config, role=role, shared=shared))
        assert experts.require_same(config, seen[shared, "ours"], seen[shared, "peer"]) < experts.SAME
    return seen


def test_a_gradient_or_a_loss_that_differs_stops_it(config, steps):
    ours, peer, file = steps[False, "ours"], steps[False, "peer"], f"{config.folder}/peer.safetensors"
    gradients = load_file(file)
    with pytest.raises(AssertionError, match="the peer's loss differs by 2.0e-04"):
        experts.require_same(config, ours, peer | {"loss": 1.0002 * ours["loss"]})
    for name in sorted(gradients)[::7]:
        save_file(gradients | {name: 1.0002 * gradients[name]}, file)
        with pytest.raises(AssertionError, match=f"the peer's {name} differs by 2"):
            experts.require_same(config, ours, peer)
    save_file({name: gradients[name] for name in sorted(gradients)[1:]}, file)
    with pytest.raises(AssertionError, match=f"{min(gradients)} trains on one side alone"):
        experts.require_same(config, ours, peer)
    save_file(gradients, file)


def test_questions_about_a_text_share_it_and_are_what_the_peer_reads(config):
    shared = replace(config, shared=True)
    samples = experts.draw_samples(shared)
    [own] = {tuple(sample.tokens[:140]) for sample in samples[:2]}
    assert own != tuple(samples[2].tokens[:140])
    tokens = sum(len(batch.tokens) for batch in experts.make_batches(shared, samples))
    assert tokens == sum(len(sample.tokens) - 1 for sample in samples) - 2 * 140
    rows = experts.collate(samples)
    supervised = [sample.tokens[-(sample.spans[0, 1] - sample.spans[0, 0]):].tolist() for sample in samples]
    assert [row[row >= 0].tolist() for row in rows["labels"]] == supervised
    assert rows["attention_mask"].sum(1).tolist() == [len(sample.tokens) for sample in samples]


def test_experts_are_kept_in_fewer_bytes_and_are_the_same(config, steps):
    kinds = {bits: experts.run_ours(replace(config, role="peer", bits=bits)) for bits in (4, 16)}
    kinds[0] = steps[False, "ours"]
    weights = 2 * 8 * 3 * 64 * 32
    held = {bits: seen["experts"] for bits, seen in kinds.items()}
    assert held == {4: weights * 17 // 32, 16: 2 * weights, 0: 4 * weights}
    assert [seen["loss"] for seen in kinds.values()] == pytest.approx([kinds[0]["loss"]] * 3, rel=1e-5)


def test_tables_have_a_row_for_each_side_and_kind(config, steps, capsys):
    experts.show_steps(config, {key: [seen, seen] for key, seen in steps.items()},
                       {"implementation": "eager", "by_length": True})
    experts.show_kinds(config, {bits: [steps[False, "ours"]] for bits in experts.KINDS.values()})
    experts.show_decoding(config, rounds=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    heads = [line.split(" | ")[0].strip("| ") for line in lines]
    assert heads[2:6] == ["ours", "transformers + PEFT, eager, by length", "ours; 2 questions a text of 140",
                          "transformers + PEFT, eager, by length; 2 questions a text of 140"]
    assert heads[8:11] == [*experts.KINDS] and heads[13:15] == ["ours, float32", "ours, bfloat16"]
    assert {line.count(" | ") for line in lines[2:6]} == {6} and len(lines) == 17


def test_decoding_that_gives_other_weights_stops_it(config, monkeypatch):
    monkeypatch.setattr(experts, "by_look_ups", lambda blocks, scales: experts.decode(blocks, scales) * 2)
    with pytest.raises(AssertionError, match="two look-ups and ldexp, float32 gives other weights"):
        experts.show_decoding(config, rounds=1)
    torch.set_num_threads(1)
