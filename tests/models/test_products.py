"""A row's product does not depend on the rows beside it, whatever the library does."""

import os

import pytest
import torch

from boe_vllm.models import products
from boe_vllm.models.functional import Scratch
from boe_vllm.models.products import RowRange, matmul_rows, probe_range, split

TILE = products.TILE["cpu"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# A deep sum into few columns is where libraries split the sum among threads.
SHAPES = [(96, 64), (96, 250), (96, 1024), (512, 1536), (1536, 512), (4096, 1024)]


def operands(depth, width, dtype, rows=300):
    """`x`, and the weight as a backward's and as a forward's product reads it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    weight = torch.randn(depth, width, generator=generator).to(dtype)
    return x, (weight, weight.t().contiguous().t())


def check_rows(x, matrix):
    whole = matmul_rows(x, matrix)
    for rows in [*range(1, 40), 63, 64, 65, 100, 129, 200, 299]:
        assert torch.equal(matmul_rows(x[:rows], matrix), whole[:rows])
        assert torch.equal(matmul_rows(x[-rows:], matrix), whole[-rows:])
    return whole


@pytest.mark.parametrize("depth, width", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_do_not_depend_on_the_number_of_rows(dtype, depth, width):
    x, matrices = operands(depth, width, dtype)
    for matrix in matrices:
        check_rows(x, matrix)


@pytest.mark.parametrize("filled", [False, True], ids=["tiles", "filled up"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_and_filled_up_products_are_the_same_products(monkeypatch, dtype, filled):
    """Rows are alike in products that are filled up only where the probe says so."""
    fewest = products.fewest_rows(dtype, torch.get_num_threads())
    monkeypatch.setattr(products, "fewest_rows", lambda *_: (fewest or 16) if filled else None)
    x, matrices = operands(96, 64, dtype)
    for matrix in matrices:
        alike = fewest is not None or not filled
        whole = (check_rows if alike else matmul_rows)(x, matrix).double()
        want = x.double() @ matrix.double()
        assert (whole - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_bfloat16_products_are_those_of_float64_rounded(monkeypatch):
    x, matrices = operands(700, 50_000, torch.bfloat16, rows=3)
    for fast in (products._has_fast_bfloat16(), False):
        monkeypatch.setattr(products, "_has_fast_bfloat16", lambda fast=fast: fast)
        for matrix in matrices:
            got, want = matmul_rows(x, matrix).double(), x.double() @ matrix.double()
            assert (got - want).abs().max() <= 2**-7 * want.abs().max()


@pytest.mark.parametrize("rows", [0, 1, TILE - 1, TILE, TILE + 1])
@pytest.mark.parametrize("fewest", [None, 1, 16])
def test_a_product_lies_where_it_was_asked_for(monkeypatch, fewest, rows):
    monkeypatch.setattr(products, "fewest_rows", lambda *_: fewest)
    x, (matrix, _) = operands(8, 5, torch.float64, rows)
    out, scratch = torch.empty(rows, 5, dtype=torch.float64), Scratch()
    assert matmul_rows(x, matrix, out=out) is out
    lent = matmul_rows(x, matrix, scratch)
    torch.testing.assert_close(out, x @ matrix)
    assert torch.equal(lent, out)
    assert not rows or lent.data_ptr() == scratch.like(x, 5).data_ptr()


@pytest.mark.parametrize("alike, expected", [(True, 16), (False, None)])
def test_what_the_machine_does_decides(monkeypatch, alike, expected):
    monkeypatch.setattr(products, "_rows_are_alike", lambda *_: alike)
    assert products.fewest_rows.__wrapped__(torch.float32, 2) == expected
    assert products.fewest_rows(torch.bfloat16, 2) is None


def test_the_probe_sees_a_library_that_treats_rows_differently(monkeypatch):
    multiply = torch.Tensor.__matmul__

    def by_number(x, matrix):
        """Below 64 rows, the sum in another order."""
        if len(x) >= 64:
            return multiply(x, matrix)
        return multiply(x.flip(1), matrix.flip(0)) * (1 + 1e-6)

    monkeypatch.setattr(torch.Tensor, "__matmul__", by_number)
    assert not products._rows_are_alike(torch.float32, 96, 250, 16)


@pytest.mark.parametrize(
    ("rows", "alike", "expected"),
    [
        (0, RowRange(128, 1000), []),
        (1, RowRange(128, 1000), [128]),
        (128, RowRange(128, 1000), [128]),
        (1000, RowRange(128, 1000), [1000]),
        (2100, RowRange(128, 1000), [1000, 1000, 128]),
        (2500, RowRange(128, 1000), [1000, 1000, 500]),
        (5000, RowRange(16, None), [5000]),
        (5, RowRange(16, None), [16]),
        (0, RowRange(16, None), []),
        (65, None, [64, 64]),
        (0, None, []),
    ],
)
def test_pieces_cover_the_rows_and_stay_in_the_range(rows, alike, expected):
    assert split(rows, alike, 64) == expected


def library(monkeypatch, *, sums_otherwise):
    """A library that sums in another order where the number of rows or a row's place says so."""

    def multiply(x, matrix, *, out):
        torch.mm(x, matrix, out=out)
        out.mul_(1 + 1e-6 * sums_otherwise(len(x), torch.arange(len(x)))[:, None])
        return out

    monkeypatch.setattr(products, "_multiply", multiply)


@pytest.mark.parametrize(
    ("below", "expected"),
    [(0, 64), (64, 64), (65, 128), (129, 256), (352, 384), (400, 512), (513, None), (2048, None)],
)
def test_the_fewest_rows_on_cuda_are_those_from_which_all_are_alike(monkeypatch, below, expected):
    library(monkeypatch, sums_otherwise=lambda n, place: (place >= 0).float() * (n < below))
    found = probe_range(torch.randn(24, 16), torch.float32)
    assert found == (None if expected is None else RowRange(expected, products._CUDA_MOST))


def test_a_kernel_that_treats_places_differently_is_noticed(monkeypatch):
    library(monkeypatch, sums_otherwise=lambda n, place: (place % 300 == 299).float())
    assert probe_range(torch.randn(24, 16), torch.float32) is None


def test_wide_results_bound_the_rows_that_are_tried(monkeypatch):
    monkeypatch.setattr(products, "_CUDA_PROBED_BYTES", 4 * 200 * 600)
    assert probe_range(torch.randn(24, 200), torch.float32).most == 600


def test_without_equal_rows_the_library_gets_all_of_them(monkeypatch):
    monkeypatch.setattr(products.settings, "row_invariant", False)
    seen = []

    def multiply(x, matrix, *, out):
        seen.append(len(x))
        return torch.mm(x, matrix, out=out)

    monkeypatch.setattr(products, "_multiply", multiply)
    x, (matrix, _) = operands(8, 5, torch.float64, 70)
    assert torch.equal(matmul_rows(x, matrix), x @ matrix)
    assert seen == [70]


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("before", [{}, {"MKL_CBWR": "COMPATIBLE"}], ids=["unset", "set"])
def test_the_strict_mode_is_asked_for_unless_the_user_chose(monkeypatch, intel, before):
    environ = dict(before)
    monkeypatch.setattr(products, "_is_intel", lambda: intel)
    monkeypatch.setattr(os, "environ", environ)
    products.ask_for_equal_rows()
    assert environ == (before or ({"MKL_CBWR": "AUTO,STRICT"} if intel else {}))


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    # LLaDA-8B's: to the heads, back, to the MLP, back, and a slice of the vocabulary.
    SHAPES = [(4096, 8192), (4096, 4096), (4096, 24576), (12288, 4096), (4096, 50000), (96, 250)]

    @pytest.mark.parametrize("depth, width", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("float32", [False, True])
    def test_products_do_not_depend_on_the_number_of_rows(self, dtype, depth, width, float32):
        generator = torch.Generator(device="cuda").manual_seed(1)
        x, weight = (
            torch.randn(n, m, generator=generator, device="cuda").to(dtype)
            for n, m in ((5000, depth), (depth, width))
        )
        for matrix in (weight, weight.t().contiguous().t()):
            whole = matmul_rows(x, matrix, float32=float32)
            assert whole.dtype == (torch.float32 if float32 else dtype)
            for rows in (1, 2, 7, 8, 31, 63, 64, 65, 127, 200, 257, 300, 511, 700, 1999, 4097):
                assert torch.equal(matmul_rows(x[:rows], matrix, float32=float32), whole[:rows])
                last = matmul_rows(x[-rows:].clone(), matrix, float32=float32)
                assert torch.equal(last, whole[-rows:])

    def test_logits_in_float32_are_less_rounded(self):
        x, weight = torch.randn(2, 40, 4096, device="cuda").bfloat16()
        want = x.double() @ weight.double().t()
        wide = matmul_rows(x, weight.t(), float32=True)
        assert (wide - want).abs().max() < 1e-4 * want.abs().max()
        rounded = matmul_rows(x, weight.t())
        assert (rounded - want).abs().max() > 10 * (wide - want).abs().max()

    def test_a_product_lies_where_it_was_asked_for(self):
        x, weight = torch.randn(300, 64, device="cuda"), torch.randn(64, 32, device="cuda")
        out, scratch = torch.empty(300, 32, device="cuda"), Scratch()
        assert matmul_rows(x, weight, out=out) is out
        assert torch.equal(matmul_rows(x, weight, scratch), out)
