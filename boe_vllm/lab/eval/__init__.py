"""`boe-vllm eval`: a sweep of policies over tasks in one engine, and the tables that follow.

settings   what a run is: its arguments, and its identity
variants   a policy with its settings, as written on the command line
presets    the paper's tables and figure as arguments
cells      one task under one policy at one canvas length and rate, and its requests
engine     vLLM: all requests in flight, finished ones as they come
in_process the same without vLLM: the denoising loop in this process
answers    what comes of a request, whichever of the two decodes it
scoring    answers judged beside the decoding loop
ledger     the JSONL file that a killed run continues from
costs      engine time shared among requests that ran together
cell_file  finished cells, which many runs may share
tables     n, score, interval, cost: Markdown and CSV
pairs      one policy against others, item by item
quality    MAUVE, generative perplexity and entropy of text
sweep      the cells of a run: which are known, which are decoded
run        the command
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command `boe-vllm eval`; returns its exit status."""
    from boe_vllm.lab.eval.run import main as run

    return run(argv)
