"""The cost model counts what the loop charges, and its arithmetic is what its docstring says."""

import dataclasses
import json
import math

import pytest
import torch

from boe_vllm.lab.bench import costs, main
from boe_vllm.lab.bench.ceilings import H100, H200, Ceilings, measured_ceilings
from boe_vllm.lab.bench.counted import Lengths, count_random, fill, loop_over, random_prompts
from boe_vllm.lab.bench.launches import CODES, UNFUSED, Footprint
from boe_vllm.lab.bench.passes import Pass, Recorder, layer_passes, layer_rows
from boe_vllm.lab.bench.predict_check import compare
from boe_vllm.lab.bench.scenarios import DECODES, STEPS
from boe_vllm.models.build import random_model
from boe_vllm.models.llada import LLaDAConfig

MACHINE = Ceilings(name="round", copy=1000.0, flops=2000.0, launch=0.5, blocking_copy=3.0)
NETWORK = costs.Network(layers=2, width=10, kv_width=10, inner=20, vocabulary=50)
LLADA_8B = costs.Network.of(LLaDAConfig(mlp_hidden_size=12288))
LENGTHS = Lengths(prompt=12, canvas=16, block=8, tokens_per_step=2)


def with_no_floor(monkeypatch, **others):
    for name, value in {"GAP": 0.0, "KERNEL": 0.0, "ROW_SHARE": 1.0, **others}.items():
        monkeypatch.setattr(costs, name, value)


# ---- the time of passes ------------------------------------------------------------------------


def test_a_product_takes_the_long_side_of_its_reading_and_its_computing(monkeypatch):
    with_no_floor(monkeypatch)
    # 2 bytes x 1500 weights at 1000 a second: 3; 2 x 8/3 rows x 1500 at 2000: 4.
    machine = dataclasses.replace(MACHINE, flops=2000.0)
    found = costs.product(8, 50, 30, dataclasses.replace(machine, flops=6000.0))
    assert found["weights"] == pytest.approx(9 / 5)
    assert found["arithmetic"] == pytest.approx(16 / 5)


def test_few_rows_cost_the_reading_alone_and_many_the_computing():
    for few in (1, 16, 64):
        terms = costs.product(few, 4096, 12288, H200)
        assert terms["weights"] > 5 * terms["arithmetic"]
    terms = costs.product(8800, 4096, 12288, H200)
    assert terms["arithmetic"] > 50 * (terms["weights"] - costs.GAP)


def test_products_take_what_an_h200_was_measured_to_take():
    measured = {
        (4096, 12288): {1: 29.9, 128: 30.2, 352: 53.6, 1024: 137.1, 2816: 358.9, 8800: 1103.2},
        (4096, 126464): {1: 246.4, 64: 262.1, 352: 526.3, 2816: 4325.4, 8800: 13247.6},
    }
    for (depth, width), times in measured.items():
        for rows, microseconds in times.items():
            found = sum(costs.product(rows, depth, width, H200).values()) * 1e6
            assert found == pytest.approx(microseconds, rel=0.17)


def test_a_round_takes_its_slower_side_and_rounds_follow_each_other(monkeypatch):
    with_no_floor(monkeypatch, HOST_SHARE=2.0)
    none = Footprint()
    one = Pass(kind="logits", rows=10)
    device = math.hypot(2 * 10 * 50 / 1000, 2 * 10 * 10 * 50 / 2000)
    code = {"logits": dataclasses.replace(none, once=3)}
    # Host: 3 launches of 2 x 0.5 s and one copy of 3 s, more than the device's 5.1 s.
    found = costs.predict([[one], []], NETWORK, MACHINE, code)
    assert found.busy == pytest.approx(device)
    assert found.seconds == pytest.approx(3 * 1 + 3)
    assert found.terms["launches"] == pytest.approx(3)
    assert found.terms["copies"] == pytest.approx(3)
    assert found.terms["arithmetic"] == 0
    quick = dataclasses.replace(MACHINE, launch=0.01, blocking_copy=0.0)
    two = costs.predict([[one], [one]], NETWORK, quick, code)
    assert two.seconds == pytest.approx(2 * device)
    assert two.binds == "arithmetic"


