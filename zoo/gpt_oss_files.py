"""
How gpt-oss lies in files: the hub's folder, with experts in MXFP4 as OpenAI publishes them, or brought to plain numbers
as transformers and others save them. Keys tell which.

    config.json
    model*.safetensors    model.layers.0.mlp.experts.gate_up_proj_blocks, _scales    (E, 2D, C/32, 16), (E, 2D, C/32)
                          or model.layers.0.mlp.experts.gate_up_proj                 (E, C, 2D): in before out

Nothing is assumed: a value that is not what gpt_oss.py computes, a field that nobody here knows, and a size that is
missing stop loading, by name. So do the layouts of others.
"""

import re
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save_file

from lora import add_lora
from model import ViTConfig
from plumbing.claims import odd_fields, refusal
from plumbing.files import read_settings, sort_metadata, write_settings
from plumbing.flags import UserError
from plumbing.kernels import linear
from plumbing.tensors import (language_files, load_exactly, on_meta, plain_names, read_tensor, tensor_shapes,
                              tensors_of)
from quantize import LowLinear, store_low
from zoo.gpt_oss import FULL, SLIDING, GptOss, GptOssConfig
from zoo.mxfp4 import BLOCK, MXLinear, decode

FAMILY = "gpt_oss"
EXPERTS = r"model\.layers\.\d+\.mlp\.experts\..*"
MATRICES = ("gate_up_proj", "down_proj")
OTHERS = {  # keys of layouts that are refused -> whose they are
    r"block\.\d+\..*": "OpenAI's own in original/", r"(language_model|vision_model|mlp1)\..*": "InternVL's",
    r".*\.mlp\.experts\.\w+_projs\..*": "unsloth's, expert by expert"}
WANTED = "here a gpt-oss is read as openai/gpt-oss-20b has it outside of original/: model.layers.0.mlp.experts..."

CONFIGS = {  # name -> sizes of models that are made here, for any tokenizer
    "gpt_oss_sample": (ViTConfig(patch_size=32, width=128, depth=4),
                       GptOssConfig(512, 128, 128, 4, 4, 2, 32, num_local_experts=8, num_experts_per_tok=4)),
    "gpt_oss_small": (ViTConfig(width=192, depth=6),
                      GptOssConfig(32000, 256, 256, 6, 8, 2, 32, num_local_experts=8, num_experts_per_tok=4)),
}

HARMLESS = set("""
    architectures model_type transformers_version dtype torch_dtype _name_or_path name_or_path use_cache
    initializer_range attention_dropout max_position_embeddings initial_context_length bos_token_id eos_token_id
    pad_token_id router_aux_loss_coef output_router_logits hidden_act experts_per_token quantization_config
    unsloth_fixed unsloth_version""".split())
NEUTRAL = {"attention_bias": (True,), "tie_word_embeddings": (False,), "rope_type": ("yarn",),
           "swiglu_alpha": (1.702,), "mscale": (1,), "attention_factor": (), "mscale_all_dim": ()}


# ----------------------------------------------------------------------------- config

def is_gpt_oss(folder):
    """Whether a hub folder says that it is a gpt-oss, also in another layout than read_config takes."""
    path = Path(folder) / "config.json"
    if not folder or not path.is_file():
        return False
    hub = read_settings(path)
    parts = [part for part in (hub, hub.get("llm_config"), hub.get("text_config")) if isinstance(part, dict)]
    return FAMILY in [part.get("model_type") for part in parts] or "swiglu_limit" in hub


def read_config(folder):
    """
    The GptOssConfig of a hub folder. Raises UserError, which names the field, where a value is not what is computed
    here, is missing, or cannot be.
    """
    path = Path(folder) / "config.json"
    hub = read_settings(path)
    if hub.get("model_type") != FAMILY:
        whose = "InternVL's, in which a gpt-oss is a part" if "architectures" in hub else "OpenAI's own in original/"
        raise UserError(f"{path}: the layout is {whose}; {WANTED}")
    stored = hub.get("quantization_config") or {"quant_method": "mxfp4"}
    if not isinstance(stored, dict) or stored.get("quant_method") != "mxfp4":
        raise UserError(f"{path}: quantization_config {stored!r:.60} not supported here: OpenAI's MXFP4 is, and "
                        "weights without any")
    for rope in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5
        inner = hub.pop(rope, None) or {}
        if not isinstance(inner, dict) or any(hub.get(name, value) != value for name, value in inner.items()):
            raise UserError(f"{path}: {rope} {inner!r:.80} is no YaRN, or not what is said beside it")
        hub |= inner
    hub.setdefault("truncate", True)  # as transformers takes it
    names = {item.name: item for item in fields(GptOssConfig)}
    missing = [f"no {name}" for name in sorted({*names, "rope_type"} - hub.keys())]
    values = {name: hub[name] for name in names.keys() & hub.keys()}
    wrong = [f"{name} {value!r:.40}" for name, value in values.items() if not fits(value, names[name].type)]
    if not wrong and not missing:
        wrong = [text for bad, text in [
            (len(values["layer_types"]) != values["num_hidden_layers"] or {*values["layer_types"]} - {SLIDING, FULL},
             "layer_types"),
            (values["num_attention_heads"] % values["num_key_value_heads"], "key-value heads do not divide the heads"),
            (values["num_experts_per_tok"] > values["num_local_experts"], "more experts per token than there are"),
            (values["head_dim"] % 2, "head_dim is odd")] if bad]
    unsupported, unknown = odd_fields(hub, HARMLESS | names.keys(), NEUTRAL)
    if refused := refusal(missing + wrong + unsupported, unknown, "gpt-oss as OpenAI has published it is"):
        raise UserError(f"{path}: {refused}")
    return GptOssConfig(**values)


