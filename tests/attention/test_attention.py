"""Active-query attention: gradients against the oracle, isolation, tolerances, errors.

The xformers path runs on CUDA only. Without a GPU its kernels are replaced by dense ones that
insist on xformers' formats, and its choices are checked on fake CUDA tensors.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import boe_vllm
from boe_vllm.attention import (
    AttentionLayout,
    active_query_attention,
    attention_backward,
    attention_forward,
    attention_forward_with_lse,
    choose_impl,
    reference,
)
from boe_vllm.attention import torch_cpu as torch_sdpa
from boe_vllm.attention import xformers as xformers_impl

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
D = 8
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


def rows_of(layout, heads=(4, 4), *, dtype=torch.float64, width=D, seed=0, device="cpu"):
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


# --- the oracle itself ---------------------------------------------------------------------------


def test_reference_is_plain_softmax_attention():
    layout = layout_of((3,), (5,), (2,))
    q, k, v, _ = rows_of(layout, (1, 1))
    want = torch.zeros(3, D, dtype=torch.float64)
    for i in range(3):
        weights = [torch.exp(SCALE * (q[i, 0] * k[j, 0]).sum()) for j in range(5)]
        want[i] = sum(w * v[j, 0] for j, w in enumerate(weights)) / sum(weights)
    got = attention_forward(q, k, v, layout=layout, scale=SCALE, impl="reference")
    torch.testing.assert_close(got[:, 0], want)


@every_layout
def test_gradients_equal_finite_differences(layout):
    """Inactive rows are constants: only the active rows are varied, only their outputs seen."""
    q, k, v, _ = rows_of(layout, (2, 1), width=3)
    rows, kv_rows = layout.active_index(), layout.active_kv_index()
    for impl in ("reference", "torch_sdpa"):

        def outputs(q_active, k_active, v_active, impl=impl):
            return active_query_attention(
                q.index_copy(0, rows, q_active),
                k.index_copy(0, kv_rows, k_active),
                v.index_copy(0, kv_rows, v_active),
                layout=layout,
                scale=SCALE,
                impl=impl,
            )[rows]

        inputs = [x.clone().requires_grad_() for x in (q[rows], k[kv_rows], v[kv_rows])]
        assert torch.autograd.gradcheck(outputs, inputs)


# --- torch_sdpa against the oracle ---------------------------------------------------------------


@every_layout
@every_heads
def test_cpu_forward_and_backward_equal_the_reference(layout, heads):
    q, k, v, do = rows_of(layout, heads)
    got = attention_forward(q, k, v, layout=layout, scale=SCALE)
    want = attention_forward(q, k, v, layout=layout, scale=SCALE, impl="reference")
    torch.testing.assert_close(got, want)
    assert_all_close(
        backward_of(layout, q, k, v, do), backward_of(layout, q, k, v, do, impl="reference")
    )


def test_forward_is_plain_sdpa_of_each_sequence():
    layout = LAYOUTS["ragged"]
    q, k, v, _ = rows_of(layout, dtype=torch.float32)
    want = [
        F.scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in qkv), scale=SCALE)
        for qkv in zip(*(x.split(layout.q_seqlens) for x in (q, k, v)), strict=True)
    ]
    want = torch.cat([x[0].transpose(0, 1) for x in want])
    for impl in ("torch_sdpa", "reference"):
        got = attention_forward(q, k, v, layout=layout, scale=SCALE, impl=impl)
        torch.testing.assert_close(got, want)
        got = active_query_attention(q, k, v, layout=layout, scale=SCALE, impl=impl)
        torch.testing.assert_close(got, want)


@every_layout
@pytest.mark.parametrize("impl", ["torch_sdpa", "reference"])
def test_autograd_gives_inactive_rows_exactly_zero(layout, impl):
    q, k, v, _ = rows_of(layout, (4, 2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = active_query_attention(*inputs, layout=layout, scale=SCALE, impl=impl)
    do = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, inputs, do, materialize_grads=True)
    rows, kv_rows = layout.active_index(), layout.active_kv_index()
    want = backward_of(layout, *(x.detach() for x in inputs), do[rows], impl="reference")
    assert_all_close([g[i] for g, i in zip(grads, (rows, kv_rows, kv_rows), strict=True)], want)
    for grad, index in zip(grads, (rows, kv_rows, kv_rows), strict=True):
        assert not grad.index_fill(0, index, 0).any()


def test_all_rows_active_is_ordinary_attention():
    layout = LAYOUTS["all active"]
    q, k, v, do = rows_of(layout, (4, 2))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    plain = reference.forward(*inputs, layout=layout, scale=SCALE)
    assert_all_close(backward_of(layout, q, k, v, do), torch.autograd.grad(plain, inputs, do))


def test_autograd_keeps_queries_of_active_rows_only():
    layout = layout_of((50,), (50,), (3,))
    q, k, v, _ = rows_of(layout, (4, 4))
    saved = []

    def keep(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        active_query_attention(
            q.requires_grad_(), k.requires_grad_(), v, layout=layout, scale=SCALE
        )
    assert sorted(x.shape[0] for x in saved) == [3, 50, 50]


# --- isolation, tiles, modes ---------------------------------------------------------------------

BATCH = layout_of((70, 33, 1, 260), (70, 40, 1, 260), (20, 33, 0, 65))


def alone(layout, i, q, k, v, do):
    """Sequence `i` of the batch as a batch of its own, in fresh memory."""
    single = layout_of((layout.q_seqlens[i],), (layout.kv_seqlens[i],), (layout.active_seqlens[i],))
    cut = {
        "q": slice(layout.q_starts[i], layout.q_starts[i + 1]),
        "kv": slice(layout.kv_starts[i], layout.kv_starts[i + 1]),
        "active": slice(layout.active_starts[i], layout.active_starts[i + 1]),
    }
    rows = q[cut["q"]].clone(), k[cut["kv"]].clone(), v[cut["kv"]].clone()
    return single, cut, (*rows, do[cut["active"]].clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_a_sequence_is_the_same_to_the_bit_alone_and_in_a_batch(dtype, heads):
    q, k, v, do = rows_of(BATCH, heads, dtype=dtype, width=32)
    out = attention_forward(q, k, v, layout=BATCH, scale=SCALE)
    grads = backward_of(BATCH, q, k, v, do)
    for i in range(BATCH.num_sequences):
        single, cut, rows = alone(BATCH, i, q, k, v, do)
        got = attention_forward(*rows[:3], layout=single, scale=SCALE)
        assert torch.equal(got, out[cut["q"]])
        for got, want in zip(backward_of(single, *rows), grads, strict=True):
            assert torch.equal(got, want[cut["active"]])


def test_a_neighbours_rows_leak_nothing():
    q, k, v, do = rows_of(BATCH, dtype=torch.float32, width=32)
    before = attention_forward(q, k, v, layout=BATCH, scale=SCALE)
    grads_before = backward_of(BATCH, q, k, v, do)
    for x, starts in ((q, BATCH.q_starts), (k, BATCH.kv_starts), (v, BATCH.kv_starts)):
        x[starts[1] : starts[2]] = 1e4  # the second sequence
    do[BATCH.active_starts[1] : BATCH.active_starts[2]] = float("nan")
    after = attention_forward(q, k, v, layout=BATCH, scale=SCALE)
    grads_after = backward_of(BATCH, q, k, v, do)
    starts = BATCH.q_starts
    assert not torch.equal(before[starts[1] : starts[2]], after[starts[1] : starts[2]])
    for i in (0, 2, 3):
        assert torch.equal(before[starts[i] : starts[i + 1]], after[starts[i] : starts[i + 1]])
        rows = slice(BATCH.active_starts[i], BATCH.active_starts[i + 1])
        for x, y in zip(grads_before, grads_after, strict=True):
            assert torch.equal(x[rows], y[rows])


@pytest.mark.parametrize("tile_bytes", [1, 5_000, 40_000], ids=str)
@every_heads
def test_the_tile_budget_changes_rounding_only(tile_bytes, heads):
    layout = layout_of((70, 33), (70, 40), (20, 33))
    q, k, v, do = rows_of(layout, heads)
    q = q[layout.active_index()]
    options = {"layout": layout, "scale": SCALE}
    assert_all_close(
        torch_sdpa.backward(do, q, k, v, **options, tile_bytes=tile_bytes),
        torch_sdpa.backward(do, q, k, v, **options),
        rtol=1e-12,
        atol=1e-12,
    )


def test_tiles_stay_within_their_budget():
    threads = torch.get_num_threads()
    for active, keys, heads, group in [(256, 1024, 8, 1), (1000, 4096, 32, 1), (7, 50, 2, 4)]:
        for budget in (1, 10_000, torch_sdpa.DEFAULT_TILE_BYTES):
            tile_heads, tile_rows = torch_sdpa._tile_shape(
                active, keys, heads=heads, group=group, itemsize=4, tile_bytes=budget
            )
            size = 2 * 4 * tile_heads * tile_rows * group * keys
            assert 1 <= tile_heads <= heads and 1 <= tile_rows <= active
            assert size <= budget * threads or (tile_heads, tile_rows) == (1, 1)


@pytest.mark.parametrize("impl", ["torch_sdpa", "reference"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_forward_and_backward_run_in_every_grad_mode(impl, mode):
    layout = layout_of((5, 3), (5, 3), (2, 1))  # fresh: nothing memoised outside the mode
    with mode():
        q, k, v, do = rows_of(layout, dtype=torch.float32)
        out = attention_forward(q, k, v, layout=layout, scale=SCALE, impl=impl)
        grads = backward_of(layout, q, k, v, do, impl=impl)
    assert all(x.isfinite().all() and not x.requires_grad for x in (out, *grads))
    # What the layout remembers from the mode serves autograd later.
    q, k, v, _ = rows_of(layout)
    out = active_query_attention(
        q.requires_grad_(), k.requires_grad_(), v, layout=layout, scale=SCALE, impl=impl
    )
    out.sum().backward()


def test_inputs_are_left_as_they_were():
    q, k, v, do = rows_of(BATCH, (4, 2), dtype=torch.float32)
    copies = [x.clone() for x in (q, k, v, do)]
    attention_forward(q, k, v, layout=BATCH, scale=SCALE)
    backward_of(BATCH, q, k, v, do)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, do), copies, strict=True))


def test_strided_views_of_a_joint_projection_are_accepted():
    layout = LAYOUTS["ragged"]
    qkv = torch.randn(15, 3 * 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q, k, v = qkv.split(4, dim=1)
    _, _, _, do = rows_of(layout)
    whole = [x.contiguous() for x in (q, k, v)]
    options = {"layout": layout, "scale": SCALE}
    torch.testing.assert_close(
        attention_forward(q, k, v, **options), attention_forward(*whole, **options)
    )
    assert_all_close(backward_of(layout, q, k, v, do), backward_of(layout, *whole, do))


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_bfloat16_is_as_exact_as_its_last_rounding(heads):
    """Against the float64 oracle on the same, already rounded, inputs."""
    layout = layout_of((130, 33), (130, 40), (40, 33))
    rows = rows_of(layout, heads, dtype=torch.bfloat16, width=32)
    exact = [x.double() for x in rows]
    step = torch.finfo(torch.bfloat16).eps  # twice the largest relative rounding error

    # The forward kernel rounds each probability and the result: both are at most half a step of
    # the weighted sum of |v|, which a second call computes.
    q, k, v, do = exact
    out = attention_forward(*rows[:3], layout=layout, scale=SCALE)
    want = attention_forward(q, k, v, layout=layout, scale=SCALE, impl="reference")
    size = attention_forward(q, k, v.abs(), layout=layout, scale=SCALE, impl="reference")
    assert ((out.double() - want).abs() <= step * size).all()

    # The backward works in float32 and rounds the results only: half a step of each, and what
    # float32 sums over 130 keys may lose.
    for got, want in zip(
        backward_of(layout, *rows),
        backward_of(layout, q, k, v, do, impl="reference"),
        strict=True,
    ):
        assert got.dtype == torch.bfloat16
        bound = 0.51 * step * want.abs() + 1e-5 * want.abs().max()
        assert ((got.double() - want).abs() <= bound).all()


def test_float32_backward_is_within_float32_of_float64():
    rows = rows_of(BATCH, (4, 4), dtype=torch.float32, width=32)
    want = backward_of(BATCH, *(x.double() for x in rows), impl="reference")
    for got, exact in zip(backward_of(BATCH, *rows), want, strict=True):
        assert (got.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_large_scores_do_not_overflow():
    layout = LAYOUTS["ragged"]
    q, k, v, do = rows_of(layout, dtype=torch.float32)
    q_active = q[layout.active_index()]
    options = {"layout": layout, "scale": 1e4}
    assert attention_forward(q, k, v, **options).isfinite().all()
    assert all(x.isfinite().all() for x in attention_backward(do, q_active, k, v, **options))


# --- what is refused -----------------------------------------------------------------------------


def test_auto_depends_on_the_device_alone():
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_impl("cpu", dtype) == "torch_sdpa"
        assert choose_impl("cuda", dtype) == "xformers"
    with pytest.raises(ValueError, match="expected a device type of cpu, cuda, got 'xpu'"):
        choose_impl("xpu", torch.float32)
    with pytest.raises(ValueError, match=r"'torch_sdpa': expected a dtype of .*, got float16"):
        choose_impl("cpu", torch.float16)
    with pytest.raises(ValueError, match=r"'xformers': expected a dtype of .*, got float64"):
        choose_impl("cuda", torch.float64)


def q_k_v_do_layout(dtype=torch.float32):
    layout = layout_of((3, 2), (4, 2), (1, 1))
    return *rows_of(layout, dtype=dtype), layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[None], k, v), r"q, k: expected packed rows .* no batch dimension"),
        (lambda q, k, v: (q[:4], k, v), "q: expected 5 rows as the layout says, got 4"),
        (lambda q, k, v: (q, k[:5], v[:5]), "k: expected 6 rows .* got 5"),
        (lambda q, k, v: (q, k, v[:5]), "v: expected the shape of k"),
        (lambda q, k, v: (q[:, :3], k, v), "number of heads that divides q's 3, got 4"),
        (lambda q, k, v: (q[..., :4], k, v), "k: expected head width 4 as q has, got 8"),
        (lambda q, k, v: (q, k.double(), v), "k: expected torch.float32 on cpu .* torch.float64"),
        (lambda q, k, v: (q, k, v.bfloat16()), "v: expected torch.float32 on cpu"),
        (lambda q, k, v: (q.half(), k.half(), v.half()), "expected a dtype of .* got float16"),
        (lambda q, k, v: (q.requires_grad_(), k, v), "call active_query_attention"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    q, k, v, _, layout = q_k_v_do_layout()
    with pytest.raises(ValueError, match=message):
        attention_forward(*change(q, k, v), layout=layout, scale=SCALE)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: torch.cat([x, x]), "q: expected 2 rows .* the backward only the active"),
        ("do", lambda x: x[:1], r"do: expected shape \(2, 4, 8\)"),
        ("do", lambda x: x.double(), "do: expected torch.float32"),
        ("do", lambda x: x.clone().requires_grad_(), "attention_backward: .* requires_grad=True"),
        ("o", lambda x: x[:, :1], r"o: expected shape \(2, 4, 8\)"),
        ("lse", lambda x: x[:, :1, 0], r"lse: expected shape \(2, 4\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_backward_inputs_that_do_not_fit_are_refused(name, change, message):
    _, k, v, do, layout = q_k_v_do_layout()
    inputs = {"do": do, "q": do, "o": None, "lse": None}
    inputs[name] = change(do)
    with pytest.raises(ValueError, match=message):
        attention_backward(
            inputs["do"],
            inputs["q"],
            k,
            v,
            layout=layout,
            scale=SCALE,
            o_AHP=inputs["o"],
            lse_AH=inputs["lse"],
        )


def test_unknown_or_misplaced_implementations_are_refused():
    q, k, v, do, layout = q_k_v_do_layout()
    message = "unknown impl 'x'; expected one of auto, reference, torch_sdpa, xformers"
    for call in (attention_forward, attention_forward_with_lse, active_query_attention):
        with pytest.raises(ValueError, match=message):
            call(q, k, v, layout=layout, scale=SCALE, impl="x")
    with pytest.raises(ValueError, match=message):
        backward_of(layout, q, k, v, do, impl="x")
    with pytest.raises(ValueError, match="impl='xformers': expected cuda tensors, got cpu"):
        attention_forward(q, k, v, layout=layout, scale=SCALE, impl="xformers")


@pytest.mark.parametrize(
    ("q", "kv", "active", "message"),
    [
        ((3,), (3, 2), (1,), "one entry per sequence in each, got 1, 2 and 1"),
        ((3, 2), (3, 1), (1, 1), "sequence 1: expected 0 <= active <= q <= kv, got active=1, q=2"),
        ((3,), (3,), (4,), "sequence 0: .* got active=4, q=3, kv=3"),
        ((3,), (3,), (-1,), "sequence 0: .* got active=-1"),
    ],
)
def test_lengths_that_cannot_be_are_refused(q, kv, active, message):
    with pytest.raises(ValueError, match=message):
        layout_of(q, kv, active)


# --- the layout ----------------------------------------------------------------------------------


def test_layout_offsets_and_indices():
    layout = layout_of([3, 0, 2], [4, 1, 2], [2, 0, 1])
    assert layout == layout_of((3, 0, 2), (4, 1, 2), (2, 0, 1)) and hash(layout) is not None
    assert layout.q_starts == (0, 3, 3, 5)
    assert layout.kv_starts == (0, 4, 5, 7)
    assert layout.active_starts == (0, 2, 2, 3)
    assert (layout.num_sequences, layout.num_queries, layout.num_keys) == (3, 5, 7)
    assert layout.active_index().tolist() == [0, 1, 3]
    assert layout.active_kv_index("cpu").tolist() == [0, 1, 5]
    assert layout.active_index() is layout.active_index(torch.device("cpu"))
    assert layout.active_only() == layout_of((2, 0, 1), (4, 1, 2), (2, 0, 1))


# --- xformers, as far as it goes without a GPU ---------------------------------------------------


def dense_kernels(fmha, *, packed_lse):
    """xformers' module with dense kernels on the CPU that accept only what the real ones do."""

    def scores(q, k, mask, scale):
        bias = mask.materialize((q.shape[1], k.shape[1]), dtype=q.dtype)
        return torch.einsum("qhd,khd->hqk", q[0], k[0]) * scale + bias

    def padded(lse, mask):
        parts = lse.split([b - a for a, b in mask.q_seqinfo.intervals()], dim=1)
        out = lse.new_full((len(parts), lse.shape[0], 64), float("nan"))  # never to be read
        for i, part in enumerate(parts):
            out[i, :, : part.shape[1]] = part
        return out

    def forward_requires_grad(q, k, v, mask, *, scale):
        assert q.dim() == k.dim() == v.dim() == 4 and q.shape[2:] == k.shape[2:]
        s = scores(q, k, mask, scale)
        out = torch.einsum("hqk,khd->qhd", s.softmax(-1), v[0])
        lse = s.logsumexp(-1)
        return out[None], lse[None] if packed_lse else padded(lse, mask)

    def backward(do, o, lse, q, k, v, mask, *, scale, op):
        assert op is kernel and q.dim() == k.dim() == v.dim() == 4 and q.shape[2] == k.shape[2]
        if packed_lse:
            assert lse.shape == (1, q.shape[2], q.shape[1])
            lse = lse[0]
        else:
            starts = list(mask.q_seqinfo.intervals())
            assert lse.shape[0] == len(starts) and lse.shape[2] % 32 == 0
            assert torch.isinf(lse).any() or sum(b - a for a, b in starts) == lse[:, 0].numel()
            lse = torch.cat([lse[i, :, : b - a] for i, (a, b) in enumerate(starts)], dim=1)
        p = torch.exp(scores(q, k, mask, scale) - lse[..., None])
        delta = (do * o).sum(-1)[0].T[..., None]
        ds = p * (torch.einsum("qhd,khd->hqk", do[0], v[0]) - delta) * scale
        return (
            torch.einsum("hqk,khd->qhd", ds, k[0])[None],
            torch.einsum("hqk,qhd->khd", ds, q[0])[None],
            torch.einsum("hqk,qhd->khd", p, do[0])[None],
        )

    def operator(name, packed, reasons):
        return SimpleNamespace(
            NAME=name, VARLEN_LSE_PACKED=packed, not_supported_reasons=lambda inputs: reasons
        )

    kernel = operator("dense", packed_lse, [])
    refusing = SimpleNamespace(BwOp=operator("refusing", not packed_lse, ["not built"]))
    return SimpleNamespace(
        BlockDiagonalMask=fmha.BlockDiagonalMask,
        Inputs=fmha.Inputs,
        flash3=refusing,
        flash=SimpleNamespace(BwOp=kernel),
        cutlass=refusing,
        memory_efficient_attention_forward=lambda *a, **k: forward_requires_grad(*a, **k)[0],
        memory_efficient_attention_forward_requires_grad=forward_requires_grad,
        memory_efficient_attention_backward=backward,
    )


