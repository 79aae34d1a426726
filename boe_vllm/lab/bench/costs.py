"""The time of a denoising step on a GPU, from what it asks of the network and from ceilings.

A round (`passes`) ends when the host reads its numbers, so that the device's work and the host's
run side by side within a round, and one after the other from round to round:

    seconds of a step = sum over its rounds of max(device, host)

    device   products: GAP + sqrt(read^2 + arithmetic^2), where reading the weights takes as long
             for one row as for a hundred; what other kernels read and write of rows, at ROW_SHARE
             of the copy's speed, and of keys; KERNEL for each kernel
    host     launches, HOST_SHARE times as long as a bare one since Python runs between them;
             blocking copies

GAP, KERNEL, ROW_SHARE and HOST_SHARE are fitted to one card (an H200, `docs/gpu.md`); the rest is
counted or measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from boe_vllm.lab.bench.ceilings import Ceilings
from boe_vllm.lab.bench.launches import Code, Footprint
from boe_vllm.lab.bench.passes import THROUGH_LAYERS, Pass, Step
from boe_vllm.models.llada import LLaDAConfig

GAP = 6e-6
"""Seconds that a product takes beside what it reads and computes."""
KERNEL = 2e-6
"""Seconds of the shortest kernel on the device."""
ROW_SHARE = 0.5
"""Speed of kernels over rows, as a share of the copy's."""
HOST_SHARE = 2.0
"""Host time of a launch within the loop over that of a bare one."""
ATTENTION_SHARE = 0.5
"""Speed of attention's products, as a share of large ones'."""
ITEM = 2
"""Bytes of a weight or an activation, bfloat16."""

TERMS = ("weights", "arithmetic", "rows", "launches", "copies")
"""What a round's time can be made of; the first three are the device's."""
Terms = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """The sizes that a cost depends on."""

    layers: int
    width: int
    kv_width: int
    """Width of the keys: heads of keys times the size of a head."""
    inner: int
    """Width of the MLP."""
    vocabulary: int

    @classmethod
    def of(cls, config: LLaDAConfig) -> Network:
        """The sizes of a checkpoint's config."""
        assert config.n_kv_heads and config.mlp_hidden_size and config.embedding_size
        return cls(
            layers=config.n_layers,
            width=config.d_model,
            kv_width=config.d_model // config.n_heads * config.n_kv_heads,
            inner=config.mlp_hidden_size,
            vocabulary=config.embedding_size,
        )

    @property
    def layer_products(self) -> tuple[tuple[int, int], ...]:
        """(depth, width) of a layer's products; a backward's are the same, turned round."""
        width, kv, inner = self.width, self.kv_width, self.inner
        return (
            (width, width + kv),
            (width, kv),
            (width, width),
            (width, 2 * inner),
            (inner, width),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a step is predicted to take; seconds."""

    seconds: float
    busy: float
    """Of them, those in which the device works."""
    terms: Terms
    """Where the seconds go, by `TERMS`: of each round, the parts of the slower side."""

    @property
    def binds(self) -> str:
        """The term that takes most."""
        return max(TERMS, key=self.terms.__getitem__)


def product(rows: int, depth: int, width: int, ceilings: Ceilings) -> Terms:
    """Seconds of one product: of reading the weights, and of computing.

    The two add up as the sides of a right angle do: neither hides the other quite where they are
    alike. Each is given its share of the whole.
    """
    read = depth * width * ITEM / ceilings.copy
    compute = 2 * rows * depth * width / ceilings.flops
    whole = math.hypot(read, compute)
    return {"weights": GAP + read**2 / whole, "arithmetic": compute**2 / whole}


def device_terms(one: Pass, network: Network, ceilings: Ceilings, footprint: Footprint) -> Terms:
    """Seconds of a pass on the device, without what its launches cost there."""
    through = one.kind in THROUGH_LAYERS
    layers = network.layers if through else 1
    products = network.layer_products if through else ((network.width, network.vocabulary),)
    terms = dict.fromkeys(TERMS, 0.0)
    for depth, width in products:
        rows = max(one.rows, footprint.filled[depth > network.width])
        for name, value in product(rows, depth, width, ceilings).items():
            terms[name] += layers * value
    # Scores and weighted sums; a backward makes three products of each instead of one.
    attention = (
        (10 if one.kind in ("backward", "observed") else 4) * one.pairs * network.width * layers
    )
    terms["arithmetic"] += attention / (ATTENTION_SHARE * ceilings.flops)
    moved = one.rows * layers * footprint.row_D * network.width
    moved += one.rows * layers * footprint.row_F * network.inner
    moved += one.rows * footprint.row_V * network.vocabulary
    keys = 2 * one.keys * network.kv_width * ITEM * layers
    terms["rows"] = moved / (ROW_SHARE * ceilings.copy) + keys / ceilings.copy
    return terms


def predict(
    step: Step,
    network: Network,
    ceilings: Ceilings,
    code: Code,
    *,
    launches: Sequence[float] | None = None,
    copies: Sequence[float] | None = None,
) -> Prediction:
    """The time of one step.

    Args:
        step: its rounds.
        network: sizes.
        ceilings: of the machine.
        code: the footprint of each kind of pass.
        launches: kernels of every round, where they were measured; else by `code`.
        copies: blocking copies of every round; else one, the host's reading.
    """
    seconds, busy, total = 0.0, 0.0, dict.fromkeys(TERMS, 0.0)
    for n, passes in enumerate(step):
        if not passes:
            continue
        count = round_launches(passes, network, code) if launches is None else launches[n]
        device = _summed(device_terms(p, network, ceilings, code[p.kind]) for p in passes)
        device["rows"] += KERNEL * count
        host = dict.fromkeys(TERMS, 0.0)
        host["launches"] = HOST_SHARE * ceilings.launch * count
        host["copies"] = ceilings.blocking_copy * (1 if copies is None else copies[n])
        slower = max(device, host, key=lambda side: sum(side.values()))
        seconds += sum(slower.values())
        busy += sum(device.values())
        total = _summed([total, slower])
    return Prediction(seconds=seconds, busy=busy, terms=total)


def round_launches(passes: Sequence[Pass], network: Network, code: Code) -> int:
    """Kernels that a round launches."""
    return sum(code[p.kind].once + code[p.kind].layer * network.layers for p in passes)


def mean(predictions: Sequence[Prediction]) -> Prediction:
    """The mean of several steps' predictions."""
    n = len(predictions)
    terms = _summed(p.terms for p in predictions)
    return Prediction(
        seconds=sum(p.seconds for p in predictions) / n,
        busy=sum(p.busy for p in predictions) / n,
        terms={name: value / n for name, value in terms.items()},
    )


def _summed(terms: Iterable[Terms]) -> Terms:
    total = dict.fromkeys(TERMS, 0.0)
    for part in terms:
        for name, value in part.items():
            total[name] += value
    return total
