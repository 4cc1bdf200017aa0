"""Qwen3-VL's words: ChatML token by token, what may be cut of it, and prepared data, runs and answers with it."""

import base64
import contextlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import asking
import eval_vqa
import prepare.all as all_py
import train_vlm
from data import EOS, Mixture, Record, View
from extras.look import follow
from extras.share import demo_talk
from plumbing.files import read_manifest
from plumbing.flags import UserError, parse_flags
from plumbing.runs import write_run
from plumbing.shards import Shard
from plumbing.sources import open_shards, require_own_tokenizer
from prepare.questions import train_sample_tokenizer
from prepare.shards import read_manifests
from run import open_trained_run
from tasks.splits import find_misfit, open_splits
from test_prepare import write_toy
from test_train import flags
from zoo.chatml import PIECES, ChatTokenizer, open_tokenizer, tokenizer_of

# The layout of Qwen's tokenizer.json
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
SPECIAL = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
    "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")]
OTHERS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]  # added, and not special
CORPUS = ["user assistant system what is shown? Is there a fracture of the left lung on this film? Answer",
          "briefly. What is this? Compare. And now? no pleural effusion, the heart is enlarged; a lesion"] * 3


def finish(model):
    """The Tokenizer with Qwen's normaliser, pre-tokeniser and decoder."""
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    return model


def add_pieces(model, special=SPECIAL, others=OTHERS):
    model.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    model.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in others])
    return model


def write_chat_tokenizer(path, corpus=CORPUS, special=SPECIAL, others=OTHERS, finish=finish):
    """A tokenizer.json, in the layout of Qwen's unless `finish` gives another, of a few hundred merges: its path."""
    model = finish(Tokenizer(models.BPE()))
    model.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    add_pieces(model, special, others).save(str(path))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("chat") / "tokenizer.json")


def views(*roles):
    return tuple(View(b"image", "a.png", role) for role in roles)


# A record, a system message, and the conversation, of which what a model has to say is in brackets
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CONVERSATIONS = [
    (Record("1", "What is this?", "a lung", b"image"), "",
     f"<|im_start|>user\n{IMAGE}What is this?<|im_end|>\n<|im_start|>assistant\n[a lung<|im_end|>\n]"),
    (Record("2", "Compare.", "A1", parts=views("", ""), turns=(("And now?", "A2"),)), "S",
     f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{IMAGE}{IMAGE}Compare.<|im_end|>\n"
     "<|im_start|>assistant\n[A1<|im_end|>\n]<|im_start|>user\nAnd now?<|im_end|>\n"
     "<|im_start|>assistant\n[A2<|im_end|>\n]"),
    (Record("3", "why?", "rain", context="It rained."), " Answer briefly.\n",
     "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\nIt rained.\nwhy?<|im_end|>\n"
     "<|im_start|>assistant\n[rain<|im_end|>\n]"),
    (Record("4", "what has changed?", "no effusion", context="seen today",
            turns=(("sure?", "yes"), ("left?", "no")),
            parts=("Two films.", *views("prior frontal"), "later: ", *views("frontal"))), "",
     f"<|im_start|>user\nTwo films.\nprior frontal: {IMAGE}later:\nfrontal: {IMAGE}seen today\nwhat has changed?"
     "<|im_end|>\n<|im_start|>assistant\n[no effusion<|im_end|>\n]<|im_start|>user\nsure?<|im_end|>\n"
     "<|im_start|>assistant\n[yes<|im_end|>\n]<|im_start|>user\nleft?<|im_end|>\n"
     "<|im_start|>assistant\n[no<|im_end|>\n]"),
    (Record("5", " what is said? ", "a cough ", parts=("history: cough",)), "",
     "<|im_start|>user\nhistory: cough\nwhat is said?<|im_end|>\n<|im_start|>assistant\n[a cough<|im_end|>\n]")]


# ----------------------------------------------------------------------------- the template

