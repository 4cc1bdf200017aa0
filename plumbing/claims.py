"""
What a file from elsewhere says of itself, held against what is computed here.

Names and shapes of tensors do not tell a LLaMA from a Gemma, heads of 64 channels from heads of 80, or
quick GELU from GELU. The config beside the tensors does. Each of its fields is read, or known to change
no number, or has to have a neutral value; a field that is none of these is refused by name, because what
it does is not known here. Nothing here raises: what is wrong comes back in words, for the caller to refuse.
"""

import json
import math
import re
from pathlib import Path

from plumbing.files import read_settings
from plumbing.flags import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1"


def lfs_pointer(file):
    """A line if a file (a path, or its content) is what git-lfs leaves in place of one; else ""."""
    start = file
    if isinstance(file, (str, Path)):
        try:
            with open(file, "rb") as content:
                start = content.read(len(POINTER))
        except (OSError, ValueError):  # no file, or a name that no disk takes
            return ""
    return ("a git-lfs pointer, not the file; run `git lfs pull` in its repository or fetch the file itself"
            if start.startswith(POINTER) else "")


def odd_fields(config, harmless, neutral):
    """
    (unsupported, unknown): texts about the fields of a config that are neither harmless nor neutral.

    harmless: names whose values change no number; neutral: {name: values that change none}. Null, {},
    [] and "" are neutral under any name.
    """
    unsupported, unknown = [], []
    for name, value in config.items():
        if name in harmless or value is None or value in ({}, [], "") or value in neutral.get(name, ()):
            continue
        (unsupported if name in neutral else unknown).append(f"{name} {json.dumps(value):.60}")
    return unsupported, unknown


def refusal(unsupported, unknown, supported):
    """One line on what a config has that is not done here; "" if it has nothing such."""
    parts = [f"{', '.join(unsupported[:6])} not supported here: {supported}"] if unsupported else []
    parts += [f"{', '.join(unknown[:6])} not known here; a field that changes no number may be deleted"
              ] if unknown else []
    return "; ".join(parts)


# ----------------------------------------------------------------------------- LLaMA's config.json

LLAMAS = {"llama": ("LlamaForCausalLM", "LLaMAForCausalLM"), "mistral": ("MistralForCausalLM",)}
LLAMA_HARMLESS = set("""
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    rms_norm_eps rope_theta rope_parameters rope_scaling head_dim hidden_act attention_multiplier
    layer_types architectures model_type
    _name_or_path name_or_path _commit_hash transformers_version torch_dtype dtype use_bfloat16 torchscript
    _attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled
    tf_legacy_loss use_cache return_dict output_hidden_states output_attentions is_decoder
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    max_position_embeddings max_sequence_length initializer_range attention_dropout pretraining_tp
    chunk_size_feed_forward max_window_layers id2label label2id num_labels problem_type finetuning_task
    tokenizer_class prefix task_specific_params is_llama_config unsloth_fixed unsloth_version
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids
    encoder_no_repeat_ngram_size num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens""".split())
LLAMA_NEUTRAL = dict.fromkeys("""
    mlp_bias qkv_bias use_bias use_qkv_bias lm_head_bias use_sliding_window is_encoder_decoder
    add_cross_attention tie_encoder_decoder rope_interleaved use_qk_norm qk_norm qk_layernorm
    use_parallel_residual""".split(), (False,)) | dict.fromkeys("""
    partial_rotary_factor rotary_pct embedding_multiplier residual_multiplier logits_scaling
    logit_scale""".split(), (1,)) | dict.fromkeys("""
    sliding_window quantization_config no_rope_layers attn_logit_softcapping final_logit_softcapping
    clip_qkv auto_map tie_word_embeddings attention_bias""".split(), ())


