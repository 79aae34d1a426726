"""Ask a running `vllm serve MODEL --sampler boe` with the openai client.

    vllm serve "$(python -c 'import boe_vllm; print(boe_vllm.tiny_model_path())')" --sampler boe
    python examples/client.py --base-url http://localhost:8000/v1

Plain, streaming, many concurrent requests with policies of their own, and requests that are
refused. Per-request settings travel in `vllm_xargs`; what a request has cost comes back in
`kv_transfer_params["boe"]`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json

from openai import AsyncOpenAI, BadRequestError

from boe_vllm.lab.tasks import Item, Task, get_task

POLICIES = ["boe", "confidence", "entropy", "random"]
REFUSED = [
    {"policy": "nope"},
    {"rho": 2},
    {"steps": 7, "gen_length": 32, "block_length": 5},
]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--requests", type=int, default=16, help="concurrent requests")
    args = parser.parse_args()
    client = AsyncOpenAI(base_url=args.base_url, api_key="unused", max_retries=0)
    model = (await client.models.list()).data[0].id

    task = get_task("sudoku6")
    (item,) = task.items(1, seed=1, split="test")
    plain = await complete(client, model, task, item)
    print(f"plain:     {item.prompt}{plain.choices[0].text}")
    print(f"           cost {plain.kv_transfer_params['boe']}")

    print(f"streaming: {item.prompt}", end="", flush=True)
    pieces = []
    async for chunk in await complete(client, model, task, item, stream=True):
        pieces.append(chunk.choices[0].text if chunk.choices else "")
        print(pieces[-1], end="", flush=True)
    print()

    mixed = []
    for n in range(args.requests):
        kind = get_task(["sudoku4", "sudoku6", "countdown", "addition"][n % 4])
        (puzzle,) = kind.items(1, seed=n, split="test")
        fields = {"policy": POLICIES[n // 4 % 4], "tokens_per_step": 1 + n % 3}
        mixed.append((kind, puzzle, fields))
    answers = await asyncio.gather(*(complete(client, model, *entry) for entry in mixed))
    right = 0
    for (kind, puzzle, fields), answer in zip(mixed, answers, strict=True):
        valid = kind.score(puzzle, answer.choices[0].text).valid
        right += valid
        print(
            f"{fields['policy']:>11} {'right' if valid else 'wrong'}: "
            f"{puzzle.prompt}{answer.choices[0].text}"
        )

    refused = 0
    for fields in REFUSED:
        try:
            await complete(client, model, task, item, {"policy": "boe"} | fields)
        except BadRequestError as error:
            refused += 1
            print(f"refused {fields}: {error.body['message']}")
    again = await complete(client, model, task, item)
    print(
        json.dumps(
            {
                "requests": len(mixed),
                "right": right,
                "refused": refused,
                "stream_equals_plain": "".join(pieces) == plain.choices[0].text,
                "same_after_all": again.choices[0].text == plain.choices[0].text,
            }
        )
    )


async def complete(
    client: AsyncOpenAI,
    model: str,
    task: Task,
    item: Item,
    fields: dict | None = None,
    stream: bool = False,
):
    """One completion of a task's canvas."""
    return await client.completions.create(
        model=model,
        prompt=item.prompt,
        max_tokens=task.gen_length,
        temperature=0.0,
        stream=stream,
        extra_body={"vllm_xargs": {"block_length": task.block_length} | (fields or {})},
    )


if __name__ == "__main__":
    asyncio.run(main())
