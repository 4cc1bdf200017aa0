"""CheXbert: transformers' BERT and tokenizer give the same, and another layout is refused by its first key."""

import pickle
import string

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizer

from plumbing.flags import UserError
from tasks.findings import FINDINGS
from zoo.chexbert import LONGEST, label, load_chexbert, load_model

WORDS = ("no", "pleural", "effusion", "effusions", "pneumonia", "heart", "is", "normal", "the", "lungs", "are", "clear")
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *string.digits, ".", ",", "-", "'",
              *(f"##{letter}" for letter in string.ascii_lowercase + string.digits), *WORDS, "##thorax", "pneumo"]
TEXTS = ["No pleural effusion.", "The lungs are CLEAR; heart normal", "", "Pneumothorax, caf\u00e9 \u00e0 la 9-mm",
         "effusion " * 700, "\u4e2d no\u0000 \u200d[SEP] [UNK] \ufffd", "no\n\n  effusion\t."]


def reference_model(seed=0, heads=2, layers=3):
    """transformers' BERT with random weights that are not small, and 14 heads: its tensors under CheXbert's keys."""
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(VOCABULARY), hidden_size=64 * heads, num_hidden_layers=layers,
                        num_attention_heads=heads, intermediate_size=96, attn_implementation="eager")
    bert = BertModel(config).eval()
    heads = [torch.nn.Linear(64 * heads, 4) for _ in range(13)] + [torch.nn.Linear(64 * heads, 2)]
    for name, parameter in bert.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.15)
    tensors = {f"bert.{key}": value for key, value in bert.state_dict().items()}
    for number, head in enumerate(heads):
        torch.nn.init.normal_(head.weight)
        tensors |= {f"linear_heads.{number}.{key}": value for key, value in head.state_dict().items()}
    return bert, heads, {key: value.detach().clone() for key, value in tensors.items()}


def save(folder, tensors, **more):
    """A chexbert.pth as CheXbert's code saves it, of DataParallel's model, and a vocab.txt."""
    state = {f"module.{key}": value for key, value in tensors.items()}
    torch.save({"epoch": 1, "model_state_dict": state, "optimizer_state_dict": {"state": {}}, **more},
               folder / "chexbert.pth")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    bert, heads, tensors = reference_model()
    folder = save(tmp_path_factory.mktemp("chexbert"), tensors)
    return load_chexbert(folder), bert, heads, BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True), folder