def llama_refusal(config, head_size):
    """
    Why a config.json is not of LLaMA's mathematics, in one line; "" if it is.

    config: its content; head_size: channels of a head, as its sizes give them.
    """
    supported = "LLaMA 1 and 2, PMC-LLaMA and TinyLlama are"
    family, classes = config.get("model_type"), config.get("architectures") or []
    classes = list(map(str, classes)) if isinstance(classes, list) else [str(classes)]
    if family is None and classes:
        family = next((name for name in LLAMAS if classes[0] in LLAMAS[name]), None)
    if family is None and not classes:
        return f"neither model_type nor architectures say what it is; {supported} supported"
    if not isinstance(family, str) or family not in LLAMAS or not {*classes} <= {*LLAMAS[family]}:
        fields = [f"model_type {config['model_type']!r:.60}"] if config.get("model_type") else []
        fields += [f"architectures {', '.join(classes):.80}"] if classes else []
        return f"{' with '.join(fields)} not supported here: {supported}"
    if family == "mistral" and (config.get("sliding_window", 4096) or not config.get("num_key_value_heads")):
        return ("a mistral whose sliding_window is not null, or without num_key_value_heads, not supported "
                f"here: {supported}")
    odd = [text for wrong, text in [
        (config.get("tie_word_embeddings"), "tied embeddings (tie_word_embeddings)"),
        (config.get("attention_bias"), "biases (attention_bias)")] if wrong] + rope_oddities(config)
    if (config.get("hidden_act") or "silu") not in ("silu", "swish"):
        odd.append(f"activation {config['hidden_act']!r:.40}".replace("'", ""))
    scale = config.get("attention_multiplier")
    if scale is not None and not (isinstance(scale, (int, float)) and math.isclose(scale, head_size ** -0.5)):
        odd.append(f"attention_multiplier {scale!r:.40}")
    types = config.get("layer_types") or []
    if not isinstance(types, list) or {*map(str, types)} - {"full_attention"}:
        odd.append(f"layer_types {types!r:.60}")
    said = LLAMA_HARMLESS | {"tie_word_embeddings", "attention_bias"}
    unsupported, unknown = odd_fields(config, said, LLAMA_NEUTRAL)
    return refusal(odd + unsupported, unknown, supported)


def rope_oddities(config):
    """Texts on what a config.json's rotary embedding has that LLaMA's has not."""
    odd, thetas = [], [config.get("rope_theta")]
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.get(field) or {}
        if not isinstance(rope, dict):
            odd.append(f"{rope!r:.40} rope".replace("'", ""))
            continue
        kind = rope.get("rope_type", rope.get("type")) or "default"
        if kind != "default":
            odd.append(f"{kind!r:.40} rope".replace("'", ""))
            continue
        thetas.append(rope.get("rope_theta"))
        unsupported, unknown = odd_fields(rope, {"rope_type", "type", "rope_theta"}, LLAMA_NEUTRAL)
        odd += [f"{field}: {text}" for text in unsupported + unknown]
    thetas = [theta for theta in thetas if theta is not None]
    if any(theta != thetas[0] for theta in thetas):
        odd.append(f"rope_theta {' and '.join(map(str, thetas)):.60} at once")
    return odd


# ----------------------------------------------------------------------------- PEFT's adapter_config.json

LORA_HARMLESS = set("""
    r lora_alpha lora_dropout target_modules task_type auto_mapping peft_version base_model_name_or_path
    revision inference_mode megatron_core qalora_group_size runtime_config target_parameters""".split())
EXPERTS = re.compile(r"(?:mlp\.)?experts\.(gate_up_proj|down_proj)")  # of all layers, of target_parameters
LORA_NEUTRAL = dict.fromkeys("""
    fan_in_fan_out use_rslora use_dora lora_bias use_qalora use_bdlora ensure_weight_tying
    """.split(), (False,)) | dict.fromkeys("""
    exclude_modules modules_to_save layers_to_transform layers_pattern rank_pattern alpha_pattern
    megatron_config trainable_token_indices loftq_config eva_config corda_config lora_ga_config
    velora_config alora_invocation_tokens monteclora_config layer_replication arrow_config
    kasa_config""".split(), ()) | {
    "peft_type": ("LORA",), "bias": ("none",),
    # Others (pissa, olora, corda, loftq, ...) change the base's own weights before training
    "init_lora_weights": (True, False, "gaussian", "orthogonal")}


def lora_refusal(config):
    """Why an adapter_config.json is not of plain LoRA, in one line; "" if it is."""
    unsupported, unknown = odd_fields(config, LORA_HARMLESS, LORA_NEUTRAL)
    if isinstance(config.get("target_modules"), str):
        unsupported.append("target_modules as a pattern")
    experts = config.get("target_parameters") or []
    if not isinstance(experts, list) or not all(EXPERTS.fullmatch(str(name)) for name in experts):
        unsupported.append(f"target_parameters {json.dumps(experts):.60} other than those of all layers' experts")
    return refusal(unsupported, unknown, "plain LoRA is")


