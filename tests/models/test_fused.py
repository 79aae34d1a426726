"""The pieces for CUDA equal those that run operation by operation, whatever the number of rows."""

import functools

import pytest
import torch

from boe_vllm.models import functional, fused

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float64: 1e-13}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
EPS = 1e-5


def rows_of(dtype, device="cpu", *, rows=7, width=24):
    generator = torch.Generator(device=device).manual_seed(3)

    def made(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    heads = made(rows, 12, 8)[:, 2:8]  # as queries lie beside keys
    angles = functional.rotary_tables(torch.arange(rows, device=device), 8, 1000.0, dtype)
    return made, heads, angles


PIECES = {
    "norm": lambda f, made, n, w, *_: f.rms_norm(made(n, w), made(w), EPS),
    "norm, back": lambda f, made, n, w, *_: f.rms_norm_backward(
        made(n, w), made(n, w), made(w), EPS
    ),
    "swiglu": lambda f, made, n, w, *_: getattr(f, "swiglu", getattr(f, "swiglu_", None))(
        made(n, 2 * w)
    ),
    "swiglu, back": lambda f, made, n, w, *_: f.swiglu_backward(made(n, w), made(n, 2 * w)),
    "rotation": lambda f, made, n, w, x, angles: turn(f, x, angles, back=False),
    "rotation, back": lambda f, made, n, w, x, angles: turn(f, x, angles, back=True),
}
every_piece = pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES.keys())


def turn(module, x, angles, *, back):
    tables = (angles,) if module is functional else angles.unbind()
    return module.rotate(x, *tables, back=back)


@pytest.fixture
def uncompiled(monkeypatch):
    """What would be compiled runs as it is written."""
    monkeypatch.setattr(fused, "_compiled", lambda piece: piece)


@DTYPES
@every_piece
@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_a_piece_equals_the_same_operation_by_operation(uncompiled, piece, dtype, rows):
    made, heads, angles = rows_of(dtype, rows=rows)
    got = piece(fused, made, rows, 24, heads, angles)
    made, heads, angles = rows_of(dtype, rows=rows)
    want = piece(functional, made, rows, 24, heads, angles)
    assert got.dtype == want.dtype == dtype and got.shape == want.shape
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(got, want, atol=limit, rtol=limit)


@every_piece
def test_a_piece_is_one_graph(monkeypatch, piece):
    """torch.compile takes each as a whole; what it makes of it is seen on a GPU only."""
    monkeypatch.setattr(fused, "_KNOWN", set())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @functools.cache
    def compiled(function):
        return torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    monkeypatch.setattr(fused, "_compiled", compiled)
    for rows in (0, 1, 2, 7, 100):
        made, heads, angles = rows_of(torch.float32, rows=rows)
        got = piece(fused, made, rows, 24, heads, angles)
        made, heads, angles = rows_of(torch.float32, rows=rows)
        torch.testing.assert_close(got, piece(functional, made, rows, 24, heads, angles))
    torch._dynamo.reset()
    # Queries beside keys lie otherwise than rows that are filled up, at an offset or not.
    assert 1 <= len(graphs) <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("width", [128, 4096])
    def test_a_row_is_the_same_among_any_number(self, dtype, width):
        made, _, _ = rows_of(dtype, "cuda")
        x, dy, weight = made(4096, width), made(4096, width), made(width)
        whole = functional.rms_norm(x, weight, EPS)
        back = functional.rms_norm_backward(dy, x, weight, EPS)
        for rows in (1, 2, 3, 7, 8, 9, 16, 33, 64, 100, 333, 1000, 4095):
            for place in (slice(rows), slice(-rows, None)):
                own = x[place].clone()
                assert torch.equal(functional.rms_norm(own, weight, EPS), whole[place])
                grad = functional.rms_norm_backward(dy[place].clone(), own, weight, EPS)
                assert torch.equal(grad, back[place])

    @DTYPES
    @every_piece
    @pytest.mark.parametrize("rows", [0, 1, 2, 300])
    def test_a_compiled_piece_equals_the_cpus(self, piece, dtype, rows):
        made, heads, angles = rows_of(dtype, "cuda", rows=rows)
        got = piece(functional, made, rows, 24, heads, angles)
        made, heads, angles = rows_of(dtype, "cuda", rows=rows)
        want = piece(functional, lambda *s: made(*s).cpu(), rows, 24, heads.cpu(), angles.cpu())
        limit = max(TOLERANCE[dtype], 1e-5)
        torch.testing.assert_close(got.cpu(), want, atol=limit, rtol=limit)