def test_a_pass_reads_the_weights_of_all_layers_and_moves_its_rows(monkeypatch):
    with_no_floor(monkeypatch)
    code = Footprint(row_D=7, row_F=3)
    one = Pass(kind="forward", rows=4, keys=6, pairs=0)
    terms = costs.device_terms(one, NETWORK, MACHINE, code)
    moved = 2 * 4 * (7 * 10 + 3 * 20)  # layers, rows, bytes a row
    keys = 2 * 2 * 6 * 10 * 2  # keys and values, layers, rows, width, bytes
    assert terms["rows"] == pytest.approx((moved + keys) / 1000)
    weights = 10 * 20 + 10 * 10 + 10 * 10 + 10 * 40 + 20 * 10
    slow = dataclasses.replace(MACHINE, flops=1e12)
    terms = costs.device_terms(one, NETWORK, slow, code)
    assert terms["weights"] == pytest.approx(2 * 2 * weights / 1000, rel=1e-3)


def test_products_of_few_rows_are_filled_up(monkeypatch):
    with_no_floor(monkeypatch)
    few = Pass(kind="partial", rows=3)
    filled = costs.device_terms(few, NETWORK, MACHINE, Footprint(filled=(8, 16)))
    # Each at its number of rows, as if that many had come.
    wanted = sum(
        2 * sum(costs.product(16 if depth > 10 else 8, depth, width, MACHINE).values())
        for depth, width in NETWORK.layer_products
    )
    assert filled["weights"] + filled["arithmetic"] == pytest.approx(wanted)


def test_launches_are_those_of_the_layers_and_those_besides():
    code = {"forward": Footprint(layer=5, once=7), "logits": Footprint(once=2)}
    passes = [Pass(kind="forward", rows=3), Pass(kind="logits", rows=1)]
    assert costs.round_launches(passes, NETWORK, code) == 5 * 2 + 7 + 2


def test_the_measured_ceilings_are_positive():
    found = measured_ceilings(torch.device("cpu"), small=True)
    assert min(found.copy, found.flops, found.launch, found.blocking_copy) > 0


# ---- the passes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return random_model(
        LLaDAConfig(
            d_model=16,
            n_layers=2,
            n_heads=2,
            mlp_hidden_size=32,
            vocab_size=40,
            mask_token_id=39,
            eos_token_id=38,
            pad_token_id=38,
        )
    )


def recorded(model, fields, requests, steps=3):
    loop = loop_over(model, cache_rows=400)
    settings = {"block_length": 8, "tokens_per_step": 2, **fields}
    fill(loop, settings, random_prompts(40, requests, 12), canvas=16)
    with Recorder(loop).recording() as found, torch.inference_mode():
        for _ in range(steps):
            results = loop.step(list(loop.canvases))
            assert not [result.error for result in results.values() if result.error]
    return loop, found


@pytest.mark.parametrize("name", [*DECODES, "joint, prefix"])
def test_the_rows_that_are_counted_are_those_that_requests_are_charged(model, name):
    fields = DECODES.get(name) or {**STEPS["joint"], "cache": "prefix"}
    fields = {k: v for k, v in fields.items() if k != "tokens_per_step"}
    for requests in (1, 3):
        loop, steps = recorded(model, fields, requests)
        accounts = [canvas.account for canvas in loop.canvases.values()]
        charged = sum(a.rows_forward + a.rows_backward for a in accounts)
        assert sum(map(layer_rows, steps)) == charged
        if requests == 1:
            assert sum(map(layer_passes, steps)) <= accounts[0].forwards + accounts[0].backwards


def test_a_recorder_leaves_loop_and_model_as_they_were(model):
    before = dict(vars(model)), dict(vars(model.layers[0]))
    loop, _ = recorded(model, STEPS["boe"], 1)
    assert (dict(vars(model)), dict(vars(model.layers[0]))) == before
    assert type(loop.clock).__name__ == "Clock"


def test_the_passes_of_a_joint_step_and_of_a_steered_one(model):
    _, steps = recorded(model, STEPS["joint"], 2, steps=1)
    kinds = [[one.kind for one in passes] for passes in steps[0] if passes]
    assert kinds == [["saving", "logits"], ["partial", "logits"]]
    assert [one.rows for one in steps[0][0]] == [2 * 28, 2 * 8]
    assert steps[0][0][0].pairs == 2 * 28 * 28 and steps[0][0][0].keys == 2 * 28
    assert steps[0][1][0].rows == 2 * 4  # of four candidates two are written, all run again
    fields = {**STEPS["boe kv"], "rho": 0.5}
    _, ((first, second, *rest),) = recorded(model, fields, 1, steps=1)
    assert [one.kind for one in first] == ["saving", "logits"]
    assert [(one.kind, one.rows) for one in second] == [
        ("soft writes", 4),
        ("partial", 4),
        ("gradient", 8),
        ("observed", 8),
    ]
    assert not any(rest)


