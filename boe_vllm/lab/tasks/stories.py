"""Small English stories: text whose likelihood under its source is known exactly.

A text begins after one end of text and fills its canvas: one story, an end of text, the next story,
and so on, the last one perhaps cut off. The source (`story_grammar`) can produce a text or not, and
the probability with which it does is exact; no judge model is needed. What a text of the model is
worth is measured against that, and beside it whether the texts are as varied as the source's own.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Iterator, Sequence

from boe_vllm.lab.tasks.base import GeneratedTask, Item
from boe_vllm.lab.tasks.story_grammar import END, STORIES

WORDS = 127
"""Words of a text: what the bundled model was trained on, less the end of text before it."""
REPEATED = 4
"""Words of a phrase whose repetitions are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextFacts:
    """What the source says of one text."""

    possible: bool
    """Whether the source can produce the text."""
    stories: tuple[tuple[str, ...], ...]
    """Its stories, the last one perhaps cut off."""
    possible_stories: int
    """How many of them the source can produce."""
    words: int
    """Words of these, ends of text among them."""
    surprise: float
    """Negative log-likelihood of these, nats."""
    first_wrong: int
    """Words before the first one that the source cannot produce there; all, if there is none."""
    entropy: float
    """Of the distribution of words within the text (unigram), nats."""
    repeated: float
    """Share of the text's phrases of four words that stood in it before."""


class Stories(GeneratedTask):
    """Unconditional texts: every item has the same prompt, one end of text, and its own draw."""

    name = "stories"
    gen_length = block_length = WORDS
    goes_on = True

    def generate(self, rng: random.Random) -> Item:
        """One text of the source, as the answer to the prompt of all of them."""
        words = itertools.islice(STORIES.stream(rng), self.gen_length)
        return Item(task=self.name, prompt=END, answer=" ".join(words))

    def items(self, n: int | None = None, *, seed: int = 0, split: str = "test") -> list[Item]:
        """`n` items with different draws. There is nothing to hold out: the source is known, and
        a text of it has next to no chance to occur twice."""
        if n is None or n < 0:
            raise ValueError(f"n: {self.name} is generated without end; expected a number, got {n}")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        return [dataclasses.replace(self.generate(rng), draw=k) for k in range(n)]

    def stream(self, *, seed: int = 0) -> Iterator[Item]:
        """Texts without end, other ones than `items`."""
        rng = random.Random(f"{self.name}/stream/{seed}")
        while True:
            yield self.generate(rng)

    def parse(self, text: str) -> str:
        """The whole text: it goes on after an end of text."""
        return text.strip()

    def is_valid(self, item: Item, answer: str) -> bool:
        """Whether the source can produce the text."""
        words = answer.split()
        return bool(words) and math.isfinite(STORIES.log_likelihood(words))


def facts_of(words: Sequence[str]) -> TextFacts:
    """What the source says of a text, word by word."""
    stories = stories_of(words)
    surprises = [-STORIES.log_likelihood(story) for story in stories]
    possible = [k for k, value in enumerate(surprises) if math.isfinite(value)]
    steps = STORIES.log_probs(words)
    wrong = bool(steps) and not math.isfinite(steps[-1])
    counts = collections.Counter(words)
    phrases = [tuple(words[k : k + REPEATED]) for k in range(len(words) - REPEATED + 1)]
    return TextFacts(
        possible=not wrong and bool(words),
        stories=stories,
        possible_stories=len(possible),
        words=sum(len(stories[k]) for k in possible),
        surprise=math.fsum(surprises[k] for k in possible),
        first_wrong=len(steps) - wrong,
        entropy=-math.fsum(n / len(words) * math.log(n / len(words)) for n in counts.values()),
        repeated=1 - len(set(phrases)) / len(phrases) if phrases else 0.0,
    )


def stories_of(words: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """A text's stories, each with its end of text; the last one has none if it is cut off."""
    found: list[tuple[str, ...]] = []
    begin = 0
    for k, word in enumerate(words):
        if word == END or k == len(words) - 1:
            found.append(tuple(words[begin : k + 1]))
            begin = k + 1
    return tuple(found)


# ---- many texts --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A mean over texts, and half the width of its 95 % interval."""

    value: float
    half: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.half:.3f}"


def mean_of(values: Sequence[float], weights: Sequence[float] | None = None) -> Mean | None:
    """A mean, or the ratio of the sums of `values` and `weights`, with an interval by the normal
    approximation (of a ratio: the delta method); None without values, or of no weight."""
    weights = [1.0] * len(values) if weights is None else weights
    total, n = math.fsum(weights), len(values)
    if not total or n < 2:
        return None
    ratio = math.fsum(values) / total
    errors = [v - ratio * w for v, w in zip(values, weights, strict=True)]
    return Mean(value=ratio, half=1.96 * statistics.stdev(errors) * n**0.5 / total)


def figures(texts: Sequence[Sequence[str]]) -> dict[str, int | float | Mean | None]:
    """What Table 4 says of some texts, with 95 % intervals where there are any.

    Returns:
        `texts`: how many; `possible`: share that the source can produce; `stories`: the same of
        the single stories; `first wrong`: words before the first impossible one; `nats a word`: of
        the possible stories; `unigram entropy`: nats, of the words within a text; `distinct`: share
        of different ones among all stories that came to their end; `repeated`: share of a text's
        phrases of four words that it has a second time.
    """
    facts = [facts_of(words) for words in texts]
    whole = [story for fact in facts for story in fact.stories if story[-1] == END]
    return {
        "texts": len(texts),
        "possible": statistics.fmean(fact.possible for fact in facts),
        "stories": mean_of(
            [fact.possible_stories for fact in facts], [len(fact.stories) for fact in facts]
        ),
        "first wrong": mean_of([fact.first_wrong for fact in facts]),
        "nats a word": mean_of([fact.surprise for fact in facts], [fact.words for fact in facts]),
        "unigram entropy": mean_of([fact.entropy for fact in facts]),
        "distinct": len(set(whole)) / len(whole) if whole else None,
        "repeated": mean_of([fact.repeated for fact in facts]),
    }
