"""On a pretended CUDA device: the CPU's tokens, one device in every operation, and few launches.

Launches and copies are numbers that do not depend on the machine. Budgets are per denoising step,
split into what grows with the network's layers and what does not by a line through two depths.
"""

import dataclasses

import pytest
import torch
from families import make, network
from pretended_counts import BLOCKING, LAUNCH, NON_BLOCKING, WAITS
from pretended_cuda import CPU, CUDA, DeviceMismatch, PretendedDevice, move
from pretended_decoding import (
    SCENARIOS,
    Cost,
    Scenario,
    cost_of,
    counting_passes,
    loop_of,
    networks,
    state,
    step,
)

DEPTHS = (2, 3)
FEW, MANY = 2, 8
"""Numbers of requests. What is independent of it must not differ."""
PLAN = {"block_length": 16, "tokens_per_step": 4}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Most that a step may cost with `MANY` requests."""

    layer: float
    """Kernel launches a layer."""
    constant: float
    """Kernel launches besides."""
    blocking: float
    """Blocking copies to the device, for each pass over the network."""
    waits: float
    """Copies to the host and reads of values, for each pass."""
    by_requests: float
    """Kernel launches a layer with `MANY` requests less those with `FEW`."""


BUDGETS = {
    "confidence": Budget(layer=9, constant=34, blocking=0, waits=1, by_requests=0),
    "joint": Budget(layer=43, constant=120, blocking=0, waits=1, by_requests=0),
    "boe": Budget(layer=55, constant=143.5, blocking=0, waits=1, by_requests=0),
}
"""As measured. A few rows are filled up for products, so more requests may even take fewer."""


@pytest.fixture(scope="module")
def pair():
    return networks()


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_the_device_decodes_the_tokens_of_the_cpu(pair, scenario):
    on_cpu, on_device = pair
    want, got = loop_of(on_cpu, CPU, scenario), loop_of(on_device, CUDA, scenario)
    cost = Cost(PretendedDevice())
    while not all(canvas.done for canvas in want.canvases.values()):
        step(want)
        with cost.device, counting_passes(on_device, cost):
            step(got)
        assert state(got) == state(want)
    assert cost.device.counts.total(LAUNCH) > cost.passes > 0
    assert cost.per_pass(BLOCKING) <= 2
    assert cost.per_pass(*WAITS) <= 2  # a query without a pass reads what the pass left behind


SWITCHES = ["boe, response", "inject, guided"]


@pytest.mark.parametrize("family", ["dream", "a2d-qwen3", "llada-moe"])
def test_the_device_decodes_the_tokens_of_every_switch(family):
    """Biases and shift; norms of heads; experts."""
    made = make(family, num_hidden_layers=2, num_key_value_heads=2)
    on_cpu, on_device = network(made), move(network(made))
    for name in SWITCHES:
        want = loop_of(on_cpu, CPU, SCENARIOS[name])
        got = loop_of(on_device, CUDA, SCENARIOS[name])
        device = PretendedDevice()
        while not all(canvas.done for canvas in want.canvases.values()):
            step(want)
            with device:
                step(got)
            assert state(got) == state(want), name
        assert device.counts.total(LAUNCH) > 0


def measured(policy):
    """Cost of a policy's steps: by layers, besides, and by the number of requests."""
    scenario, slopes = Scenario(fields={"policy": policy} | PLAN), {}
    for requests in (FEW, MANY):
        costs = [
            cost_of(networks(depth, torch.bfloat16)[1], scenario, requests) for depth in DEPTHS
        ]
        low, high = (cost.per_step(LAUNCH) for cost in costs)
        slopes[requests] = (high - low) / (DEPTHS[1] - DEPTHS[0])
    return Budget(
        layer=slopes[MANY],
        constant=high - slopes[MANY] * DEPTHS[1],
        blocking=max(cost.per_pass(BLOCKING) for cost in costs),
        waits=max(cost.per_pass(*WAITS) for cost in costs),
        by_requests=slopes[MANY] - slopes[FEW],
    ), costs[-1]


@pytest.mark.parametrize("policy", BUDGETS)
def test_a_step_keeps_its_budget(policy):
    found, cost = measured(policy)
    found, budget = map(dataclasses.asdict, (found, BUDGETS[policy]))
    print(f"\n{policy}: {cost.passes / cost.steps:.1f} passes a step")
    print(f"  {'':12s} {'measured':>8s} {'budget':>8s}")
    for field, value in found.items():
        print(f"  {field:12s} {value:8.1f} {budget[field]:8.1f}")
    for line in cost.device.counts.lines(BLOCKING, NON_BLOCKING, *WAITS):
        print(line)
    over = {field: value for field, value in found.items() if value > budget[field] + 1e-9}
    assert not over, f"above the budget {budget}"


def test_two_devices_in_one_operation_are_refused():
    with PretendedDevice(), pytest.raises(DeviceMismatch, match="expected one device"):
        torch.ones(3, device=CUDA) + torch.ones(3)


def test_what_is_counted():
    device = PretendedDevice()
    with device:
        x = torch.ones(4, device=CUDA)  # a launch
        y = (x[1:] * torch.tensor(2.0))[
            None
        ]  # a launch; a view costs nothing, a CPU scalar neither
        host = torch.arange(3.0)
        y.add_(host.to(CUDA))  # a blocking copy and a launch
        y.add_(host.pin_memory().to(CUDA, non_blocking=True))  # a non-blocking one
        assert y.tolist() == [[2, 4, 6]]  # a copy to the host
    counts = device.counts
    assert [counts.total(k) for k in (LAUNCH, BLOCKING, NON_BLOCKING)] == [4, 1, 1]
    assert counts.total(*WAITS) == 1


@torch.library.custom_op("boe_vllm::three_steps_for_a_test", mutates_args=())
def three_steps(x: torch.Tensor) -> torch.Tensor:
    return (x + 1).exp().sum(-1)


def test_a_custom_operator_is_one_launch():
    device = PretendedDevice()
    with device, torch.no_grad():
        x = torch.zeros(2, 3, device=CUDA)
        device.counts.of.clear()
        assert three_steps(x).tolist() == pytest.approx([3 * torch.e] * 2)
    assert device.counts.total(LAUNCH) == 1