def fits(value, kind):
    """Whether a value of config.json can be what a field of GptOssConfig wants."""
    if kind is tuple:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if kind is bool:
        return isinstance(value, bool)
    return type(value) in ((int, float) if kind is float else (int,)) and 0 < value < 1 << 24


def hub_config(config):
    """A GptOssConfig as the hub's config.json has it, as a dict."""
    values = asdict(config)
    rope = {name: values.pop(name) for name in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings",
                                                "truncate")}
    return {"architectures": ["GptOssForCausalLM"], "model_type": FAMILY, **values, "hidden_act": "silu",
            "attention_bias": True, "tie_word_embeddings": False,
            "max_position_embeddings": round(rope["factor"] * rope["original_max_position_embeddings"]),
            "rope_scaling": {"rope_type": "yarn", **rope}}


# ----------------------------------------------------------------------------- loading

class Head(LowLinear):
    """A head in 16 bits, which is brought to float32 in pieces: whole that of gpt-oss would take 2.3 GB, each time."""

    ROWS = 1 << 14  # of a piece

    def multiply(self, x, transposed=False):
        if x.dtype == torch.bfloat16:
            return super().multiply(x, transposed)
        pieces = self.codes.split(self.ROWS)
        if transposed:
            return sum(part @ piece.to(x.dtype) for part, piece in zip(x.split(self.ROWS, dim=-1), pieces))
        return torch.cat([linear(x, piece.to(x.dtype)) for piece in pieces], dim=-1)


