"""Chains of additions written out step by step.

`A:47+85+13=` -> `47+85=132,132+13=145`. The answers differ in length, and the canvas after
them is EOS: an EOS written too early cuts the chain.
"""

import random
import re

from boe_vllm.lab.tasks.base import GeneratedTask, Item

_STEP = re.compile(r"(\d{1,9})\+(\d{1,9})=(\d{1,9})", re.ASCII)


class Addition(GeneratedTask):
    """Two or three terms of one or two digits."""

    name = "addition"
    gen_length = block_length = 32
    max_terms = 3

    def generate(self, rng: random.Random) -> Item:
        count = rng.randint(2, self.max_terms)
        terms = [rng.randint(*rng.choice(((1, 9), (10, 99)))) for _ in range(count)]
        steps, total = [], terms[0]
        for term in terms[1:]:
            steps.append(f"{total}+{term}={total + term}")
            total += term
        return Item(
            task=self.name,
            prompt=f"A:{'+'.join(map(str, terms))}=",
            answer=",".join(steps),
            meta={"terms": terms, "total": total},
        )

    def is_valid(self, item: Item, answer: str) -> bool:
        """Each step must add the next term to the total so far, in either order."""
        total, *rest = item.meta["terms"]
        steps = answer.split(",")
        if len(steps) != len(rest):
            return False
        for step, term in zip(steps, rest, strict=True):
            match = _STEP.fullmatch(step)
            if match is None:
                return False
            left, right, result = map(int, match.groups())
            if sorted((left, right)) != sorted((total, term)) or result != total + term:
                return False
            total = result
        return True
