"""
How a Qwen3-VL lies in files: the hub's folder, as the checkpoints of Qwen and MedMO and transformers have it,
and what a run of train_vlm.py keeps of one.

    config.json, preprocessor_config.json     sizes, and how many pixels an image may have
    model*.safetensors                        model.visual.*, model.language_model.*, lm_head.weight if not tied

Nothing is assumed: a value that is not what qwen3_vl.py computes, a field that nobody here knows, and a size
that is missing stop loading, by name.
"""

from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from lora import add_lora
from model import VLM
from plumbing.claims import odd_fields, refusal
from plumbing.files import read_settings, write_settings
from plumbing.flags import UserError
from plumbing.tensors import language_files, load_exactly, on_meta, read_tensor, tensor_shapes
from quantize import store_low
from zoo.qwen3_vl import Mergers, Text, TextConfig, Vision, VisionConfig

FAMILY = "qwen3_vl"
MERGERS = r"model\.visual\.(merger|deepstack_merger_list)\."
# part -> its class, what stands before its names in the checkpoint, and the checkpoint's keys that are not its own
PARTS = {"vision": (Vision, "model.visual.", rf"(?!model\.visual\.).*|{MERGERS}.*"),
         "projector": (Mergers, "model.visual.", rf"(?!{MERGERS}).*"),
         "language": (Text, "", r"model\.visual\..*")}

CONFIGS = {  # name -> sizes of models that are made here, for any tokenizer
    "qwen_sample": (VisionConfig(4, 128, 344, 2, num_position_embeddings=196, out_hidden_size=128,
                                 deepstack_visual_indexes=(0, 1, 2), min_pixels=1024),
                    TextConfig(512, 128, 344, 4, 2, 2, head_dim=64, rope_theta=1e4, mrope_section=(12, 10, 10))),
    "qwen_small": (VisionConfig(4, 192, 768, 3, num_position_embeddings=196, out_hidden_size=256,
                                deepstack_visual_indexes=(1, 2), min_pixels=1024),
                   TextConfig(32000, 256, 616, 5, 4, 2, head_dim=64, rope_theta=1e4, mrope_section=(12, 10, 10))),
}

HARMLESS = set("""
    architectures model_type transformers_version dtype torch_dtype _name_or_path name_or_path use_cache
    initializer_range attention_dropout max_position_embeddings bos_token_id eos_token_id pad_token_id
    image_token_id video_token_id vision_start_token_id vision_end_token_id tie_word_embeddings
    unsloth_fixed unsloth_version""".split())
TEXT_NEUTRAL = {"hidden_act": ("silu",), "attention_bias": (False,), "model_type": ("qwen3_vl_text",),
                "use_sliding_window": (False,), "rope_type": ("default",), "mrope_interleaved": (True,)}
VISION_NEUTRAL = {"hidden_act": ("gelu_pytorch_tanh",), "in_channels": (3,), "temporal_patch_size": (2,),
                  "rope_theta": (10000,), "rope_type": ("axial", "default")}
PIXELS_NEUTRAL = {"image_mean": ([0.5] * 3,), "image_std": ([0.5] * 3,), "resample": (3,), "do_resize": (True,),
                  "do_rescale": (True,), "do_normalize": (True,), "do_convert_rgb": (True,),
                  "rescale_factor": (1 / 255,), "temporal_patch_size": (2,)}


# ----------------------------------------------------------------------------- configs

def is_qwen(folder):
    """Whether a hub folder says that it is a Qwen3-VL."""
    path = Path(folder) / "config.json"
    return bool(folder) and path.is_file() and read_settings(path).get("model_type") == FAMILY


def read_section(kind, section, neutral, harmless, path):
    """A VisionConfig or TextConfig of a section of config.json. Raises UserError as read_config does."""
    section = dict(section)
    for rope in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5
        section |= section.pop(rope, None) or {}
    section.setdefault("rope_type", section.pop("type", "default"))
    names = {item.name: item for item in fields(kind)}
    needed = names.keys() - {"tie_word_embeddings", "min_pixels", "max_pixels"}
    missing = [f"no {name}" for name in sorted(needed - section.keys())]
    values = {name: tuple(section[name]) if isinstance(section[name], list) else section[name]
              for name in needed & section.keys()}
    wrong = [f"{name} {value!r:.40}" for name, value in values.items()
             if not all(type(number) in (int, float) and 0 <= number < 1 << 24
                        for number in (value if type(value) is tuple else (value,)))
             or type(value) is not names[name].type and not (names[name].type is float and type(value) is int)]
    unsupported, unknown = odd_fields(section, HARMLESS | names.keys() | harmless, neutral)
    if refused := refusal(missing + wrong + unsupported, unknown, "Qwen3-VL as its first checkpoints have it is"):
        raise UserError(f"{path}: {refused}")
    return kind(**values)