@pytest.fixture(scope="module")
def fmha():
    return pytest.importorskip("xformers.ops").fmha


@pytest.fixture(params=[True, False], ids=["packed lse", "padded lse"])
def dense_xformers(request, fmha, monkeypatch):
    kernels = dense_kernels(fmha, packed_lse=request.param)
    monkeypatch.setattr(xformers_impl, "_fmha", lambda: kernels)


@every_layout
@every_heads
def test_xformers_masks_gathers_and_slices_as_the_reference(dense_xformers, layout, heads):
    layout = layout_of(layout.q_seqlens, layout.kv_seqlens, layout.active_seqlens)
    q, k, v, do = rows_of(layout, heads)
    options = {"layout": layout, "scale": SCALE}
    want_o, want_lse = reference.forward_with_lse(q, k, v, **options)
    torch.testing.assert_close(xformers_impl.forward(q, k, v, **options), want_o)
    o, lse = xformers_impl.forward_with_lse(q, k, v, **options)
    torch.testing.assert_close(o, want_o)
    torch.testing.assert_close(lse, want_lse, check_dtype=False)

    rows = layout.active_index()
    want = reference.backward(do, q[rows], k, v, **options)
    assert_all_close(xformers_impl.backward(do, q[rows], k, v, **options), want, check_dtype=False)
    saved = {"o_AHP": o[rows], "lse_AH": lse[rows]}
    got = xformers_impl.backward(do, q[rows], k, v, **options, **saved)
    assert_all_close(got, want, check_dtype=False)


