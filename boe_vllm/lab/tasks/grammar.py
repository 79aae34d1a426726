"""A probabilistic grammar with a memory: a source of text whose distribution is known exactly.

A text is a stream of words. The grammar derives it from left to right: the first symbol that is
still pending is a word, which is emitted, or the name of a rule, which is replaced by one of its
alternatives. An alternative may note something in the memory (who the story is about, how many
apples there are), and later rules read it: that is how words agree over any distance. When nothing
is pending, the memory is emptied and the next text of the stream begins.

No two alternatives that are open at the same time begin with the same word. So the words of a text
say how it was derived, the probability of any text is a product along one path, and the entropy of
the words is that of the choices.

Legend: `S` states, `E` edges between states, `n` words of a text.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boe_vllm.base.arrays import FloatArray, IntArray

Memory = Mapping[str, Any]
Alternative = tuple[float, str, Mapping[str, Any]]
"""A weight, the symbols in its place, separated by spaces, and what is noted in the memory."""
Rule = Callable[[Memory], Iterable[Alternative]]

_REMEMBERED = 100_000
"""States whose options are kept, at most."""
_SMALL = 1e-18
"""Probability below which the end of a text is no longer followed."""


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """Where a derivation stands: all that the rest of the stream depends on."""

    pending: tuple[str, ...] = ()
    """Symbols still to be derived, first one first."""
    memory: tuple[tuple[str, Any], ...] = ()
    """What has been noted, sorted by name."""


Option = tuple[float, State]


class Grammar:
    """Rules, and what follows from them: samples, likelihoods and entropies."""

    def __init__(
        self,
        rules: Mapping[str, Rule],
        start: str,
        alike: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """A grammar.

        Args:
            rules: by name; every other symbol is a word.
            start: the rule that a text of the stream begins with.
            alike: replaces what a memory holds by a representative, where the probabilities of
                everything that follows are the same (one name for another). Entropies are computed
                on representatives; texts are not.
        """
        self.rules, self.start = dict(rules), start
        self._alike = alike
        self._options: dict[State, dict[str, Option]] = {}

    def options(self, state: State) -> dict[str, Option]:
        """The words that may follow, each with its probability and the state that it leads to.

        Raises:
            ValueError: for two alternatives that begin with the same word, a rule without one, or a
                text that may end with a rule that gave no word.
        """
        if state not in self._options:
            if len(self._options) >= _REMEMBERED:
                self._options.clear()
            self._options[state] = self._derive(state)
        return self._options[state]

    def _derive(self, state: State) -> dict[str, Option]:
        found: dict[str, Option] = {}
        open_ = [(1.0, state if state.pending else State((self.start,)))]
        while open_:
            p, now = open_.pop()
            if not now.pending:
                raise ValueError(f"rule {self.start!r}: expected a word at the end of every text")
            head, rest = now.pending[0], now.pending[1:]
            if head in self.rules:
                memory: dict[str, Any] = dict(now.memory)
                chosen = list(self.rules[head](memory))
                total = math.fsum(weight for weight, _, _ in chosen)
                if total <= 0:
                    raise ValueError(f"rule {head!r}: expected an alternative, got none")
                for weight, symbols, notes in chosen:
                    after = tuple(sorted({**memory, **notes}.items())) if notes else now.memory
                    open_.append((p * weight / total, State((*symbols.split(), *rest), after)))
            elif head in found:
                raise ValueError(f"word {head!r}: expected one alternative that begins with it")
            else:
                found[head] = (p, State(rest, now.memory if rest else ()))
        return found

    # ---- texts ---------------------------------------------------------------------------------

    def stream(self, rng: random.Random) -> Iterator[str]:
        """The words of one text after the other, without end."""
        while True:
            pending, memory = [self.start], dict[str, Any]()
            while pending:
                head = pending.pop()
                if head not in self.rules:
                    yield head
                    continue
                chosen = list(self.rules[head](memory))
                ((_, symbols, notes),) = rng.choices(chosen, [weight for weight, _, _ in chosen])
                pending += reversed(symbols.split())
                memory |= notes

    def log_probs(self, words: Iterable[str]) -> list[float]:
        """The log-probability of each word given those before it, nats, up to the first word that
        the source cannot produce: that one has -inf, and is the last of the list."""
        state, found = State(), []
        for word in words:
            p, state = self.options(state).get(word, (0.0, state))
            found.append(math.log(p) if p else -math.inf)
            if not p:
                break
        return found

    def log_likelihood(self, words: Iterable[str]) -> float:
        """The log-probability that the stream begins with these words, nats; -inf if it cannot."""
        return math.fsum(self.log_probs(words))

    # ---- entropies -----------------------------------------------------------------------------

    def entropies(self, words: int) -> FloatArray:
        """[n] the entropy of each of the first `n` words of the stream given those before it, nats;
        exact, by following the distribution of the state."""
        import numpy as np

        chain = self._chain()
        mass = np.zeros(len(chain.entropy_S))
        mass[0] = 1.0
        found = []
        for _ in range(words):
            found.append(float(mass @ chain.entropy_S))
            mass = chain.step(mass)
        return np.array(found)

    def text_entropy(self) -> tuple[float, float]:
        """Entropy of one text of the stream, nats, and its mean length in words; exact."""
        import numpy as np

        chain = self._chain()
        mass = np.zeros(len(chain.entropy_S))
        mass[0] = 1.0
        entropy = length = 0.0
        while (left := float(mass.sum())) > _SMALL:
            entropy += float(mass @ chain.entropy_S)
            length += left
            mass = chain.step(mass)
            mass[0] = 0.0  # the text has ended
        return entropy, length

    def entropy_rate(self) -> float:
        """Entropy of the stream a word, nats: that of a text over its mean length."""
        entropy, length = self.text_entropy()
        return entropy / length

    def representative(self, state: State) -> State:
        """The state that stands for all that are like this one."""
        memory = self._alike(dict(state.memory))
        return State(state.pending, tuple(sorted(memory.items())))

    def _chain(self) -> Chain:
        """The Markov chain of the representatives; its first state is the start of a text."""
        import numpy as np

        index = {State(): 0}
        waiting = [State()]
        edges: list[tuple[int, int, float]] = []
        entropies: list[float] = []
        for state in waiting:  # grows while it is read
            options = list(self.options(state).values())
            entropies.append(-math.fsum(p * math.log(p) for p, _ in options))
            for p, after in options:
                after = self.representative(after)
                if after not in index:
                    index[after] = len(index)
                    waiting.append(after)
                edges.append((index[state], index[after], p))
        before, after_, p_ = zip(*edges, strict=True)
        return Chain(np.array(entropies), np.array(before), np.array(after_), np.array(p_))


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """A Markov chain over states."""

    entropy_S: FloatArray
    """Entropy of the next word, nats."""
    before_E: IntArray
    after_E: IntArray
    p_E: FloatArray

    def step(self, mass_S: FloatArray) -> FloatArray:
        """The distribution of the next state."""
        import numpy as np

        weights = mass_S[self.before_E] * self.p_E
        return np.bincount(self.after_E, weights, minlength=len(mass_S)).astype(np.float64)
