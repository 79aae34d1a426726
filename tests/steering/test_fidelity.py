"""Fidelity: ranks, intervals and states are what they claim, and oracles agree with themselves."""

import math

import numpy as np
import pytest
import torch
from test_bench import bench
from tokenizers import Tokenizer

import boe_vllm
from boe_vllm.lab.bench import checkpoint, common
from boe_vllm.lab.bench.decoded import PHASES, decoded_states, one_step, pass_over
from boe_vllm.lab.bench.estimates import COUPLINGS, GAINS, LOOKAHEAD, step_fields
from boe_vllm.lab.bench.ranks import bootstrap, share_of_gain, spearman
from boe_vllm.lab.bench.states import open_loop
from boe_vllm.lab.tasks import TASKS


def test_spearman_equals_pearson_on_slow_mean_ranks():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.integers(0, 5, (2, 9)).astype(float)
        ranks = [[np.mean([(y < x) + 0.5 * (y == x) for y in v]) for x in v] for v in (a, b)]
        if np.std(ranks, axis=1).min() > 0:
            assert spearman(a, b) == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert spearman(np.arange(4.0), np.array([1.0, 8, 27, 64])) == pytest.approx(1)
    assert math.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_share_of_gain_is_zero_on_average_and_one_at_best():
    wanted = np.array([1.0, 5.0, 3.0])
    assert [share_of_gain(n, wanted) for n in range(3)] == [-1, 1, 0]


def test_bootstrap_draws_groups_whole_and_leaves_out_nan():
    values, groups = [0.0] * 30 + [1.0] * 30 + [math.nan], [0] * 30 + [1] * 30 + [2]
    mean, low, high = bootstrap(values, groups)
    assert (mean, low, high) == (0.5, 0, 1)  # as if there were two states
    mean, low, high = bootstrap(values, range(61))
    assert mean == 0.5 and 0.35 < low < 0.42 and 0.58 < high < 0.65


@pytest.fixture(scope="module")
def loop():
    args = common.checked(
        common_arguments(["--model", "tiny", "--threads", str(torch.get_num_threads())])
    )
    config = checkpoint.read_config(args)
    return open_loop(
        args, checkpoint.load_model(args, config, checkpoint.read_tensors(args, config))
    )


def common_arguments(arguments):
    import argparse

    parser = argparse.ArgumentParser()
    common.add_arguments(parser)
    return parser.parse_args(arguments)


def test_a_step_from_a_decoded_state_is_the_next_step_of_its_decode(loop):
    tokenizer = Tokenizer.from_file(f"{boe_vllm.tiny_model_path()}/tokenizer.json")
    states = decoded_states(loop, tokenizer, [TASKS["sudoku4-few"]], items=2, seed=3, together=1)
    assert [(s.item, s.phase) for s in states] == [(n, phase) for n in (0, 1) for phase in PHASES]
    assert [len(s.masked) for s in states] == [13, 8, 4] * 2
    for state in states:
        assert (state.tokens[state.masked] == loop.special.mask).all()
    _, statistics = pass_over(loop, states)
    one_step(loop, states, {"policy": "confidence"})()
    for n, (state, own) in enumerate(zip(states, statistics, strict=True)):
        after = loop.canvases[str(n)].tokens
        (written,) = np.flatnonzero(after != state.tokens)
        place = np.searchsorted(state.masked, written)
        assert own.confidence[place] >= own.confidence.max() - 2e-5
        assert after[written] == own.proposal[place]


def test_every_estimate_can_be_asked_for_in_a_step(loop):
    tokenizer = Tokenizer.from_file(f"{boe_vllm.tiny_model_path()}/tokenizer.json")
    states = decoded_states(loop, tokenizer, [TASKS["sudoku4-few"]], items=1, seed=3)[:2]
    for name in (*GAINS, LOOKAHEAD, *COUPLINGS):
        fields = step_fields(name, rho=0.5) | {"tokens_per_step": 2}
        results = one_step(loop, states, fields)()
        assert all(result.error is None for result in results.values())
        for n, state in enumerate(states):
            assert (loop.canvases[str(n)].tokens != state.tokens).sum() == 2


def test_fidelity_ends_with_its_keys():
    arguments = ["fidelity", "--model", "tiny", "--states", "6", "--tasks", "sudoku4,sudoku4-few"]
    arguments += ["--requests", "2", "--repeats", "1", "--threads", "1", "--budget", "2"]
    result = bench(*arguments)
    assert result["details"]["states"] == 6
    gains = {row["estimate"]: row for row in result["details"]["gain"]}
    assert list(gains) == [*GAINS, LOOKAHEAD]
    assert gains[LOOKAHEAD]["spearman"] == gains[LOOKAHEAD]["share"] == 1
    rivals = [row["spearman"] for name, row in gains.items() if name != LOOKAHEAD]
    assert result["fidelity.gain_spearman_best"] == max(rivals) < 1
    assert gains["kv"]["rows"] == gains["response"]["rows"] > gains["mask"]["rows"] > 1
    for table in result["details"]["kappa"].values():
        rows = {row["estimate"]: row for row in table}
        assert list(rows) == list(COUPLINGS) and rows["exact"]["spearman"] == 1
        assert rows["exact"]["rows"] > rows["pairs"]["rows"] > rows["overlap"]["rows"] == 1
        assert all(row["low"] <= row["spearman"] <= row["high"] for row in table)
