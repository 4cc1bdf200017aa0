"""
The words of Qwen3-VL: its tokenizer.json, and ChatML, the template in which it reads a conversation.

    <|im_start|>user\\n<|vision_start|> image <|vision_end|>what is shown?<|im_end|>\\n
    <|im_start|>assistant\\n | a fracture <|im_end|> \\n |                            supervised: between the bars

ChatTokenizer has the face of data.Tokenizer. This file needs no torch.
"""

import hashlib
import json
from pathlib import Path

import tokenizers

from data import Tokenizer, View
from plumbing.files import find_tokenizer
from plumbing.flags import UserError

# What the template is written with; of an image's place, <|image_pad|>, a stream has the image's number instead
PIECES = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


class ChatTokenizer:
    """
    A model's tokenizer.json with the pieces of ChatML. system: a message that stands before each sample.

    Raises UserError where the file is missing or no such tokenizer.
    """

    word_start = "\u0120"  # begins a word's piece, in place of the space before it

    def __init__(self, path, system=""):
        self.path, self.system = Path(path), system.strip()
        if not self.path.is_file():
            raise UserError(f"{path}: no tokenizer here; name the tokenizer.json of a chat model with --tokenizer")
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            settings = json.loads(content)
            added = settings.get("added_tokens") or []
            self.special = {token["id"] for token in added if token["special"]}
            # The library can read special pieces as text, but not the others, such as <tool_call>: so all are
            settings["added_tokens"] = [token | {"special": True} for token in added]
            self.model = tokenizers.Tokenizer.from_str(json.dumps(settings))
        except Exception:  # the library raises nothing more exact
            raise UserError(f"{path}: not a tokenizer.json that the tokenizers library reads") from None
        self.model.encode_special_tokens = True  # in a text they are text
        self.model.no_truncation()
        self.model.no_padding()
        ids = self.model.get_vocab()
        if missing := [piece for piece in PIECES if piece not in ids]:
            raise UserError(f"{path}: without {', '.join(missing)}, which Qwen3-VL's template is written with; "
                            "a LLaMA is read by its tokenizer.model")
        self.start, end, of_text, self.vision_start, self.vision_end, _ = [ids[piece] for piece in PIECES]
        self.stops, self.end = (end, of_text), [end, *self.encode("\n")]
        self.vocab_size, self.piece = max(ids.values()) + 1, self.model.id_to_token

    def encode(self, text):
        """Token ids of a text, in which special pieces such as <|image_pad|> are text like any other."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half of a pair of surrogates is no text
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens):
        """The text of token ids, special pieces aside; those past the vocabulary have none."""
        tokens = [int(token) for token in tokens if token < self.vocab_size and int(token) not in self.special]
        return self.model.decode(tokens, skip_special_tokens=False).strip()

    def begin(self, role):
        """What a turn begins with."""
        return [self.start, *self.encode(f"{role}\n")]

    def write(self, record):
        """
        ChatML of a record, as data.write_plain gives it: the tokens, image number k as -1 - k; the (begin, end)
        of each answer with its <|im_end|> and the newline behind it; and the (begin, end) of what may be cut,
        the user's text behind the last image, in its first turn.

        A user says all in the order of a Record: parts or image, context, question. Texts side by side are
        joined by a newline, a role stands before its image as "frontal: ", and nothing is put between an image
        and a text.
        """
        tokens = [*self.begin("system"), *self.encode(self.system), *self.end] if self.system else []
        spans, cut, images = [], None, 0
        before = [*(record.parts or record.views()), record.context]
        for question, answer in ((record.question, record.answer), *record.turns):
            tokens += self.begin("user")
            texts, head = [], len(tokens)
            for part in (*before, question):
                text = part.strip() if isinstance(part, str) else part.role and f"{part.role.strip()}: "
                texts += [text] if text else []
                if isinstance(part, View):
                    tokens += [*self.encode("\n".join(texts)), self.vision_start, -1 - images, self.vision_end]
                    texts, head, images = [], len(tokens), images + 1
            tokens += self.encode("\n".join(texts))
            cut, before = cut or (head, len(tokens)), []
            tokens += [*self.end, *self.begin("assistant")]
            begin = len(tokens)
            tokens += [*self.encode(answer.strip()), *self.end]
            spans.append((begin, len(tokens)))
        return tokens, spans, cut


def open_tokenizer(path, system=""):
    """
    The tokenizer of a file, or of a folder that holds one: a ChatTokenizer of a tokenizer.json, else LLaMA's.
    Raises UserError where there is none, and for a system message that LLaMA's template has no place for.
    """
    path = find_tokenizer(path)
    if path.suffix == ".json":
        return ChatTokenizer(path, system)
    if system:
        raise UserError(f"--system: {path} is no chat model's, whose template has a place for it; name a "
                        "tokenizer.json with --tokenizer")
    return Tokenizer(path)


def tokenizer_of(shard):
    """The tokenizer that a shard was prepared with. Raises UserError where it is another one now."""
    tokenizer = open_tokenizer(shard.folder.parent, shard.manifest.get("system", ""))
    if tokenizer.sha256 != shard.manifest["tokenizer_sha256"]:
        raise UserError(f"{tokenizer.path}: not the one its shards were made with; {shard.again}")
    return tokenizer