def read_adapter_config(folder):
    """
    The add_lora settings of an adapter folder, ours or PEFT's.

    Raises UserError when it is absent or uses what lora.py does not do.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{path}: not there; an adapter folder has it beside adapter_model.safetensors")
    config = read_settings(path)
    if refused := lora_refusal(config):
        raise UserError(f"{path}: {refused}")
    r, alpha, dropout = (config.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    targets, experts = config.get("target_modules"), config.get("target_parameters") or []
    targets = [] if targets is None and experts else targets
    sound = {"target_modules": isinstance(targets, list) and all(isinstance(t, str) for t in targets),
             "r": type(r) is int and 0 < r < 1 << 16,
             "lora_alpha": type(alpha) in (int, float) and abs(alpha) < 1e9,
             "lora_dropout": type(dropout) in (int, float) and 0 <= dropout < 1}
    if not all(sound.values()):
        wrong = ", ".join(f"{key} {config.get(key)!r:.50}" for key in sound if not sound[key])
        raise UserError(f"{path}: {wrong} cannot be")
    targets = sorted({*targets, *(EXPERTS.fullmatch(name)[1] for name in experts)})
    return {"targets": ",".join(targets), "r": r, "alpha": alpha, "dropout": dropout}


# ----------------------------------------------------------------------------- a ViT's config

# timm's names of sizes -> width, heads
VIT_SIZES = {"xsmall": (256, 4), "tiny": (192, 3), "small": (384, 6), "medium": (512, 8),
             "betwixt": (640, 10), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16),
             "giant": (1408, 16), "gigantic": (1664, 16), "so400m": (1152, 16)}
KNOWN_WIDTHS = (128, 192, 384, 768, 1024)  # in heads of 64 wherever they are: the sample's, Ti, S, B, L
TIMM_VIT = re.compile(r"(?:vit|deit)_([a-z]+|so400m)_patch\d+(_clip|_siglip)?(_quickgelu)?_\d+"
                      r"(?:_in21k|_dino)?(?:\..*)?")
TIMM_HARMLESS = set("""
    img_size patch_size embed_dim depth num_heads act_layer num_classes global_pool pre_norm drop_rate
    pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate weight_init fix_init
    dynamic_img_size dynamic_img_pad strict_img_size""".split())
TIMM_NEUTRAL = dict.fromkeys("class_token qkv_bias proj_bias".split(), (True,)) | dict.fromkeys(
    "no_embed_class fc_norm qk_norm scale_attn_norm scale_mlp_norm".split(), (False,)) | dict.fromkeys(
    """init_values norm_layer embed_norm_layer block_fn mlp_layer attn_layer embed_layer
    pos_embed_ft""".split(), ()) | {
    "reg_tokens": (0,), "mlp_ratio": (4,), "pos_embed": ("learn",), "in_chans": (3,)}
OPEN_CLIP_HARMLESS = set("""
    image_size patch_size width layers head_width patch_dropout pool_type output_tokens
    timm_model_name timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path
    final_ln_after_pool global_average_pool""".split())
OPEN_CLIP_NEUTRAL = dict.fromkeys(
    "attentional_pool attn_pooler no_ln_pre input_patchnorm".split(), (False,)) | dict.fromkeys(
    "ls_init_value norm_kwargs act_kwargs block_type".split(), ()) | {
    "mlp_ratio": (4,), "pos_embed_type": ("learnable",)}


def timm_facts(config):
    """What timm's config says of a ViT, and what in it is not done here."""
    name, arguments = str(config["architecture"]), config.get("model_args") or {}
    match = TIMM_VIT.fullmatch(name)
    if not match or not isinstance(arguments, dict):
        return {}, f"architecture {name!r:.80} not supported here: timm's plain ViTs are"
    size, kind, quick = match.groups()
    width, heads = VIT_SIZES.get(size, (None, None))
    clip, siglip = kind == "_clip", kind == "_siglip"
    facts = {"width": arguments.get("embed_dim", width), "heads": arguments.get("num_heads", heads),
             "depth": arguments.get("depth"), "clip": bool(arguments.get("pre_norm", clip)), "siglip": siglip,
             "eps": 1e-5 if clip else 1e-6,
             "activation": arguments.get("act_layer") or ("quick_gelu" if quick else "gelu")}
    tag = str((config.get("pretrained_cfg") or {}).get("tag", name.partition(".")[2]))
    if (siglip or clip and not quick and tag == "openai") and not arguments.get("act_layer"):
        del facts["activation"]  # timm computes OpenAI's and SigLIP's weights with the exact GELU under these names
    if siglip and "mlp_ratio" in arguments:
        facts["MLP width"] = int(facts["width"] * arguments["mlp_ratio"])  # as timm rounds it
    if "final_norm" in arguments:
        facts["last norm"] = arguments["final_norm"]  # none is behind the block that --vision_layer takes
    told = {"final_norm"} | ({"mlp_ratio"} if siglip else set())
    neutral = TIMM_NEUTRAL | {"class_token": (False,)} if siglip else TIMM_NEUTRAL
    return facts, refusal(*odd_fields(arguments, TIMM_HARMLESS | told, neutral), "timm's plain ViTs are")


