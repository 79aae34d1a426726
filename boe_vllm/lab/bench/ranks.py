"""Agreement of a score with what it stands for, and the uncertainty of a mean over states."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from boe_vllm.base.arrays import BoolArray, FloatArray


def spearman(score: FloatArray, wanted: FloatArray) -> float:
    """Rank correlation, ties at their mean rank; NaN where one of the two is constant."""
    a, b = _ranks(score), _ranks(wanted)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else np.nan


def share_of_gain(chosen: int, wanted: FloatArray) -> float:
    """What the chosen one achieves: 0 as the average one, 1 as the best; NaN if all are alike."""
    room = wanted.max() - wanted.mean()
    return float((wanted[chosen] - wanted.mean()) / room) if room > 0 else np.nan


def area_under_curve(score: FloatArray, positive: BoolArray) -> float:
    """Probability that a positive one has the larger score than one that is not, ties counted half;
    NaN where there are none of either."""
    many = int(positive.sum())
    pairs = many * (len(positive) - many)
    lower = _ranks(score)[positive].sum() - many * (many - 1) / 2
    return float(lower / pairs) if pairs else np.nan


def bootstrap(
    values: Sequence[float], groups: Sequence[Hashable], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float, float]:
    """Mean and its 95 % interval (percentiles); NaNs are left out.

    Args:
        values: one per state.
        groups: one per state; states of a group are drawn together, since they depend on each
            other.
        seed: of the draws.
        draws: resamples.
    """
    numbers = np.asarray(values, float)
    known = np.isfinite(numbers)
    if not known.any():
        return np.nan, np.nan, np.nan
    places = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    owner = np.array([places[group] for group in groups])
    sums = np.bincount(owner[known], numbers[known], len(places))
    counts = np.bincount(owner[known], minlength=len(places))
    picked = np.random.default_rng(seed).integers(len(places), size=(draws, len(places)))
    with np.errstate(invalid="ignore"):
        means = sums[picked].sum(1) / counts[picked].sum(1)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(numbers[known].mean()), float(low), float(high)


def _ranks(values: FloatArray) -> FloatArray:
    """Ranks from 0, equal values at the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[place]