def expert_shapes(config, packed):
    """{name behind "mlp.experts.": shape} of a layer's tensors; packed: in MXFP4."""
    E, C, D = config.num_local_experts, config.hidden_size, config.intermediate_size
    shapes = {}
    for name, rows, columns in (("gate_up_proj", 2 * D, C), ("down_proj", C, D)):
        shapes |= {f"{name}_bias": (E, rows)}
        shapes |= {f"{name}_blocks": (E, rows, columns // BLOCK, BLOCK // 2),
                   f"{name}_scales": (E, rows, columns // BLOCK)} if packed else {name: (E, columns, rows)}
    return shapes


def find_experts(files, config):
    """
    ({key: file} of the experts' tensors, whether they are in MXFP4). Raises UserError where one is unknown, missing,
    repeated or misshapen, which load_exactly tells of all others.
    """
    file_of, shapes, problems = {}, {}, []
    for file in files:
        for key, shape in tensor_shapes(file).items():
            if whose := next((whose for pattern, whose in OTHERS.items() if re.fullmatch(pattern, key)), None):
                raise UserError(f"{file}: {key}: the layout is {whose}; {WANTED}")
            if ".mlp.experts." in key:
                problems += [f"{key} comes twice"] * (key in file_of)
                file_of[key], shapes[key] = file, shape
    packed = any(key.endswith("_blocks") for key in file_of)
    if packed and (config.hidden_size % BLOCK or config.intermediate_size % BLOCK):
        raise UserError(f"{files[0]}: in MXFP4, with sizes in config.json that are no multiples of {BLOCK}")
    wanted = {f"model.layers.{layer}.mlp.experts.{name}": shape for layer in range(config.num_hidden_layers)
              for name, shape in expert_shapes(config, packed).items()}
    problems += [f"{key} is {shapes[key]}, not {wanted[key]}" if key in wanted and key in shapes else
                 f"{key} is missing" if key in wanted else f"{key} is unknown"
                 for key in sorted(wanted.keys() | shapes.keys()) if wanted.get(key) != shapes.get(key)]
    if problems:
        raise UserError(f"{files[0]}: does not fit this model: {'; '.join(problems[:3])}"
                        + f" and {len(problems) - 3} more" * (len(problems) > 3))
    return file_of, packed


def fill_experts(layers, file_of, packed, dtype, device):
    """Fill the experts of all layers from their stacked tensors, of which each expert gets its slice."""
    def read(key):
        tensor, coded = read_tensor(file_of[key], key), key.endswith(("_blocks", "_scales"))
        if tensor.dtype != torch.uint8 if coded else not tensor.is_floating_point():
            raise UserError(f"{file_of[key]}: {key} is {tensor.dtype}, which holds no weights")
        if key.endswith("_scales") and tensor.max() == 255:
            raise UserError(f"{file_of[key]}: {key} has a scale of 255, which stands for no number")
        return tensor.to(device)

    for number, experts in enumerate(layers):
        for matrix in MATRICES:
            key = f"model.layers.{number}.mlp.experts.{matrix}"
            biases = read(f"{key}_bias").to(dtype)
            if packed:
                blocks, scales = read(f"{key}_blocks"), read(f"{key}_scales")
            else:
                weights = read(key).transpose(1, 2)  # (E, out, in)
            for e, expert in enumerate(experts):
                linear = getattr(expert, matrix)
                linear.bias = nn.Parameter(biases[e], linear.bias.requires_grad)
                if packed and isinstance(linear, MXLinear):
                    linear.hold(blocks[e], scales[e])
                elif hasattr(linear, "store"):
                    linear.store(decode(blocks[e], scales[e], torch.bfloat16) if packed else weights[e])
                else:
                    linear.weight = nn.Parameter(decode(blocks[e], scales[e], dtype) if packed else
                                                 weights[e].to(dtype).contiguous())


def load_gpt_oss(folder, dtype=torch.float32, device="cpu", lora=None, bits=0, trained=False):
    """
    A gpt-oss from a hub folder. dtype: of what is no expert's matrix in MXFP4, which stays as it is, unless it is
    trained. bits: of the experts' matrices, see quantize.py, where 4 leave MXFP4 as it is, too; attention, embeddings
    and head have 16 then. lora: the settings of its LoRA, newly made, if it is to have one.

    Raises UserError as read_config and load_exactly do.
    """
    folder = Path(folder)
    config, files = read_config(folder), language_files(folder)
    if config.num_hidden_layers > sum(len(tensor_shapes(file)) for file in files):
        raise UserError(f"{folder}/config.json: {config.num_hidden_layers} layers are more than the tensors beside it")
    file_of, packed = find_experts(files, config)
    with on_meta():
        model = GptOss(config).to(dtype)
        layers = [block.mlp.experts for block in model.blocks]
        for block in model.blocks:
            block.mlp.experts = nn.ModuleList()  # filled by themselves below
            store_low(block.self_attn, bits and 16)
        if bits:
            model.model.embed_tokens.to(torch.bfloat16).register_forward_hook(lambda module, tokens, x: x.to(dtype))
            model.lm_head = Head(model.lm_head, 16)
        for expert in [expert for experts in layers for expert in experts]:
            if packed and bits in (0, 4) and not trained:
                for matrix in MATRICES:
                    setattr(expert, matrix, MXLinear(getattr(expert, matrix)))
            else:
                store_low(expert, bits)
    load_exactly(model, files, None, device, dropped=EXPERTS)
    if str(device) != "meta":
        fill_experts(layers, file_of, packed, dtype, device)
    for block, experts in zip(model.blocks, layers):
        block.mlp.experts = experts
    if lora:
        add_lora(model, **lora)
    return model


def save_gpt_oss(module, folder):
    """Write a gpt-oss whose experts are plain as a hub folder, which transformers reads."""
    folder.mkdir(exist_ok=True)
    state = tensors_of(module)
    names = plain_names(state)
    tensors = {name: state[inside] for name, inside in names.items() if ".experts." not in name}
    for number in range(module.config.num_hidden_layers):
        prefix = f"model.layers.{number}.mlp.experts."
        for matrix in MATRICES:
            weights, biases = ([state[names[f"{prefix}{e}.{matrix}.{kind}"]]
                                for e in range(module.config.num_local_experts)] for kind in ("weight", "bias"))
            tensors[prefix + matrix] = torch.stack(weights).transpose(1, 2).contiguous()  # (E, in, out)
            tensors[f"{prefix}{matrix}_bias"] = torch.stack(biases)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sort_metadata(folder / "model.safetensors")
    write_settings(folder / "config.json", hub_config(module.config))
