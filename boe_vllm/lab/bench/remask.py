"""Which written tokens are wrong: what a gradient says of it, beside stored confidences.

Puzzles with one answer are written by confidence, several tokens a step, until so many masks are
left; every written token is then right or wrong. Scores of how suspicious a token is are compared
by the area under their curve (0.5 is chance, 1 names every wrong token before any right one):

    stored     its probability when it was written, low first (ReMDM's "conf")
    now        its probability at its own row now, low first (P2)
    embedding  how far the masks' entropies fall, to first order, if it is masked again: through its
               embedding, `<dH/de, e_token - e_mask>`
    keys       the same through its keys and values, with those that it would really have
    exact      how far they really fall: a forward for every written token
    left out   its probability once it is masked, low first: the same forwards
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boe_vllm.base.arrays import BoolArray, FloatArray, IntArray
from boe_vllm.base.bundled import model_path
from boe_vllm.lab.bench import common
from boe_vllm.lab.bench.baseline import PlainLLaDA
from boe_vllm.lab.bench.checkpoint import read_llada
from boe_vllm.lab.bench.ranks import area_under_curve
from boe_vllm.lab.tasks import TASKS
from boe_vllm.models.build import read_tensors

Tensor = torch.Tensor
Scores = dict[str, FloatArray]

COMMON_OPTIONS = False
"""Nothing is timed here."""
SCORES = ("stored", "now", "embedding", "keys", "exact", "left out")
ONE_ANSWER = ("sudoku4", "sudoku6", "addition")
DRAWS = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--model", default="tiny", help="tiny, or a checkpoint's folder")
    parser.add_argument("--tasks", type=common.names(ONE_ANSWER), default=["sudoku6"])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--tokens-per-step", type=common.integers, default=[4, 8])
    parser.add_argument("--left", type=int, default=12, help="masks that are left")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Print one line for each task and rate."""
    from tokenizers import Tokenizer

    folder = Path(model_path(args.model))
    config = read_llada(folder)
    network = Watched(config, dict(read_tensors(folder)), dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = []
    for task in (TASKS[name] for name in args.tasks):
        for rate in args.tokens_per_step:
            found, wrong, groups = [], [], []
            for number, item in enumerate(task.items(args.items, seed=args.seed, split="test")):
                prompt, answer = (
                    np.array(tokenizer.encode(text, add_special_tokens=False).ids)
                    for text in (item.prompt, item.answer)
                )
                state = _written(network, prompt, len(answer), rate, args.left)
                found.append(suspicions(network, *state))
                tokens, places, _ = state
                wrong.append(tokens[places] != answer[places - len(prompt)])
                groups.append(np.full(len(places), number))
            row = _row(found, np.concatenate(wrong), np.concatenate(groups), args.seed)
            rows.append({"task": task.name, "tokens a step": rate, **row})
            common.progress(f"{task.name}: {rate} tokens a step measured")
    common.print_table("Area under the curve for finding wrong tokens, and its 95 % interval", rows)
    print("Below 0.5 the opposite sign would do better, by as much as it is above 0.5 then.")
    common.print_result("remask", {}, details=rows, environment={}, args=args)


class Watched(PlainLLaDA):
    """The plain network, which keeps the keys and values of its last pass, before rotation."""

    kept: list[Tensor]
    """Keys and values, [B, L, G P] each, layer by layer."""

    def hidden(self, x_BLD: Tensor, bias_B11L: Tensor | None = None) -> Tensor:
        """As the plain network's."""
        self.kept = []
        return super().hidden(x_BLD, bias_B11L)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = super()._linear(x, name)
        if name.endswith(("k_proj", "v_proj")):
            if y.requires_grad:
                y.retain_grad()
            self.kept.append(y)
        return y

    def log_probs(self, x_BLD: Tensor) -> Tensor:
        """[B, L, V] of embeddings, the mask never proposed."""
        logits = self.logits(self.hidden(x_BLD)).clone()
        logits[..., self.config.mask_token_id] = torch.finfo(logits.dtype).min
        return logits.log_softmax(-1)


def _written(
    network: Watched, prompt: IntArray, canvas: int, rate: int, left: int
) -> tuple[IntArray, IntArray, FloatArray]:
    """Tokens [L] of a canvas with so many masks left; the written positions [W], in the order of
    writing, and their probabilities [W] when they were written."""
    mask = network.config.mask_token_id
    tokens = np.concatenate([prompt, np.full(canvas, mask)])
    places, stored = [], []
    while (count := int((tokens == mask).sum())) > left:
        with torch.no_grad():
            log_probs = network.log_probs(network.embed(torch.from_numpy(tokens)[None]))[0]
        masked = np.flatnonzero(tokens == mask)
        confidence, proposal = (x.numpy() for x in log_probs[masked].exp().max(-1))
        best = np.argsort(-confidence, kind="stable")[: min(rate, count - left)]
        tokens[masked[best]] = proposal[best]
        places.append(masked[best])
        stored.append(confidence[best])
    return tokens, np.concatenate(places), np.concatenate(stored)


def suspicions(network: Watched, tokens: IntArray, places: IntArray, stored: FloatArray) -> Scores:
    """All scores of written tokens, larger for what is more likely wrong.

    Args:
        network: in float32 or float64.
        tokens: [L] of the state.
        places: [W] written positions.
        stored: [W] their probabilities when they were written.
    """
    mask, index = network.config.mask_token_id, np.arange(len(places))
    now, masks = torch.from_numpy(tokens)[None], np.flatnonzero(tokens == mask)
    x = network.embed(now).clone().requires_grad_(True)
    before = network.log_probs(x)
    entropy = _entropies(before)[:, masks].sum()
    entropy.backward()  # type: ignore[no-untyped-call]
    kept = network.kept
    again = now.repeat(len(places), 1)
    again[index, places] = mask
    with torch.no_grad():
        after, moved = network.log_probs(network.embed(again)), network.kept
        falls = entropy - _entropies(after)[:, masks].sum(-1)
        change = network.embed(now)[0, places] - network.embed(again)[index, places]
        assert x.grad is not None
        embedding = (x.grad[0, places] * change).sum(-1)
        keys = torch.zeros(len(places), dtype=x.dtype)
        for old, new in zip(kept, moved, strict=True):
            assert old.grad is not None
            keys += (old.grad[0, places] * (old[0, places] - new[index, places])).sum(-1)
        held = now[0, places]
        return {
            "stored": -stored,
            "now": -before[0, places, held].numpy(),
            "embedding": embedding.numpy(),
            "keys": keys.numpy(),
            "exact": falls.numpy(),
            "left out": -after[index, places, held].numpy(),
        }


def _entropies(log_probs: Tensor) -> Tensor:
    """[...] nats."""
    return -(log_probs.exp() * log_probs).sum(-1)


def _row(found: Sequence[Scores], wrong: BoolArray, groups: IntArray, seed: int) -> dict[str, Any]:
    """Areas over all tokens; items are drawn again for the intervals."""
    row: dict[str, Any] = {"tokens": len(wrong), "wrong": int(wrong.sum())}
    rng = np.random.default_rng(seed)
    own = [np.flatnonzero(groups == item) for item in np.unique(groups)]
    draws = [
        np.concatenate([own[n] for n in rng.integers(len(own), size=len(own))])
        for _ in range(DRAWS)
    ]
    if wrong.all() or not wrong.any():
        return row | dict.fromkeys(SCORES, "-")
    for name in SCORES:
        score = np.concatenate([scores[name] for scores in found])
        areas = [area_under_curve(score[draw], wrong[draw]) for draw in draws]
        low, high = np.nanpercentile(areas, [2.5, 97.5])
        row[name] = f"{area_under_curve(score, wrong):.2f} ({low:.2f} to {high:.2f})"
    return row