@pytest.mark.parametrize("record, system, text", CONVERSATIONS)
def test_a_record_is_the_conversation_that_the_library_reads_in_its_text(record, system, text, path):
    tokenizer = ChatTokenizer(path, system)
    tokens, spans, (begin, end) = tokenizer.write(record)
    library, wanted, marks = Tokenizer.from_file(str(path)), [], []
    for piece in text.replace("]", "[").split("["):
        wanted += library.encode(piece).ids
        marks.append(len(wanted))
    images = [place for place, token in enumerate(wanted) if token == library.token_to_id("<|image_pad|>")]
    assert [tokens[place] for place in images] == [-1 - number for number in range(len(images))]
    assert [wanted[place] if token < 0 else token for place, token in enumerate(tokens)] == wanted
    assert spans == list(zip(marks[:-1:2], marks[1::2]))
    whole = library.encode(text.replace("[", "").replace("]", "")).ids  # as it is read at once
    assert wanted == whole
    said = text[:text.index("<|im_end|>\n<|im_start|>assistant")]
    said = said.rpartition("<|vision_end|>" if "<|vision_end|>" in said else "user\n")[2]
    assert library.decode(tokens[begin:end], skip_special_tokens=False) == said


def test_text_that_looks_like_a_piece_stays_text(path):
    tokenizer, library = ChatTokenizer(path), Tokenizer.from_file(str(path))
    added = {library.token_to_id(piece) for piece in SPECIAL + OTHERS}
    assert len(added) == len(SPECIAL + OTHERS) and None not in added
    for piece in SPECIAL + OTHERS:
        tokens = tokenizer.encode(f"a {piece} b")
        assert not added & set(tokens) and tokenizer.decode(tokens) == f"a {piece} b"
    tokens, spans, _ = tokenizer.write(Record("1", "<|image_pad|><|im_end|>", "<think>", b"image",
                                              context="<|im_start|>assistant", turns=(("<tool_call>", "ok"),)))
    special = [library.id_to_token(token) for token in tokens if token in added]
    turn = ["<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert special == ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", *turn, "<|im_start|>", *turn]
    assert sum(token < 0 for token in tokens) == 1
    assert tokenizer.decode(tokenizer.encode("A\u030a \ud800 x")) == "\u00c5 ? x"  # NFC; half of a pair is no text


def test_decoding_passes_over_special_pieces_and_ids_without_one(path):
    tokenizer = ChatTokenizer(path)
    words, past = tokenizer.encode("a fracture "), tokenizer.vocab_size
    think = Tokenizer.from_file(str(path)).token_to_id("<think>")
    assert tokenizer.decode([*words, *tokenizer.stops, past, past + 9]) == "a fracture"
    assert tokenizer.decode(np.array([think, *words])) == "<think>a fracture"  # which is text, not special
    assert tokenizer.decode([]) == "" and tokenizer.piece(past - 1) == "</think>"
    assert [tokenizer.piece(token) for token in tokenizer.stops] == ["<|im_end|>", "<|endoftext|>"]
    assert tokenizer.piece(tokenizer.encode("a film")[1]).startswith(tokenizer.word_start)
    assert tokenizer.encode("") == [] and not tokenizer.system


def test_truncation_and_padding_of_the_file_are_not_obeyed(path, tmp_path):
    model = Tokenizer.from_file(str(path))
    model.enable_truncation(4)
    model.enable_padding(length=64)
    model.save(str(tmp_path / "tokenizer.json"))
    text = "what is shown on this film?"
    assert ChatTokenizer(tmp_path / "tokenizer.json").encode(text) == ChatTokenizer(path).encode(text)


@pytest.mark.parametrize("piece", PIECES)
def test_a_tokenizer_without_a_piece_of_the_template_is_refused(piece, tmp_path):
    write_chat_tokenizer(tmp_path / "tokenizer.json", special=[other for other in SPECIAL if other != piece])
    with pytest.raises(UserError) as refused:
        open_tokenizer(tmp_path)
    told = str(refused.value)
    assert f"{tmp_path}/tokenizer.json: without {piece}, which" in told and "\n" not in told


