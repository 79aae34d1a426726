"""One policy on one task: items decoded side by side by the loop, answers scored, cost counted."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.lab.bench.states import open_request
from boe_vllm.lab.tasks import GeneratedTask, Item
from boe_vllm.policies import frequencies
from boe_vllm.request.config import SamplerConfig, parse_sampler_config


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What one policy did with the items of one task at one budget; costs are means per item."""

    task: str
    contestant: str
    tokens_per_step: int
    """1 for policies that decide themselves how many tokens they write."""
    valid: list[bool]
    """Per item, whether the answer obeys the task's rules."""
    steps: float
    forwards: float
    backwards: float
    rows: float
    """Of all forwards and backwards."""
    seconds: float
    """Of the whole cell."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells cells apart."""
        return self.task, self.contestant, self.tokens_per_step

    @property
    def share(self) -> float:
        """Of valid answers."""
        return sum(self.valid) / len(self.valid)


class Arena:
    """A loop and a tokenizer, ready to decode tasks."""

    def __init__(
        self, loop: DenoisingLoop, tokenizer: Tokenizer, *, running: int, seed: int
    ) -> None:
        """`running` items are decoded at a time; `seed` draws the items."""
        self.loop, self.tokenizer = loop, tokenizer
        self.running, self.seed = running, seed

    def contest(
        self,
        task: GeneratedTask,
        count: int,
        name: str,
        fields: Mapping[str, Any],
        tokens_per_step: int,
    ) -> Cell:
        """Decode `count` unseen items in one block at temperature 0."""
        items = task.items(count, seed=self.seed, split="test")
        config = parse_sampler_config(
            {
                "gen_length": task.gen_length,
                "block_length": task.gen_length,
                "tokens_per_step": tokens_per_step,
                **fields,
            }
        )
        start = time.perf_counter()
        answers, costs = self._decode(items, config, task.gen_length)
        seconds = time.perf_counter() - start
        valid = [task.score(item, text).valid for item, text in zip(items, answers, strict=True)]

        def mean(*names: str) -> float:
            return sum(cost[name] for cost in costs for name in names) / len(costs)

        return Cell(
            task=task.name,
            contestant=name,
            tokens_per_step=tokens_per_step,
            valid=valid,
            steps=mean("denoising_steps"),
            forwards=mean("forwards"),
            backwards=mean("backwards"),
            rows=mean("rows_forward", "rows_backward"),
            seconds=seconds,
        )

    def _decode(
        self, items: Sequence[Item], config: SamplerConfig, length: int
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Texts and costs, as the engine would give them; canvases of `length` tokens."""
        texts = [""] * len(items)
        costs: list[dict[str, Any]] = [{} for _ in items]
        tokens: dict[str, list[int]] = {}
        waiting = list(range(len(items)))[::-1]
        while waiting or tokens:
            while waiting and len(tokens) < self.running:
                number = waiting.pop()
                prompt = self.tokenizer.encode(items[number].prompt, add_special_tokens=False).ids
                open_request(self.loop, number, prompt, config, canvas=length)
                tokens[str(number)] = []
            for name, result in self.loop.step(list(tokens)).items():
                if result.error:
                    raise RuntimeError(f"item {name}: {result.error}")
                tokens[name] += result.tokens
                if result.done and result.report is not None:
                    texts[int(name)] = self.tokenizer.decode(
                        tokens.pop(name), skip_special_tokens=False
                    )
                    costs[int(name)] = result.report
                    self.loop.remove(name)
        return texts, costs


def frequency_table(
    tokenizer: Tokenizer, tasks: Sequence[GeneratedTask], folder: str, texts: int = 2000
) -> str:
    """The path of a table for `pc` in `folder`, counted on training items of the tasks."""
    corpus = []
    for task in tasks:
        stream = task.stream(seed=0)
        corpus += [item.prompt + item.answer for item, _ in zip(stream, range(texts), strict=False)]
    path = Path(folder) / "frequencies.json"
    path.write_text(json.dumps(frequencies.count(tokenizer, corpus)))
    return str(path)
