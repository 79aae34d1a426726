"""The benchmarks run and say what they promise; what they compare with computes the same tokens."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from oracle import Dense, random_weights, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from boe_vllm.lab.bench import baseline, common, main, steering
from boe_vllm.lab.bench.agreement import Commits, from_trace, is_tie
from boe_vllm.lab.bench.baseline import PlainLLaDA
from boe_vllm.lab.bench.dense import dense_boe_step
from boe_vllm.lab.bench.flops import NetworkFlops, StepRows
from boe_vllm.lab.bench.parts import FUNCTIONS
from boe_vllm.lab.bench.states import VARIANTS, draw_state, one_step, open_loop, variant_fields
from boe_vllm.lab.bench.steering import block_mean, sampled_counts
from boe_vllm.models.build import random_model
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.request.resolved import ResolvedRequest, plan_canvas

TINY = ["--d-model", "32", "--layers", "1", "--heads", "2", "--vocab", "50", "--requests", "2"]
TINY += ["--repeats", "1", "--threads", "1"]
CPU = argparse.Namespace(device="cpu")


@pytest.fixture(scope="module")
def model():
    config = small_config()
    model = random_model(config)
    model.load_weights(random_weights(config).items())
    return model


@pytest.fixture(scope="module")
def plain():
    return PlainLLaDA(small_config(), random_weights(small_config()), dtype=torch.float32)


def last_line(text):
    result = json.loads(text.strip().splitlines()[-1])
    assert {"benchmark", "details", "environment", "options"} <= set(result)
    assert result["environment"]["matmul_peak_gflops"] > 0
    return result


def bench(*arguments):
    """The command in a process of its own, as people run it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "boe_vllm.lab.bench", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return last_line(done.stdout)


# ---- the commands ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, keys",
    [
        (
            "steering --lengths 256,1024 --variants confidence,mask,kv,dense",
            [
                "steering.mask_over_confidence",
                "steering.kv_over_confidence",
                "steering.dense_over_confidence",
                "steering.mask_over_confidence_1024",
            ],
        ),
        ("attention --lengths 1024", ["attention.backward_speedup_1024_0.25"]),
        (
            "scaling --counts 1,4,8 --lengths 40,64 --active 8,16 --prompt-len 48",
            ["scaling.requests_exponent"],
        ),
    ],
)
def test_a_benchmark_of_single_steps_ends_with_its_keys(capsys, command, keys):
    threads = torch.get_num_threads()
    name, *options = command.split()
    try:
        assert main([name, *TINY, *options]) == 0
    finally:
        torch.set_num_threads(threads)
    result = last_line(capsys.readouterr().out)
    assert result["benchmark"] == name
    for key in keys:
        assert isinstance(result[key], float)


def test_all_variants_of_a_step_run(capsys):
    assert main(["steering", *TINY, "--lengths", "24", "--blocks", "8", "--parts"]) == 0
    out = capsys.readouterr().out
    steps = [row["step"] for row in last_line(out)["details"]]
    assert steps == [*VARIANTS, "dense"]
    assert all(label in out for label, _, _ in FUNCTIONS)
    for _, owner, name in FUNCTIONS:
        assert not hasattr(getattr(owner, name), "__wrapped__"), f"{name} is still watched"


def test_memory_ends_with_its_keys():
    result = bench("memory", *TINY, "--lengths", "1024", "--variants", "confidence,mask")
    assert result["memory.steering_over_plain_1024"] >= 0.9
    for row in result["details"]:
        assert row["step MB"] > 0 and row["process"] > row["step MB"]


def test_throughput_ends_with_its_keys_and_checks_the_tokens():
    lengths = ["--prompt-len", "3,9", "--gen-len", "9,16", "--block-length", "8"]
    equal = ["--equal-len", "8,16", "--equal-requests", "2"]
    result = bench("throughput", *TINY, *lengths, *equal, "--no-overhead")
    for key in ("confidence_over_baseline", "boe_over_baseline_confidence", "dual_over_none"):
        assert result[f"throughput.{key}"] > 0
    tokens = result["details"]["tokens"]
    assert tokens["compared"] == 2 and tokens["equal"] + tokens["ties"] == 2
    first = result["details"]["mixed"][0]
    assert (first["policy"], first["steps"]) == ("baseline", 4)