def test_the_tokenizer_that_a_file_is_of_is_opened(path, tmp_path):
    model = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match="tokenizer.model: no tokenizer here"):
        open_tokenizer(tmp_path)
    with pytest.raises(UserError, match="x.json: no tokenizer here; name the tokenizer.json of a chat model"):
        open_tokenizer(tmp_path / "x.json")
    (tmp_path / "tokenizer.json").write_bytes(path.read_bytes())
    assert open_tokenizer(tmp_path).path == tmp_path / "tokenizer.json"
    model.write_bytes(train_sample_tokenizer())
    assert open_tokenizer(tmp_path).path == model  # as a LLaMA's folder has both
    assert open_tokenizer(model).stops == (EOS,) and open_tokenizer(path, "S").system == "S"
    with pytest.raises(UserError, match="--system: .*tokenizer.model is no chat model's"):
        open_tokenizer(model, "S")
    for content in (b"{", b"[1]", b'{"added_tokens": 3}', path.read_bytes()[:-100], b"version https://git-lfs"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.json: not a tokenizer.json that the tokenizers lib"):
            open_tokenizer(tmp_path / "tokenizer.json")


# ----------------------------------------------------------------------------- the real vocabulary

def merges_of(ranks):
    """The pair that each piece was merged from: of all, the two that its bytes come to by the merges before it."""
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in piece]
        while len(parts) > 2:
            joined = [ranks.get(one + other, rank) for one, other in zip(parts, parts[1:])]
            first = joined.index(min(joined))
            parts[first:first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            yield tuple(parts)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Qwen's vocabulary, as the wheel of dashscope carries it: `pip install --no-deps dashscope`."""
    package = importlib.util.find_spec("dashscope")
    files = [Path(folder) / "resources/qwen.tiktoken" for folder in package.submodule_search_locations or ()
             ] if package else []
    if not any(file.is_file() for file in files):
        pytest.skip("needs `pip install --no-deps dashscope`, which carries Qwen's vocabulary")
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(bytes.split, files[0].open("rb"))}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = dict(zip([*plain, *(byte for byte in range(256) if byte not in plain)],
                       map(chr, [*plain, *range(256, 256 + 256 - len(plain))])))
    assert sorted(letters.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())

    def name(piece):
        return "".join(letters[byte] for byte in piece)

    model = finish(Tokenizer(models.BPE({name(piece): rank for piece, rank in ranks.items()},
                                        [(name(one), name(other)) for one, other in merges_of(ranks)])))
    path = tmp_path_factory.mktemp("real") / "tokenizer.json"
    more = ["<tool_call>", "</tool_call>", *(f"<|{end}|>" for end in (
        "fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")), "<tool_response>",
        "</tool_response>", "<think>", "</think>"]
    add_pieces(model, others=more).save(str(path))
    return path


def test_ids_of_the_real_vocabulary_are_the_published_ones(real):
    tokenizer = ChatTokenizer(real)
    tokens, spans, cut = tokenizer.write(Record("1", "What is this?", "", b"image"))
    assert tokens == [151644, 872, 198, 151652, -1, 151653, 3838, 374, 419, 30, 151645, 198, 151644, 77091, 198,
                      151645, 198]
    assert (spans, cut) == ([(15, 17)], (6, 10))
    tokens, _, _ = ChatTokenizer(real, "S").write(Record("1", "What?", "no"))
    assert tokens[:6] == [151644, 8948, 198, 50, 151645, 198]
    assert tokenizer.stops == (151645, 151643) and tokenizer.vocab_size == 151669
    boxes = "Fractures <box>[[156, 516, 231, 607], [240, 529, 296, 581]]</box>"
    assert len(tokenizer.encode(boxes)) == 49 and tokenizer.decode(tokenizer.encode(boxes)) == boxes


# ----------------------------------------------------------------------------- prepared data

def picture(seed, height=40, width=60):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def records(count=12):
    answers = "no", "a fracture of the lung"
    return [("train", Record(str(number), f"what is shown on film {number}?", answers[number % 2], picture(number),
                             f"{number}.png", context="seen " * (3 * number))) for number in range(count)]


def test_a_shard_holds_what_the_template_writes(path, tmp_path):
    shard = write_toy(tmp_path, records(), path.read_bytes())
    tokenizer = tokenizer_of(shard)
    assert tokenizer.path == tmp_path / "toy/tokenizer.json"
    assert tokenizer.sha256 == shard.manifest["tokenizer_sha256"]
    for number, (_, record) in enumerate(records()):
        sample = shard.read_sample(number)
        record.context = record.context.strip()
        tokens, spans, cut = tokenizer.write(record)
        assert np.maximum(sample.tokens, -1).tolist() == tokens and sample.spans.tolist() == [list(*spans)]
        assert tuple(shard.samples[["head", "prompt"]][number].tolist()) == cut
    assert "system" not in shard.manifest
    (tmp_path / "toy/tokenizer.json").write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UserError, match="tokenizer.json: not the one its shards were made with; run `py"):
        tokenizer_of(shard)


