"""Named settings that checks and predictions go through, as requests would name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]

CONFIDENCE: Fields = {"policy": "confidence"}
JOINT: Fields = {"policy": "boe", "preset": "joint"}
STEERED: Fields = {"policy": "boe", "preset": "kv"}
PAPER: Fields = {"policy": "boe", "preset": "paper"}
PAIRWISE: Fields = {"policy": "boe", "preset": "pairwise"}

STEPS: dict[str, Fields] = {
    "confidence": CONFIDENCE,
    "joint": JOINT,
    "boe": STEERED,
    "boe paper": PAPER,
    "pairwise": PAIRWISE,
    "info-gain": {"policy": "info-gain"},
    "klass": {"policy": "klass"},
}
"""What a step of each may cost; tokens a step come from whoever asks."""

FOUR = {"tokens_per_step": 4}
DECODES: dict[str, Fields] = {
    "confidence": {**CONFIDENCE, **FOUR},
    "joint": {**JOINT, **FOUR},
    "boe": STEERED,
    "boe paper": PAPER,
    "boe response": {**STEERED, "surrogate": "response"},
    "boe prototype": {"policy": "boe", "preset": "prototype"},
    "boe inject frozen": {**STEERED, "surrogate": "inject", "context": "frozen"},
    "pairwise": {**PAIRWISE, **FOUR},
    "klass": {"policy": "klass", **FOUR},
    "info-gain": {"policy": "info-gain", **FOUR},
    "joint, dual cache": {**JOINT, **FOUR, "cache": "dual"},
    "boe, guided": {**STEERED, "cfg_scale": 1.0},
    "joint, sampled": {**JOINT, **FOUR},
}
"""Whole decodes, one for each part of the code that a device may compute in its own way."""
SAMPLED = {"joint, sampled": 0.7}
"""Temperatures of the decodes that are not greedy."""