def test_overhead_ends_with_its_key():
    work = ["--prompt-len", "8", "--gen-len", "8", "--block-length", "8", "--requests", "2"]
    result = bench("overhead", *work, "--repeats", "1", "--threads", "1")
    assert 0 < result["overhead.engine_share"] < 1


def test_an_unknown_benchmark_or_option_names_what_is_known(capsys):
    assert main(["speed"]) == 2
    assert "'steering'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["steering", "--variants", "mask,kw"])
    assert "'kw'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["steering", "--device", "tpu"])
    assert "cpu or cuda" in capsys.readouterr().err
    with pytest.raises(common.UsageError, match="--parts: expected --device cpu beside it"):
        steering.run(argparse.Namespace(parts=True, device="cuda"))


# ---- what is compared with ---------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"weight_tying": True}])
def test_the_baselines_network_equals_the_dense_oracle_in_a_padded_batch(changes):
    config = small_config(**changes)
    weights = random_weights(config, dtype=torch.float64)
    plain = PlainLLaDA(config, weights, dtype=torch.float64)
    rng = np.random.default_rng(0)
    lengths, longest = [5, 11, 8], 11
    tokens = torch.from_numpy(rng.integers(0, 25, (3, longest)))
    attention_mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    logits = plain(tokens, attention_mask.long())
    oracle = Dense(config, weights)
    for row, length in enumerate(lengths):
        want = oracle.logits(oracle.embed(tokens[row, -length:]))
        torch.testing.assert_close(logits[row, -length:], want, atol=1e-9, rtol=0)


def decode_with_the_loop(model, prompts, fields, max_tokens):
    loop = open_loop(CPU, model)
    config = parse_sampler_config(fields)
    for n, prompt in enumerate(prompts):
        plan = plan_canvas(config, prompt_len=len(prompt), max_tokens=max_tokens, max_model_len=128)
        params = ResolvedRequest(config=config, plan=plan, temperature=0.0, seed=n)
        loop.add(str(n), prompt, params)
    tokens, traces = {name: [] for name in loop.canvases}, {}
    while loop.canvases:
        for name, result in loop.step(list(loop.canvases)).items():
            tokens[name] += result.tokens
            if result.done:
                traces[name] = result.report["trace"]
                loop.remove(name)
    return list(tokens.values()), [traces[name] for name in tokens]


@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_the_baseline_commits_what_the_loop_commits_on_the_same_canvas(
    model, plain, tokens_per_step
):
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 25, length).tolist() for length in (3, 9, 14)]
    fields = {"block_length": 8, "tokens_per_step": tokens_per_step, "trace": True}
    tokens, traces = decode_with_the_loop(model, prompts, fields, 24)
    decoded = baseline.decode_all(
        plain, prompts, [24, 17, 20], block_length=8, tokens_per_step=tokens_per_step
    )
    for own, trace, theirs, length in zip(tokens, traces, decoded, [24, 17, 20], strict=True):
        assert theirs.canvas == own
        assert theirs.tokens == own[:length]
        assert theirs.step_of == from_trace(trace).step_of.tolist()


def test_the_baseline_cuts_at_the_first_end_of_text(plain):
    whole = baseline.decode_all(plain, [[1, 2]], [16], block_length=8, tokens_per_step=2)[0]
    end = whole.canvas[5]
    cut = baseline.decode_all(
        plain, [[1, 2]], [16], block_length=8, tokens_per_step=2, eos_token_id=end
    )[0]
    assert cut.tokens == whole.canvas[: whole.canvas.index(end) + 1]
    assert cut.canvas == whole.canvas


