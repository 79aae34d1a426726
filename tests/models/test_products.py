"""A row's product does not depend on the rows beside it, whatever the library does."""

import os

import pytest
import torch

from boe_vllm.models import products
from boe_vllm.models.functional import Scratch
from boe_vllm.models.products import TILE, matmul_rows

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


@pytest.mark.parametrize("fewest", [None, 16], ids=["tiles", "filled up"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_and_filled_up_products_are_the_same_products(monkeypatch, dtype, fewest):
    monkeypatch.setattr(products, "fewest_rows", lambda *_: fewest)
    x, matrices = operands(96, 64, dtype)
    for matrix in matrices:
        whole = check_rows(x, matrix).double()
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


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("before", [{}, {"MKL_CBWR": "COMPATIBLE"}], ids=["unset", "set"])
def test_the_strict_mode_is_asked_for_unless_the_user_chose(monkeypatch, intel, before):
    environ = dict(before)
    monkeypatch.setattr(products, "_is_intel", lambda: intel)
    monkeypatch.setattr(os, "environ", environ)
    products.ask_for_equal_rows()
    assert environ == (before or ({"MKL_CBWR": "AUTO,STRICT"} if intel else {}))