def open_clip_facts(config):
    """The same of open_clip's config."""
    model = config.get("model_cfg", config)
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(vision, dict):
        return {}, "no vision_cfg in it"
    wrong = refusal(*odd_fields(vision, OPEN_CLIP_HARMLESS, OPEN_CLIP_NEUTRAL), "CLIP's plain ViTs are")
    if name := vision.get("timm_model_name"):
        facts, more = timm_facts({"architecture": name})
        return facts, more or wrong
    width, head = vision.get("width", 768), vision.get("head_width", 64)
    return {"width": width, "heads": width // head, "depth": vision.get("layers"), "clip": True, "eps": 1e-5,
            "activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}, wrong


def hub_facts(config):
    """The same of transformers' config of a CLIP, a SigLIP or a ViT, which last has timm's names in our files."""
    family = config["model_type"]
    if family not in ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "vit", "deit"):
        return {}, f"model_type {family!r:.60} not supported here: timm's, CLIP's and SigLIP's plain ViTs are"
    vision, clip, siglip = config.get("vision_config") or config, "clip" in family, family.startswith("siglip")
    if vision.get("qkv_bias", True) is not True:
        return {}, "qkv_bias false not supported here: plain ViTs are"
    activation = vision.get("hidden_act", "quick_gelu" if clip else "gelu_pytorch_tanh" if siglip else "gelu")
    return {"width": vision.get("hidden_size", 768), "heads": vision.get("num_attention_heads", 12),
            "depth": vision.get("num_hidden_layers", 12), "clip": clip, "siglip": siglip,
            "MLP width": vision.get("intermediate_size"), "patch size": vision.get("patch_size"),
            "image_size": vision.get("image_size"),
            "eps": vision.get("layer_norm_eps", 1e-5 if clip else 1e-6 if siglip else 1e-12),
            "activation": "gelu_tanh" if activation == "gelu_pytorch_tanh" else activation}, ""


def vit_facts(file, metadata):
    """
    ({fact: value}, problem) that a ViT's file and the configs beside it tell: width, heads, depth, clip
    (a norm before the blocks), siglip (no class token), eps, activation, image_size and more, those that are told.
    problem: one line, "" for none.

    metadata: the file's own, of safetensors; config.json is timm's or transformers', and
    open_clip_config.json open_clip's. A config.json of another kind, as a checkpoint's, tells nothing.
    """
    sources = [("its metadata", {name: int(metadata[name]) if metadata[name].isdecimal() else metadata[name]
                                 for name in ("heads", "activation", "image_size") if name in metadata})]
    for name in ("config.json", "open_clip_config.json"):
        path = Path(file).parent / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("no JSON object")
            read = (open_clip_facts if name.startswith("open") else timm_facts if "architecture" in config
                    else hub_facts if "model_type" in config else lambda config: ({}, ""))
            facts, problem = read(config)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError, ZeroDivisionError) as error:
            return {}, f"{path}: damaged, or no config of a ViT ({error})"
        if problem:
            return {}, f"{path}: {problem}"
        sources.append((name, facts))
    claims = {}  # fact -> (value, who says so)
    for who, facts in sources:
        for fact, value in facts.items():
            if value is not None and claims.setdefault(fact, (value, who))[0] != value:
                return {}, f"{fact} is {claims[fact][0]!r:.40} by {claims[fact][1]}, {value!r:.40} by {who}"
    return {fact: value for fact, (value, _) in claims.items()}, ""