def test_the_baseline_samples_from_the_tempered_distribution(plain):
    prompts = [[1, 2]] * 800
    canvases, _ = baseline.generate(
        plain,
        prompts,
        gen_length=1,
        block_length=1,
        steps=1,
        temperature=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    got = np.bincount(canvases[:, 0], minlength=29) / len(prompts)
    logits = plain(torch.tensor([[1, 2, 28]]))[0, 2]
    logits[28] = -torch.inf
    want = (logits.double() / 2.0).softmax(-1).numpy()
    assert np.abs(got - want).max() < 4 * np.sqrt(want.max() / len(prompts))


def test_the_naive_step_equals_the_engines_dense_injection(model, plain):
    config = small_config()
    loop = open_loop(CPU, model)
    fields = variant_fields("inject exact, all", 0.5) | {"trace": True}
    for masked in (1, 2, 5, 12):
        state = draw_state(config, requests=3, length=20, block=12, masked=masked, seed=masked)
        one_step(loop, state, fields)()
        traces = [canvas.report()["trace"] for canvas in loop.canvases.values()]
        tokens, places = torch.from_numpy(state.tokens), torch.from_numpy(state.masked)
        step = dense_boe_step(plain, tokens, places, rho=0.5)
        # Positions in a report count from the end of the prompt, which has all but one of them.
        assert [place - 19 for place in step.positions] == [t["position"][0] for t in traces]
        assert step.tokens == [t["token"][0] for t in traces]
        if masked > 2:
            scores = [t["score"][0] for t in traces]
            assert step.scores == pytest.approx(scores, rel=1e-3, abs=1e-5)


def test_a_difference_is_a_tie_only_where_float64_says_so(model):
    config = small_config()
    exact = PlainLLaDA(config, random_weights(config), dtype=torch.float64)
    fields = {"block_length": 8, "tokens_per_step": 2, "trace": True}
    _, traces = decode_with_the_loop(model, [[1, 2, 3]], fields, 16)
    ours = from_trace(traces[0])

    def changed(**values):
        return Commits(
            tokens=values.get("tokens", ours.tokens), step_of=values.get("step_of", ours.step_of)
        )

    other_token = changed(tokens=(ours.tokens + (np.arange(16) == 3)) % 25)
    assert not is_tie(exact, [1, 2, 3], ours, other_token, 8)
    first, last = np.flatnonzero(ours.step_of == 0)[0], np.flatnonzero(ours.step_of == 3)[0]
    swapped = ours.step_of.copy()
    swapped[[first, last]] = swapped[[last, first]]
    assert not is_tie(exact, [1, 2, 3], ours, changed(step_of=swapped), 8)
    # Where two tokens are the same to the network, either may come out.
    head = exact.weights["ff_out"]
    twin = (int(ours.tokens[first]) + 1) % 25
    head[twin] = head[int(ours.tokens[first])]
    tokens = ours.tokens.copy()
    tokens[first] = twin
    assert is_tie(exact, [1, 2, 3], ours, changed(tokens=tokens), 8)


# ---- the arithmetic ----------------------------------------------------------------------------


def test_flops_are_those_that_torch_counts():
    config = small_config(n_kv_heads=2)
    plain = PlainLLaDA(config, random_weights(config), dtype=torch.float32)
    flops = NetworkFlops(config)
    # The counter does not know the CPU's fused attention, but its products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        plain(torch.zeros((2, 7), dtype=torch.long))
    assert counter.get_total_flops() == flops.full_logits(2, 7)
    step = StepRows(live=7, keys=7, logits=7)
    assert 2 * flops.step(step) == flops.full_logits(2, 7)


@pytest.mark.parametrize("block, rho", [(32, 0.25), (64, 0.25), (32, 1.0), (8, 0.1), (1, 0.5)])
def test_sampled_counts_give_the_mean_of_a_function_with_a_step_at_the_edge(block, rho):
    def time_of(masked):
        return 3 + 0.25 * masked + (2 + 0.5 * masked if np.ceil(rho * masked) > 1 else 0)

    want = np.mean([time_of(m) for m in range(1, block + 1)])
    got = block_mean({m: time_of(m) for m in sampled_counts(block, rho)}, block)
    assert got == pytest.approx(want)


def test_interleaved_runs_every_case_once_a_round_and_times_only_the_work():
    ran = []

    def case(name):
        def prepare():
            ran.append(f"prepare {name}")
            return lambda: ran.append(name)

        return prepare

    times = common.interleaved(
        {"a": case("a"), "b": case("b")},
        argparse.Namespace(repeats=3, device="cpu", clock="wall"),
    )
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    rounds = [set(ran[n : n + 4]) for n in range(0, len(ran), 4)]
    assert rounds == [{"a", "b", "prepare a", "prepare b"}] * 4


def test_the_exponent_of_a_power_is_its_power():
    assert common.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)
    assert np.isnan(common.exponent([1], [3]))
