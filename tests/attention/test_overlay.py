"""Attention of hypothetical rows: equal to plain attention over replaced keys, in any company."""

import pytest
import torch

from boe_vllm.attention import overlay
from boe_vllm.attention.overlay import Overlay, group_overlays, overlay_attention
from boe_vllm.base.transfer import Transfer
from boe_vllm.steering import replaced

HEADS, SIZE, SCALE = 4, 8, 8**-0.5


def random_overlays(seed, kv_heads, dtype, shapes):
    """Packed inputs for sequences of (key rows, states, rows of a state)."""
    rng = torch.Generator().manual_seed(seed)

    def draw(rows, heads):
        return torch.randn(rows, heads, SIZE, generator=rng, dtype=dtype)

    overlays, start = [], 0
    for length, many, each in shapes:
        columns = [torch.randperm(length, generator=rng)[:each] for _ in range(many)]
        columns_Nm = torch.stack(columns) if many else torch.empty(0, each, dtype=torch.long)
        overlays.append(Overlay(kv_start=start, kv_len=length, columns_Nm=columns_Nm.numpy()))
        start += length
    rows = sum(states.rows for states in overlays)
    inputs = [draw(rows, HEADS), draw(rows, kv_heads), draw(rows, kv_heads)]
    return overlays, [*inputs, draw(start, kv_heads), draw(start, kv_heads)]


def attend(overlays, inputs):
    groups = group_overlays(
        overlays,
        heads=HEADS,
        row_elements=inputs[3][0].numel(),
        transfer=Transfer(torch.device("cpu")),
    )
    return overlay_attention(*inputs, groups=groups, scale=SCALE)


def one_state_at_a_time(overlays, inputs):
    """By definition: put the state's rows among the keys, then plain attention."""
    q, k, v, keys, values = inputs
    out, first = [], 0
    for states in overlays:
        span = slice(states.kv_start, states.kv_start + states.kv_len)
        for columns in states.columns_Nm:
            rows = slice(first, first + len(columns))
            first += len(columns)
            own_k, own_v = keys[span].clone(), values[span].clone()
            own_k[columns], own_v[columns] = k[rows], v[rows]
            repeat = HEADS // own_k.shape[1]
            own_k, own_v = (x.repeat_interleave(repeat, 1) for x in (own_k, own_v))
            weights = (SCALE * torch.einsum("mhp,shp->hms", q[rows], own_k)).softmax(-1)
            out.append(torch.einsum("hms,shp->mhp", weights, own_v))
    return torch.cat(out)


SHAPES = [(20, 3, 2), (13, 1, 4), (20, 3, 2), (9, 0, 2), (20, 2, 3), (20, 3, 2)]


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_overlay_equals_plain_attention_over_replaced_keys(kv_heads):
    overlays, inputs = random_overlays(0, kv_heads, torch.float64, SHAPES)
    torch.testing.assert_close(
        attend(overlays, inputs), one_state_at_a_time(overlays, inputs), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("most_elements", [1, 2**26])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_replaced_keys_give_the_same(monkeypatch, kv_heads, most_elements):
    monkeypatch.setattr(replaced, "_MOST_ELEMENTS", most_elements)
    overlays, inputs = random_overlays(0, kv_heads, torch.float64, SHAPES)
    calls = replaced.replace_keys(
        replaced.key_sets(overlays),
        key_rows=len(inputs[3]),
        row_elements=inputs[3][0].numel(),
        transfer=Transfer(torch.device("cpu")),
    )
    assert len(calls) == (1 if most_elements > 1 else sum(o.columns_Nm.shape[0] for o in overlays))
    got = replaced.replaced_attention(*inputs, calls=calls, scale=SCALE)
    torch.testing.assert_close(got, one_state_at_a_time(overlays, inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("most_keys", [1, 2**22])
def test_a_sequence_is_the_same_to_the_bit_in_any_group(monkeypatch, most_keys):
    monkeypatch.setattr(overlay, "_MOST_KEYS", most_keys)
    overlays, inputs = random_overlays(1, HEADS, torch.float32, SHAPES)
    together = attend(overlays, inputs)
    first = 0
    for states in overlays:
        rows = slice(first, first + states.rows)
        first += states.rows
        if states.rows:
            alone = attend([states], [*(x[rows] for x in inputs[:3]), *inputs[3:]])
            assert torch.equal(alone, together[rows])
