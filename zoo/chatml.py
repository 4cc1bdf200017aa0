"""
The words of Qwen3-VL: ChatML, the template in which it reads a conversation; and which tokenizer a file is of.

    <|im_start|>user\\n<|vision_start|> image <|vision_end|>what is shown?<|im_end|>\\n
    <|im_start|>assistant\\n | a fracture <|im_end|> \\n |                            supervised: between the bars

This file needs no torch.
"""

from data import Tokenizer
from plumbing.files import find_tokenizer
from plumbing.flags import UserError
from zoo.harmony import HarmonyTokenizer
from zoo.turns import TurnTokenizer

# What the template is written with; of an image's place, <|image_pad|>, a stream has the image's number instead
PIECES = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


class ChatTokenizer(TurnTokenizer):
    """
    A tokenizer.json with the pieces of ChatML. Of each answer the <|im_end|> and the newline behind it are supervised,
    too; nothing stands between an image and a text.
    """

    family, pieces, lead = "Qwen3-VL", PIECES, ()

    def __init__(self, path, system=""):
        super().__init__(path, system)
        self.start, end, of_text, self.vision_start, self.vision_end, _ = map(self.model.token_to_id, PIECES)
        self.stops, self.end = (end, of_text), [end, *self.encode("\n")]
        self.before_image, self.behind_image = [self.vision_start], [self.vision_end]
        self.opening = [*self.begin("system"), *self.encode(self.system), *self.end] if self.system else []

    def begin(self, role):
        """What a turn begins with."""
        return [self.start, *self.encode(f"{role}\n")]

    def reply(self, answer, reasoning, last):
        """An answer: the tokens that are supervised, and those behind them. ChatML has no place for a reasoning."""
        return [*self.encode(answer), *self.end], []


def open_tokenizer(path, system=""):
    """
    The tokenizer of a file, or of a folder that holds one: of a tokenizer.json the one whose template has its pieces,
    else LLaMA's. Raises UserError where there is none, and for a system message that LLaMA's template has no place for.
    """
    path = find_tokenizer(path)
    if path.suffix == ".json":
        content = path.read_bytes() if path.is_file() else b""
        harmony = b'"<|channel|>"' in content and b'"<|im_start|>"' not in content
        return (HarmonyTokenizer if harmony else ChatTokenizer)(path, system)
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
