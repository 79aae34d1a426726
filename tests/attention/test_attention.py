"""Active-query attention on the CPU: gradients against the oracle, isolation, precision, errors."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    LAYOUTS,
    SCALE,
    P,
    assert_all_close,
    backward_of,
    every_heads,
    every_layout,
    layout_of,
    rows_of,
)

from boe_vllm.attention import (
    api,
    attention_backward,
    attention_forward,
    explain_auto,
    reference,
    torch_cpu,
    torch_cuda,
)
from boe_vllm.attention import xformers as xformers_impl
from boe_vllm.attention.api import resolve

# --- the oracle itself ---------------------------------------------------------------------------


def test_reference_is_plain_softmax_attention():
    layout = layout_of((3,), (5,), (2,))
    q, k, v, _ = rows_of(layout, (1, 1))
    want = torch.zeros(3, P, dtype=torch.float64)
    for i in range(3):
        weights = [torch.exp(SCALE * (q[i, 0] * k[j, 0]).sum()) for j in range(5)]
        want[i] = sum(w * v[j, 0] for j, w in enumerate(weights)) / sum(weights)
    got = attention_forward(q, k, v, layout=layout, scale=SCALE, impl="reference")
    torch.testing.assert_close(got[:, 0], want)


class Differentiable(torch.autograd.Function):
    """An implementation's forward and backward of the active rows, for autograd's own checks."""

    @staticmethod
    def forward(ctx, q, k_active, v_active, k, v, layout, impl):
        rows = layout.active_kv_index()
        k, v = k.index_copy(0, rows, k_active), v.index_copy(0, rows, v_active)
        ctx.save_for_backward(q, k, v)
        ctx.layout, ctx.impl = layout, impl
        options = {"layout": layout.active_only(), "scale": SCALE, "impl": impl}
        return attention_forward(q, k, v, **options)

    @staticmethod
    def backward(ctx, do):
        options = {"layout": ctx.layout, "scale": SCALE, "impl": ctx.impl}
        return *attention_backward(do, *ctx.saved_tensors, **options), None, None, None, None


@every_layout
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradients_equal_finite_differences(layout, impl):
    """Inactive rows are constants: only the active rows are varied, only their outputs seen."""
    q, k, v, _ = rows_of(layout, (2, 1), width=3)
    rows, kv_rows = layout.active_index(), layout.active_kv_index()
    inputs = [x.clone().requires_grad_() for x in (q[rows], k[kv_rows], v[kv_rows])]
    assert torch.autograd.gradcheck(lambda *x: Differentiable.apply(*x, k, v, layout, impl), inputs)


# --- PyTorch's CPU kernels against the oracle ----------------------------------------------------


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
    for impl in ("torch", "reference"):
        got = attention_forward(q, k, v, layout=layout, scale=SCALE, impl=impl)
        torch.testing.assert_close(got, want)
    got = reference.active_query_attention(q, k, v, layout=layout, scale=SCALE)
    torch.testing.assert_close(got, want)


@every_layout
def test_eq_30_gives_inactive_rows_exactly_zero(layout):
    q, k, v, _ = rows_of(layout, (4, 2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = reference.active_query_attention(*inputs, layout=layout, scale=SCALE)
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
        torch_cpu.backward(do, q, k, v, **options, tile_bytes=tile_bytes),
        torch_cpu.backward(do, q, k, v, **options),
        rtol=1e-12,
        atol=1e-12,
    )


def test_tiles_stay_within_their_budget():
    threads = torch.get_num_threads()
    for active, keys, heads, group in [(256, 1024, 8, 1), (1000, 4096, 32, 1), (7, 50, 2, 4)]:
        for budget in (1, 10_000, torch_cpu.DEFAULT_TILE_BYTES):
            tile_heads, tile_rows = torch_cpu._tile_shape(
                active, keys, heads=heads, group=group, itemsize=4, tile_bytes=budget
            )
            size = 2 * 4 * tile_heads * tile_rows * group * keys
            assert 1 <= tile_heads <= heads and 1 <= tile_rows <= active
            assert size <= budget * threads or (tile_heads, tile_rows) == (1, 1)


@pytest.mark.parametrize("impl", ["torch", "reference"])
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
    out = reference.active_query_attention(
        q.requires_grad_(), k.requires_grad_(), v, layout=layout, scale=SCALE
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
    qkv = torch.randn(15, 3 * 4, P, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
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


@pytest.fixture
def forget():
    """What `auto` means is remembered; a test that changes xformers' answer is not to be."""
    explain_auto.cache_clear()
    yield
    explain_auto.cache_clear()