def test_a_prompt_that_is_too_long_keeps_the_end_of_the_user_s_turn(path, tmp_path):
    shard, image_tokens, most = write_toy(tmp_path, records(), path.read_bytes()), 4, 40
    tokenizer = tokenizer_of(shard)
    ending, cut = [*tokenizer.end, *tokenizer.begin("assistant")], 0

    def open_mixture(most):
        return Mixture([shard], lambda heights, widths: 0 * heights + image_tokens, max_length=most)

    mixture = open_mixture(most)
    for number in range(len(shard)):
        whole, sample = shard.read_sample(number), mixture.read(number)[2]
        [(begin, end)] = sample.spans.tolist()
        length = len(whole.tokens) + image_tokens - 2  # the last is no input
        assert len(sample.tokens) + image_tokens - 2 == min(length, most)
        cut += length > most
        assert sample.tokens[begin - len(ending):begin].tolist() == ending and begin - len(ending) > sample.head
        front, back = sample.tokens[:sample.head], sample.tokens[sample.head:]
        assert front.tolist() == whole.tokens[:whole.head].tolist() and end == len(sample.tokens)
        assert back.tolist() == whole.tokens[-len(back):].tolist()
    assert mixture.cut == cut > 3 and mixture.too_long == 0
    answers = [len(tokenizer.encode(record.answer)) for _, record in records()]
    around = [*tokenizer.begin("user"), tokenizer.vision_start, tokenizer.vision_end, *ending, *tokenizer.end]
    least = len(around) + image_tokens + 1 - 1  # with one token of the text
    assert open_mixture(least + max(answers)).too_long == 0
    assert open_mixture(least + max(answers) - 1).too_long == answers.count(max(answers)) < len(answers)


def prepare(folder, *words, only="sample"):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        words = ["--workers=1", f"--only={only}", f"--shards_dir={folder}", *words]
        all_py.main(parse_flags(all_py.Config, words))
    return out.getvalue()


def test_preparing_notices_another_tokenizer_and_another_system_message(path, tmp_path):
    target, words = tmp_path / "shards", ["--limit=4", f"--tokenizer={path}"]
    prepare(target, "--limit=4")
    own = read_manifests(target / "sample")["train"]
    assert "up to date" in prepare(target, "--limit=4") and "system" not in own
    assert "tokenizer_sha256 was " in prepare(target, *words)
    plain = read_manifests(target / "sample")["train"]
    assert sorted(file.name for file in (target / "sample").glob("tokenizer.*")) == ["tokenizer.json"]
    assert plain["tokenizer_sha256"] == open_tokenizer(path).sha256 and "system" not in plain
    assert "up to date" in prepare(target, *words) and "up to date" in prepare(target, *words, "--system= ")
    assert "system was none, now Answer briefly." in prepare(target, *words, "--system=Answer briefly.")
    asked = read_manifests(target / "sample")["train"]
    assert asked["system"] == "Answer briefly." and asked["checksum"] != plain["checksum"]
    tokenizer = tokenizer_of(Shard(target / "sample/train"))
    begin = Shard(target / "sample/train").read_sample(0).tokens.tolist()
    system = [*tokenizer.begin("system"), *tokenizer.encode("Answer briefly."), *tokenizer.end]
    assert begin[:len(system)] == system and tokenizer.system == "Answer briefly."
    assert "up to date" in prepare(target, *words, "--system=Answer briefly. ")
    assert "system was Answer briefly., now none" in prepare(target, *words)
    assert read_manifests(target / "sample")["train"]["checksum"] == plain["checksum"]
    assert "with a chat model's tokenizer" in prepare(target, "--limit=4")
    assert read_manifests(target / "sample")["train"]["checksum"] == own["checksum"]
    folder = prepare(target, "--limit=4", f"--tokenizer={path.parent}")  # names it as well
    assert read_manifests(target / "sample")["train"]["checksum"] == plain["checksum"] and "ready" in folder


