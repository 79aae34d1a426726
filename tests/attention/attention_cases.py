"""Layouts, inputs and comparisons that the tests of attention share."""

import pytest
import torch

from boe_vllm.attention import AttentionLayout, attention_backward

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
P = 8
SCALE = 0.4


def layout_of(q, kv, active):
    return AttentionLayout(q_seqlens=q, kv_seqlens=kv, active_seqlens=active)


LAYOUTS = {
    "one row": layout_of((1,), (1,), (1,)),
    "ragged": layout_of((5, 1, 9), (5, 1, 9), (2, 1, 4)),
    "one without active rows": layout_of((4, 3, 6), (4, 3, 6), (2, 0, 3)),
    "none active": layout_of((4, 3), (4, 3), (0, 0)),
    "all active": layout_of((4, 6), (4, 6), (4, 6)),
    "keys beyond the queries": layout_of((3, 4), (7, 4), (2, 4)),
    "a sequence without queries": layout_of((0, 4), (3, 5), (0, 2)),
    "no sequence": layout_of((), (), ()),
}
HEADS = {"as many key heads": (4, 4), "grouped": (4, 2), "one key head": (3, 1)}

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
every_heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())


def rows_of(layout, heads=(4, 4), *, dtype=torch.float64, width=P, seed=0, device="cpu"):
    """Random q, k, v of all rows and the gradient of the active rows' outputs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (layout.num_queries, heads[0]),
        (layout.num_keys, heads[1]),
        (layout.num_keys, heads[1]),
        (layout.num_active, heads[0]),
    ]
    return [
        torch.randn(*shape, width, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in shapes
    ]


def backward_of(layout, q, k, v, do, *, impl="auto", **options):
    q_active = q[layout.active_index(q.device)]
    return attention_backward(do, q_active, k, v, layout=layout, scale=SCALE, impl=impl, **options)


def assert_all_close(got, want, **tolerance):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **tolerance)
