"""Each row is multiplied by its own group's matrix, with the same bits in any batch."""

import pytest
import torch
import torch.nn.functional as F
from families import make, network
from pretended_counts import LAUNCH, WAITS
from pretended_cuda import CUDA, PretendedDevice, move
from pretended_decoding import SCENARIOS, cost_of

from boe_vllm.models import grouped
from boe_vllm.models.grouped import Groups, matmul_groups, matmul_groups_one_by_one

CHOSEN = torch.tensor([[4, 1], [1, 0], [4, 2], [0, 4], [1, 4]])  # nobody chose group 3
GROUPS = 5


def example(dtype, rows=CHOSEN, depth=16, width=24):
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(len(rows), depth, generator=generator).to(dtype)
    weights = torch.randn(GROUPS, width, depth, generator=generator).to(dtype)
    groups = Groups.of(rows, GROUPS)
    return x_ND, weights, groups, x_ND[groups.order_M // rows.shape[1]]


def plain_loop(x_ND, weights):
    """[N x K, E] in the order of the choices."""
    return torch.stack(
        [weights[group] @ x_ND[row] for row, own in enumerate(CHOSEN.tolist()) for group in own]
    )


def test_rows_are_put_together_by_group_and_put_back():
    groups = Groups.of(CHOSEN, GROUPS)
    assert groups.order_M.tolist() == [3, 6, 1, 2, 8, 5, 0, 4, 7, 9]
    assert groups.ends_X.tolist() == [2, 5, 6, 6, 10]
    rows = torch.arange(10.0)[groups.order_M, None]
    assert groups.put_back(rows).flatten().tolist() == list(range(10))


def test_each_row_has_the_product_of_its_group():
    x_ND, weights, groups, x_MD = example(torch.float64)
    for matrices in (weights.transpose(1, 2), weights.transpose(1, 2).contiguous()):
        found = groups.put_back(matmul_groups(x_MD, matrices, groups))
        torch.testing.assert_close(found, plain_loop(x_ND, weights))


@pytest.fixture
def kernels(monkeypatch):
    """Sizes of the grouped kernels that were asked for."""
    asked = []
    kernel = F.grouped_mm

    def counted(x, weights, *, offs):
        asked.append(tuple(x.shape))
        return kernel(x, weights, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", counted)
    return asked


def test_the_kernel_gives_the_products_one_by_one(kernels, monkeypatch):
    """As PyTorch has it for the CPU: what its rows beyond the last group are does not matter."""
    x_ND, weights, groups, x_MD = example(torch.bfloat16)
    want = matmul_groups_one_by_one(x_MD, weights.transpose(1, 2), groups)
    monkeypatch.setattr(grouped, "_has_kernel", lambda *operands: True)
    found = matmul_groups(x_MD, weights.transpose(1, 2), groups)
    assert found.shape == (10, 24)
    assert kernels == [(grouped.FEWEST, 16)]
    torch.testing.assert_close(found, want)
    exact = plain_loop(x_ND.double(), weights.double())
    torch.testing.assert_close(groups.put_back(found).double(), exact, rtol=1e-2, atol=1e-2)


def routed(experts):
    made = make(
        "llada-moe",
        num_hidden_layers=1,
        num_key_value_heads=2,
        hidden_size=32,
        head_dim=8,
        num_experts=experts,
    )
    return move(network(made).to(torch.bfloat16))


@pytest.mark.parametrize("policy", ["confidence", "boe, response"])
def test_launches_do_not_grow_with_experts_and_nothing_waits_for_their_rows(policy, kernels):
    few, many = (cost_of(routed(n), SCENARIOS[policy], requests=2) for n in (4, 16))
    assert kernels
    assert many.per_step(LAUNCH) == few.per_step(LAUNCH)
    assert many.per_pass(*WAITS) <= 2  # as of a network without experts


def test_float32_experts_on_the_device_are_multiplied_one_by_one(kernels):
    x_ND, weights, _, _ = example(torch.float32)
    with PretendedDevice():
        x, matrices, rows = (t.to(CUDA) for t in (x_ND, weights.transpose(1, 2), CHOSEN))
        groups = Groups.of(rows, GROUPS)
        found = groups.put_back(matmul_groups(x[groups.order_M // 2], matrices, groups))
        torch.testing.assert_close(found.cpu(), plain_loop(x_ND, weights))
    assert not kernels