@pytest.mark.parametrize("words, told", [
    (["--system=Be brief."], "--system: only a chat model's template has a place for it"),
    (["--max_pixels=100000"], "--max_pixels: with --resize=fit and in place of --image_size"),
    (["--max_pixels=100000", "--resize=crop"], "--max_pixels: with --resize=fit"),
    (["--max_pixels=100000", "--resize=fit", "--image_size=448"], "give --resize=fit --max_pixels=100000 alone"),
    (["--max_pixels=50000", "--resize=fit"], "--max_pixels=50000: from 65536 to 16777216"),
    (["--max_pixels=16777217", "--resize=fit"], "--max_pixels=16777217: ")])
def test_flags_that_do_not_fit_are_told_in_one_line(words, told, tmp_path):
    with pytest.raises(UserError) as refused:
        prepare(tmp_path, *words)
    assert told in str(refused.value) and "\n" not in str(refused.value)


# ----------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def trained(path, tmp_path_factory):
    """(shards, a run of two steps on them), of a chat tokenizer and a system message."""
    folder = tmp_path_factory.mktemp("trained")
    prepare(folder / "shards", "--limit=24", f"--tokenizer={path}", "--system=Answer briefly.")
    train_vlm.main(flags(folder / "shards", folder / "run", max_steps=2, held_out=0))
    return folder / "shards", folder / "run"


def test_a_run_has_its_tokenizer_and_its_system_message(trained, path):
    shards, run = trained
    assert sorted(file.name for file in run.glob("tokenizer.*")) == ["tokenizer.json"]
    assert read_manifest(run, "config.json")["system"] == "Answer briefly."
    folder, _, record, tokenizer = open_trained_run(str(run))
    assert (folder, record["system"], tokenizer.system) == (run, "Answer briefly.", "Answer briefly.")
    assert tokenizer.path == run / "tokenizer.json" and tokenizer.sha256 == open_tokenizer(path).sha256


def test_questions_are_asked_behind_the_system_message_and_answers_end_as_the_template_says(trained, monkeypatch,
                                                                                            tmp_path):
    shards, run = trained
    asked = []
    generate = asking.generate

    def watched(model, groups, max_new_tokens, sampling, *more):
        asked.extend(groups := list(groups))
        assert (sampling.stops, sampling.vocab_size) == (tokenizer.stops, tokenizer.vocab_size)
        return generate(model, groups, max_new_tokens, sampling, *more)

    monkeypatch.setattr(asking, "generate", watched)
    tokenizer = open_trained_run(str(run))[3]
    (tmp_path / "a.png").write_bytes(picture(3))
    config = eval_vqa.Config(run=str(run), question="what is shown?", image=str(tmp_path / "a.png"),
                             max_new_tokens=3)
    eval_vqa.answer_own(config)
    [(_, [prompt])] = asked
    tokens, spans, _ = tokenizer.write(Record("", "what is shown?", image=b""))
    assert prompt == tokens[:spans[0][0]] and "system" in tokenizer.model.decode(prompt[:4])
    with pytest.raises(UserError, match=r"--question: [\d,]+ tokens; this model was trained on samples of 256"):
        eval_vqa.answer_own(eval_vqa.Config(run=str(run), question="what? " * 200))


def test_an_evaluation_refuses_shards_of_another_system_message(trained, path, tmp_path):
    shards, run = trained
    _, _, record, tokenizer = open_trained_run(str(run))
    assert len(open_splits("sample", "test", shards, tokenizer, record["image"])) == 1
    prepare(tmp_path / "shards", "--limit=8", f"--tokenizer={path}")
    with pytest.raises(UserError) as refused:
        open_splits("sample", "test", tmp_path / "shards", tokenizer, record["image"])
    assert ("made with the system message '', the run with 'Answer briefly.'; run `python prepare/all.py "
            f"--only=sample --tokenizer={run}/tokenizer.json --system='Answer briefly.'`") in str(refused.value)
    eval_vqa.main(eval_vqa.Config(run=str(run), shards_dir=str(shards), data="sample", limit=6, max_new_tokens=4,
                                  out=str(tmp_path / "out")))
    assert len(list((tmp_path / "out").glob("*/results.json"))) == 1


