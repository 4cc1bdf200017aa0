"""
The words of gpt-oss: Harmony, the template in which it reads a conversation (openai/harmony, docs/format.md; the chat
template of openai/gpt-oss-20b).

    <|start|>system<|message|>...<|end|>                      fixed, see SYSTEM
    <|start|>developer<|message|># Instructions ...<|end|>    where --system says any
    <|start|>user<|message|><img> image </img>\\nwhat is shown?<|end|>
    <|start|>assistant | <|channel|>final<|message|>a fracture<|return|> |         supervised: between the bars

A message of the channel `analysis` may stand before the final one: what the model thinks, which no answer shows.
MedGPT-oss has a system message of its own, which is not known. This file needs no torch.
"""

from plumbing.flags import UserError
from zoo.turns import TurnTokenizer

PIECES = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>")
# Around an image: the pieces that InternVL gives to gpt-oss, else two that OpenAI has reserved and never trained
AROUND = ("<img>", "</img>"), ("<|reserved_200013|>", "<|reserved_200014|>")
EFFORT, EFFORTS = "Reasoning:", ("low", "medium", "high")
# The hub's template writes the day on which it is used; here it is InternVL's, so that a model is asked as it was
# trained on any day
SYSTEM = """You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-08-06

Reasoning: {effort}

# Valid channels: analysis, commentary, final. Channel must be included for every message."""


class HarmonyTokenizer(TurnTokenizer):
    """
    A tokenizer.json with the pieces of Harmony. system: instructions of the developer; its first line may be
    "Reasoning: medium", or high, how long the model is to think, which is low otherwise.
    """

    family, pieces = "gpt-oss", PIECES

    def __init__(self, path, system=""):
        super().__init__(path, system)
        self.start, self.channel, self.message, end, *stops = map(self.model.token_to_id, PIECES)
        self.end, self.stops = [end], tuple(stops)
        self.lead = [self.channel, *self.encode("final"), self.message]
        pairs = [[self.model.token_to_id(piece) for piece in pair] for pair in AROUND]
        if not (known := [pair for pair in pairs if self.special.issuperset(pair)]):
            raise UserError(f"{path}: neither {' and '.join(AROUND[0])} nor {' and '.join(AROUND[1])} are special "
                            "pieces of it, between which an image stands; take gpt-oss's own tokenizer.json")
        (before, behind), *_ = known
        self.before_image, self.behind_image = [before], [behind, *self.encode("\n")]
        effort, instructions = self.part_system()
        self.opening = [*self.begin("system"), *self.encode(SYSTEM.format(effort=effort)), end]
        if instructions:
            self.opening += [*self.begin("developer"), *self.encode(f"# Instructions\n\n{instructions}\n\n"), end]

    def part_system(self):
        """(how long the model is to think, what else the system message says)."""
        first, _, rest = self.system.partition("\n")
        if not first.startswith(EFFORT):
            return EFFORTS[0], self.system
        effort = first.removeprefix(EFFORT).strip()
        if effort not in EFFORTS:
            raise UserError(f"--system: its first line is {first!r:.60}; behind {EFFORT} stands {', '.join(EFFORTS)} "
                            "alone, and instructions follow on the next line")
        return effort, rest.strip()

    def begin(self, role):
        """What a message begins with; an assistant's goes on with its channel, which the model writes itself."""
        return [self.start, *self.encode(role), *[self.message] * (role != "assistant")]

    def reply(self, answer, reasoning, last):
        """
        An answer: the tokens that are supervised, and those behind them.

        The last one ends in <|return|>, which stops generation. An earlier one is history, in which <|end|> stands
        there; that is not supervised, for a model that was trained to write it would go on with another message. A
        reasoning is supervised with its answer, as a message before it.
        """
        analysis = [self.channel, *self.encode("analysis"), self.message, *self.encode(reasoning.strip()), *self.end,
                    *self.begin("assistant")] if reasoning else []
        said = [*analysis, *self.lead, *self.encode(answer)]
        return ([*said, self.stops[0]], []) if last else (said, self.end)

    def final(self, tokens):
        """
        The part, a slice, of a list of tokens behind "<|start|>assistant" that is the text of the last message in the
        channel `final`: nothing where there is none, as in an answer that was cut in its analysis; all where there is
        no channel.
        """
        if self.channel not in tokens:
            return slice(None)
        part, ends = slice(0, 0), [at for at, token in enumerate(tokens) if token in (self.start, *self.end)]
        for begin, end in zip([0, *(at + 1 for at in ends)], [*ends, len(tokens)]):
            message = tokens[begin:end]
            if self.channel in message and self.message in message:
                name, text = message.index(self.channel) + 1, message.index(self.message)
                if super().decode(message[name:text]).split()[:1] == ["final"]:
                    part = slice(begin + text + 1, end)
        return part

    def decode(self, tokens):
        """The text of the message that `final` finds."""
        tokens = [int(token) for token in tokens]
        return super().decode(tokens[self.final(tokens)])