def test_xformers_mask_leaves_out_sequences_without_rows(fmha):
    layout = layout_of((3, 2, 4), (5, 2, 4), (2, 0, 1))
    plan = xformers_impl.mask_plan(layout.active_only(), "cpu")
    assert isinstance(plan.mask, fmha.BlockDiagonalMask)
    assert plan.mask.q_seqinfo.seqstart_py == [0, 2, 3]
    assert plan.mask.k_seqinfo.seqstart_py == [0, 5, 9]
    assert plan.kv_index.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10]
    assert plan.active_kv_index.tolist() == [0, 1, 5]
    whole = xformers_impl.mask_plan(layout, "cpu")
    assert whole.kv_index is None and whole.mask.q_seqinfo.seqstart_py == [0, 3, 5, 9]
    assert xformers_impl.mask_plan(layout, "cpu") is whole


@pytest.fixture
def pretend_h100(fmha, monkeypatch):
    """xformers believes in a Hopper GPU; tensors are fake, so nothing is ever computed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(fmha.common, "_built_with_cuda", True)
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "12.8")
    for op in (fmha.flash.FwOp, fmha.flash.BwOp):
        monkeypatch.setattr(op, "OPERATOR", lambda *args: None)
    for op in (fmha.flash3.FwOp, fmha.flash3.BwOp):
        monkeypatch.setattr(op, "OPERATOR", None)
    # Pinned memory, through which xformers moves the lengths, does not exist here.
    monkeypatch.setattr(
        fmha.attn_bias,
        "_to_device_tensor",
        lambda seq, dtype, device: torch.tensor(seq, dtype=dtype).to(device),
    )
    with FakeTensorMode():
        yield


@pytest.mark.parametrize(
    ("dtype", "width", "deterministic", "expected"),
    [
        (torch.bfloat16, 64, False, "flash"),
        (torch.float16, 128, False, "flash"),
        (torch.bfloat16, 64, True, "cutlass"),
        (torch.float32, 64, False, "cutlass"),
    ],
    ids=str,
)
def test_xformers_backward_operator(pretend_h100, fmha, dtype, width, deterministic, expected):
    layout = layout_of((3, 2), (5, 2), (2, 1)).active_only()
    q = torch.empty(3, 4, width, dtype=dtype, device="cuda")
    k = torch.empty(7, 4, width, dtype=dtype, device="cuda")
    mask = xformers_impl.mask_plan(layout, q.device).mask
    torch.use_deterministic_algorithms(deterministic)
    try:
        op = xformers_impl.backward_operator(fmha, q, k, k, mask, SCALE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert op is getattr(fmha, expected).BwOp


def test_xformers_says_why_no_kernel_takes_the_inputs(pretend_h100, fmha):
    layout = layout_of((3,), (5,), (2,)).active_only()
    q = torch.empty(2, 4, 12, dtype=torch.bfloat16, device="cuda")
    k = torch.empty(5, 4, 12, dtype=torch.bfloat16, device="cuda")
    mask = xformers_impl.mask_plan(layout, q.device).mask
    message = r"(?s)expected inputs that a .* kernel takes.*query.shape\[-1\] % 8 != 0"
    with pytest.raises(ValueError, match=message):
        xformers_impl.backward_operator(fmha, q, k, k, mask, SCALE)
    with pytest.raises(ValueError, match=message):
        attention_forward(q, k, k, layout=layout, scale=SCALE)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_xformers_itself_accepts_our_calls(pretend_h100, fmha, monkeypatch, heads):
    """The real xformers, its checks and PyTorch's shape rules for CUTLASS, on fake tensors."""
    layout = layout_of((3, 2, 40), (5, 2, 40), (2, 0, 33))

    # PyTorch 2.13 has no working shape rule for this kernel, so its arguments are looked at here.
    def kernel(do, q, k, v, *, out, logsumexp, max_seqlen_q, max_seqlen_k, scale, **rest):
        assert do.shape == q.shape == out.shape == (1, 35, 4, 64)
        assert k.shape == v.shape == (1, 45, 4, 64)
        assert logsumexp.shape == (2, 4, 64) and logsumexp.is_contiguous()
        assert (max_seqlen_q, max_seqlen_k, scale) == (33, 40, SCALE)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None

    monkeypatch.setattr(fmha.cutlass.BwOp, "OPERATOR", kernel)
    q = torch.empty(45, heads[0], 64, device="cuda")
    k = torch.empty(47, heads[1], 64, device="cuda")
    rows = torch.empty(35, heads[0], 64, device="cuda")
    options = {"layout": layout, "scale": SCALE}
    o, lse = attention_forward_with_lse(q, k, k, **options)
    assert o.shape == q.shape and lse.shape == q.shape[:2] and lse.dtype == torch.float32
    assert attention_forward(q, k, k, **options).shape == q.shape
    dq, dk, dv = attention_backward(rows, rows, k, k, **options)
    assert dq.shape == rows.shape and dk.shape == dv.shape == (35, heads[1], 64)