def read_config(folder):
    """
    (VisionConfig, TextConfig) of a hub folder. Raises UserError, which names the field, where a value is not
    what is computed here, is missing, or cannot be.
    """
    folder, path = Path(folder), Path(folder) / "config.json"
    hub = read_settings(path)
    sections = {name: hub.pop(f"{name}_config", None) for name in ("vision", "text")}
    if hub.get("model_type") != FAMILY or not all(isinstance(section, dict) for section in sections.values()):
        raise UserError(f"{path}: not of a Qwen3-VL")
    tied = {bool(said) for where in (hub, sections["text"])
            if (said := where.get("tie_word_embeddings")) is not None}
    unsupported, unknown = odd_fields(hub, HARMLESS, {})
    problems = ["tie_word_embeddings is not one value" if len(tied) != 1 else "", *unsupported, *unknown]
    vision = read_section(VisionConfig, sections["vision"], VISION_NEUTRAL, {"model_type"}, path)
    text = read_section(TextConfig, sections["text"], TEXT_NEUTRAL, set(), path)
    text.tie_word_embeddings = True in tied
    taps = vision.deepstack_visual_indexes
    problems += [message for wrong, message in [
        (vision.out_hidden_size != text.hidden_size, "out_hidden_size is not the text's hidden_size"),
        (vision.hidden_size % (4 * vision.num_heads or 1), "hidden_size / num_heads of the tower is no multiple of 4"),
        (round(vision.num_position_embeddings ** 0.5) ** 2 != vision.num_position_embeddings,
         "num_position_embeddings is no square"),
        (sorted({*taps}) != [*taps] or max(taps, default=0) >= vision.depth,
         "deepstack_visual_indexes are no blocks in order"),
        (len(taps) > text.num_hidden_layers, "DeepStack has more layers than the text"),
        (text.num_attention_heads % text.num_key_value_heads, "key-value heads do not divide the heads"),
        (len(text.mrope_section) != 3 or 2 * sum(text.mrope_section) != text.head_dim,
         "mrope_section does not fill half a head")] if wrong]
    if problems := list(filter(None, problems)):
        raise UserError(f"{path}: {'; '.join(problems[:4])}")
    return replace(vision, **read_limits(folder, vision)), text


def read_limits(folder, vision):
    """{"min_pixels", "max_pixels"} by what lies beside config.json. UserError where that reads images otherwise."""
    path = next((path for name in ("preprocessor_config.json", "processor_config.json")
                 if (path := folder / name).is_file()), None)
    if path is None:
        print(f"{folder}: no preprocessor_config.json; an image may have as many pixels as Qwen3-VL's own say")
        return {}
    settings = read_settings(path)
    settings = settings.get("image_processor", settings)
    size = settings.get("size") or {}
    limits = [size.get("shortest_edge", settings.get("min_pixels")),
              size.get("longest_edge", settings.get("max_pixels"))]
    wrong = [f"{name} {settings[name]!r:.60}" for name, good in PIXELS_NEUTRAL.items()
             if settings.get(name) is not None and not any(
                 torch.allclose(torch.tensor(settings[name], dtype=torch.float64),
                                torch.tensor(value, dtype=torch.float64)) for value in good)]
    wrong += [f"{name} {settings[name]!r:.20}" for name, here in (
        ("patch_size", vision.patch_size), ("merge_size", vision.spatial_merge_size))
        if settings.get(name, here) != here]
    if wrong or not all(type(limit) is int and limit > 0 for limit in limits):
        raise UserError(f"{path}: {', '.join(wrong) or 'how many pixels an image may have'} not supported here")
    return dict(zip(("min_pixels", "max_pixels"), limits))


