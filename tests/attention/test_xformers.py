"""The xformers path, as far as it goes without a GPU, and on one where there is one.

Its kernels are replaced by dense ones that insist on xformers' formats, and its choices are checked
on fake CUDA tensors. On a machine without CUDA nothing pretends that xformers was built with it but
the fixture that says so.
"""

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_cases import (
    SCALE,
    assert_all_close,
    every_heads,
    every_layout,
    gpu,
    layout_of,
    rows_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import boe_vllm
from boe_vllm.attention import attention_backward, attention_forward, reference
from boe_vllm.attention import xformers as xformers_impl


def dense_kernels(fmha, *, packed_lse):
    """xformers' module with dense kernels on the CPU that accept only what the real ones do."""

    def scores(q, k, mask, scale):
        bias = mask.materialize((q.shape[1], k.shape[1]), dtype=q.dtype)
        return torch.einsum("qhp,khp->hqk", q[0], k[0]) * scale + bias

    def padded(lse, mask):
        parts = lse.split([b - a for a, b in mask.q_seqinfo.intervals()], dim=1)
        out = lse.new_full((len(parts), lse.shape[0], 64), float("nan"))  # never to be read
        for i, part in enumerate(parts):
            out[i, :, : part.shape[1]] = part
        return out

    def forward_requires_grad(q, k, v, mask, *, scale, op):
        assert op is family.FwOp
        assert q.dim() == k.dim() == v.dim() == 4 and q.shape[2:] == k.shape[2:]
        s = scores(q, k, mask, scale)
        out = torch.einsum("hqk,khp->qhp", s.softmax(-1), v[0])
        lse = s.logsumexp(-1)
        return out[None], lse[None] if packed_lse else padded(lse, mask)

    def backward(do, o, lse, q, k, v, mask, *, scale, op):
        assert op is family.BwOp
        assert q.dim() == k.dim() == v.dim() == 4 and q.shape[2] == k.shape[2]
        if packed_lse:
            assert lse.shape == (1, q.shape[2], q.shape[1])
            lse = lse[0]
        else:
            starts = list(mask.q_seqinfo.intervals())
            assert lse.shape[0] == len(starts) and lse.shape[2] % 32 == 0
            lse = torch.cat([lse[i, :, : b - a] for i, (a, b) in enumerate(starts)], dim=1)
        p = torch.exp(scores(q, k, mask, scale) - lse[..., None])
        delta = (do * o).sum(-1)[0].T[..., None]
        ds = p * (torch.einsum("qhp,khp->hqk", do[0], v[0]) - delta) * scale
        return (
            torch.einsum("hqk,khp->qhp", ds, k[0])[None],
            torch.einsum("hqk,qhp->khp", ds, q[0])[None],
            torch.einsum("hqk,qhp->khp", p, do[0])[None],
        )

    family, refusing = operators_that("run", []), operators_that("refuse", ["not built"])
    return SimpleNamespace(
        BlockDiagonalMask=fmha.BlockDiagonalMask,
        Inputs=fmha.Inputs,
        flash3=refusing,
        # Flash runs forward only, as under deterministic algorithms: the family counts as a whole.
        flash=SimpleNamespace(FwOp=family.FwOp, BwOp=refusing.BwOp) if not packed_lse else family,
        cutlass=refusing if packed_lse else family,
        memory_efficient_attention_forward=lambda *a, **k: forward_requires_grad(*a, **k)[0],
        memory_efficient_attention_forward_requires_grad=forward_requires_grad,
        memory_efficient_attention_backward=backward,
    )


def operators_that(name, reasons):
    def operator(kind):
        return SimpleNamespace(NAME=f"{name}{kind}", not_supported_reasons=lambda inputs: reasons)

    return SimpleNamespace(FwOp=operator("F"), BwOp=operator("B"))


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
    want = reference.forward(q, k, v, **options)
    torch.testing.assert_close(xformers_impl.forward(q, k, v, **options), want)
    rows = layout.active_index()
    want = reference.backward(do, q[rows], k, v, **options)
    assert_all_close(xformers_impl.backward(do, q[rows], k, v, **options), want, check_dtype=False)


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
    # Pinned memory, through which lengths and indices move, does not exist here.
    monkeypatch.setattr(
        fmha.attn_bias,
        "_to_device_tensor",
        lambda seq, dtype, device: torch.tensor(seq, dtype=dtype).to(device),
    )
    monkeypatch.setattr(
        xformers_impl,
        "to_device",
        lambda arrays, device: [torch.tensor(array).to(device) for array in arrays],
    )
    with FakeTensorMode():
        yield


def one_sequence(fmha, dtype, head_size):
    """Eight rows on a fake CUDA device, and their mask."""
    q = torch.empty(1, 8, 4, head_size, dtype=dtype, device="cuda")
    return q, q, q, fmha.BlockDiagonalMask.from_seqlens([8], [8], device=q.device)


@pytest.mark.parametrize(
    ("dtype", "head_size", "deterministic", "expected"),
    [
        (torch.bfloat16, 64, False, "flash"),
        (torch.float16, 128, False, "flash"),
        (torch.bfloat16, 64, True, "cutlass"),
        (torch.float32, 64, False, "cutlass"),
    ],
    ids=str,
)
def test_forward_and_backward_are_of_one_family(
    pretend_h100, fmha, dtype, head_size, deterministic, expected
):
    inputs = one_sequence(fmha, dtype, head_size)
    torch.use_deterministic_algorithms(deterministic)
    try:
        forward_op, backward_op = xformers_impl.operators(fmha, *inputs, SCALE)
    finally:
        torch.use_deterministic_algorithms(False)
    family = getattr(fmha, expected)
    assert forward_op is family.FwOp and backward_op is family.BwOp
    assert forward_op.VARLEN_LSE_PACKED == backward_op.VARLEN_LSE_PACKED


def test_xformers_says_why_no_kernel_takes_the_inputs(pretend_h100, fmha):
    message = r"(?s)expected inputs that its kernels take, .*query.shape\[-1\] % 8 != 0"
    with pytest.raises(ValueError, match=message):
        xformers_impl.operators(fmha, *one_sequence(fmha, torch.bfloat16, 12), SCALE)
    layout = layout_of((3,), (5,), (2,))
    q, k, rows = (torch.empty(n, 4, 12, dtype=torch.bfloat16, device="cuda") for n in (3, 5, 2))
    with pytest.raises(ValueError, match=message):
        attention_forward(q, k, k, layout=layout, scale=SCALE, impl="xformers")
    with pytest.raises(ValueError, match=message):
        attention_backward(rows, rows, k, k, layout=layout, scale=SCALE, impl="xformers")


def test_a_refusal_has_xformers_reasons(pretend_h100, monkeypatch, fmha):
    assert xformers_impl.refusal(torch.bfloat16, 64) is None
    assert "query.shape[-1] % 8 != 0" in xformers_impl.refusal(torch.bfloat16, 12)
    for op in (fmha.flash.FwOp, fmha.flash.BwOp, fmha.cutlass.FwOp, fmha.cutlass.BwOp):
        monkeypatch.setattr(op, "OPERATOR", None)
    assert "operator wasn't built" in xformers_impl.refusal(torch.bfloat16, 64)


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
    options = {"layout": layout, "scale": SCALE, "impl": "xformers"}
    assert attention_forward(q, k, k, **options).shape == q.shape
    dq, dk, dv = attention_backward(rows, rows, k, k, **options)
    assert dq.shape == rows.shape and dk.shape == dv.shape == (35, heads[1], 64)


def test_cuda_12s_runtime_is_loaded_from_its_wheel(monkeypatch, tmp_path):
    """Where there is one; a wheel that cannot be loaded is xformers' to report."""
    library = tmp_path / "lib" / "libcudart.so.12"
    library.parent.mkdir()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    loaded = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode: loaded.append((path, mode)))
    xformers_impl._load_cuda_runtime()
    assert not loaded
    library.touch()
    xformers_impl._load_cuda_runtime()
    assert loaded == [(str(library), ctypes.RTLD_GLOBAL)]
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    xformers_impl._load_cuda_runtime()  # an empty file is no library
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    xformers_impl._load_cuda_runtime()


def missing(name):
    raise ModuleNotFoundError(name)


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
        want_o = reference.forward(q, k, v, **options)
        index = layout.active_index()
        want = reference.backward(do, q[index], k, v, **options)
        active = index.cuda()
        arguments = (rows[3], rows[0][active], *rows[1:3])
        pairs = [
            (attention_forward(*rows[:3], **options, impl="xformers"), want_o),
            *zip(attention_backward(*arguments, **options, impl="xformers"), want, strict=True),
        ]
        for got, exact in pairs:
            assert got.shape == exact.shape
            if exact.numel():
                error = (got.double().cpu() - exact).abs().max()
                assert error <= self.TOLERANCE[dtype] * exact.abs().max()
