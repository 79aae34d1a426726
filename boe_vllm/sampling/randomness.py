"""Counter-based random numbers: a pure function of seed, stream, step and position.

A request draws the same numbers alone, in any batch and in any slot, and on every rank of a
tensor-parallel group, because nothing is consumed from a shared generator.
"""

from __future__ import annotations

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray

# Streams keep the draws of one step apart.
WRITE, CHOOSE, REMASK, LOOKAHEAD = range(4)

# Candidate sets of one step draw from streams of their own, from here on.
CANDIDATES = 1 << 16

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seed: int, *, step: int, positions: IntArray, stream: int) -> FloatArray:
    """One number in (0, 1) per position, float64, by SplitMix64's finaliser (Steele 2014)."""
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed % 2**64], dtype=np.uint64))
        key = _mix(key + np.uint64(step) * _GOLDEN + np.uint64(stream + 1))
        bits = _mix(key + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))