def write_config(folder, vision, text):
    """Write config.json and preprocessor_config.json as the hub has them, and transformers reads them."""
    limits = {"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels}
    tower = {name: value for name, value in asdict(vision).items() if name not in ("min_pixels", "max_pixels")}
    decoder = {name: value for name, value in asdict(text).items()
               if name not in ("rope_theta", "mrope_section", "tie_word_embeddings")}
    write_settings(folder / "config.json", {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": FAMILY,
        "tie_word_embeddings": text.tie_word_embeddings,
        "vision_config": tower | {"model_type": FAMILY, "hidden_act": "gelu_pytorch_tanh", "in_channels": 3,
                                  "temporal_patch_size": 2},
        "text_config": decoder | {
            "model_type": "qwen3_vl_text", "hidden_act": "silu", "attention_bias": False,
            "rope_theta": text.rope_theta, "max_position_embeddings": 262144,
            "rope_scaling": {"rope_type": "default", "mrope_section": text.mrope_section, "mrope_interleaved": True}}})
    write_settings(folder / "preprocessor_config.json", {
        "size": limits, "patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "Qwen2VLImageProcessorFast"})


# ----------------------------------------------------------------------------- loading

def load_part(part, config, source, dtype, device, bits=0):
    """
    A part of a Qwen3-VL, `part` a key of PARTS, from a hub folder of the whole, or from a file of its own. dtype: of
    its tensors. bits: of its matrices, see quantize.py, and the embeddings and the head have 16 then; 0: all are in
    dtype. Raises UserError as load_exactly does.
    """
    kind, prefix, dropped = PARTS[part]
    own = Path(source).is_file()
    files = [source] if own else language_files(Path(source))
    with on_meta():
        module = kind(config).to(dtype)
        if bits and part == "language":
            module.model.language_model.embed_tokens.to(torch.bfloat16)
            store_low(module, 16)  # the head, of what stays so
        store_low(module if part == "projector" else module.blocks, bits)
    if part == "language" and config.tie_word_embeddings:
        for file in files:
            if "lm_head.weight" in tensor_shapes(file):
                require_tied(files, file)
                dropped += r"|lm_head\.weight"
    return load_exactly(module, files, None, device, prefix="" if own else prefix,
                        dropped=r"(?!)" if own else dropped)


def require_tied(files, file):
    """Raise UserError where a checkpoint's head is not its embeddings, though its config says that they are one."""
    name = "model.language_model.embed_tokens.weight"
    embedded = next(file for file in files if name in tensor_shapes(file))
    if not torch.equal(read_tensor(file, "lm_head.weight"), read_tensor(embedded, name)):
        raise UserError(f"{file}: lm_head.weight is not the embeddings, though config.json says tie_word_embeddings")


def refuse_split(split):
    """Raise UserError for weights.build_vlm's split."""
    if split:
        raise UserError("--shard=true: processes do not split a Qwen3-VL; leave it out")


def load_qwen(sources, dtype, device, trained=(), bits=0, split=None):
    """
    A VLM whose parts come from `sources`, {part: the hub folder of all, or a file of its own}; the config from
    the language part's folder. Parts in `trained` are to be trained in full: in float32, whatever dtype and bits.
    """
    refuse_split(split)
    vision_config, text_config = read_config(sources["language"])
    configs = {"vision": vision_config, "projector": vision_config, "language": text_config}
    parts = {part: load_part(part, config, sources[part], device=device, **(
        {"dtype": torch.float32} if part in trained else {"dtype": dtype, "bits": bits}))
        for part, config in configs.items()}
    return VLM(**parts)


def build_qwen(name, vocab_size, folder, dtype, device, lora=None, split=None, trained=(), bits=0):
    """
    The VLM of a hub folder, or, without one, a random one of CONFIGS[name], for a tokenizer of so many
    tokens; the rest as weights.build_vlm takes it.
    """
    refuse_split(split)
    if folder:
        model = load_qwen(dict.fromkeys(PARTS, folder), dtype, device, trained, bits)
    elif bits:
        raise UserError(f"--base_bits={bits}: no base; name the folder of one with --model or --start")
    else:
        vision, text = CONFIGS[name]
        with torch.device(device):
            model = VLM(Vision(vision), Text(replace(text, vocab_size=vocab_size)).to(dtype), Mergers(vision))
    if model.language.config.vocab_size < vocab_size:
        raise UserError(f"{folder}: its {model.language.config.vocab_size} tokens are fewer than the tokenizer's "
                        f"{vocab_size}; prepare with its own tokenizer")
    if lora:
        add_lora(model.language, **lora)
        model.lora["language"] = lora
    return model
