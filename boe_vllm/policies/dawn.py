"""DAWN: what depends on sure text is believed sooner, what depends on each other is not written
together (arXiv 2602.06953; lizhuo-luo/DAWN `llada/generate.py`, `get_transfer_index_dawn`).

A position depends on another where it attends to it by at least `edge`, mean over the heads of the
last layers. Columns that all rows attend to, by more than `sink` in the mean, are left out. Three
kinds of position are written:

    sure      its probability reaches `threshold`
    induced   it depends on an anchor, and its probability reaches `induce`
    free      an independent set, by confidence, of the others that reach `low`; none that depends
              on a position that is both sure and induced

and the surest in any case. An anchor is a written position before the block's end, the prompt's
included, of which the model is still sure: what it would write there now has a probability of
`anchor`. The vocabulary's logits are therefore computed for all written rows as well.

`sink` is a share of the attention, not of its mean: in a sequence of fewer than `1 / sink` rows the
mean itself is larger, and nearly every column is a sink. Nothing then depends on anything, and DAWN
is the threshold rule with `low`.

Where no candidate of the free set is left, the authors' loop goes on and writes position 0 of the
prompt anew; here it stops. Under a cache, attention and anchors are those of the rows that are
computed; the authors have no cache there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig, View, top
from boe_vllm.policies.dapd import independent_set
from boe_vllm.steering.attention_map import AttentionMap

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking


@options
class DAWNConfig(PolicyConfig):
    """DAWN: believe what depends on sure text sooner, and write nothing together that depends.

    Defaults are those of the authors' function; for LLaDA-8B their scripts raise `low` to 0.75 or
    0.8 on some tasks.
    """

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Probability from which a token is written whatever it depends on."""
    anchor: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Probability from which a written position is an anchor."""
    induce: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Probability from which a token that depends on an anchor is written (`tau_induce`)."""
    low: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Probability from which a token may join the independent set (`tau_low`)."""
    edge: Annotated[float, Field(gt=0, le=1)] = 0.07
    """Share of a row's attention from which it depends on another (`tau_edge`)."""
    sink: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of all rows' attention above which a position is a sink (`tau_sink`)."""
    layers: Annotated[int, Field(ge=1, le=1024)] = 4
    """Layers whose attention counts, the last ones."""


class DAWNPolicy(Policy[DAWNConfig]):
    """Sure, induced and independent positions; the number of steps adapts."""

    name = "dawn"
    Config = DAWNConfig
    source = "arXiv 2602.06953; lizhuo-luo/DAWN `get_transfer_index_dawn`"
    passes = "1 forward; the number of steps adapts"

    def needs(self) -> Needs:
        """All rows' queries and keys, and what would be written where something is."""
        return Needs(rows="all", revision=True, past=True)

    def step(self, view: View) -> Asking:
        """Read the attention, write what is sure, induced or independent."""
        settings = self.config
        assert view.revision is not None
        attention: FloatArray = yield AttentionMap(layers=settings.layers)
        seen, everyones = attention[:-1], attention[-1]
        depends = (seen >= settings.edge) & (everyones <= settings.sink)
        depends[np.arange(len(seen)), view.positions] = False
        among = depends[:, view.positions]
        anchors = view.revision.positions[view.revision.confidence >= settings.anchor]

        p = view.confidence
        sure = p >= settings.threshold
        induced = depends[:, anchors].any(1) & (p >= settings.induce)
        blocked = among[:, sure & induced].any(1)
        candidates = (p >= settings.low) & ~sure & ~induced & ~blocked
        written = sure | induced
        if candidates.any():
            free = np.where(candidates, p, -np.inf)
            written[independent_set(free, among | among.T)] = True
        if not written.any():
            written[top(p, 1)] = True
        return Commit(chosen=np.flatnonzero(written), scores=p)
