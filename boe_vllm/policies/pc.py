"""PC-Sampler: confidence, less for later positions and for trivial tokens (arXiv 2508.13021,
NEUIR/PC-Sampler `pc_sampler_function`).

`score_i = exp(-lambda i) min(-p_i ln(f[x_i] + 1e-9), alpha)`: `i` counts positions from 0 within
the current block, `p_i` is the proposal's confidence and `f` the background frequency of its token.
A token that the table does not have, such as EOS, counts as one occurrence: it is favoured, unless
lambda puts it off.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies import frequencies
from boe_vllm.policies.base import PolicyConfig, View, allowed
from boe_vllm.policies.local import LocalPolicy

EPSILON = 1e-9
_LAST = -1e300


@options
class PCConfig(PolicyConfig):
    """PC-Sampler: confidence, less for later positions and for trivial tokens."""

    frequencies: str | None = None
    """Path of a token frequency table; needed. Only the server's configuration may set it: a
    request must not make a server read files."""
    lambd: Annotated[float, Field(ge=0)] = 0.25
    """Lambda, how fast positions lose weight; 0 for none. Default: that of most of the authors'
    tasks (Sudoku 0, Countdown 0.5 or 1)."""
    alpha: Annotated[float, Field(gt=0)] = 10.0
    """Upper limit of the calibrated confidence. Default: the authors'."""

    def __post_init__(self) -> None:
        if self.frequencies is None:
            raise ValueError(
                "frequencies: policy 'pc' expected the path of a token frequency table in the "
                "server's sampler config, got None; start the server with --sampler-config "
                f'\'{{"frequencies": "FILE"}}\'; for the file, {frequencies.HOW_TO_GET_ONE}'
            )
        frequencies.load(self.frequencies)


class PCPolicy(LocalPolicy[PCConfig]):
    """Ranks by the logarithm of the score: the same order, also where the score underflows.

    Masks inside the prompt, which are written with the first block, count as its position 0.
    """

    name = "pc"
    Config = PCConfig
    source = "arXiv 2508.13021; NEUIR/PC-Sampler `pc_sampler_function`"

    def __init__(self, config: PCConfig) -> None:
        super().__init__(config)
        assert config.frequencies is not None
        self.table = frequencies.load(config.frequencies)

    def score(self, view: View) -> FloatArray:
        """[M] ln score; forbidden early commits come last.

        Raises:
            ValueError: when the table was counted with a larger vocabulary than the model's.
        """
        if self.table.largest_token >= view.vocab_size:
            raise ValueError(
                f"frequencies: expected a table for {view.vocab_size} tokens, got token "
                f"{self.table.largest_token} in {self.config.frequencies!r}; count one with this "
                f"model's tokenizer"
            )
        index = np.maximum(view.positions - view.block_start, 0)
        confidence = np.maximum(view.confidence, 0.0)
        calibrated = -confidence * np.log(self.table(view.proposal) + EPSILON)
        with np.errstate(divide="ignore"):
            value = np.log(np.minimum(calibrated, self.config.alpha))
        value = np.maximum(value, _LAST)  # -inf is for what may not be written early
        return allowed(value - self.config.lambd * index, view)
