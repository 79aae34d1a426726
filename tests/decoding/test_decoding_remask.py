"""On the bundled model, in float64: the remasking and look-ahead policies commit what their slow
transcriptions commit."""

import pytest
import slow_decoding
import slow_remasking as slow
import torch
from oracle import Dense
from test_composition import remasked
from test_lookahead import soft_state
from test_loop import finish, params_of
from toy import steps_by

from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.lab.tasks import TASKS
from boe_vllm.models.build import random_model
from boe_vllm.models.special import SpecialTokens

CASES = [
    ({"policy": "remdm", "sigma_schedule": "cap", "eta": 0.3}, slow.remdm, {"eta": 0.3}),
    ({"policy": "remdm", "sigma_schedule": "conf"}, slow.remdm, {"schedule": "conf", "eta": None}),
    ({"policy": "remdm-llada", "remask_number": 2}, slow.remdm_llada, {"number": 2}),
    ({"policy": "p2", "eta": 2.0}, slow.p2, {"eta": 2.0}),
    ({"policy": "info-gain", "bypass": 0.0}, slow.info_gain, {"bypass": 0.0}),
    ({"policy": "lookum"}, slow.lookum, {}),
    ({"policy": "lookahead"}, slow.lookahead, {}),
    ({"policy": "lookahead", "write": "proposal", "rho": 0.5}, slow.lookahead, {"rho": 0.5}),
    (
        {
            "policy": "pairwise", "interaction": 0.0, "coupling": "attention",
            "remask": "remdm", "sigma_schedule": "rescale", "eta": 0.9,
        },
        remasked,
        {"schedule": "rescale", "eta": 0.9},
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    config, weights = slow_decoding.bundled()
    model = random_model(config, dtype=torch.float64)
    model.load_weights(weights.items())
    return model, Dense(config, weights)


@pytest.mark.parametrize(
    "fields, rule, settings",
    CASES,
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_the_bundled_model_commits_as_the_transcription_does(tiny, fields, rule, settings):
    model, dense = tiny
    config = model.config
    loop = DenoisingLoop(
        model,
        special=SpecialTokens(mask=config.mask_token_id, eos=config.eos_token_id),
        device=torch.device("cpu"),
    )
    task = TASKS["sudoku4"]
    prompt = list(task.items(3)[2].prompt.encode())
    shape = {"gen_length": task.gen_length, "block_length": task.block_length}
    frame = shape | {"tokens_per_step": 2}
    params = params_of(fields | frame, prompt_len=len(prompt), max_tokens=task.gen_length, seed=3)
    loop.add("x", prompt, params)
    tokens, reports = finish(loop)

    def logits(tokens):
        return dense.logits(dense.embed(torch.tensor(tokens))).tolist()

    counted = slow.Model(logits, config.mask_token_id)
    decoding = slow.Decoding(counted, prompt, task.gen_length, task.block_length, seed=3)
    soft = {"state": soft_state(dense)} if fields == {"policy": "lookahead"} else {}
    want = rule(decoding, steps_of=steps_by(2), **settings, **soft)
    assert tokens["x"] == want.x[len(prompt) :]
    if fields["policy"] in ("info-gain", "lookum") or "write" in fields:
        assert reports["x"]["forwards"] == counted.forwards