def test_auto_is_torch_on_the_cpu():
    assert explain_auto("cpu", torch.float32, 64)[0] == "torch"
    assert resolve("auto", "cpu", torch.bfloat16, 64) == "torch"
    with pytest.raises(ValueError, match=r"'torch': expected a dtype of .*, got float16"):
        resolve("auto", "cpu", torch.float16, 64)
    with pytest.raises(ValueError, match="expected a device type of cpu or cuda, got 'xpu'"):
        resolve("auto", "xpu", torch.float32, 64)


@pytest.mark.parametrize(
    ("against", "expected", "reason"),
    [
        (None, "xformers", "its kernels take the model's heads"),
        ("fa2F: not built", "torch", "xformers does not run here: fa2F: not built"),
    ],
    ids=["runs", "does not"],
)
def test_auto_is_xformers_on_cuda_where_it_runs(monkeypatch, forget, against, expected, reason):
    asked = []
    monkeypatch.setattr(xformers_impl, "refusal", lambda *case: asked.append(case) or against)
    assert explain_auto("cuda", torch.bfloat16, 64) == (expected, reason)
    assert resolve("auto", "cuda", torch.bfloat16, 64) == expected
    assert asked == [(torch.bfloat16, 64)]
    with pytest.raises(ValueError, match=f"{expected!r}: expected a dtype of .*, got float64"):
        resolve("auto", "cuda", torch.float64, 64)


def test_a_named_implementation_never_becomes_another(monkeypatch, forget):
    monkeypatch.setattr(xformers_impl, "refusal", lambda *case: "not built")
    for impl in ("torch", "xformers", "reference"):
        assert resolve(impl, "cuda", torch.bfloat16, 64) == impl
    assert resolve("reference", "xpu", torch.float16, 64) == "reference"


def test_torch_is_another_module_on_each_device():
    assert api._load("torch", "cpu") is torch_cpu
    assert api._load("torch", "cuda") is torch_cuda


def q_k_v_do_layout(dtype=torch.float32):
    layout = layout_of((3, 2), (4, 2), (1, 1))
    return *rows_of(layout, dtype=dtype), layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[None], k, v), r"q, k: expected packed rows .* no batch dimension"),
        (lambda q, k, v: (q[:4], k, v), "q: expected 5 rows as the layout says, got 4"),
        (lambda q, k, v: (q, k[:5], v[:5]), "k: expected 6 rows .* got 5"),
        (lambda q, k, v: (q, k, v[:5]), r"v: expected shape \(6, 4, 8\) as k has, got"),
        (lambda q, k, v: (q[:, :3], k, v), "number of heads that divides q's 3, got 4"),
        (lambda q, k, v: (q[..., :4], k, v), "k: expected head size 4 as q has, got 8"),
        (lambda q, k, v: (q, k.double(), v), "k: expected torch.float32 on cpu .* torch.float64"),
        (lambda q, k, v: (q, k, v.bfloat16()), "v: expected torch.float32 on cpu as k has"),
        (lambda q, k, v: (q.half(), k.half(), v.half()), "expected a dtype of .* got float16"),
        (lambda q, k, v: (q.requires_grad_(), k, v), "got one with requires_grad=True; detach it"),
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
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_backward_inputs_that_do_not_fit_are_refused(name, change, message):
    _, k, v, do, layout = q_k_v_do_layout()
    inputs = {"do": do, "q": do} | {name: change(do)}
    with pytest.raises(ValueError, match=message):
        attention_backward(inputs["do"], inputs["q"], k, v, layout=layout, scale=SCALE)


def test_unknown_or_misplaced_implementations_are_refused():
    q, k, v, do, layout = q_k_v_do_layout()
    message = "unknown impl 'x'; expected one of auto, reference, torch, xformers"
    with pytest.raises(ValueError, match=message):
        attention_forward(q, k, v, layout=layout, scale=SCALE, impl="x")
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
