"""Every family's greedy tokens are those of a plain loop over transformers' own class: whole, in
blocks, with caches that are refreshed in every step, into templates and into prompts."""

import numpy as np
import pytest
import torch
from families import FAMILIES, MASK, make, network, plain_loop
from test_loop import VARIANTS, finish, make_loop, params_of

PROMPT = [3, 14, 15, 9, 26, 5]
SHAPES = {
    "whole": dict(block_length=12, tokens_per_step=2),
    "blocks": dict(block_length=4, tokens_per_step=2),
    "dual": dict(block_length=4, tokens_per_step=1, cache="dual", cache_refresh=1),
    "prefix": dict(block_length=6, tokens_per_step=2, cache="prefix", cache_refresh=1),
}


def decoded(made, prompt, fields, length=12, **more):
    """All tokens of prompt and canvas, by the engine's loop."""
    loop = make_loop(network(made), cache_rows=100)
    given = params_of(fields | more, prompt_len=len(prompt), max_tokens=length)
    loop.add("x", list(prompt), given)
    canvas = loop.canvases["x"]
    finish(loop)
    return canvas.tokens.tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_a_plain_loop(family, shape):
    made = make(family, dtype=torch.float64, num_hidden_layers=2)
    fields = SHAPES[shape]
    want = plain_loop(
        made,
        PROMPT + [MASK] * 12,
        start=len(PROMPT),
        block=fields["block_length"],
        quota=fields["tokens_per_step"],
    )
    assert decoded(made, PROMPT, fields) == want


@pytest.fixture(scope="module")
def dream():
    return make("dream", dtype=torch.float64, num_key_value_heads=2)


FIELDS = {"block_length": 4, "tokens_per_step": 1}


@pytest.mark.parametrize("prompt", [[7], [7, 8], [7, MASK, 9], [7, MASK, MASK, 1, MASK]])
@pytest.mark.parametrize("cache", [{}, {"cache": "dual", "cache_refresh": 1}], ids=["", "dual"])
def test_a_shifted_model_predicts_the_first_position_and_gaps_from_the_row_before(
    dream, prompt, cache
):
    """A prompt of one token, and masks in a prompt, which are written with the first block."""
    want = plain_loop(dream, prompt + [MASK] * 8, start=len(prompt), block=4, quota=1)
    assert decoded(dream, prompt, FIELDS | cache, length=8) == want


def test_a_shifted_model_fills_a_template(dream):
    tokens = [MASK, MASK, 2, MASK, 5, MASK, 6]
    prompt = [4, 4]
    given = {"canvas_template": [2, [2], 1, [5], 1, [6]]}
    want = plain_loop(dream, prompt + tokens, start=2, block=4, quota=1)
    assert decoded(dream, prompt, FIELDS | given, length=7) == want


def test_frozen_rows_of_a_shifted_model_never_include_what_predicts_the_block(dream):
    loop = make_loop(network(dream), cache_rows=100)
    fields = FIELDS | {"cache": "dual"}
    loop.add("x", list(PROMPT), params_of(fields, prompt_len=len(PROMPT), max_tokens=8))
    loop.step(["x"])
    canvas = loop.canvases["x"]
    assert canvas.cache_plan().live_positions.tolist() == [5, 6, 7, 8, 9]
    finish(loop)
    assert loop.pool.used == 0


@pytest.mark.parametrize("family", ["illada", "dream"])
@pytest.mark.parametrize(
    "cache", [{}, {"cache": "dual", "cache_refresh": 1}, {"cache": "prefix", "cache_refresh": 1}]
)
def test_a_growing_canvas_shows_no_mask_beyond_the_block(family, cache):
    """A block is appended when the one before is done, as iLLaDA's authors decode."""
    made = make(family, dtype=torch.float64, num_hidden_layers=2)
    want = list(PROMPT)
    for block in (4, 4, 4):
        start = len(want)
        want = plain_loop(made, want + [MASK] * block, start=start, block=block, quota=1)
    assert decoded(made, PROMPT, FIELDS | cache | {"canvas": "growing"}) == want
    whole = plain_loop(made, PROMPT + [MASK] * 12, start=len(PROMPT), block=4, quota=1)
    assert want != whole  # the test can fail


def test_every_policy_of_a_shifted_model_gives_alone_what_it_gives_among_all_others():
    """Half of them on a growing canvas; tokens are drawn for every other."""
    model = network(make("dream", num_key_value_heads=2, num_hidden_layers=2))
    more = {"tokens_per_step": 2, "block_length": 5, "trace": True}
    grows = {"canvas": "growing"}
    asked = [fields | more | (grows if n % 4 < 2 else {}) for n, fields in enumerate(VARIANTS)]
    requests = [
        params_of(fields, prompt_len=4, max_tokens=10, temperature=float(n % 2), seed=n)
        for n, fields in enumerate(asked)
    ]
    crowd = make_loop(model)
    for n, params in enumerate(requests):
        crowd.add(str(n), [3, MASK, 9, n], params)
    tokens, reports = finish(crowd)
    for n, params in enumerate(requests):
        alone = make_loop(model)
        alone.add("x", [3, MASK, 9, n], params)
        own, report = finish(alone)
        # Scores of the "prototype" preset have come out one unit of their last decimal apart.
        scores = [np.array(r["trace"].pop("score"), float) for r in (report["x"], reports[str(n)])]
        np.testing.assert_allclose(*scores, atol=2e-6)
        assert (own["x"], report["x"]) == (tokens[str(n)], reports[str(n)]), VARIANTS[n]
        assert MASK not in own["x"] and len(own["x"]) == 10
