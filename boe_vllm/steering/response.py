"""What a candidate's reveal does to the entropies of the others, layer by layer of a backward.

With `K_i, V_i` a candidate's keys and values at one layer, `K'_i, V'_i` the revealed ones
(`surrogate.reveal`), `q_j, o_j` a row's query and attention output, `p` its weight on `i`, and
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

Legend: `C` packed candidates, `c` those of one request, `K` kept rows, `k` those of one sequence,
`s` its key rows, `H`/`G` heads of queries/keys, `P` size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.models.functional import accurate
from boe_vllm.steering.parts import PairMember
from boe_vllm.steering.step import DenoisingPass
from boe_vllm.steering.surrogate import Revealed

Tensor = torch.Tensor


class Responses:
    """Watches a backward (`observe`) and adds up the candidates' drops of entropy."""

    def __init__(
        self, current: DenoisingPass, parts: Sequence[PairMember], changes: Revealed
    ) -> None:
        """Listen for some parts.

        Args:
            current: the step's pass, whose saved the backward runs on.
            parts: who queries; their candidates are packed in this order.
            changes: of the candidates' keys and values.
        """
        self.current, self.parts, self.changes = current, parts, changes
        ends = np.cumsum([len(part.query.candidates) for part in parts])
        self.spans = [
            slice(e - len(p.query.candidates), e) for e, p in zip(ends, parts, strict=True)
        ]
        dtype = torch.promote_types(current.log_probs.hidden_RD.dtype, torch.float32)
        self.drops_C = torch.zeros(int(ends[-1]), dtype=dtype, device=current.device)
        """[C] over all layers so far and, under tensor parallelism, all heads; nats."""

    def __call__(self, layer: int, dmixed_AHP: Tensor, dk_AGP: Tensor, dv_AGP: Tensor) -> None:
        """One layer's gradients."""
        for part, span in zip(self.parts, self.spans, strict=True):
            if part.query.surrogate == "kv":
                drop = self._linear(layer, part, span, dk_AGP, dv_AGP)
            else:
                drop = self._response(layer, part, span, dmixed_AHP)
            self.drops_C[span] += drop

    def _linear(
        self, layer: int, part: PairMember, span: slice, dk_AGP: Tensor, dv_AGP: Tensor
    ) -> Tensor:
        rows = self._saved_rows(part)
        keys = accurate(dk_AGP[rows]) * accurate(self.changes.keys[layer][span])
        values = accurate(dv_AGP[rows]) * accurate(self.changes.values[layer][span])
        return -self.current.model.sum_over_ranks(keys.sum((1, 2)) + values.sum((1, 2)))

    def _response(self, layer: int, part: PairMember, span: slice, dmixed_AHP: Tensor) -> Tensor:
        current = self.current
        assert current.saved is not None
        layout, saved = current.layout.attention, current.saved.layers[layer]
        start = current.layout.saved_starts[part.place]
        kept = slice(start, start + current.layout.saved_lens[part.place])
        keys = slice(layout.kv_starts[part.place], layout.kv_starts[part.place + 1])
        q_HkP, do_HkP = (accurate(x[kept]).transpose(0, 1) for x in (saved.queries_AHP, dmixed_AHP))
        group = q_HkP.shape[0] // saved.keys_SGP.shape[1]
        k_HsP, v_HsP, dk_HcP, dv_HcP = (
            accurate(x).transpose(0, 1).repeat_interleave(group, 0)
            for x in (
                saved.keys_SGP[keys],
                saved.values_SGP[keys],
                self.changes.keys[layer][span],
                self.changes.values[layer][span],
            )
        )
        # A sequence's keys begin with its masked rows, and so do its kept rows.
        columns = torch.from_numpy(part.query.candidates).to(current.device)
        scale = current.model.layers[layer].scale
        p_Hks = ((q_HkP @ k_HsP.mT) * scale).softmax(-1)
        own_Hk1 = (do_HkP * (p_Hks @ v_HsP)).sum(-1, keepdim=True)
        was_Hkc, value_Hkc = p_Hks[:, :, columns], do_HkP @ v_HsP[:, columns].mT
        others_Hkc = (1 - was_Hkc).clamp_(min=16 * torch.finfo(was_Hkc.dtype).eps)
        odds_Hkc = was_Hkc.log() - others_Hkc.log() + (q_HkP @ dk_HcP.mT) * scale
        rest_Hkc = (own_Hk1 - was_Hkc * value_Hkc) / others_Hkc
        change_Hkc = odds_Hkc.sigmoid() * (value_Hkc + do_HkP @ dv_HcP.mT - rest_Hkc)
        change_Hkc = change_Hkc - was_Hkc * (value_Hkc - rest_Hkc)
        drop_kc = -current.model.sum_over_ranks(change_Hkc.sum(0))
        drop_kc[columns, torch.arange(len(columns), device=current.device)] = 0
        if part.query.surrogate == "rectified":
            drop_kc = drop_kc.clamp_(min=0)
        return drop_kc.sum(0)

    def _saved_rows(self, part: PairMember) -> Tensor:
        rows = self.current.saved_rows(part.place, part.query.candidates)
        return torch.from_numpy(rows).to(self.current.device)
