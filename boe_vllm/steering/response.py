"""What a candidate's reveal does to the entropies of the others, layer by layer of a backward.

With `K_i, V_i` a candidate's keys and values at one layer, `K'_i, V'_i` the revealed ones
(`hypothetical.reveal`), `q_j, o_j` a row's query and attention output, `p` its weight on `i`, and
`dK, dV, dO` the gradients of the objective, the entropies fall by

    kv         - sum over layers of <dK_i, K'_i - K_i> + <dV_i, V'_i - V_i>
    response   - sum over layers, heads and rows j != i of <dO_j, d_ij>
    rectified  sum over layers and rows j != i of max(0, - sum over heads of <dO_j, d_ij>)

where `d_ij` is how `o_j` changes when row i's key and value are replaced, exactly:

    d_ij = p' (V'_i - r) - p (V_i - r),    r = (o_j - p V_i) / (1 - p) the mean of all other values,
    p' = sigmoid(ln p - ln(1 - p) + scale q_j (K'_i - K_i)) the new weight on i

"kv" linearises the softmax as well and lets the candidate's own row respond, although it is
written; "rectified" (ours) leaves out what the linearisation takes for a rise of entropy. None of
them costs a further forward than that which reveals the keys and values.

Legend: `c` candidates of one place, `a` its saved rows, `s` its rows of keys and values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.base.transfer import to_device
from boe_vllm.models.functional import accurate
from boe_vllm.steering.guidance import Place
from boe_vllm.steering.hypothetical import Revealed
from boe_vllm.steering.step import DenoisingPass

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """Candidates of one place of the pass."""

    place: Place
    candidates: IntArray
    """[c] indices into the sequence's masked positions."""
    rule: str
    """Which of the three above."""


class Responses:
    """Watches a backward (`model.backward(observe=...)`) and adds up the drops of entropy."""

    def __init__(
        self, current: DenoisingPass, members: Sequence[Watched], changes: Revealed
    ) -> None:
        """Listen for some places.

        Args:
            current: the step's pass, on whose saved rows the backward runs.
            members: whose candidates, packed in this order.
            changes: of the candidates' keys and values.
        """
        self.current, self.members, self.changes = current, members, changes
        ends = np.cumsum([len(member.candidates) for member in members])
        self.spans = [
            slice(end - len(member.candidates), end)
            for end, member in zip(ends, members, strict=True)
        ]
        linear = [n for n, member in enumerate(members) if member.rule == "kv"]
        others = [n for n in range(len(members)) if n not in linear]
        rows = [current.saved_rows(members[n].place, members[n].candidates) for n in linear]
        places = [np.arange(self.spans[n].start, self.spans[n].stop) for n in linear]
        joined = [np.concatenate([np.empty(0, np.int64), *x]) for x in (rows, places)]
        columns = [members[n].candidates for n in others]
        moved = to_device([*joined, *columns], current.device)
        self.linear = moved[:2] if linear else None
        """[c] saved rows of all candidates whose rule is "kv", and their places among all."""
        # A sequence's keys begin with its masked rows, and so do its saved rows.
        self.columns = dict(zip(others, moved[2:], strict=True))
        """[c] the candidates of each other member among its saved rows, and among its key rows."""
        dtype = torch.promote_types(current.log_probs.hidden_RD.dtype, torch.float32)
        self.drops_C = torch.zeros(int(ends[-1]), dtype=dtype, device=current.device)
        """[C] over all layers so far and, under tensor parallelism, all heads; nats."""

    def __call__(self, layer: int, dmixed_AHP: Tensor, dk_AGP: Tensor, dv_AGP: Tensor) -> None:
        """One layer's gradients."""
        if self.linear is not None:
            rows, places = self.linear
            keys = accurate(dk_AGP[rows]) * accurate(self.changes.keys[layer][places])
            values = accurate(dv_AGP[rows]) * accurate(self.changes.values[layer][places])
            rises = self.current.model.sum_over_ranks(keys.sum((1, 2)) + values.sum((1, 2)))
            self.drops_C[places] -= rises
        for n, columns in self.columns.items():
            drop = self._response(layer, self.members[n], columns, self.spans[n], dmixed_AHP)
            self.drops_C[self.spans[n]] += drop

    def _response(
        self, layer: int, member: Watched, columns: Tensor, span: slice, dmixed_AHP: Tensor
    ) -> Tensor:
        current = self.current
        assert current.saved is not None
        layout, saved = current.layout.attention, current.saved.layers[layer]
        start = current.layout.saved_starts[member.place]
        rows = slice(start, start + current.layout.saved_lens[member.place])
        keys = slice(layout.kv_starts[member.place], layout.kv_starts[member.place + 1])
        q_HaP, do_HaP = (accurate(x[rows]).transpose(0, 1) for x in (saved.queries_AHP, dmixed_AHP))
        group = q_HaP.shape[0] // saved.keys_SGP.shape[1]
        k_HsP, v_HsP, dk_HcP, dv_HcP = (
            accurate(x).transpose(0, 1).repeat_interleave(group, 0)
            for x in (
                saved.keys_SGP[keys],
                saved.values_SGP[keys],
                self.changes.keys[layer][span],
                self.changes.values[layer][span],
            )
        )
        scale = current.model.layers[layer].scale
        p_Has = ((q_HaP @ k_HsP.mT) * scale).softmax(-1)
        own_Ha1 = (do_HaP * (p_Has @ v_HsP)).sum(-1, keepdim=True)
        was_Hac, value_Hac = p_Has[:, :, columns], do_HaP @ v_HsP[:, columns].mT
        others_Hac = (1 - was_Hac).clamp_(min=16 * torch.finfo(was_Hac.dtype).eps)
        odds_Hac = was_Hac.log() - others_Hac.log() + (q_HaP @ dk_HcP.mT) * scale
        rest_Hac = (own_Ha1 - was_Hac * value_Hac) / others_Hac
        change_Hac = odds_Hac.sigmoid() * (value_Hac + do_HaP @ dv_HcP.mT - rest_Hac)
        change_Hac = change_Hac - was_Hac * (value_Hac - rest_Hac)
        drop_ac = -current.model.sum_over_ranks(change_Hac.sum(0))
        drop_ac[columns, torch.arange(len(columns), device=current.device)] = 0
        if member.rule == "rectified":
            drop_ac = drop_ac.clamp_(min=0)
        return drop_ac.sum(0)
