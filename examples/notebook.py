"""One puzzle under three policies in this process: what was written when, and what it cost.

    python examples/notebook.py

Needs no vLLM. The same lines work in a notebook; docs/notebook.md explains them.
"""

from __future__ import annotations

from boe_vllm import Denoiser, tiny_model_path
from boe_vllm.lab.tasks import get_task


def main() -> None:
    """Decode the puzzle and print, for each policy, the order of writing and the cost."""
    denoiser = Denoiser.from_pretrained(tiny_model_path())
    task = get_task("sudoku4-few")
    (item,) = task.items(1, seed=0, split="test")
    print(item.prompt)
    for policy in ("confidence", "boe", "joint"):
        (answer,) = denoiser.generate(
            item.prompt,
            policy=policy,
            max_tokens=task.gen_length,
            block_length=task.gen_length,
            tokens_per_step=4,
            trace=True,
        )
        valid = "valid" if task.score(item, answer.text).valid else "not valid"
        print(f"\n{policy}: {answer.text} ({valid})")
        print("written in step:", *answer.trace["step"])
        print("cost:", answer.cost)


if __name__ == "__main__":
    main()
