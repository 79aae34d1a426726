"""How requests without a grammar fare beside requests with one: first tokens and throughput.

    vllm serve MODEL --sampler confidence
    python examples/beside_grammars.py --base-url http://localhost:8000/v1

Some clients stream requests without a grammar, one after the other, while as many others ask for
something else: nothing, requests without a grammar (how they would fare beside any load), large
JSON schemas that are followed in any order, and large ones that are read from left to right. No
schema is asked for twice, so that each is made and read anew. The lines are JSON, one for each
company; times are in seconds, of the requests without a grammar.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from typing import Any

import aiohttp

NUMBERS = itertools.count()


def schema(fields: int, *, bound: bool) -> dict[str, Any]:
    """A schema that nobody has asked for before; with bounds no finite automaton follows it."""
    own = next(NUMBERS)
    kinds: list[dict[str, Any]] = [
        {"type": "integer", "minimum": 3} if bound else {"type": "integer"},
        {"type": "string", "maxLength": 8},
        {"enum": ["low", "mid", f"high {own}"]},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    ]
    names = [f"f{own}_{n}" for n in range(fields)]
    properties = {name: kinds[n % len(kinds)] for n, name in enumerate(names)}
    return {
        "type": "object",
        "properties": properties,
        "required": names[:2],
        "additionalProperties": False,
    }


class Company:
    """Clients of one server, of two sorts, until the time is over."""

    def __init__(self, session: aiohttp.ClientSession, model: str, args: argparse.Namespace):
        self.session, self.model, self.args = session, model, args
        self.first: list[float] = []
        self.tokens = self.beside = 0

    def body(self, **fields: Any) -> dict[str, Any]:
        """A request without a grammar."""
        return {
            "model": self.model,
            "prompt": "A:1+2=",
            "max_tokens": 64,
            "ignore_eos": True,
        } | fields

    async def free(self, until: float) -> None:
        """Stream requests without a grammar."""
        body = self.body(stream=True, stream_options={"include_usage": True})
        while time.monotonic() < until:
            begin, told = time.monotonic(), False
            async with self.session.post("completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                async for raw in answer.content:
                    line = raw.decode().strip().removeprefix("data: ")
                    if not line or line == "[DONE]":
                        continue
                    chunk = json.loads(line)
                    if not told and chunk["choices"] and chunk["choices"][0]["text"]:
                        self.first.append(time.monotonic() - begin)
                        told = True
                    self.tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)

    async def other(self, kind: str, until: float) -> None:
        """Ask for what the company is about."""
        while time.monotonic() < until:
            body = self.body(max_tokens=128)
            if kind != "free":
                asked = schema(self.args.fields, bound=kind == "frontier")
                body |= {"structured_outputs": {"json": asked}}
            async with self.session.post("completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            self.beside += 1

    async def run(self, kind: str) -> dict[str, Any]:
        """The numbers of one company."""
        until = time.monotonic() + self.args.seconds
        others = (
            [] if kind == "none" else [self.other(kind, until) for _ in range(self.args.clients)]
        )
        await asyncio.gather(*(self.free(until) for _ in range(self.args.clients)), *others)
        ordered = sorted(self.first)
        return {
            "beside": kind,
            "clients": self.args.clients,
            "requests": len(ordered),
            "first_token_median_s": round(statistics.median(ordered), 3),
            "first_token_p95_s": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
            "first_token_max_s": round(ordered[-1], 3),
            "tokens_per_s": round(self.tokens / self.args.seconds, 1),
            "others": self.beside,
        }


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4, help="of each of the two sorts")
    parser.add_argument("--fields", type=int, default=12, help="of each schema")
    args = parser.parse_args()
    base = args.base_url.rstrip("/") + "/"
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(base_url=base, timeout=timeout) as session:
        async with session.get("models") as answer:
            model = (await answer.json())["data"][0]["id"]
        for kind in ("none", "free", "automaton", "frontier"):
            print(json.dumps(await Company(session, model, args).run(kind)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