def test_datasets_of_two_system_messages_train_no_run(path, tmp_path):
    words = ["--limit=4", f"--tokenizer={path}"]
    prepare(tmp_path, *words, "--system=S")
    shard = Shard(tmp_path / "sample/train")
    assert find_misfit(shard, open_tokenizer(path, "S"), None) == ""
    assert "the system message 'S', the run with ''" in find_misfit(shard, open_tokenizer(path), None)
    prepare(tmp_path, *words, only="sample_captions")
    with pytest.raises(UserError, match="sample,sample_captions were prepared with different tokenizers or sys"):
        open_shards("sample,sample_captions", tmp_path, "train")
    prepare(tmp_path, *words, "--system=S", only="sample_captions")
    assert len(open_shards("sample,sample_captions", tmp_path, "train")["shards"]) == 2


def test_a_sample_is_followed(trained, capsys):
    shards, run = trained
    follow.main(follow.Config(run=str(run), data="sample", split="train", number=3, shards_dir=str(shards)))
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:17].strip(): line[17:] for line in lines}
    tokenizer, shard = open_trained_run(str(run))[3], Shard(shards / "sample/train")
    words = shard.read_records()[3]
    question, answer = tokenizer.encode(words["question"]), tokenizer.encode(words["answer"])
    assert rows["Tokenizer.encode"] == f"{question} | {answer}"
    losses = [line.split("'")[1] for line in lines if line.startswith("  loss of ")]
    assert losses == [tokenizer.piece(token) for token in [*answer, *tokenizer.end]]
    sample = shard.read_sample(3)
    assert rows["write"].startswith(f"{len(sample.tokens)} tokens: {sample.head} up to the image's end, ")
    assert rows["write"].endswith(f"2 that end it; supervised: {sample.spans[0, 0]} to {sample.spans[0, 1] - 1}")


def test_the_demo_asks_in_the_run_s_words(trained):
    _, run = trained
    tokenizer = open_trained_run(str(run))[3]
    prefix, own = demo_talk.write_prompt(tokenizer, "what is shown?")
    assert prefix[-2:] == [tokenizer.vision_start, -1] and own[0] == tokenizer.vision_end
    assert own[-len(tokenizer.begin("assistant")):] == tokenizer.begin("assistant")
    text = "no pleural effusion of the left lung"
    tokens = [demo_talk.Token(token, 0.5, [], np.ones(4)) for token in (*tokenizer.encode(text), tokenizer.stops[1])]
    assert [word.text for word in demo_talk.words_of(tokens, tokenizer)] == text.split()


def test_a_folder_keeps_the_tokenizer_of_its_own_run_alone(path, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"of a run that was stopped before its first checkpoint")
    write_run(tmp_path, {"flags": {}}, open_tokenizer(path), None)
    assert sorted(file.name for file in tmp_path.glob("tokenizer.*")) == ["tokenizer.json"]


# ----------------------------------------------------------------------------- weights and words of two families

def test_a_tokenizer_of_one_family_with_weights_of_another_is_refused(path, tmp_path, capsys):
    (tmp_path / "tokenizer.model").write_bytes(train_sample_tokenizer())
    plain, chat = open_tokenizer(tmp_path), open_tokenizer(path)
    for family, own, other in (("llama", plain, chat), ("qwen3_vl", chat, plain)):
        folder = tmp_path / family
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        with pytest.raises(UserError) as refused:
            require_own_tokenizer(folder, other)
        assert f"{folder}: of another family ({family}) than the shards' {other.path}" in str(refused.value)
        require_own_tokenizer(folder, own)
        assert "not known whether its tokenizer is the shards'" in capsys.readouterr().out
        (folder / own.path.name).write_bytes(own.path.read_bytes())
        require_own_tokenizer(folder, own)
        assert capsys.readouterr().out == ""
    write_chat_tokenizer(tmp_path / "qwen3_vl/tokenizer.json", ["retina photographs show haemorrhages"] * 9)
    with pytest.raises(UserError, match=rf"qwen3_vl/tokenizer.json: id \d+ is .*--tokenizer={tmp_path}/qwen3"):
        require_own_tokenizer(tmp_path / "qwen3_vl", chat)
