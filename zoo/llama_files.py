"""How a LLaMA lies in files: the hub's folder, config.json and model.safetensors, whole or in several files."""

from dataclasses import asdict, fields
from pathlib import Path

import torch

from data import BOS, EOS
from lora import add_lora, lora_layers
from model import LLaMA, LlamaConfig
from plumbing.claims import llama_refusal
from plumbing.files import read_settings
from plumbing.flags import UserError
from plumbing.tensors import language_files, load_exactly, on_meta, tensor_shapes
from quantize import store_low


def read_llama_config(folder):
    """The LlamaConfig of a hub folder. Raises UserError where it is of another model, or cannot be."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}/config.json: not there; `python prepare/all.py "
                        "--only=pmc_llama_7b` brings the paper's")
    hub = read_settings(folder / "config.json")
    ropes = [rope for rope in map(hub.get, ("rope_parameters", "rope_scaling")) if isinstance(rope, dict)]
    config = LlamaConfig(**{item.name: hub[item.name] for item in fields(LlamaConfig)
                            if hub.get(item.name) is not None})
    config.num_key_value_heads = hub.get("num_key_value_heads") or config.num_attention_heads
    config.rope_theta = next((rope["rope_theta"] for rope in ropes if rope.get("rope_theta")), config.rope_theta)
    impossible = [f"{name} {value!r:.50}" for name, value in asdict(config).items()
                  if type(value) not in (int, type(getattr(LlamaConfig, name)))
                  or not (name == "head_dim" and value == 0)
                  and not 0 < value < (1e30 if isinstance(value, float) else 1 << 24)]
    if impossible or (config.num_attention_heads % config.num_key_value_heads or config.head_size % 2
                      or not config.head_dim and config.hidden_size % config.num_attention_heads):
        raise UserError(f"{folder}/config.json: {', '.join(impossible) or 'its sizes'} cannot be")
    if refused := llama_refusal(hub, config.head_size):
        raise UserError(f"{folder}/config.json: {refused}")
    return config


def load_llama(folder, dtype=torch.float32, device="cpu", lora=None, split=None, bits=0):
    """
    A LLaMA from a hub folder. lora: the settings of its LoRA, newly made, if it is to have one; split: a
    function that divides the empty model among processes before it is filled; bits: of its blocks, see quantize.py.

    Raises UserError when the folder is incomplete or a tensor does not fit.
    """
    folder = Path(folder)
    config, files = read_llama_config(folder), language_files(folder)
    if config.num_hidden_layers > sum(len(tensor_shapes(file)) for file in files):
        raise UserError(f"{folder}/config.json: {config.num_hidden_layers} layers are more than the "
                        "tensors beside it")  # and would take for ever to build
    with on_meta():
        model = LLaMA(config).to(dtype)
        store_low(model.blocks, bits)
        if split and lora:
            add_lora(model, **lora)
    if split:
        split(model)
    load_exactly(model, files, dtype, device, dropped=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
    if split:
        for _, layer in sorted(lora_layers(model).items()):  # in add_lora's order: the same random numbers
            layer.reset()
    elif lora:
        add_lora(model, **lora)
    return model


def hub_config(config):
    """A LlamaConfig as the hub's config.json has it, as a dict."""
    sizes = {name: value for name, value in asdict(config).items() if value or name != "head_dim"}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes, "hidden_act": "silu",
            "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False}
