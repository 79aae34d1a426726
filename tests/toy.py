"""A denoiser without a network: random predictions that depend on the whole sequence, many of them
equal, so that a policy can be driven through hundreds of requests, ties included."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from boe_vllm.decoding.canvas import Canvas
from boe_vllm.decoding.policy_step import view_of
from boe_vllm.models.rows import SequenceRows
from boe_vllm.models.special import SpecialTokens
from boe_vllm.policies.base import Commit
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.request.resolved import ResolvedRequest, plan_canvas
from boe_vllm.sampling.statistics import RowStatistics
from boe_vllm.steering.attention_map import Attention, AttentionMap
from boe_vllm.steering.chain import Conditional, Conditioned
from boe_vllm.steering.change import PredictionChange
from boe_vllm.steering.coupling import Coupling
from boe_vllm.steering.importance import TokenImportance
from boe_vllm.steering.likelihood import Likelihood
from boe_vllm.steering.lookahead import Lookahead, Prospect
from boe_vllm.steering.shift import Shift
from boe_vllm.steering.verification import Verification, Verified

VOCAB, MASK = 9, 8
GRID = 2**-16
"""Statistics are multiples of it, so that equal ones tie and their sums are exact in any order."""
PATTERNS = [
    [9.0, 1.0, 0.5, 0.0, -1.0, 0.2, 0.1, 0.3],
    [3.0, 2.5, 0.5, 0.0, -1.0, 0.2, 0.1, 0.3],
    [2.0, 1.0, 0.5, 0.0, -1.0, 0.2, 0.1, 0.3],
    [1.0, 0.9, 0.5, 0.0, -1.0, 0.2, 0.1, 0.3],
    [5.0, 1.0, 0.5, 0.0, -1.0, 0.2, 0.1, 0.3],
]


def on_grid(values):
    return np.round(values / GRID) * GRID


class Toy:
    """Each position's logits are one of a few patterns, turned; the mask token leads by far.

    It has no gradients and no attention: every Token Importance Score and every coupling is zero,
    and predictions have always moved by 0.005 nats.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def logits(self, tokens):
        digest = hashlib.blake2b(
            bytes(map(int, tokens)), salt=self.seed.to_bytes(8, "big")
        ).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        rows = []
        for _ in tokens:
            pattern, turn = PATTERNS[rng.integers(len(PATTERNS))], int(rng.integers(8))
            rows.append([*pattern[turn:], *pattern[:turn], 20.0])
        return rows

    def statistics(self, tokens, positions) -> RowStatistics:
        """Of the given positions, as the engine would have them at temperature 0."""
        logits = np.array(self.logits(tokens))[positions].reshape(-1, VOCAB)
        logits[:, MASK] = -1e30
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        p = np.exp(logp)
        ordered = np.sort(p, -1)
        return RowStatistics(
            proposal=p.argmax(-1),
            confidence=on_grid(ordered[:, -1]),
            margin=on_grid(ordered[:, -1] - ordered[:, -2]),
            entropy=on_grid(-(p * np.where(p > 0, logp, 0)).sum(-1)),
            finite=np.ones(len(p), bool),
            rank=np.ones(len(p), np.int64),
            top_tokens=None,
            top_logprobs=None,
        )

    def answer(self, tokens, positions, query):
        """The result of a query, and the forwards that it took."""
        if isinstance(query, TokenImportance):
            return np.zeros(len(query.candidates)), 0
        if isinstance(query, Coupling):
            return np.zeros((len(query.pool), len(query.pool))), 0
        if isinstance(query, Attention):
            return np.zeros((len(query.index), len(query.index))), 0
        if isinstance(query, AttentionMap):
            return np.zeros((len(positions) + 1, len(tokens))), 0
        if isinstance(query, Verification):
            return self.verified(tokens, positions, query), 1
        if isinstance(query, Shift):
            return np.zeros(len(positions)), 1
        if isinstance(query, Likelihood):
            logits = np.array(self.logits(tokens))[positions[query.index]].reshape(-1, VOCAB)
            logits[:, MASK] = -1e30
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            return logp[np.arange(len(logp)), query.tokens], 0
        if isinstance(query, PredictionChange):
            return np.full(len(query.positions), 0.005), 0
        if isinstance(query, Conditional):
            state = tokens.copy()
            state[positions[query.written]] = query.tokens
            found = self.statistics(state, positions[query.queried])
            result = Conditioned(
                proposal=found.proposal, confidence=found.confidence, entropy=found.entropy
            )
            return result, 1
        found = self.prospects(tokens, positions, query)
        return found, len(found)

    def verified(self, tokens, positions, query: Verification):
        """Each draft at its masked position, with the drafts before it written."""
        state, probability, agrees = tokens.copy(), [], []
        state[positions[query.written]] = query.written_tokens
        for index, draft in zip(query.drafted, query.drafts, strict=True):
            found = self.statistics(state, positions[[index]])
            logits = np.array(self.logits(state))[positions[index], :MASK]
            probability.append(math.exp(logits[draft]) / np.exp(logits).sum())
            agrees.append(found.proposal[0] == draft)
            state[positions[index]] = draft
        return Verified(probability=np.array(probability), agrees=np.array(agrees))

    def prospects(self, tokens, positions, query: Lookahead):
        """The result of a look-ahead; soft writes are those of the likeliest token."""
        found, best = [], self.statistics(tokens, positions).proposal
        for k, written in enumerate(query.writes):
            values = best[written] if query.tokens is None else query.tokens[k]
            state = tokens.copy()
            state[positions[written]] = values
            still = np.setdiff1d(np.arange(len(positions)), written)
            seen = {
                "block": positions[still],
                "masked": np.flatnonzero(state == MASK),
                "all": np.arange(len(state)),
            }[query.observe]
            block = self.statistics(state, positions[still])
            elsewhere = self.statistics(state, np.setdiff1d(seen, positions[still]))
            found.append(
                Prospect(
                    index=still,
                    proposal=block.proposal,
                    confidence=block.confidence,
                    margin=block.margin,
                    entropy=block.entropy,
                    elsewhere=elsewhere.entropy,
                    carry=block if query.carry else None,
                )
            )
        return found


