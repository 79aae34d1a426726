"""Ask a running server for JSON of a schema, many times, and parse every answer.

    vllm serve MODEL --sampler confidence
    python examples/grammar.py --base-url http://localhost:8000/v1 --requests 200

The schema has eight fields with nesting. For each policy the last lines are JSON: how many answers
were valid, and the denoising steps that they took beside the tokens that they have, which are the
steps of one token a step. The exit status is 1 if an answer was not valid.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer"},
        "member": {"type": "boolean"},
        "level": {"enum": ["low", "mid", "high"]},
        "score": {"type": "number"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                "floor": {"type": ["integer", "null"]},
            },
            "required": ["zip", "floor"],
        },
        "note": {"type": ["string", "null"], "maxLength": 8},
    },
    "required": ["name", "age", "member", "level", "score", "tags", "home", "note"],
}


def ask(args: argparse.Namespace, policy: str, seed: int) -> tuple[bool, int, int]:
    """Whether one answer is valid, its steps, and its tokens."""
    body = {
        "prompt": args.prompt,
        "max_tokens": args.max_tokens,
        "temperature": 1.0,
        "seed": seed,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": SCHEMA},
        },
        "vllm_xargs": {
            "policy": policy,
            "tokens_per_step": args.tokens_per_step,
            "grammar_order": args.order,
        },
    }
    answer = httpx.post(f"{args.base_url}/completions", json=body, timeout=600)
    answer.raise_for_status()
    data = answer.json()
    (choice,) = data["choices"]
    try:
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)
    except (json.JSONDecodeError, jsonschema.ValidationError):
        print(f"not valid: {choice['text']!r}")
        return False, choice["boe"]["denoising_steps"], data["usage"]["completion_tokens"]
    return True, choice["boe"]["denoising_steps"], data["usage"]["completion_tokens"]


def main() -> int:
    """0 if every answer is valid."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--policies", nargs="+", default=["confidence", "boe", "joint"])
    parser.add_argument("--prompt", default="A:1+2=")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--tokens-per-step", type=int, default=4)
    parser.add_argument("--order", choices=["auto", "free", "frontier"], default="auto")
    args = parser.parse_args()
    wrong = 0
    for policy in args.policies:
        begin = time.monotonic()
        with ThreadPoolExecutor(args.clients) as pool:
            seeds = range(args.requests)
            found = list(pool.map(lambda seed, policy=policy: ask(args, policy, seed), seeds))
        seconds = time.monotonic() - begin
        valid = sum(one[0] for one in found)
        wrong += len(found) - valid
        line = {
            "policy": policy,
            "requests": len(found),
            "valid": valid,
            "order": args.order,
            "tokens_per_step": args.tokens_per_step,
            "mean_steps": round(statistics.mean(one[1] for one in found), 1),
            "mean_tokens": round(statistics.mean(one[2] for one in found), 1),
            "tokens_per_second": round(sum(one[2] for one in found) / seconds, 1),
        }
        print(json.dumps(line))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
