"""What every task is: items with a prompt, a rule that scores an answer, a stop rule.

Tasks are generated (`GeneratedTask`) or read from files (`boe_vllm.lab.tasks.files`). The generated
ones are plain characters; the tiny checkpoint's tokenizer makes one token of each byte, so lengths
in characters are lengths in tokens.
"""

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

SPLITS = ("train", "test")
_END_OF_ANSWER = re.compile(r"<\|endoftext\|>|<\|eot_id\|>|\s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One problem."""

    task: str
    """Name of the task the item belongs to."""
    prompt: str
    """Text given to the model, up to where the answer follows (`=` in generated tasks)."""
    answer: str
    """One right answer, without EOS; other right answers may exist."""
    draw: int = 0
    """Which of several items of one prompt: each has random numbers of its own."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Facts the prompt is made of (terms, target, clue count), for reports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The judgement of one answer."""

    valid: bool
    """The answer obeys the task's rules: the measure to report."""
    exact: bool
    """The answer is the reference answer, character for character."""
    cell_accuracy: float | None = None
    """Share of blank cells filled as in the reference, in [0, 1]; None where several
    answers are right or the answer is no grid."""


def split_of(prompt: str) -> str:
    """`"test"` for one prompt in 16, chosen by a stable hash, else `"train"`."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % 16 == 0 else "train"


class Task(ABC):
    """Problems together with the rule that scores answers to them."""

    name: ClassVar[str]
    gen_length: ClassVar[int]
    """Canvas length in tokens; shorter answers are padded with EOS."""
    block_length: ClassVar[int]
    """Suggested semi-autoregressive block in tokens; divides `gen_length`."""
    stop: ClassVar[tuple[str, ...]] = ()
    """Strings that end an answer; they are not part of it."""
    source: ClassVar[str] = "boe_vllm"
    """Where the prompt comes from."""
    judged: ClassVar[bool] = True
    """Whether an answer can be right or wrong; False for free text."""
    goes_on: ClassVar[bool] = False
    """Whether a text goes on after an end of text, so that it is decoded and judged to the end of
    its canvas, ends of text among its words."""
    slow_score: ClassVar[bool] = False
    """Whether scoring may take long (it runs programs): score away from the decoding loop."""

    @abstractmethod
    def is_valid(self, item: Item, answer: str) -> bool:
        """Whether `answer` (already parsed) obeys the rules of `item`."""

    @abstractmethod
    def items(self, n: int | None = None, *, seed: int = 0, split: str = "test") -> list[Item]:
        """`n` different problems; the same for the same arguments. None for all, in a file."""

    def require(self) -> None:
        """A ValueError when this machine lacks what scoring needs; nothing by default."""
        return

    def messages(self, item: Item) -> list[dict[str, str]]:
        """The item as a conversation, for models with a chat template."""
        return [{"role": "user", "content": item.prompt}]

    def parse(self, text: str) -> str:
        """The answer within generated text: everything before EOS or white space."""
        return _END_OF_ANSWER.split(text.lstrip(), maxsplit=1)[0]

    def score(self, item: Item, text: str) -> Score:
        """Judge generated `text` as an answer to `item`."""
        answer = self.parse(text)
        return Score(
            valid=self.is_valid(item, answer),
            exact=answer == item.answer,
            cell_accuracy=self.cell_accuracy(item, answer),
        )

    def cell_accuracy(self, item: Item, answer: str) -> float | None:
        """See `Score.cell_accuracy`; None unless a task overrides this."""
        return None


class GeneratedTask(Task):
    """A generator of problems, with a train and a test split."""

    @abstractmethod
    def generate(self, rng: random.Random) -> Item:
        """One problem of either split."""

    def generate_for(self, rng: random.Random, split: str) -> Item:
        """One problem of `split`."""
        while split_of((item := self.generate(rng)).prompt) != split:
            pass
        return item

    def items(self, n: int | None = None, *, seed: int = 0, split: str = "test") -> list[Item]:
        """`n` different problems of a split; the same for the same arguments."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        if n is None:
            raise ValueError(f"n: {self.name} is generated without end; say how many items")
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[str, Item] = {}
        for _ in range(1000 + 20 * n):
            if len(found) == n:
                break
            item = self.generate_for(rng, split)
            found.setdefault(item.prompt, item)
        else:
            raise ValueError(f"{self.name} has only about {len(found)} {split} items, not {n}")
        return list(found.values())

    def stream(self, *, seed: int = 0) -> Iterator[Item]:
        """Training problems without end, with repeats; never one of the test split."""
        rng = random.Random(f"{self.name}/stream/{seed}")
        while True:
            yield self.generate_for(rng, "train")
