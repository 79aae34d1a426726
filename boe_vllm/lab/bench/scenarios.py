"""Named settings that checks and predictions go through, as requests would name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]

CONFIDENCE: Fields = {"policy": "confidence"}
JOINT: Fields = {"policy": "joint"}
PAIRWISE: Fields = {"policy": "pairwise"}
BOE: Fields = {"policy": "boe"}
KV: Fields = {"policy": "boe", "preset": "kv"}

STEPS: dict[str, Fields] = {
    "confidence": CONFIDENCE,
    "joint": JOINT,
    "boe": BOE,
    "boe paper": {**BOE, "preset": "paper"},
    "boe kv": KV,
    "pairwise": PAIRWISE,
    "joint adaptive": {**JOINT, "commit": "rounds"},
    "eb": {"policy": "eb", "gamma": 0.01},
    "info-gain": {"policy": "info-gain"},
    "klass": {"policy": "klass"},
}
"""What a step of each may cost; tokens a step come from whoever asks, or are a policy's own."""

FOUR = {"tokens_per_step": 4}
DECODES: dict[str, Fields] = {
    "confidence": {**CONFIDENCE, **FOUR},
    "joint": {**JOINT, **FOUR},
    "boe": {**BOE, **FOUR},
    "boe paper": {**BOE, "preset": "paper"},
    "boe kv": KV,
    "boe response": {**BOE, "preset": "response"},
    "boe prototype": {**BOE, "preset": "prototype"},
    "boe inject frozen": {**KV, "surrogate": "inject", "context": "frozen"},
    "pairwise": {**PAIRWISE, **FOUR},
    "klass": {"policy": "klass", **FOUR},
    "info-gain": {"policy": "info-gain", **FOUR},
    "joint, dual cache": {**JOINT, **FOUR, "cache": "dual"},
    "boe kv, guided": {**KV, "cfg_scale": 1.0},
    "joint, sampled": {**JOINT, **FOUR},
}
"""Whole decodes, one for each part of the code that a device may compute in its own way; tokens a
step are the policy's own where none are given."""
SAMPLED = {"joint, sampled": 0.7}
"""Temperatures of the decodes that are not greedy."""
