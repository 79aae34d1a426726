"""The operators for CUDA equal the pieces operation by operation, whatever the number of rows."""

import functools
import importlib
import os
import subprocess
import sys

import pytest
import torch

from boe_vllm.models import compiled, functional, fused

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float64: 1e-11}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
EPS = 1e-5
WIDTH, HEADS, KV_HEADS, SIZE, VOCABULARY = 24, 3, 1, 6, 5003


class Arguments:
    """Of every operator, for some rows."""

    def __init__(self, rows, dtype, device="cpu", width=WIDTH):
        self.generator = torch.Generator().manual_seed(3)
        self.rows, self.dtype, self.device, self.width = rows, dtype, device, width

    def made(self, *shape, dtype=None):
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.device, dtype or self.dtype)

    def of(self, name):
        n, width, made = self.rows, self.width, self.made
        angles = functional.rotary_tables(torch.arange(n), SIZE, 1e3, self.dtype).to(self.device)
        exact = torch.promote_types(self.dtype, torch.float32)
        index = torch.randperm(12, generator=self.generator)[: min(n, 12)].to(self.device)
        return {
            "rms_norm": lambda: (made(n, width), made(width), EPS),
            "add_rms_norm": lambda: (made(n, width), made(n, width), made(width), EPS),
            "rms_norm_backward": lambda: (made(n, width), made(n, width), made(width), EPS, None),
            "split_rotated": lambda: (
                made(n, (HEADS + 2 * KV_HEADS) * SIZE),
                angles,
                HEADS,
                KV_HEADS,
            ),
            "join_rotated_back": lambda: (
                made(n, HEADS, SIZE),
                made(n, KV_HEADS, SIZE),
                made(n, KV_HEADS, SIZE),
                angles,
            ),
            "swiglu": lambda: (made(n, 2 * width),),
            "swiglu_backward": lambda: (made(n, width), made(n, 2 * width)),
            "chosen_rows": lambda: (*(made(k, KV_HEADS, SIZE) for k in (7, 7, 5, 5)), index),
            "normalise_": lambda: (made(n, VOCABULARY, dtype=exact),),
            "entropy_gradient_": lambda: (
                made(n, VOCABULARY, dtype=exact).log_softmax(-1),
                made(n, VOCABULARY, dtype=exact),
            ),
        }[name]()


def values(run, arguments):
    """All that an operator gives and changes."""
    found = run(*arguments)
    found = found if isinstance(found, tuple) else (found,)
    return [x.cpu() for x in (*found, *arguments) if isinstance(x, torch.Tensor)]


def check(name, run, rows, dtype, device="cpu", beside=False):
    got, want = [], []
    for place, function, where in ((got, run, device), (want, fused._PLAIN[name], "cpu")):
        made = Arguments(rows, dtype, where)
        arguments = made.of(name)
        if beside:
            arguments = (*arguments[:-1], made.made(rows, WIDTH))
        place += values(function, arguments)
    for mine, other in zip(got, want, strict=True):
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(mine, other, atol=limit, rtol=limit)


every_operator = pytest.mark.parametrize("name", fused.SCHEMAS)
ROWS = pytest.mark.parametrize("rows", [0, 1, 2, 7])


def test_kernels_in_the_interpreter():
    """Triton's interpreter runs the kernels on the CPU, in a process that begins with it."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "TestKernels"]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="in a process of their own")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    @pytest.fixture
    def kernels(self):
        return importlib.import_module("boe_vllm.models.kernels")

    @DTYPES
    @every_operator
    @ROWS
    def test_a_kernel_equals_the_same_operation_by_operation(self, kernels, name, dtype, rows):
        check(name, getattr(kernels, name), rows, dtype)

    def test_a_gradient_beside_is_added(self, kernels):
        check("rms_norm_backward", kernels.rms_norm_backward, 5, torch.float32, beside=True)

    def test_extreme_logits(self, kernels):
        """Ties go to the first token, what is ruled out has no part, and NaN is seen."""
        x = torch.full((3, VOCABULARY), -1e30)
        x[0, [4100, 17, 4999]] = 2.0
        x[1, 4500] = 3.0
        x[2] = torch.nan
        argmax, best, second, entropy = kernels.normalise_(x)
        assert argmax[:2].tolist() == [17, 4500] and 0 <= argmax[2] < VOCABULARY
        assert best[0].exp() == pytest.approx(1 / 3) and second[0] == best[0] and best[1] == 0
        assert entropy[:2].tolist() == pytest.approx([torch.tensor(3.0).log().item(), 0.0])
        assert torch.isnan(entropy[2])


@pytest.fixture
def uncompiled(monkeypatch):
    """What would be compiled runs as it is written."""
    monkeypatch.setattr(compiled, "_compiled", lambda piece: piece)


@DTYPES
@pytest.mark.parametrize("name", compiled.PIECES)
@ROWS
def test_a_compiled_piece_equals_the_same_operation_by_operation(uncompiled, name, dtype, rows):
    check(name, getattr(compiled, name), rows, dtype)


@pytest.mark.parametrize("name", compiled.PIECES)
def test_a_piece_is_one_graph(monkeypatch, name):
    """torch.compile takes each as a whole; what it makes of it is seen on a GPU only."""
    monkeypatch.setattr(compiled, "_KNOWN", set())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @functools.cache
    def one(function):
        return torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    monkeypatch.setattr(compiled, "_compiled", one)
    for rows in (0, 1, 2, 7, 100):
        check(name, getattr(compiled, name), rows, torch.float32)
    torch._dynamo.reset()
    # Queries beside keys lie otherwise than rows that are filled up, at an offset or not.
    assert 1 <= len(graphs) <= 3


def test_kernels_can_be_switched_off():
    assert fused.unwanted("") == set()
    assert fused.unwanted("swiglu, rms_norm") == {"swiglu", "rms_norm"}
    assert fused.unwanted("all") == set(fused.SCHEMAS)
    with pytest.raises(ValueError, match="BOE_VLLM_NO_TRITON: expected all, or names of rms_norm"):
        fused.unwanted("norms")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("width", [128, 4096])
    def test_a_row_is_the_same_among_any_number(self, dtype, width):
        made = Arguments(4096, dtype, "cuda").made
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
    @every_operator
    @pytest.mark.parametrize("rows", [0, 1, 2, 300])
    def test_an_operator_equals_the_cpus(self, name, dtype, rows):
        check(name, getattr(fused, name), rows, dtype, "cuda")
