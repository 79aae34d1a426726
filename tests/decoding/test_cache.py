"""Frozen keys and values: refreshed every step they change nothing, and never leak room."""

import numpy as np
import pytest
from test_loop import MASK, finish, make_loop, model, params_of  # noqa: F401

FIELDS = {"block_length": 8, "tokens_per_step": 2}


def run(model, fields, *, cache_rows=400, count=3, **changes):  # noqa: F811
    loop = make_loop(model, cache_rows=cache_rows)
    rng = np.random.default_rng(2)
    for n in range(count):
        prompt = rng.integers(0, 25, 5 + 7 * n).tolist()
        loop.add(
            str(n),
            prompt,
            params_of(FIELDS | fields, prompt_len=len(prompt), max_tokens=24, **changes),
        )
    tokens, reports = finish(loop)
    assert loop.pool.used == 0
    return tokens, reports


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"policy": "boe"},
        {"policy": "boe", "surrogate": "kv"},
        {"policy": "boe", "surrogate": "inject"},
    ],
    ids=lambda f: "-".join(f.values()) or "confidence",
)
def test_refreshed_every_step_equals_no_cache(model, cache, fields):  # noqa: F811
    want, _ = run(model, fields)
    got, _ = run(model, fields | {"cache": cache, "cache_refresh": 1})
    assert got == want


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "confidence"},
        {"policy": "boe"},
        {"policy": "boe", "preset": "prototype"},
        {"policy": "joint"},
    ],
    ids=lambda f: "-".join(f.values()),
)
def test_a_cached_request_is_the_same_alone_and_beside_others(model, cache, fields):  # noqa: F811
    fields = fields | {"cache": cache}
    want, _ = run(model, fields, count=1)
    got, _ = run(model, fields, count=3)
    assert got["0"] == want["0"]


def test_rows_that_are_computed_shrink_to_the_block(model):  # noqa: F811
    rows = {
        cache: run(model, {"cache": cache}, count=1)[1]["0"]["rows_forward"]
        for cache in ("none", "prefix", "dual")
    }
    # Prompt 5, three blocks of 8, four steps each: one full pass a block, three reduced.
    assert rows["none"] == 12 * 29
    assert rows["prefix"] == 3 * 29 + 3 * (24 + 16 + 8)
    assert rows["dual"] == 3 * 29 + 9 * 8


def test_the_first_step_of_a_block_is_exact(model):  # noqa: F811
    """With one step a block nothing is ever read from the cache."""
    fields = {"tokens_per_step": 8}
    assert run(model, fields | {"cache": "dual"})[0] == run(model, fields)[0]


def test_masks_in_the_prompt_stay_live(model):  # noqa: F811
    loop = make_loop(model, cache_rows=64)
    fields = FIELDS | {"cache": "dual"}
    loop.add("x", [1, MASK, 3], params_of(fields, prompt_len=3, max_tokens=8))
    canvas = loop.canvases["x"]
    tokens, _ = finish(loop)
    assert len(tokens["x"]) == 8 and MASK not in canvas.tokens


def test_a_full_pool_is_an_error_that_says_so(model):  # noqa: F811
    loop = make_loop(model, cache_rows=40)
    params = params_of(FIELDS | {"cache": "dual"}, prompt_len=2, max_tokens=24)
    loop.add("a", [1, 2], params)
    with pytest.raises(ValueError, match=r"cache: expected room for 26 rows, got 14 of 40; raise"):
        loop.add("b", [1, 2], params)
    loop.remove("a")
    loop.add("b", [1, 2], params)
