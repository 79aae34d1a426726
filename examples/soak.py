"""Load a running server with everything at once, and check what every client gets.

    vllm serve MODEL --sampler boe
    python examples/soak.py --base-url http://localhost:8000/v1 --seconds 600 --clients 16

Clients ask again and again, with prompts of every length, all policies, temperatures, streaming
and not; some leave in the middle, some send bad requests. Before the load, each kind of request is
asked alone; under load its tokens have to be the same. The last line is JSON; the exit status is 1
if anything was lost, doubled, different, or answered with a status that it should not have.

Fairness (docs/contracts.md): all admitted requests make their steps together, so a short request of
`s` steps waits for `s` steps of everybody, each as long at most as everybody's alone, one after the
other. If all of them do not fit into the server's rows at once, it also waits in the queue, at most
for everybody before it. Its latency may be `--slack` times this bound.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import sys
import time
from collections import Counter
from typing import Any

import aiohttp
from soak_requests import BAD, SHORT, kinds


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Alone:
    """What a request gives and takes with nothing beside it."""

    text: str
    seconds: float
    steps: int
    rows: int


class Soak:
    """One run: what was asked, what came back, and what was wrong with it."""

    def __init__(self, args: argparse.Namespace, session: aiohttp.ClientSession, model: str):
        self.args, self.session, self.model = args, session, model
        self.alone: list[Alone] = []
        self.kinds = kinds(args.limit, args.kinds, args.seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.latencies: list[float] = []
        self.memory: list[tuple[float, int]] = []

    async def post(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer; only a stream has snapshots."""
        fields = {k: v for k, v in body.get("vllm_xargs", {}).items() if k != "stream_canvas"}
        body = {"model": self.model} | body | {"vllm_xargs": fields}
        async with self.session.post("completions", json=body) as answer:
            return answer.status, await answer.json()

    async def ask(self, body: dict[str, Any]) -> tuple[int, str]:
        """Status and text."""
        status, data = await self.post(body)
        return (status, str(data)) if status != 200 else (200, data["choices"][0]["text"])

    async def by_itself(self, body: dict[str, Any]) -> Alone:
        """A request that nothing runs beside."""
        begin = time.monotonic()
        status, data = await self.post(body)
        seconds = time.monotonic() - begin
        assert status == 200, data
        canvas, block = body["max_tokens"], body["vllm_xargs"].get("block_length", 1)
        return Alone(
            text=data["choices"][0]["text"],
            seconds=seconds,
            steps=data["kv_transfer_params"]["boe"]["denoising_steps"],
            rows=data["usage"]["prompt_tokens"] + -(-canvas // block) * block,
        )

    async def stream(self, body: dict[str, Any], leave_after: int | None) -> tuple[int, str | None]:
        """Status and text of a stream; None for the text if the client left before its end."""
        body = {"model": self.model, "stream": True} | body
        text, ends = "", 0
        async with self.session.post("completions", json=body) as answer:
            if answer.status != 200:
                return answer.status, await answer.text()
            pieces = 0
            async for raw in answer.content:
                line = raw.decode().strip()
                if not line.startswith("data:"):
                    continue
                if line == "data: [DONE]":
                    ends += 1
                    continue
                chunk = json.loads(line[5:])
                if "error" in chunk:
                    return 500, str(chunk)
                text += "".join(choice["text"] for choice in chunk["choices"])
                pieces += 1
                if leave_after is not None and pieces > leave_after:
                    return 200, None
        if ends != 1:
            self.wrong.append(f"a stream ended {ends} times")
        return 200, text

    async def client(self, number: int, until: float) -> None:
        """Ask until the time is over."""
        draw = random.Random(1000 * self.args.seed + number)
        while time.monotonic() < until:
            roll = draw.random()
            await (self.bad(draw) if roll < 0.1 else self.short() if roll < 0.2 else self.one(draw))

    async def bad(self, draw: random.Random) -> None:
        body = SHORT | draw.choice(BAD)
        streaming = draw.random() < 0.5
        status, text = await (self.stream(body, None) if streaming else self.ask(body))
        self.counts["refused"] += 1
        if status != 400:
            self.wrong.append(f"expected 400 for {body}, got {status}: {text}")

    async def short(self) -> None:
        begin = time.monotonic()
        status, _ = await self.ask(SHORT)
        self.latencies.append(time.monotonic() - begin)
        self.counts["short"] += 1
        if status != 200:
            self.wrong.append(f"a short request got {status}")

    async def one(self, draw: random.Random) -> None:
        n = draw.randrange(len(self.kinds))
        text: str | None
        if draw.random() < 0.3:  # leaves, while waiting or in the middle of the stream
            self.counts["left"] += 1
            if draw.random() < 0.5:
                task = asyncio.ensure_future(self.ask(self.kinds[n]))
                await asyncio.wait([task], timeout=draw.random())
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    return
                status, text = task.result()
            else:
                status, text = await self.stream(self.kinds[n], draw.randrange(3))
        elif draw.random() < 0.5:
            status, text = await self.stream(self.kinds[n], None)
        else:
            status, text = await self.ask(self.kinds[n])
        self.counts["answered"] += 1
        if status != 200 or text not in (None, self.alone[n].text):
            self.wrong.append(f"kind {n}: status {status}, {text!r}, {self.alone[n]}")

    async def watch(self, until: float) -> None:
        """Note the server's memory every few seconds."""
        while time.monotonic() < until:
            self.memory.append((time.monotonic(), resident(self.args.pid)))
            await asyncio.sleep(2)

    async def run(self) -> dict[str, Any]:
        """The whole soak; see the module."""
        for body in self.kinds:
            await self.by_itself(body)  # the first time of everything takes longer
            self.alone.append(await self.by_itself(body))
        short = [await self.by_itself(SHORT) for _ in range(5)]
        bound = self.args.slack * await self.fair_latency(short[0])
        begin = time.monotonic()
        until = begin + self.args.seconds
        await asyncio.gather(
            *(self.client(n, until) for n in range(self.args.clients)), self.watch(until)
        )
        running = await self.idle()
        again = [(await self.ask(body))[1] for body in self.kinds]
        settled = [size for at, size in self.memory if at >= begin + self.args.seconds / 3]
        growth = max(settled) / settled[0] - 1 if settled and settled[0] else None
        failures = {
            "wrong": len(self.wrong),
            "different_afterwards": sum(
                a != one.text for a, one in zip(again, self.alone, strict=True)
            ),
            "still_running": running,
            "gauges_not_0": int(await self.gauges()),
            "short_beyond_bound": sum(latency > bound for latency in self.latencies),
            "memory_not_flat": int(growth is not None and growth > self.args.growth),
        }
        return {
            "seconds": round(time.monotonic() - begin, 1),
            "clients": self.args.clients,
            **self.counts,
            "short_latency_alone_s": round(statistics.median(one.seconds for one in short), 3),
            "short_latency_median_s": round(statistics.median(self.latencies or [0]), 3),
            "short_latency_max_s": round(max(self.latencies, default=0.0), 3),
            "short_latency_bound_s": round(bound, 3),
            "rss_mib": [size // 2**20 for _, size in self.memory[:: max(1, len(self.memory) // 8)]],
            "rss_growth_after_warm_up": None if growth is None else round(growth, 4),
            "failures": failures,
            "ok": not any(failures.values()),
            "examples": self.wrong[:3],
        }

    async def fair_latency(self, short: Alone) -> float:
        """Seconds that a short request takes at most, by the rule above."""
        others = self.args.clients - 1
        slowest_step = max(one.seconds / one.steps for one in self.alone)
        bound = short.seconds + short.steps * others * slowest_step
        rows = (others + 1) * max(one.rows for one in self.alone)
        if rows > await self.metric("boe:cache_rows{"):  # the server's budget
            bound += others * max(one.seconds for one in self.alone)
        return bound

    async def metric(self, *series: str) -> float:
        """The sum of some of the server's series, by the beginning of their lines."""
        root = self.args.base_url.removesuffix("/v1")
        async with self.session.get(f"{root}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(series))

    async def gauges(self) -> float:
        """Canvases that are held, and their frozen rows, once nothing runs."""
        await asyncio.sleep(1.0)  # the server's numbers are those of its last step
        return await self.metric("boe:active_requests{", "boe:cache_rows_used{")

    async def idle(self) -> int:
        """Requests that still run some seconds after the last client has gone."""
        running = -1
        for _ in range(30):
            await self.ask(SHORT)
            series = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
            running = int(await self.metric(*series))
            if running == 0:
                break
            await asyncio.sleep(0.5)
        return running


def resident(pid: int | None) -> int:
    """Bytes that a process and its children hold; 0 if no process was named."""
    if pid is None:
        return 0
    import psutil

    root = psutil.Process(pid)
    return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kinds", type=int, default=27, help="different requests")
    parser.add_argument("--limit", type=int, default=512, help="the model's context, tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the server's process, to watch its memory")
    parser.add_argument("--slack", type=float, default=3, help="times the fair latency")
    parser.add_argument("--growth", type=float, default=0.02, help="of memory, after a third")
    args = parser.parse_args()
    timeout = aiohttp.ClientTimeout(total=300)
    base = args.base_url.rstrip("/") + "/"
    async with aiohttp.ClientSession(base_url=base, timeout=timeout) as session:
        async with session.get("models") as answer:
            model = (await answer.json())["data"][0]["id"]
        result = await Soak(args, session, model).run()
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
