"""
CheXbert (Smit et al. 2020, arXiv 2004.09167): a BERT that says which of CheXpert's 14 findings a report mentions.

BERT-base reads a report of up to 512 word pieces; on its [CLS] output stand 13 linear heads with four classes, a
finding is not mentioned, positive, negative or uncertain, and one with two, "No Finding" or not. The weights are the
user's own: a folder with chexbert.pth, as github.com/stanfordmlgroup/CheXbert gives it out, or the same tensors as
chexbert.safetensors, and bert-base-uncased's vocab.txt. Nothing in chexbert.pth is run when it is loaded.

Modules carry the names of the file's keys. Letters: B reports, T word pieces, C width, nh heads of 64 channels.
"""

import pickle
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import BertWordPieceTokenizer

from plumbing.flags import UserError
from plumbing.kernels import Linear
from plumbing.tensors import on_meta
from tasks.findings import FINDINGS

STATUSES = ("", "positive", "negative", "uncertain")  # by class
LONGEST = 512  # word pieces, [CLS] and [SEP] among them
HEAD, EPSILON = 64, 1e-12
DROPPED = re.compile(r"bert\.pooler\..*|bert\.embeddings\.position_ids")  # what the heads do not look at
FILES = ("chexbert.pth", "chexbert.safetensors")


# ----------------------------------------------------------------------------- model

def normed(inputs, C):
    """A linear map to C channels and the LayerNorm behind it and what it is added to."""
    return nn.ModuleDict({"dense": Linear(inputs, C), "LayerNorm": nn.LayerNorm(C, EPSILON)})


class Layer(nn.Module):
    """A block of BERT: attention, then two linear maps, each with its LayerNorm behind the sum (arXiv 1810.04805)."""

    def __init__(self, C, inner):
        super().__init__()
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: Linear(C, C) for name in ("query", "key", "value")}), "output": normed(C, C)})
        self.intermediate = nn.ModuleDict({"dense": Linear(C, inner)})
        self.output = normed(inner, C)

    def forward(self, x, mask):
        """(B, T, C) -> the same; mask: (B, 1, 1, T) bool, where there is a word piece."""
        q, k, v = (self.attention["self"][name](x).unflatten(-1, (-1, HEAD)).transpose(1, 2)
                   for name in ("query", "key", "value"))  # each (B, nh, T, 64)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        output = self.attention["output"]
        x = output["LayerNorm"](x + output["dense"](y))
        y = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](y))


class CheXbert(nn.Module):
    """sizes: vocabulary, C, inner width and number of layers; BERT-base has 30,522, 768, 3,072 and 12."""

    def __init__(self, vocabulary, C, inner, layers):
        super().__init__()
        self.bert = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "word_embeddings": nn.Embedding(vocabulary, C), "position_embeddings": nn.Embedding(LONGEST, C),
                "token_type_embeddings": nn.Embedding(2, C), "LayerNorm": nn.LayerNorm(C, EPSILON)}),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(Layer(C, inner) for _ in range(layers))})})
        self.linear_heads = nn.ModuleList(Linear(C, 2 if name == "No Finding" else 4) for name in FINDINGS)

    def hidden(self, tokens, mask):
        """(B, T) word pieces and where there are any, bool -> (B, T, C)."""
        embeddings = self.bert["embeddings"]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = embeddings["LayerNorm"](embeddings["word_embeddings"](tokens) + embeddings["position_embeddings"](places)
                                    + embeddings["token_type_embeddings"].weight[0])
        for layer in self.bert["encoder"]["layer"]:
            x = layer(x, mask[:, None, None])
        return x

    def forward(self, tokens, mask):
        """(B, T) as above -> the logits of each finding, 13 of (B, 4) and (B, 2)."""
        first = self.hidden(tokens, mask)[:, 0]
        return [head(first) for head in self.linear_heads]


# ----------------------------------------------------------------------------- files

def read_tensors(file):
    """The tensors of a chexbert.pth or .safetensors file, without the "module." that DataParallel puts before each."""
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
            tensors = tensors.get("model_state_dict", tensors)
        return {key.removeprefix("module."): tensor for key, tensor in tensors.items() if torch.is_tensor(tensor)}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{file}: no file of weights alone ({why:.100}); name a folder with CheXbert's") from None


