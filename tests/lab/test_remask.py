"""Scores of written tokens, against finite differences and forwards of another network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Dense, random_weights, small_config

from boe_vllm.lab.bench.__main__ import main
from boe_vllm.lab.bench.ranks import area_under_curve
from boe_vllm.lab.bench.remask import Watched, suspicions

MASK = 28
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def state():
    tokens = np.array([3, 7, 11, MASK, 5, 9, MASK, 2, MASK])
    return tokens, np.array([2, 4, 7])


def entropies_of(dense, x, masks):
    logits = dense.logits(x).clone()
    logits[:, MASK] = -1e9
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)[masks].sum(), logp


def test_scores_equal_finite_differences_and_forwards(state):
    tokens, places = state
    config = small_config()
    weights = random_weights(config, dtype=torch.float64)
    stored = np.array([0.9, 0.5, 0.7])
    scores = suspicions(Watched(config, weights, dtype=torch.float64), tokens, places, stored)
    dense, masks = Dense(config, weights), np.flatnonzero(tokens == MASK)
    x = dense.embed(torch.from_numpy(tokens))
    mask = dense.embed(torch.tensor([MASK]))[0]
    before, now = entropies_of(dense, x, masks)
    for n, place in enumerate(places):
        moved = [x.clone(), x.clone()]
        for sign, state in zip((1, -1), moved, strict=True):
            state[place] += sign * 1e-5 * (mask - x[place])
        (up, _), (down, _) = (entropies_of(dense, state, masks) for state in moved)
        assert scores["embedding"][n] == pytest.approx(float(down - up) / 2e-5, abs=1e-8)
        again = x.clone()
        again[place] = mask
        after, logp = entropies_of(dense, again, masks)
        assert scores["exact"][n] == pytest.approx(float(before - after), abs=1e-9)
        assert scores["left out"][n] == pytest.approx(-float(logp[place, tokens[place]]), abs=1e-9)
        assert scores["now"][n] == pytest.approx(-float(now[place, tokens[place]]), abs=1e-9)
    assert scores["stored"].tolist() == (-stored).tolist()


def test_the_change_of_keys_is_that_of_embeddings_where_a_token_differs_little_from_the_mask(state):
    """To first order in the token's distance from the mask the two linearisations differ only by
    what the written row itself contributes, which is nothing where no mask is read at it."""
    tokens, places = state
    config = small_config(n_layers=1)
    weights = random_weights(config, dtype=torch.float64)
    name = "model.transformer.wte.weight"
    near = weights[name].clone()
    for place in places:
        near[tokens[place]] = near[MASK] + 1e-4 * (near[tokens[place]] - near[MASK])
    network = Watched(config, weights | {name: near}, dtype=torch.float64)
    scores = suspicions(network, tokens, places, np.ones(3))
    for other in ("keys", "exact"):
        assert scores[other] == pytest.approx(scores["embedding"], rel=1e-2)


def test_the_command_prints_a_line_for_each_rate(capsys):
    argv = ["remask", "--tasks", "addition", "--items", "2", "--left", "3"]
    assert main([*argv, "--tokens-per-step", "8,16"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "remask"
    assert [row["tokens a step"] for row in result["details"]] == [8, 16]
    assert all(row["tokens"] > 0 for row in result["details"])


@pytest.mark.parametrize(
    "example, options, printed",
    [
        (
            "gradient_controls.py",
            "--tasks countdown --limit 1 --cells {out} --policies "
            "choice:order=tis,choice:rounds=2:pool=4:context=random,"
            "choice:rounds=9:trigger=count:most=2",
            "| choice:order=tis |",
        ),
        ("bypass_cost.py", "--requests 1 --repeats 1", "steps with a backward; over confidence"),
    ],
)
def test_the_examples_run(tmp_path, example, options, printed):
    argv = options.format(out=tmp_path / "cells.jsonl").split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), *argv],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and printed in done.stdout, done.stderr[-2000:]


def test_the_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert area_under_curve(score, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(area_under_curve(score, np.zeros(40, bool)))
