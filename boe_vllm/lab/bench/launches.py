"""What each kind of pass asks of a GPU beside its products: kernels launched, bytes moved.

Launches do not depend on the machine: a test counts them on a pretended device. Bytes follow from
which kernels there are: each reads its operands from memory and writes its result there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from boe_vllm.lab.bench.passes import Kind


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Of one pass of one kind."""

    layer: int = 0
    """Kernels launched in every layer, products among them."""
    once: int = 0
    """Kernels launched beside the layers."""
    row_D: int = 0
    """Bytes moved for every row, layer and channel of the residual stream."""
    row_F: int = 0
    """Bytes moved for every row, layer and channel of the MLP."""
    row_V: int = 0
    """Bytes moved for every row and token of the vocabulary."""
    filled: tuple[int, int] = (1, 1)
    """Rows that products with fewer are filled up to, so that a row's bits do not depend on their
    number: where the product is as deep as the residual stream is wide, and where it is deeper."""


Code = Mapping[Kind, Footprint]
"""The footprints of one state of the package's code."""

UNFUSED: Code = {
    "forward": Footprint(layer=40, once=18, row_D=140, row_F=10),
    "saving": Footprint(layer=44, once=20, row_D=140, row_F=10),
    "partial": Footprint(layer=60, once=11, row_D=140, row_F=10),
    "backward": Footprint(layer=59, once=26, row_D=240, row_F=50),
    "observed": Footprint(layer=73, once=27, row_D=240, row_F=50),
    "logits": Footprint(once=43, row_V=66),
    "soft writes": Footprint(once=9, row_V=22),
    "gradient": Footprint(once=4, row_V=44),
}
"""Every operation a kernel of its own: norms, rotation and activation in float32 between bfloat16
products. Partial passes and observed backwards launched more for several requests."""

FILLED = (64, 384)
"""From these numbers on an H200 treats all rows of a bfloat16 product of LLaDA-8B alike."""
BUDGET: Code = {
    "forward": Footprint(layer=16, once=18, row_D=44, row_F=6, filled=FILLED),
    "saving": Footprint(layer=18, once=20, row_D=44, row_F=6, filled=FILLED),
    "partial": Footprint(layer=14, once=11, row_D=44, row_F=6, filled=FILLED),
    "backward": Footprint(layer=26, once=20, row_D=80, row_F=24, filled=FILLED),
    "observed": Footprint(layer=30, once=20, row_D=80, row_F=24, filled=FILLED),
    "logits": Footprint(once=20, row_V=24, filled=FILLED),
    "soft writes": Footprint(once=8, row_V=14, filled=FILLED),
    "gradient": Footprint(once=4, row_V=20, filled=FILLED),
}
"""What the code is allowed to ask for: 16 kernels a layer for a forward, 60 for a whole step of
`joint` at four tokens a step; norms, rotation and activation are one kernel each, which reads
its operands once."""

FUSED: Code = {
    "forward": Footprint(layer=9, once=11, row_D=44, row_F=6, filled=FILLED),
    "saving": Footprint(layer=13, once=13, row_D=44, row_F=6, filled=FILLED),
    "partial": Footprint(layer=14, once=2, row_D=100, row_F=6, filled=FILLED),
    "backward": Footprint(layer=16, once=12, row_D=80, row_F=24, filled=FILLED),
    "observed": Footprint(layer=32, once=13, row_D=140, row_F=24, filled=FILLED),
    "logits": Footprint(once=23, row_V=66, filled=FILLED),
    "soft writes": Footprint(once=9, row_V=22, filled=FILLED),
    "gradient": Footprint(once=5, row_V=44, filled=FILLED),
}
"""Norms, rotation and activation are one kernel each, and so is the attention of a partial pass,
for any number of requests."""

CODES: Mapping[str, Code] = {"unfused": UNFUSED, "fused": FUSED, "budget": BUDGET}
"""By the names that measurements carry."""
CURRENT = "fused"
"""The package as it is."""
CODE = CODES[CURRENT]