def test_without_xformers_the_cpu_works_and_cuda_names_the_extra():
    script = """
import sys
sys.modules["xformers"] = None
import torch
from boe_vllm.attention import AttentionLayout, attention_backward, attention_forward
from boe_vllm.attention import xformers as impl
layout = AttentionLayout(q_seqlens=(3,), kv_seqlens=(3,), active_seqlens=(2,))
x = torch.randn(3, 2, 8)
attention_forward(x, x, x, layout=layout, scale=1.0)
attention_backward(x[:2], x[:2], x, x, layout=layout, scale=1.0)
try:
    impl.forward(x, x, x, layout=layout, scale=1.0)
except ImportError as error:
    assert "pip install 'boe-vllm[cuda]'" in str(error), error
else:
    raise AssertionError("xformers was blocked")
"""
    root = Path(boe_vllm.__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, timeout=120)


# --- on a GPU ------------------------------------------------------------------------------------


class TestOnGpu:
    pytestmark = gpu
    TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
    """Share of the largest value; TF32 products in float32, and half precision inside kernels."""

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
    @pytest.mark.parametrize(
        "layout",
        [
            layout_of((70, 33, 1, 260), (70, 40, 1, 260), (20, 33, 0, 65)),
            layout_of((128,), (128,), (32,)),
            layout_of((5, 9), (5, 9), (0, 0)),
        ],
        ids=["ragged", "one", "none active"],
    )
    def test_xformers_equals_the_reference(self, dtype, heads, layout):
        layout = layout_of(layout.q_seqlens, layout.kv_seqlens, layout.active_seqlens)
        rows = rows_of(layout, heads, dtype=dtype, width=64, device="cuda")
        q, k, v, do = (x.double().cpu() for x in rows)
        options = {"layout": layout, "scale": 0.125}
        o, lse = attention_forward_with_lse(*rows[:3], **options)
        want_o, want_lse = reference.forward_with_lse(q, k, v, **options)
        index = layout.active_index()
        want = reference.backward(do, q[index], k, v, **options)
        active = index.cuda()
        saved = {"o_AHP": o[active], "lse_AH": lse[active]}
        arguments = (rows[3], rows[0][active], *rows[1:3])
        pairs = [
            (attention_forward(*rows[:3], **options), want_o),
            (o, want_o),
            (lse, want_lse),
            *zip(attention_backward(*arguments, **options), want, strict=True),
            *zip(attention_backward(*arguments, **options, **saved), want, strict=True),
        ]
        for got, exact in pairs:
            assert got.shape == exact.shape
            if exact.numel():
                error = (got.double().cpu() - exact).abs().max()
                assert error <= self.TOLERANCE[dtype] * exact.abs().max()

    def test_autograd_gives_inactive_rows_exactly_zero(self):
        layout = layout_of((70, 33), (70, 40), (20, 0))
        q, k, v, _ = rows_of(layout, dtype=torch.bfloat16, width=64, device="cuda")
        inputs = [x.requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = active_query_attention(*inputs, layout=layout, scale=0.125)
        grads = torch.autograd.grad(out.float().sum(), inputs)
        indices = [layout.active_index("cuda")] + 2 * [layout.active_kv_index("cuda")]
        for grad, index in zip(grads, indices, strict=True):
            assert grad[index].any()
            assert not grad.index_fill(0, index, 0).any()