def test_hidden_states_and_logits_are_those_of_transformers(loaded):
    model, bert, heads, *_ = loaded
    tokens = torch.randint(5, len(VOCABULARY), (4, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(40) < torch.tensor([[40], [7], [1], [25]])
    tokens[~mask] = 0
    with torch.no_grad():
        expected = bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        found, logits = model.hidden(tokens, mask), model(tokens, mask)
    assert expected.std() > 0.5 and (found - expected)[mask].abs().max() < 1e-5
    assert [tuple(some.shape) for some in logits] == [(4, 4)] * 13 + [(4, 2)]
    for some, head in zip(logits, heads, strict=True):
        assert (some - head(expected[:, 0])).abs().max() < 1e-4  # heads of weights around 1 sum 128 products


def test_the_longest_text_fits(loaded):
    model, bert, *_ = loaded
    tokens = torch.full((1, LONGEST), 9)
    with torch.no_grad():
        expected = bert(input_ids=tokens).last_hidden_state
        assert (model.hidden(tokens, torch.ones_like(tokens, dtype=torch.bool)) - expected).abs().max() < 1e-5


def test_word_pieces_are_those_of_transformers(loaded):
    model, _, _, tokenizer, _ = loaded
    for text in TEXTS:
        ours = model.tokenizer.encode(text).ids
        assert ours == tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"]
        assert ours[0] == VOCABULARY.index("[CLS]") and ours[-1] == VOCABULARY.index("[SEP]") and len(ours) <= LONGEST
    pieces = model.tokenizer.encode("Pneumothorax, effusions").tokens
    assert pieces == ["[CLS]", "pneumo", "##thorax", ",", "effusions", "[SEP]"]
    assert len(model.tokenizer.encode("effusion " * 700).ids) == LONGEST


def test_labels_are_the_largest_logits_in_any_batch(loaded):
    model, bert, heads, tokenizer, _ = loaded
    expected, statuses = [], ("", "positive", "negative", "uncertain")  # CLASS_MAPPING of CheXbert's constants.py
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt")
            first = bert(**ids).last_hidden_state[:, 0]
            classes = [int(head(first).argmax()) for head in heads]
            expected.append({finding: statuses[one] for finding, one in zip(FINDINGS, classes) if one})
    assert label(model, TEXTS, batch_size=3) == label(model, TEXTS, batch_size=1) == expected
    assert len(set(map(str, expected))) > 2
    assert {status for one in expected for status in one.values()} == set(statuses[1:])
    assert label(model, []) == [] and all(one.get("No Finding", "positive") == "positive" for one in expected)


def test_the_same_tensors_as_safetensors_are_the_same_model(loaded, tmp_path):
    model, *_, folder = loaded
    state = torch.load(folder / "chexbert.pth", weights_only=True)["model_state_dict"]
    for prefix in ("module.", ""):
        save_file({prefix + key.removeprefix("module."): value.contiguous() for key, value in state.items()},
                  tmp_path / "chexbert.safetensors")
        (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
        assert label(load_chexbert(tmp_path), TEXTS) == label(model, TEXTS)


def test_half_precision_and_older_keys_are_read(tmp_path):
    _, _, tensors = reference_model()
    tensors["bert.embeddings.position_ids"] = torch.arange(LONGEST)[None]  # of older transformers
    model = load_model(save(tmp_path, {key: value.half() if value.is_floating_point() else value
                                       for key, value in tensors.items()}) / "chexbert.pth")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any("pooler" in key for key in model.state_dict())


@pytest.mark.parametrize("change, words", [
    (lambda tensors: tensors.pop("linear_heads.5.bias"), "linear_heads.5.bias is missing"),
    (lambda tensors: tensors.update({"linear_heads.14.weight": torch.zeros(4, 128)}), "heads.14.weight is unknown"),
    (lambda tensors: tensors.update({"linear_heads.13.weight": torch.zeros(4, 128)}),
     r"linear_heads.13.weight is \(4, 128\), not \(2, 128\)"),
    (lambda tensors: tensors.pop("bert.embeddings.word_embeddings.weight"), "word_embeddings.weight is missing"),
    (lambda tensors: tensors.pop("bert.encoder.layer.1.attention.self.key.weight"), "attention.self.key.weight is"),
    (lambda tensors: tensors.update({"bert.embeddings.position_embeddings.weight": torch.zeros(128, 128)}),
     r"position_embeddings.weight is \(128, 128\)"),
    (lambda tensors: tensors.update({"bert.embeddings.word_embeddings.weight": torch.zeros(95)}), "no matrix"),
    (lambda tensors: tensors.update({"bert.embeddings.word_embeddings.weight": torch.zeros(95, 100)}), "100 columns"),
    (lambda tensors: tensors.clear(), "no CheXbert")])
def test_another_layout_is_refused_by_its_first_key(change, words, tmp_path):
    _, _, tensors = reference_model()
    change(tensors)
    with pytest.raises(UserError, match=rf"chexbert\.pth: [^\n]*{words}"):
        load_chexbert(save(tmp_path, tensors))


class Hostile:
    def __reduce__(self):
        return print, ("this was run",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"not a file of weights", pickle.dumps({"a": 1}), pickle.dumps([1, 2])])
def test_no_file_of_weights_is_refused_in_a_line(content, tmp_path):
    for name in ("chexbert.pth", "chexbert.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"^[^\n]*{name}: no [^\n]*$"):
            load_model(tmp_path / name)


def test_nothing_in_a_file_is_run(tmp_path, capsys):
    _, _, tensors = reference_model()
    with pytest.raises(UserError, match="no file of weights alone"):
        load_chexbert(save(tmp_path, tensors, more=Hostile()))
    assert "this was run" not in capsys.readouterr().out


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match="neither chexbert.pth nor chexbert.safetensors"):
        load_chexbert(tmp_path)
    _, _, tensors = reference_model()
    save(tmp_path, tensors)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY[:-1]))
    with pytest.raises(UserError, match=f"{len(VOCABULARY) - 1} word pieces, but chexbert.pth has {len(VOCABULARY)}"):
        load_chexbert(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match="vocab.txt: not there"):
        load_chexbert(tmp_path)
