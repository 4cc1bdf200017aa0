"""
What the templates of chat models have in common: a tokenizer.json, and a record as a conversation in turns.

zoo/chatml.py and zoo/harmony.py say which pieces stand around a turn, an image and an answer. This file needs no torch.
"""

import hashlib
import json
from pathlib import Path

import tokenizers

from data import View
from plumbing.flags import UserError


class TurnTokenizer:
    """
    A model's tokenizer.json, with the face of data.Tokenizer. system: a message that stands before each sample.

    A subclass names its `family` and the `pieces` that it needs, and has `begin` and `reply`; `opening`, the tokens
    before the first turn; `end`, those behind a user's; `before_image` and `behind_image`; and `lead`, those of an
    answer that stand before its own words. Raises UserError where the file is missing or no such tokenizer.
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
        if missing := [piece for piece in self.pieces if piece not in ids]:
            raise UserError(f"{path}: without {', '.join(missing)}, which {self.family}'s template is written with; of "
                            "chat models Qwen3-VL and gpt-oss are known, and a LLaMA is read by its tokenizer.model")
        self.vocab_size, self.piece = max(ids.values()) + 1, self.model.id_to_token

    def encode(self, text):
        """Token ids of a text, in which special pieces such as <|image_pad|> are text like any other."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half of a pair of surrogates is no text
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens):
        """The text of token ids, special pieces aside; those past the vocabulary have none."""
        tokens = [int(token) for token in tokens if token < self.vocab_size and int(token) not in self.special]
        return self.model.decode(tokens, skip_special_tokens=False).strip()

    def write(self, record):
        """
        The conversation of a record, as data.write_plain gives it: the tokens, image number k as -1 - k; the
        (begin, end) of what is supervised of each answer; and the (begin, end) of what may be cut, the user's text
        behind the last image, in its first turn.

        A user says all in the order of a Record: parts or image, context, question. Texts side by side are joined by
        a newline, and a role stands before its image as "frontal: ".
        """
        tokens, spans, cut, images = [*self.opening], [], None, 0
        before = [*(record.parts or record.views()), record.context]
        turns = [(record.question, record.answer), *record.turns]
        for number, (question, answer) in enumerate(turns, 1):
            tokens += self.begin("user")
            texts, head = [], len(tokens)
            for part in (*before, question):
                text = part.strip() if isinstance(part, str) else part.role and f"{part.role.strip()}: "
                texts += [text] if text else []
                if isinstance(part, View):
                    tokens += [*self.encode("\n".join(texts)), *self.before_image, -1 - images, *self.behind_image]
                    texts, head, images = [], len(tokens), images + 1
            tokens += self.encode("\n".join(texts))
            cut, before = cut or (head, len(tokens)), []
            tokens += [*self.end, *self.begin("assistant")]
            said, behind = self.reply(answer.strip(), "" if record.turns else record.reasoning, number == len(turns))
            spans.append((len(tokens), len(tokens) + len(said)))
            tokens += [*said, *behind]
        return tokens, spans, cut
