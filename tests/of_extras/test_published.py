"""Folders in the layout of published models: what a benchmark loads has the names, shapes and bytes of the hub's."""

import json

import torch

from extras.bench.published import write_folder
from plumbing.tensors import language_files, read_tensor, tensor_shapes
from zoo.gpt_oss import GptOssConfig
from zoo.gpt_oss_files import load_gpt_oss, read_config


def test_gpt_oss_20b_s_folder_has_the_tensors_and_the_bytes_of_the_hub_s(tmp_path):
    write_folder("gpt_oss_20b", tmp_path / "hub", values=False)
    files = language_files(tmp_path / "hub")
    assert [file.name for file in files] == [f"model-0000{number}-of-00002.safetensors" for number in range(3)]
    headers = [json.loads(file.open("rb").read(1 << 20)[8:].split(b"}}")[0] + b"}}") for file in files]
    tensors = {name: facts for header in headers for name, facts in header.items() if name != "__metadata__"}
    sizes = [end - begin for begin, end in (facts["data_offsets"] for facts in tensors.values())]
    assert (len(tensors), sum(sizes)) == (459, 13_761_264_768)  # metadata.total_size of openai/gpt-oss-20b
    assert tensors["model.layers.23.mlp.experts.gate_up_proj_blocks"] == tensors[
        "model.layers.23.mlp.experts.gate_up_proj_blocks"] | {"dtype": "U8", "shape": [32, 5760, 90, 16]}
    assert all(file.stat().st_blocks * 512 < 1 << 20 for file in files)
    model = load_gpt_oss(tmp_path / "hub", torch.bfloat16, "meta", trained=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 20_914_757_184
    assert read_config(tmp_path / "hub").layer_types == GptOssConfig().layer_types[:24]


def test_a_cut_folder_has_values_that_are_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("extras.bench.published.GptOssConfig", lambda num_hidden_layers: GptOssConfig(
        64, 64, 96, num_hidden_layers, 4, 2, 16, num_local_experts=4, num_experts_per_tok=2))
    write_folder("gpt_oss_20b", tmp_path / "hub", layers=2)
    [file] = language_files(tmp_path / "hub")
    assert file.name == "model-00000-of-00000.safetensors"
    for key in tensor_shapes(file):
        tensor = read_tensor(file, key)
        if key.endswith("_scales"):
            assert (tensor.dtype, tensor.min(), tensor.max()) == (torch.uint8, 118, 124)
        else:
            assert tensor.float().std() > 0 or "norm" in key and (tensor == 1).all()
    with torch.no_grad():
        assert load_gpt_oss(tmp_path / "hub", bits=4)(torch.arange(9)).isfinite().all()
