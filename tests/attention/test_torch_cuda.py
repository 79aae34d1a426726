"""PyTorch's CUDA kernels: what they are given, by dense stand-ins; and themselves, on a GPU."""

import pytest
import torch
from attention_cases import (
    SCALE,
    assert_all_close,
    backward_of,
    every_heads,
    every_layout,
    gpu,
    layout_of,
    rows_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from boe_vllm.attention import attention_backward, attention_forward, reference, torch_cuda

CPU = torch.device("cpu")


def spans(q_starts, k_starts, most_q, most_k):
    """The rows of every sequence, once the lengths are what a kernel insists on."""
    for starts in (q_starts, k_starts):
        assert starts.dtype == torch.int32 and starts.is_contiguous() and starts[0] == 0
    q_spans, k_spans = (
        [slice(*x) for x in zip(s, s[1:], strict=False)]
        for s in (q_starts.tolist(), k_starts.tolist())
    )
    assert max(s.stop - s.start for s in q_spans) == most_q
    assert max(s.stop - s.start for s in k_spans) == most_k
    assert all(s.stop > s.start for s in (*q_spans, *k_spans))
    return list(zip(q_spans, k_spans, strict=True))


class DenseKernels:
    """The four operators in float32 on the CPU; they accept only what the real ones do."""

    STATE = torch.tensor([1, 2]), torch.tensor(3)

    def forward(self, q, k, v, lengths, scale):
        parts = spans(*lengths)
        assert parts[-1][0].stop == len(q) and parts[-1][1].stop == len(k)
        repeat = q.shape[1] // k.shape[1]
        out, lse = torch.empty_like(q), []
        for own, keys in parts:
            ks, vs = (x[keys].float().repeat_interleave(repeat, 1) for x in (k, v))
            scores = torch.einsum("qhp,khp->hqk", q[own].float(), ks) * scale
            out[own] = torch.einsum("hqk,khp->qhp", scores.softmax(-1), vs).to(q.dtype)
            lse.append(scores.logsumexp(-1))
        return out, lse

    def backward(self, do, q, k, v, o, lse, lengths, scale):
        assert do.shape == q.shape == o.shape and do.dtype == q.dtype
        repeat = q.shape[1] // k.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for (own, keys), denominators in zip(spans(*lengths), lse, strict=True):
            dos, qs, os = (x[own].float() for x in (do, q, o))
            ks, vs = (x[keys].float().repeat_interleave(repeat, 1) for x in (k, v))
            p = torch.exp(torch.einsum("qhp,khp->hqk", qs, ks) * scale - denominators[..., None])
            delta = (dos * os).sum(-1).T[..., None]
            ds = p * (torch.einsum("qhp,khp->hqk", dos, vs) - delta) * scale
            dq[own] = torch.einsum("hqk,khp->qhp", ds, ks).to(q.dtype)
            for into, grad in (
                (dk, torch.einsum("hqk,qhp->khp", ds, qs)),
                (dv, torch.einsum("hqk,qhp->khp", p, dos)),
            ):
                into[keys] = grad.unflatten(1, (-1, repeat)).sum(2).to(k.dtype)
        return dq, dk, dv

    def _flash_attention_forward(
        self, q, k, v, q_starts, k_starts, most_q, most_k, dropout, causal, debug, *, scale
    ):
        assert q.dtype in (torch.bfloat16, torch.float16) and not q.shape[1] % k.shape[1]
        assert (dropout, causal, debug) == (0.0, False, False)
        o, lse = self.forward(q, k, v, (q_starts, k_starts, most_q, most_k), scale)
        return o, torch.cat(lse, 1), *self.STATE, torch.empty(0)

    def _flash_attention_backward(
        self,
        *inputs,
        scale,
    ):
        do, q, k, v, o, lse, *lengths, dropout, causal, state, unused = inputs
        assert do.is_contiguous() and lse.shape == (q.shape[1], len(q))
        assert (dropout, causal) == (0.0, False)
        assert state is self.STATE[0] and unused is self.STATE[1]
        parts = lse.split([own.stop - own.start for own, _ in spans(*lengths)], 1)
        return self.backward(do, q, k, v, o, parts, lengths, scale)

    def _efficient_attention_forward(
        self, q, k, v, bias, q_starts, k_starts, most_q, most_k, dropout, mask, with_lse, *, scale
    ):
        assert q.dtype == torch.float32 and q.shape[0] == 1 and q.shape[2:] == k.shape[2:]
        assert (bias, dropout, mask, with_lse) == (None, 0.0, 0, True)
        o, lse = self.forward(q[0], k[0], v[0], (q_starts, k_starts, most_q, most_k), scale)
        padded = torch.full((len(lse), q.shape[2], -(-most_q // 32) * 32), float("nan"))
        for i, part in enumerate(lse):
            padded[i, :, : part.shape[1]] = part
        return o[None], padded, *self.STATE, most_q, most_k

    def _efficient_attention_backward(self, *inputs, scale):
        do, q, k, v, bias, o, *lengths, lse, dropout, seed, offset, mask, with_bias = inputs
        assert (bias, dropout, mask, with_bias) == (None, 0.0, 0, False)
        assert seed is self.STATE[0] and offset is self.STATE[1]
        parts = spans(*lengths)
        assert lse.shape[0] == len(parts) and not lse.shape[2] % 32
        lse = [x[:, : own.stop - own.start] for x, (own, _) in zip(lse, parts, strict=True)]
        grads = self.backward(do[0], q[0], k[0], v[0], o[0], lse, lengths, scale)
        return *(x[None] for x in grads), None


@pytest.fixture
def dense(monkeypatch):
    monkeypatch.setattr(torch_cuda, "_aten", DenseKernels())


@every_layout
@every_heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_get_what_they_take_and_give_what_the_reference_gives(dense, layout, heads, dtype):
    layout = layout_of(layout.q_seqlens, layout.kv_seqlens, layout.active_seqlens)
    q, k, v, do = rows_of(layout, heads, dtype=dtype)
    exact = [x.double() for x in (q, k, v, do)]
    options = {"layout": layout, "scale": SCALE}
    rows = layout.active_index()
    got = [torch_cuda.forward(q, k, v, **options)]
    got += torch_cuda.backward(do, q[rows], k, v, **options)
    want = [reference.forward(*exact[:3], **options)]
    want += reference.backward(exact[3], exact[0][rows], *exact[1:3], **options)
    # Of the kernel's own precision nothing is known here: inputs, output and sums over grouped
    # heads are rounded to the dtype.
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert all(x.dtype == dtype for x in got)
    assert_all_close([x.double() for x in got], want, atol=tolerance, rtol=tolerance)


def test_a_layout_moves_to_the_device_once(dense, monkeypatch):
    calls = []

    def counted(arrays, device):
        calls.append(len(arrays))
        return to_device(arrays, device)

    to_device = torch_cuda.to_device
    monkeypatch.setattr(torch_cuda, "to_device", counted)
    layout = layout_of((3, 0, 2, 4), (5, 1, 2, 4), (2, 0, 0, 1))
    q, k, v, do = rows_of(layout, dtype=torch.float32)
    for _ in range(3):  # layers
        torch_cuda.forward(q, k, v, layout=layout, scale=SCALE)
        torch_cuda.backward(do, q[layout.active_index()], k, v, layout=layout, scale=SCALE)
    assert calls == [8]


def test_plans_leave_out_sequences_without_rows():
    layout = layout_of((3, 2, 4), (5, 2, 4), (2, 0, 1))
    first, second = torch_cuda.plans(layout, CPU)
    assert first.q_starts.tolist() == [0, 3, 5, 9] and first.k_starts.tolist() == [0, 5, 7, 11]
    assert (first.most_q, first.most_k, first.kv_index) == (4, 5, None)
    assert second.q_starts.tolist() == [0, 2, 3] and second.k_starts.tolist() == [0, 5, 9]
    assert second.kv_index.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10]
    assert second.active_kv_index.tolist() == [0, 1, 5]
    assert torch_cuda.plans(layout_of((3,), (5,), (0,)), CPU)[1] is None


@pytest.mark.parametrize("size", [12, 264])
def test_a_head_size_that_flash_does_not_take_is_refused(dense, size):
    layout = layout_of((3,), (5,), (2,))
    q, k, v, do = rows_of(layout, dtype=torch.bfloat16, width=size)
    message = rf"head size divisible by 8 and at most 256 .*, got {size}; use float32"
    with pytest.raises(ValueError, match=message):
        torch_cuda.forward(q, k, v, layout=layout, scale=SCALE)
    with pytest.raises(ValueError, match=message):
        torch_cuda.backward(do, q[:2], k, v, layout=layout, scale=SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pytorch_accepts_our_forward(monkeypatch, dtype):
    """PyTorch's own operators, their schemas and shape rules, on fake CUDA tensors."""
    monkeypatch.setattr(
        torch_cuda,
        "to_device",
        lambda arrays, device: [torch.tensor(array).to(device) for array in arrays],
    )
    layout = layout_of((3, 2, 40), (5, 2, 40), (2, 0, 33))
    with FakeTensorMode():
        q = torch.empty(45, 4, 64, dtype=dtype, device="cuda")
        k = torch.empty(47, 2, 64, dtype=dtype, device="cuda")
        out = attention_forward(q, k, k, layout=layout, scale=SCALE, impl="torch")
        assert out.shape == q.shape and out.dtype == dtype and out.device.type == "cuda"


# --- on a GPU ------------------------------------------------------------------------------------


class TestOnGpu:
    pytestmark = gpu
    TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
    """Share of the largest value; TF32 products in float32, and half precision inside kernels."""

    LAYOUTS = {
        "ragged": layout_of((700, 33, 1, 260), (700, 400, 1, 260), (20, 33, 0, 65)),
        "one": layout_of((128,), (1024,), (32,)),
        "none active": layout_of((5, 9), (5, 9), (0, 0)),
        "all active": layout_of((5, 9), (5, 9), (5, 9)),
    }

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
    @pytest.mark.parametrize("size", [64, 128])
    def test_torch_equals_the_reference(self, dtype, heads, layout, size):
        layout = layout_of(layout.q_seqlens, layout.kv_seqlens, layout.active_seqlens)
        rows = rows_of(layout, heads, dtype=dtype, width=size, device="cuda")
        q, k, v, do = (x.double().cpu() for x in rows)
        options = {"layout": layout, "scale": size**-0.5}
        index = layout.active_index()
        want = [reference.forward(q, k, v, **options)]
        want += reference.backward(do, q[index], k, v, **options)
        active = rows[0][index.cuda()]
        got = [attention_forward(*rows[:3], **options, impl="torch")]
        got += attention_backward(rows[3], active, *rows[1:3], **options, impl="torch")
        for x, exact in zip(got, want, strict=True):
            assert x.shape == exact.shape and x.dtype == dtype
            if exact.numel():
                error = (x.double().cpu() - exact).abs().max()
                assert error <= self.TOLERANCE[dtype] * exact.abs().max()

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_a_sequence_is_the_same_alone_and_in_a_batch(self, dtype):
        """Forward, dk and dv to the bit; of dq the order of the sums varies between runs."""
        layout = layout_of((700, 33, 260), (700, 400, 260), (20, 33, 65))
        q, k, v, do = rows_of(layout, (8, 2), dtype=dtype, width=64, device="cuda")
        out = attention_forward(q, k, v, layout=layout, scale=0.125, impl="torch")
        grads = backward_of(layout, q, k, v, do, impl="torch")
        single = layout_of((700,), (700,), (20,))
        rows = q[:700], k[:700], v[:700], do[:20]
        alone = attention_forward(*rows[:3], layout=single, scale=0.125, impl="torch")
        assert torch.equal(alone, out[:700])
        dq, dk, dv = backward_of(single, *rows, impl="torch")
        assert torch.equal(dk, grads[1][:20]) and torch.equal(dv, grads[2][:20])
        torch.testing.assert_close(dq, grads[0][:20], atol=0.02, rtol=0.02)

    def test_nothing_waits_for_the_device(self):
        layout = layout_of((700, 33), (700, 400), (20, 33))
        q, k, v, do = rows_of(layout, dtype=torch.bfloat16, width=64, device="cuda")
        active = q[layout.active_index("cuda")]
        torch.cuda.set_sync_debug_mode("error")
        try:
            options = {"layout": layout, "scale": 0.125, "impl": "torch"}
            attention_forward(q, k, v, **options)
            attention_backward(do, active, k, v, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