def vit_problem(facts, here):
    """
    What vit_facts tells that tensors or our code contradict, or what nobody tells; "" if all is known. here: what
    the tensors tell: width, depth, clip, siglip, patch size and patches, along a side, among it.
    """
    width, clip, siglip, write = here["width"], here["clip"], here["siglip"], "write beside it, as config.json,"
    for fact, value in here.items():
        if facts.get(fact, value) != value:
            return f"{fact} is {facts[fact]!r:.40} by the config beside it, {value} by its tensors"
    P, side = here["patch size"], here["patches"]
    image_size = facts.get("image_size", side * P)
    if type(image_size) is not int or image_size // P != side:
        return f"image_size is {image_size!r:.40} by the config beside it, {side} patches of {P} pixels by its tensors"
    if facts.get("eps", 1e-5 if clip else 1e-6) != (1e-5 if clip else 1e-6):
        return f"a norm's eps of {facts['eps']!r:.40} not supported here: {1e-5 if clip else 1e-6} is"
    done = ("gelu_tanh",) if siglip else ("gelu", "quick_gelu")
    if facts.get("activation", done[0]) not in done:
        return f"activation {facts['activation']!r:.60} not supported here: {' and '.join(done)}, no other"
    if siglip and (clip or not {"heads", "activation"} <= facts.keys()):
        return ("no class token, but nothing says that it is a SigLIP, of how many heads; "
                f'{write} {{"model_type": "siglip_vision_model", "hidden_size": {width}, "num_hidden_layers": '
                f'{here["depth"]}, "num_attention_heads": ..., "image_size": ...}}, of so400m-patch14-384 16 and 384')
    if "heads" not in facts and width not in KNOWN_WIDTHS:
        return (f"how many heads its {width} channels have is not known; {write} "
                f'{{"architecture": "vit_base_patch16{"_clip" * clip}_224", "model_args": {{"embed_dim": '
                f'{width}, "num_heads": ...}}}}')
    heads = facts.get("heads", width // 64)
    if type(heads) is not int or heads < 1 or width % heads:
        return f"{heads!r:.40} heads of {width} channels cannot be"
    if clip and "activation" not in facts:
        return ("whether its activation is OpenAI's quick GELU or LAION's plain one is not known; "
                f'{write} {{"architecture": "vit_base_patch32_clip_quickgelu_224"}} or, for the plain one, '
                '{"architecture": "vit_base_patch32_clip_224"}, with "model_args": {"embed_dim": '
                f'{width}}} if it is not base; what prepare/all.py makes anew says it itself')
    return ""


# ----------------------------------------------------------------------------- tokenizers

def pieces_beside(folder):
    """
    ({id: piece}, file name) of the tokenizer in a hub folder; (None, why) where none can be read.
    """
    import sentencepiece

    path, other = Path(folder) / "tokenizer.model", Path(folder) / "tokenizer.json"
    try:
        if path.is_file():
            model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            return {n: model.id_to_piece(n) for n in range(model.get_piece_size())}, path.name
        if other.is_file():
            content = json.loads(other.read_text(encoding="utf-8"))
            pieces = {number: piece for piece, number in content["model"]["vocab"].items()}
            return pieces | {row["id"]: row["content"] for row in content.get("added_tokens", ())}, other.name
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, RecursionError):
        name = path if path.is_file() else other
        return None, f"{name.name} cannot be read{f': {lfs_pointer(name)}' if lfs_pointer(name) else ''}"
    return None, "no tokenizer.model or tokenizer.json beside it"


def tokenizer_mismatch(folder, pieces):
    """
    (problem, unknown) of a language model's folder and the pieces, by id, that shards were made with: at
    which id its own tokenizer has another piece, or why that is not known; "" for what is not so.
    """
    own, source = pieces_beside(folder)
    if own is None:
        return "", source
    wrong = next((n for n in range(len(pieces)) if own.get(n) != pieces[n]), None)
    if wrong is None:
        return "", ""
    readable = source == "tokenizer.model" or any(  # as zoo/chatml.py knows them
        piece in own.values() for piece in ("<|im_start|>", "<|channel|>"))
    remedy = f"--tokenizer={folder}/{source}" if readable else "--tokenizer=<its tokenizer.model>"
    return (f"{folder}/{source}: id {wrong} is {own.get(wrong)!r:.40} there, {pieces[wrong]!r:.40} in the "
            f"shards' tokenizer; prepare the data anew with `python prepare/all.py --only=... {remedy}`"), ""
