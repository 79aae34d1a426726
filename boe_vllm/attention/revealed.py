"""Attention of revealed rows: each sees its sequence as it was, but itself as it would become.

A candidate's row is run again with a soft write in its place. Its query meets the old keys and
values of all other rows (other candidates included) and its own new ones.

Legend: `C` packed candidate rows, `S` packed rows of keys and values, `H`/`G` heads of
queries/keys, `P` size of a head, `n` candidates and `s` key rows of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor


def revealed_attention(
    q_CHP: Tensor,
    k_CGP: Tensor,
    v_CGP: Tensor,
    keys_SGP: Tensor,
    values_SGP: Tensor,
    *,
    own_rows: Tensor,
    candidate_lens: Sequence[int],
    kv_starts: Sequence[int],
    kv_lens: Sequence[int],
    scale: float,
) -> Tensor:
    """Mixed values of the candidates, [C, H, P].

    Args:
        q_CHP, k_CGP, v_CGP: the candidates' new queries, keys and values.
        keys_SGP, values_SGP: the old keys and values of all sequences.
        own_rows: [C] int64, each candidate's row in `keys_SGP`.
        candidate_lens: candidates per sequence; they are packed in the order of the sequences.
        kv_starts, kv_lens: where each of these sequences' keys lie.
        scale: factor on the products of queries and keys.
    """
    group = q_CHP.shape[1] // k_CGP.shape[1]
    mixed = torch.empty_like(q_CHP)
    first = 0
    for count, start, length in zip(candidate_lens, kv_starts, kv_lens, strict=True):
        rows = slice(first, first + count)
        first += count
        if count == 0:
            continue
        keys = keys_SGP[start : start + length].repeat_interleave(group, 1)
        values = values_SGP[start : start + length].repeat_interleave(group, 1)
        own = own_rows[rows] - start
        each = torch.arange(count, device=own.device)
        q_Hn = q_CHP[rows].transpose(0, 1)
        new_k = k_CGP[rows].repeat_interleave(group, 1).transpose(0, 1)
        new_v = v_CGP[rows].repeat_interleave(group, 1).transpose(0, 1)
        scores = q_Hn @ keys.permute(1, 2, 0) * scale
        scores[:, each, own] = (q_Hn * new_k).sum(-1) * scale
        exact = scores.dtype if scores.dtype == torch.float64 else torch.float32
        weights = scores.softmax(-1, dtype=exact).to(scores.dtype)
        change = new_v - values[own].transpose(0, 1)
        mixed_Hn = weights @ values.transpose(0, 1) + weights[:, each, own][..., None] * change
        mixed[rows] = mixed_Hn.transpose(0, 1)
    return mixed