def find_sizes(shapes, file):
    """The sizes of a CheXbert from its tensors' shapes by key."""
    keys = ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.intermediate.dense.weight")
    for key in keys:
        if len(shapes.get(key, ())) != 2:
            raise UserError(f"{file}: no CheXbert: {key} is missing or no matrix")
    (vocabulary, C), (inner, _) = map(shapes.get, keys)
    if C % HEAD:
        raise UserError(f"{file}: no CheXbert: {keys[0]} has {C} columns, no multiple of {HEAD}")
    return vocabulary, C, inner, len({key.split(".")[3] for key in shapes if key.startswith("bert.encoder.layer.")})


def find_problem(shapes, wanted):
    """What is wrong with the first key that is not as it should be, "" where all are; both {key: shape}."""
    for key in [*wanted, *shapes]:
        if key not in shapes:
            return f"{key} is missing"
        if key not in wanted:
            return f"{key} is unknown"
        if shapes[key] != wanted[key]:
            return f"{key} is {shapes[key]}, not {wanted[key]}"
    return ""


def load_model(file, device="cpu"):
    """A CheXbert, float32, in eval mode. Raises UserError with the first key that is missing, unknown or misshapen."""
    tensors = {key: tensor for key, tensor in read_tensors(file).items() if not DROPPED.fullmatch(key)}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    with on_meta():
        model = CheXbert(*find_sizes(shapes, file))
    if problem := find_problem(shapes, {key: tuple(value.shape) for key, value in model.state_dict().items()}):
        raise UserError(f"{file}: no CheXbert: {problem}")
    model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    return model.to(device).eval()


def load_tokenizer(file):
    """bert-base-uncased's tokenizer from its vocab.txt, cut at LONGEST word pieces with [SEP] the last."""
    if not file.is_file():
        raise UserError(f"{file}: not there; put bert-base-uncased's vocab.txt beside the weights")
    try:
        tokenizer = BertWordPieceTokenizer(str(file), lowercase=True)
    except Exception as error:  # the package raises nothing more particular
        raise UserError(f"{file}: no list of word pieces ({error}); take bert-base-uncased's") from None
    tokenizer.enable_truncation(LONGEST)
    return tokenizer


def load_chexbert(folder, device="cpu"):
    """The CheXbert of a folder with FILES' first and vocab.txt; its `tokenizer` is that of the vocabulary."""
    folder = Path(folder)
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: neither {' nor '.join(FILES)} is there; github.com/stanfordmlgroup/CheXbert says "
                        "where to get the weights")
    model, tokenizer = load_model(file, device), load_tokenizer(folder / "vocab.txt")
    if tokenizer.get_vocab_size() != (count := model.bert["embeddings"]["word_embeddings"].num_embeddings):
        raise UserError(f"{folder}/vocab.txt: {tokenizer.get_vocab_size():,} word pieces, but {file.name} has "
                        f"{count:,}; take bert-base-uncased's")
    model.tokenizer = tokenizer
    return model


# ----------------------------------------------------------------------------- labels

@torch.no_grad()
def label(model, texts, batch_size=16):
    """[{finding: "positive", "negative" or "uncertain"}] of n texts, without the findings that one does not mention."""
    pieces = [encoding.ids for encoding in model.tokenizer.encode_batch(list(texts))]
    found = [{} for _ in pieces]
    order = sorted(range(len(pieces)), key=lambda number: len(pieces[number]))  # alike in length, little padding
    for begin in range(0, len(order), batch_size):
        numbers = order[begin:begin + batch_size]
        rows = [torch.tensor(pieces[number]) for number in numbers]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        device = model.linear_heads[0].weight.device
        classes = [logits.argmax(1).tolist() for logits in model(tokens.to(device), mask.to(device))]
        for place, number in enumerate(numbers):
            found[number] = {finding: STATUSES[some[place]] for finding, some in zip(FINDINGS, classes) if some[place]}
    return found
