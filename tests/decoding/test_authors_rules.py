"""Whole requests in float64 equal the authors' own loops, rule by rule: `confidence` under guidance
and with late ends of text against LLaDA's `generate`, the others against slow transcriptions."""

import functools
import math

import local_rules as rules
import numpy as np
import pytest
import slow_decoding
import torch
from oracle import Dense, random_weights, small_config
from test_decoding_local import COUNTS
from test_loop import NEEDED, finish, make_loop, params_of
from toy import label

from boe_vllm.models import build

REQUESTS = 24
EOS, EOT, MASK = 27, 26, 28
LENGTH, BLOCK = 12, 6
LOOSE = {"confidence_threshold": 0.2, "kl_threshold": 0.3}
GENERATE = [
    {},
    {"cfg_scale": 0.5},
    {"cfg_scale": 2.0},
    {"confidence_eos_eot_inf": True},
    {"confidence_eos_eot_inf": True, "cfg_scale": 1.0},
    {"logits_eos_inf": True},
]
OTHERS = [
    ({"policy": "margin"}, functools.partial(rules.certainty, name="margin")),
    ({"policy": "entropy"}, functools.partial(rules.certainty, name="entropy")),
    ({"policy": "eb", "gamma": 1.0}, functools.partial(rules.eb, gamma=1.0)),
    ({"policy": "pc"} | NEEDED["pc"], functools.partial(rules.pc, counts=COUNTS, total=10000)),
    ({"policy": "threshold", "threshold": 0.4}, functools.partial(rules.threshold, threshold=0.4)),
    ({"policy": "factor", "factor": 1.5}, functools.partial(rules.factor, factor=1.5)),
    ({"policy": "klass"} | LOOSE, functools.partial(rules.klass, **LOOSE)),
]


@pytest.fixture(scope="module")
def network():
    """A random model with sharper predictions than most, so that EOS and EoT are proposed."""
    config = small_config()
    weights = random_weights(config, dtype=torch.float64)
    model = build.random_model(config, dtype=torch.float64)
    model.load_weights(weights.items())
    return model, Dense(config, weights)


def generate(dense, prompt, *, steps, cfg_scale=0.0, **ends):
    """LLaDA's `generate` at temperature 0 with `remasking="low_confidence"`, line by line."""
    x = torch.tensor(prompt + [MASK] * LENGTH)
    given = x != MASK
    for block in range(LENGTH // BLOCK):
        first, end = len(prompt) + block * BLOCK, len(prompt) + (block + 1) * BLOCK
        per_block = steps // (LENGTH // BLOCK)
        for step in range(per_block):
            masked = x == MASK
            quota = BLOCK // per_block + (step < BLOCK % per_block)
            logits = dense.logits(dense.embed(x))
            if cfg_scale > 0:
                without = dense.logits(dense.embed(x.masked_fill(given, MASK)))
                logits = without + (cfg_scale + 1) * (logits - without)
            logits[:, MASK] = -math.inf  # a position that proposes it would never be written
            if ends.get("logits_eos_inf"):
                logits[:, EOS] = -math.inf
            x0 = logits.argmax(-1)
            if ends.get("confidence_eos_eot_inf"):
                logits[:, [EOS, EOT]] = -math.inf
            p = logits.softmax(-1).gather(-1, x0[:, None])[:, 0]
            p[end:] = -math.inf
            confidence = torch.where(masked, p, -math.inf)
            # The authors' topk leaves the order of ties open; a stable sort takes the lower one.
            chosen = confidence.sort(descending=True, stable=True).indices[:quota]
            x[chosen] = x0[chosen]
        assert not (x[first:end] == MASK).any()
    return x[len(prompt) :].tolist()


def prompts():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 25, int(rng.integers(3, 9))).tolist() for _ in range(REQUESTS)]


def decoded(model, fields):
    """All requests together."""
    loop = make_loop(model, late=frozenset({EOS, EOT}))
    for n, prompt in enumerate(prompts()):
        shape = {"gen_length": LENGTH, "block_length": BLOCK}
        params = params_of(fields | shape, prompt_len=len(prompt), max_tokens=LENGTH, seed=n)
        loop.add(str(n), prompt, params)
    tokens, _ = finish(loop)
    return [tokens[str(n)] for n in range(REQUESTS)]


@pytest.mark.parametrize("fields", GENERATE, ids=label)
def test_confidence_is_lladas_generate(network, fields):
    model, dense = network
    got = decoded(model, {"policy": "confidence", "steps": 6} | fields)
    assert got == [generate(dense, prompt, steps=6, **fields) for prompt in prompts()]


@pytest.mark.parametrize("fields, rule", OTHERS, ids=lambda v: label(v) if type(v) is dict else "")
def test_a_policy_is_its_authors_rule(network, fields, rule):
    model, dense = network
    rate = {"tokens_per_step": 2} if fields["policy"] in ("margin", "entropy", "pc") else {}
    got = decoded(model, fields | rate)
    want = [
        slow_decoding.decode(
            dense, prompt, rule, gen_length=LENGTH, block_length=BLOCK, seed=n, **rate
        ).tokens
        for n, prompt in enumerate(prompts())
    ]
    assert got == want


def test_the_two_readings_of_late_ends_differ(network):
    """Otherwise the tests above could not tell them apart."""
    model, _ = network
    fields = {"policy": "confidence", "steps": 6}
    theirs = decoded(model, fields | {"confidence_eos_eot_inf": True})
    ours = decoded(model, fields | {"eos_eot_last": True})
    assert theirs != ours and theirs != decoded(model, fields)