def test_the_steps_of_a_block_have_the_rows_of_their_cache():
    plain = count_random(STEPS["confidence"], 3, LENGTHS)
    cached = count_random({**STEPS["confidence"], "cache": "dual"}, 3, LENGTHS)
    assert [layer_rows(step) for step in plain] == [3 * 28] * LENGTHS.steps
    assert [layer_rows(step) for step in cached] == [3 * 28] + [3 * 8] * (LENGTHS.steps - 1)


# ---- the command --------------------------------------------------------------------------------


def last_line(text):
    return json.loads(text.strip().splitlines()[-1])


def test_predict_prints_passes_beside_rows_and_says_whether_the_defaults_are_dear(capsys):
    lengths = "--prompt-len 20 --gen-len 16 --block-length 8 --tokens-per-step 2"
    assert main(["predict", "--device", "h100", "--requests", "1,3", *lengths.split()]) == 0
    out = capsys.readouterr().out
    for column in ("passes", "rows", "launches", "binds"):
        assert column in out
    assert "joint at one request and 2 tokens a step: predicted at" in out
    result = last_line(out)
    assert result["predict.joint_over_confidence"] > 1
    rows = {(r["policy"], r["cache"], r["requests"]): r for r in result["details"]}
    assert rows["confidence", "none", 1]["passes"] == 1
    assert rows["confidence", "none", 3]["rows"] == 3 * 36
    assert rows["confidence", "dual", 3]["rows"] < 3 * 36
    assert result["environment"]["ceilings"] == H100.name


def test_predict_counts_the_puzzles_of_the_bundled_checkpoint(capsys):
    policies = "confidence,joint,joint adaptive"
    arguments = ["--states", "puzzles", "--policies", policies, "--caches", "none"]
    assert main(["predict", "--requests", "8", *arguments]) == 0
    sure = {r["policy"]: r for r in last_line(capsys.readouterr().out)["details"]}
    # Where the network is sure, tokens join without a round of their own.
    assert 1 < sure["joint"]["rounds"] < 4
    plain = sure["confidence"]
    assert plain["steps an answer"] == pytest.approx((36 / 4 + 36 / 4 + 32 / 4) / 3)
    assert plain["ms an answer"] == pytest.approx(plain["ms"] * plain["steps an answer"] / 8)
    assert sure["joint adaptive"]["steps an answer"] != plain["steps an answer"]


def test_measured_steps_are_predicted_to_a_tenth(tmp_path):
    lines = [
        {"check": "facts", "device": "NVIDIA H200"},
        step_line("confidence", 1, 21.63, 1347, 3, 13.5),
        step_line("joint", 1, 122.84, 7638, 25, 37.11),
        step_line("confidence", 8, 86.65, 1507, 2, 80.72),
        step_line("joint", 8, 402.15, 21406, 88, 135.51),
    ]
    file = tmp_path / "gpu.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    rows = compare(file, LLADA_8B, H200)
    assert [row["rows"] for row in rows] == [352, 376, 2816, 3008]
    for row in rows:
        assert row["of it"] == pytest.approx(1, abs=0.1)
        assert row["of busy"] == pytest.approx(1, abs=0.15)


def test_a_file_without_measured_steps_is_refused(capsys, tmp_path):
    file = tmp_path / "gpu.jsonl"
    file.write_text('{"check": "facts"}\n')
    with pytest.raises(SystemExit):
        main(["predict", "--check", str(file)])
    assert "output of scripts/gpu_check.py" in capsys.readouterr().err


def step_line(scenario, requests, ms, kernels, syncs, busy):
    return {
        "check": "steps",
        "scenario": scenario,
        "requests": requests,
        "prompt": 224,
        "canvas": 128,
        "block": 32,
        "tokens_per_step": 4,
        "code": "unfused",
        "first_step": 2,
        "steps": 4,
        "ms_step": ms,
        "syncs": syncs,
        "kernels": kernels,
        "busy_ms": busy,
    }


def test_every_state_of_the_code_knows_every_kind_of_pass():
    assert all(set(code) == set(UNFUSED) for code in CODES.values())
