"""The cost model's table of launches is what a pretended device counts, pass by pass."""

import collections
import functools
import itertools

import pytest
import torch
from pretended_counts import LAUNCH
from pretended_cuda import CUDA, PretendedDevice
from pretended_decoding import Scenario, loop_of, networks, step

from boe_vllm.lab.bench.launches import CODE, Footprint
from boe_vllm.lab.bench.passes import Recorder
from boe_vllm.lab.bench.scenarios import STEPS

DEPTHS = (2, 4)
REQUESTS = 8
"""Enough rows for products that need not be filled up, as an 8B model's own passes have."""
ONE = ("partial",)
"""Kinds that are measured on one request: they launch more for several of unequal lengths."""
MEASURED = ("confidence", "joint", "boe paper", "boe kv")


def launches(name, depth, requests):
    """Launches of each kind of pass, from its beginning to that of the next, means over steps."""
    device = PretendedDevice()
    fields = {"tokens_per_step": 1, **STEPS[name]} if "boe" in name else STEPS[name]
    loop = loop_of(networks(depth, torch.bfloat16)[1], CUDA, Scenario(fields=fields), requests)
    recorder, begun = Recorder(loop), []
    note = recorder._note

    def noted(kind, *counts):
        begun.append((kind, device.counts.total(LAUNCH)))
        note(kind, *counts)

    recorder._note = noted
    with device, recorder.recording():
        for _ in range(3):
            begun.append(("step", device.counts.total(LAUNCH)))
            step(loop)
    begun.append(("end", device.counts.total(LAUNCH)))
    found = collections.defaultdict(list)
    for (kind, before), (_, after) in zip(begun, begun[1:], strict=False):
        found[kind].append(after - before)
    return {kind: sum(counts) / len(counts) for kind, counts in found.items()}


@functools.cache
def measured():
    """Kind -> launches a layer and besides, by a line through two depths."""
    table = {}
    for name, requests in itertools.product(MEASURED, (1, REQUESTS)):
        low, high = (launches(name, depth, requests) for depth in DEPTHS)
        for kind in low:
            if (kind in ONE) != (requests == 1):
                continue
            layer = (high[kind] - low[kind]) / (DEPTHS[1] - DEPTHS[0])
            table.setdefault(kind, (layer, low[kind] - layer * DEPTHS[0]))
    return table


@pytest.mark.parametrize("kind", CODE)
def test_the_table_says_what_a_pass_launches(kind):
    layer, once = measured()[kind]
    said = Footprint(layer=CODE[kind].layer, once=CODE[kind].once)
    found = f"{kind}: Footprint(layer={layer:.0f}, once={once:.0f}); correct the table by it"
    assert said.layer == pytest.approx(layer, abs=3), found
    assert said.once == pytest.approx(once, abs=10), found
