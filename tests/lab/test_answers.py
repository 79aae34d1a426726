"""The predicted time of an answer, from a cell alone, is that of the passes which were made."""

import numpy as np
import pytest

from boe_vllm.lab.bench import answers, costs
from boe_vllm.lab.bench.ceilings import H100
from boe_vllm.lab.bench.counted import Lengths, count_random
from boe_vllm.lab.bench.launches import CODE
from boe_vllm.lab.bench.passes import layer_passes, layer_rows
from boe_vllm.lab.eval.cell_file import FinishedCell
from boe_vllm.models.llada import LLaDAConfig

LLADA_8B = costs.Network.of(LLaDAConfig(mlp_hidden_size=12288))
LENGTHS = Lengths(prompt=24, canvas=16, block=16, tokens_per_step=2)
WHOLE = answers.Canvas(rows=40.0, masks=16.0)


def cell_of(contestant, steps, requests):
    """What a cell would say of these steps, decoded one by one."""
    many = len(steps)
    passes = sum(map(layer_passes, steps))
    backwards = sum(p.kind in ("backward", "observed") for s in steps for r in s for p in r)
    return FinishedCell(
        task="t",
        contestant=contestant,
        tokens_per_step=2,
        valid=[True],
        steps=many,
        forwards=passes - backwards,
        backwards=backwards,
        rows=sum(map(layer_rows, steps)) / requests,
        seconds=0.0,
    )


@pytest.mark.parametrize("requests", [1, 25])
@pytest.mark.parametrize(
    "contestant, fields, off",
    [
        ("confidence", {"policy": "confidence"}, 0.01),
        ("dawn", {"policy": "dawn"}, 0.01),
        ("joint", {"policy": "joint"}, 0.08),
        ("joint:commit=drafts", {"policy": "joint", "commit": "drafts"}, 0.08),
        ("boe:commit=drafts", {"policy": "boe", "commit": "drafts"}, 0.15),
        ("boe:sets=top", {"policy": "boe", "sets": "top", "bypass": None}, 0.15),
    ],
)
def test_a_cell_is_predicted_as_its_own_passes_are(contestant, fields, off, requests):
    steps = count_random(fields, requests, LENGTHS, LENGTHS.canvas)
    cell = cell_of(contestant, steps, requests)
    want = sum(costs.predict(step, LLADA_8B, H100, CODE).seconds for step in steps)
    got = answers.milliseconds(cell, WHOLE, requests, LLADA_8B, H100)
    assert got == pytest.approx(1e3 * want / requests, rel=off)


def test_requests_share_the_passes_that_any_of_them_makes():
    rng = np.random.default_rng(0)
    for mean, requests in ((0.3, 1), (0.3, 4), (1.7, 3), (2.0, 25)):
        drawn = np.floor(mean) + (rng.random((200_000, requests)) < mean % 1)
        assert answers.shared(mean, requests) == pytest.approx(drawn.max(1).mean(), rel=0.01)
    assert answers.shared(0.0, 25) == 0


def test_the_sequences_of_a_task_are_those_of_one_token_a_step():
    one = FinishedCell(
        task="t", contestant="confidence", tokens_per_step=1, valid=[], steps=16.0, forwards=16.0,
        backwards=0.0, rows=640.0, seconds=0.0,
    )  # fmt: skip
    assert answers.canvases([one]) == {"t": WHOLE}
    assert answers.policy_of("dawn:sink=0.1").needs().past
    assert answers.policy_of("joint").config.adapts
    assert answers.policy_of("of another package") is None
    assert answers.policy_of("boe thorough") is None  # a name that the file of policies once had