def decided(step, reply):
    """The commit of a policy's step, whose queries `reply` answers."""
    if isinstance(step, Commit):
        return step
    answer = None
    while True:
        try:
            query = step.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = reply(query)


class Driven:
    """A canvas that a policy fills from a toy's predictions; everything that happens is noted."""

    def __init__(self, toy, fields, prompt, gen_length, *, seed=0, late=(), policy=None) -> None:
        config = parse_sampler_config(fields) if isinstance(fields, dict) else fields
        plan = plan_canvas(config, prompt_len=len(prompt), max_tokens=gen_length, max_model_len=200)
        self.toy = toy
        self.canvas = Canvas(
            prompt,
            ResolvedRequest(config=config, plan=plan, temperature=0.0, seed=seed),
            special=SpecialTokens(mask=MASK, eos=VOCAB - 2, late=frozenset(late)),
            vocab_size=VOCAB,
        )
        if policy is not None:
            blocks = self.canvas.blocks
            self.canvas.policy = blocks.policy = policy
            blocks.step_limit = policy.step_limit(blocks.masks_at_start, blocks.steps)
        self.inputs, self.commits, self.views, self.sent, self.forwards = [], [], [], [], 0

    def step(self):
        canvas = self.canvas
        positions, written = canvas.writable(), canvas.blocks.written(canvas.masked)
        wanted = SequenceRows(
            tokens=canvas.tokens,
            logit_positions=positions,
            extra_positions=written[: len(written) * canvas.policy.needs().revision],
        )
        rows = wanted.wanted_positions
        statistics = canvas.carried
        if statistics is None:
            statistics = self.toy.statistics(canvas.tokens, rows)
            self.forwards += 1
        self.inputs.append(canvas.tokens.tolist())
        view = view_of(canvas, wanted, slice(0, len(rows)), statistics)

        def reply(query):
            result, forwards = self.toy.answer(canvas.tokens, positions, query)
            self.forwards += forwards
            return result

        commit = decided(canvas.policy.step(view), reply)
        canvas.apply(commit, view, slice(0, len(rows)), statistics)
        self.views.append(view)
        self.commits.append(commit)
        self.sent.append(canvas.emit())
        return commit

    def finish(self, limit=2000):
        for _ in range(limit):
            self.step()
            if self.canvas.done:
                return self
        raise AssertionError("a request did not end")

    @property
    def tokens(self):
        return self.canvas.tokens[self.canvas.prompt_len :].tolist()


def without_repeats(states):
    """Each state once where it follows itself: a step that changed nothing leaves no trace."""
    return [s for n, s in enumerate(states) if n == 0 or s != states[n - 1]]


def steps_by(tokens_per_step=None, steps=None):
    """Steps of a block by its number of masks, as the frame has them."""
    return lambda masks: steps or math.ceil(masks / tokens_per_step)


def frame(shape):
    """The fields of `(generated, block, tokens per step or None, steps per block or None)`."""
    length, block, per_step, steps = shape
    fields = {"gen_length": length, "block_length": block}
    if steps:
        return fields | {"steps": steps * (length // block)}
    return fields | {"tokens_per_step": per_step}


def label(case):
    """A case's name: its fields' values, but for a table's path."""
    if not isinstance(case, dict):
        return ""
    return "-".join(str(v) for k, v in case.items() if k != "frequencies")
