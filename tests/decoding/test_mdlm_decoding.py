"""MDLM's tokens are those of plain loops over the transcription of its network: greedy ones, and
its own ancestral sampler, step by step."""

import numpy as np
import pytest
import torch
from families import network, plain_loop
from mdlm_oracle import EOS, MASK, VOCAB, make_mdlm
from test_family_decoding import PROMPT, SHAPES, decoded
from test_loop import VARIANTS, finish, make_loop, params_of

from boe_vllm.sampling import randomness


@pytest.fixture(scope="module")
def mdlm():
    return make_mdlm(dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_a_plain_loop(mdlm, shape):
    fields = SHAPES[shape]
    want = plain_loop(
        mdlm,
        PROMPT + [MASK] * 12,
        start=len(PROMPT),
        block=fields["block_length"],
        quota=fields["tokens_per_step"],
    )
    assert decoded(mdlm, PROMPT, fields) == want


def sampled(mdlm, length, steps, seed, eps=1e-5):
    """MDLM's `_sample` with `_ddpm_caching_update` after one end of text, with our random numbers:
    a mask is revealed if its number is below (t - s)/t, and the token is the sample that another
    number chooses from the prediction. The prediction is kept while nothing changes."""
    x = np.array([EOS] + [MASK] * length)
    timesteps, dt = np.linspace(1, eps, steps + 1), (1 - eps) / steps
    forwards, p_x0, waited = 0, None, 1.0
    for t in timesteps[:-1]:
        if not (x == MASK).any():
            break
        if p_x0 is None:
            p_x0, waited = mdlm.log_probs(mdlm.logits(mdlm.embed(x))).exp().numpy(), t
            forwards += 1
        masked = np.flatnonzero(x == MASK)
        numbers = [
            randomness.uniforms(seed, step=forwards - 1, positions=masked, stream=stream)
            for stream in (randomness.CHOOSE, randomness.WRITE)
        ]
        # One number for the whole wait: revealed by s with probability (t - s)/t of its start.
        revealed = masked[numbers[0] < (waited - (t - dt)) / waited]
        for position, u in zip(masked, numbers[1], strict=True):
            if position in revealed:
                total = p_x0[position].cumsum()
                x[position] = np.searchsorted(total, u * total[-1], side="right")
        if len(revealed):
            p_x0 = None
    return x.tolist(), forwards


def test_ancestral_sampling_is_mdlms_own_loop(mdlm):
    for seed in range(6):
        loop = make_loop(network(mdlm))
        fields = {"policy": "ancestral", "block_length": 20, "steps": 40}
        given = params_of(fields, prompt_len=1, max_tokens=20, temperature=1.0, seed=seed)
        loop.add("x", [EOS], given)
        canvas = loop.canvases["x"]
        _, reports = finish(loop)
        tokens, forwards = sampled(mdlm, 20, 40, seed)
        assert canvas.tokens.tolist() == tokens and MASK not in tokens
        assert reports["x"]["forwards"] == forwards < 20
        assert all(0 <= token < VOCAB for token in tokens)


def test_every_policy_gives_alone_what_it_gives_among_all_others():
    model = network(make_mdlm(n_blocks=2))
    more = {"tokens_per_step": 2, "block_length": 5, "trace": True}
    requests = [
        params_of(fields | more, prompt_len=1, max_tokens=10, temperature=float(n % 2), seed=n)
        for n, fields in enumerate(VARIANTS)
    ]
    crowd = make_loop(model)
    for n, params in enumerate(requests):
        crowd.add(str(n), [EOS], params)
    tokens, reports = finish(crowd)
    for n, params in enumerate(requests):
        alone = make_loop(model)
        alone.add("x", [EOS], params)
        own, report = finish(alone)
        assert (own["x"], report["x"]) == (tokens[str(n)], reports[str(n)]), VARIANTS[n]
        assert MASK not in own["x"] and len(own["x"]) == 10
