"""What the clients of `soak.py` ask for: requests of all sorts, and bad ones."""

from __future__ import annotations

import random
from typing import Any

POLICIES = ("boe", "confidence", "entropy", "margin", "random", "eb", "threshold", "remdm", "p2")
BAD = (
    {"vllm_xargs": {"policy": "nope"}},
    {"vllm_xargs": {"rho": 7}},
    {"vllm_xargs": {"steps": 7, "gen_length": 32, "block_length": 5}},
    {"max_tokens": 100_000},
    {"presence_penalty": 1.0},
    {"prompt": ""},
    {"structured_outputs": {"grammar": "root ::= ("}},
    {"structured_outputs": {"regex": "a{9}"}},
    {"guided_regex": "a+"},
    {"allowed_token_ids": [10**6]},
    {"vllm_xargs": {"canvas_template": "[" * 10_000}},
    {"vllm_xargs": {"choices": '{"a":' * 50 + "1" + "}" * 50}},
    {"min_tokens": 3, "vllm_xargs": {"gen_length": 2}},
)
# What a request may ask for besides: templates, answers, grammars, masks to fill in, snapshots.
SORTS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"structured_outputs": {"regex": "[0-9]{2,}(\\+[0-9]+)?"}},
    {"structured_outputs": {"choice": ["12", "345"]}},
    {"structured_outputs": {"grammar": 'root ::= "(" root ")" | [0-9]'}},
    {"response_format": {"type": "json_object"}},
    {"vllm_xargs": {"canvas_template": '["a=", 3]'}},
    {"vllm_xargs": {"choices": '["7", "30", "12"]'}},
    {"prompt": "A:1+<|mdm_mask|>=3"},
    {"vllm_xargs": {"cache": "dual"}},
    {"vllm_xargs": {"stream_canvas": True}},
)
SHORT = {"prompt": "A:1+2=", "max_tokens": 4, "temperature": 0, "vllm_xargs": {"policy": "random"}}


def kinds(limit: int, number: int, seed: int) -> list[dict[str, Any]]:
    """Requests of all sorts whose prompt and canvas fit into `limit` tokens of a byte each."""
    draw = random.Random(seed)
    found = []
    for n in range(number):
        canvas = draw.choice([4, 8, 16, 32, 64, min(128, limit // 2)])
        length = draw.choice([1, 2, 8, 32, 128, limit - canvas - 8])
        length = max(1, min(length, limit - canvas - 8))
        prompt = "".join(draw.choice("0123456789+-=:;A") for _ in range(length))
        body = {
            "prompt": prompt,
            "max_tokens": canvas,
            "temperature": draw.choice([0, 0, 0.7, 1.0]),
            "seed": n,
            "ignore_eos": draw.random() < 0.5,
            "vllm_xargs": {
                "policy": POLICIES[n % len(POLICIES)],
                "tokens_per_step": draw.choice([1, 2, 4]),
                "block_length": min(canvas, draw.choice([4, 16, 32])),
            },
        }
        sort = SORTS[n % len(SORTS)]
        fields = body["vllm_xargs"] | sort.get("vllm_xargs", {})
        if "choices" in fields:  # which stand alone
            fields = sort["vllm_xargs"]
        found.append(body | sort | {"vllm_xargs": fields})
    return found
