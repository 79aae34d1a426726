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

BUDGET: Code = {
    "forward": Footprint(layer=16, once=18, row_D=44, row_F=6),
    "saving": Footprint(layer=18, once=20, row_D=44, row_F=6),
    "partial": Footprint(layer=14, once=11, row_D=44, row_F=6),
    "backward": Footprint(layer=26, once=20, row_D=80, row_F=24),
    "observed": Footprint(layer=30, once=20, row_D=80, row_F=24),
    "logits": Footprint(once=20, row_V=24),
    "soft writes": Footprint(once=8, row_V=14),
    "gradient": Footprint(once=4, row_V=20),
}
"""What the code is allowed to ask for: 16 kernels a layer for a forward, 60 for a whole step of
`joint` at four tokens a step; norms, rotation and activation are one kernel each, which reads
its operands once."""

FUSED: Code = {
    "forward": Footprint(layer=13, once=11, row_D=44, row_F=6),
    "saving": Footprint(layer=17, once=13, row_D=44, row_F=6),
    "partial": Footprint(layer=14, once=2, row_D=44, row_F=6),
    "backward": Footprint(layer=16, once=12, row_D=80, row_F=24),
    "observed": Footprint(layer=32, once=13, row_D=80, row_F=24),
    "logits": Footprint(once=23, row_V=24),
    "soft writes": Footprint(once=9, row_V=14),
    "gradient": Footprint(once=4, row_V=20),
}
"""Norms with their sums, rotation, activation and the vocabulary's statistics are one kernel each.
Of the launches in a layer, four fill up the rows of one short request for its products."""

CODES: Mapping[str, Code] = {"unfused": UNFUSED, "budget": BUDGET, "fused": FUSED}
"""By the names that measurements carry."""
CURRENT = "fused"
"""The package as it is."""
CODE = CODES[CURRENT]
