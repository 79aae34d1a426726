"""Ranks that hold some columns of every expert add up to the whole routed MLP."""

import pytest
import torch

from boe_vllm.models.experts import RoutedMlp
from boe_vllm.models.layers import Layers
from boe_vllm.models.shape import ExpertsShape

F64 = torch.float64
SHAPE = ExpertsShape(count=5, chosen=2, inner=8)
WIDTH = 12


class OneOf(Layers):
    """A rank's view, without the others."""

    def __init__(self, rank, ranks):
        self.rank, self.ranks = rank, ranks


def routed(rank=0, ranks=1):
    generator = torch.Generator().manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        mlp = RoutedMlp(SHAPE, WIDTH, OneOf(rank, ranks))
    finally:
        torch.set_default_dtype(before)
    mlp.router.data.copy_(torch.randn(SHAPE.count, WIDTH, generator=generator, dtype=F64))
    for expert in range(SHAPE.count):
        for part in ("gate", "up", "down"):
            shape = (WIDTH, SHAPE.inner) if part == "down" else (SHAPE.inner, WIDTH)
            mlp.experts.load(torch.randn(shape, generator=generator, dtype=F64), part, expert)
    return mlp


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_add_up(ranks):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, WIDTH, generator=generator, dtype=F64)
    saved_A = torch.tensor([0, 3, 4])
    dy = torch.randn(3, WIDTH, generator=generator, dtype=F64)
    whole = routed()
    out, saved = whole.run(x, saved_A)
    parts = [routed(rank, ranks) for rank in range(ranks)]
    outs = [part.run(x, saved_A) for part in parts]
    torch.testing.assert_close(sum(own for own, _ in outs), out)
    backs = [part.backward(dy, kept) for part, (_, kept) in zip(parts, outs, strict=True)]
    torch.testing.assert_close(sum(backs), whole.backward(dy, saved))


def test_experts_that_do_not_divide_among_the_ranks_are_refused():
    with pytest.raises(ValueError, match=r"tensor_parallel_size: .*inner width \(8\), got 3"):
        routed(0, 3)


def test_without_rows_to_save_nothing_is_kept():
    x = torch.randn(4, WIDTH, dtype=F64)
    out, saved = routed().run(x)
    assert saved is None
    torch.testing.assert_close(out, routed().run(x, torch.arange(4))[0], rtol=0, atol=0)
