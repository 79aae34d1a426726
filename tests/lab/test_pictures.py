"""Pictures: the recorder changes nothing, influence is the gradient, figures show the numbers."""

import copy
import csv
import dataclasses
import io
import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
import torch
from oracle import Dense, random_weights, small_config
from rich.console import Console
from test_importance import oracle

from boe_vllm import cli
from boe_vllm.decoding.accounting import Account
from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.denoiser import Denoiser
from boe_vllm.lab.eval import tables
from boe_vllm.lab.pictures import bars, curves, figure, packages, plot, results, timeline, watch
from boe_vllm.lab.pictures.influence import influence
from boe_vllm.lab.pictures.recorder import Recorder, Request, recording
from boe_vllm.lab.pictures.terminal import Scene, plain
from boe_vllm.lab.pictures.trajectory import FORMAT, read
from boe_vllm.lab.tasks import TASKS
from boe_vllm.models.build import random_model
from boe_vllm.models.rows import SequenceRows
from boe_vllm.models.special import SpecialTokens
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.request.resolved import ResolvedRequest, plan_canvas
from boe_vllm.steering.importance import TokenImportance

F64 = torch.float64
LABELS = ("confidence", "boe", "boe:preset=paper", "p2:eta=3", "info-gain")


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser.from_pretrained("tiny")


def recorder(denoiser, label, *, task="sudoku4", number=1, rate=2, surrogate=None, **fields):
    task = TASKS[task]
    item = task.items(number + 1)[number]
    request = Request(
        prompt=item.prompt,
        gen_length=task.gen_length,
        seed=0,
        task=task,
        item=item,
        number=number,
    )
    (variant,) = watch.variants_of(label)
    frame = {"block_length": task.block_length, "tokens_per_step": rate}
    return Recorder(
        denoiser,
        request,
        label=label,
        fields=frame | variant.fields | fields,
        surrogate=surrogate,
    )


def finished(made):
    while not made.done:
        made.step()
    return made


@pytest.fixture(scope="module")
def recorded(denoiser):
    made = [finished(recorder(denoiser, label, surrogate="response")) for label in LABELS]
    return recording(made[0].request, made)


# ---- the recorder ------------------------------------------------------------------------------


CASES = [
    *((label, {}) for label in LABELS),
    ("confidence", {"cache": "dual", "block_length": 8}),
    ("boe:preset=paper", {"cache": "prefix", "block_length": 8}),
    ("boe:preset=paper", {"cfg_scale": 0.5}),
]


@pytest.mark.parametrize(("label", "fields"), CASES)
def test_a_recorded_decode_is_the_loops_own(denoiser, label, fields):
    made = recorder(denoiser, label, surrogate="mask", **fields)
    request, config = made.request, made.canvas.config
    prompt = denoiser.encode(request.prompt)
    plan = plan_canvas(config, prompt_len=len(prompt), max_tokens=16, max_model_len=200)
    loop = denoiser.open_loop(200)
    params = ResolvedRequest(config=config, plan=plan, temperature=0.0, seed=request.draws)
    loop.add("x", prompt, params)
    own = loop.canvases["x"]
    while not made.done:
        before = own.tokens[own.prompt_len :].tolist()
        loop.step(["x"])
        step = made.step()
        after = own.tokens[own.prompt_len :].tolist()
        assert step.tokens == before and made.tokens == after
        assert (step.forwards, step.backwards) == (own.account.forwards, own.account.backwards)
        mask = loop.special.mask
        gone = [p for p, (a, b) in enumerate(zip(before, after, strict=True)) if a == mask != b]
        back = [p for p, (a, b) in enumerate(zip(before, after, strict=True)) if a != mask == b]
        assert sorted(step.committed) == gone and step.remasked == back
    assert own.done


def test_a_step_holds_what_the_policy_saw(recorded):
    by_label = {t.label: t for t in recorded.trajectories}
    for trajectory in recorded.trajectories:
        for step in trajectory.steps:
            masked = [p for p, t in enumerate(step.tokens) if t == recorded.mask_token]
            assert step.positions == masked
            for row, probabilities in enumerate(step.top_probabilities):
                assert probabilities == sorted(probabilities, reverse=True)
                assert step.confidence[row] == pytest.approx(probabilities[0], rel=1e-3)
            assert np.shape(step.influence) == (len(masked), len(masked))
            assert recorded.mask_token not in np.array(step.top_tokens)
        assert trajectory.steps[0].remaining == pytest.approx(sum(trajectory.steps[0].entropy))
    # Confidence writes its largest scores, best first.
    for step in by_label["confidence"].steps:
        scores = dict(zip(step.positions, step.scores, strict=True))
        best = sorted(step.scores, reverse=True)[:2]
        assert [scores[p] for p in step.committed] == pytest.approx(best, abs=1e-6)
    # BoE ranks candidates only.
    assert None in by_label["boe:preset=paper"].steps[0].scores
    assert by_label["boe:preset=paper"].steps[-1].backwards > 0
    assert any(step.remasked for step in by_label["p2:eta=3"].steps)


def test_the_answer_is_judged_as_eval_does(recorded):
    item = TASKS["sudoku4"].items(2)[1]
    for trajectory in recorded.trajectories:
        assert trajectory.valid == TASKS["sudoku4"].score(item, trajectory.text).valid
        assert len(trajectory.text) == 16


def test_a_request_ends_at_eos_and_at_a_stop_string_as_the_engine_ends_it(denoiser):
    made = finished(recorder(denoiser, "confidence", task="addition", rate=1))
    text = made.trajectory().text
    assert made.loop.special.eos in made.tokens and "<|" not in text
    stopped = recorder(denoiser, "confidence", task="addition", rate=1)
    task = stopped.request.task
    twin = type("Stopping", (type(task),), {"stop": (text[1],)})()
    stopped.request = dataclasses.replace(stopped.request, task=twin)
    assert finished(stopped).trajectory().text == text.split(text[1])[0]


# ---- influence ---------------------------------------------------------------------------------


def small_loop(masked):
    config = small_config()
    weights = random_weights(config, dtype=F64)
    model = random_model(config, dtype=F64)
    model.load_weights(weights.items())
    loop = DenoisingLoop(
        model,
        special=SpecialTokens(mask=28, eos=27),
        device=torch.device("cpu"),
    )
    config_ = parse_sampler_config({"policy": "confidence", "block_length": masked})
    plan = plan_canvas(config_, prompt_len=6, max_tokens=masked, max_model_len=64)
    params = ResolvedRequest(config=config_, plan=plan, temperature=0.0, seed=0)
    loop.add("x", [3, 1, 4, 1, 5, 9], params)
    loop.step(["x"])
    return loop, Dense(config, weights)


@pytest.mark.parametrize("surrogate", ["mask", "kv", "response"])
def test_influence_is_the_oracles_gradient_of_one_entropy_at_a_time(surrogate):
    loop, dense = small_loop(6)
    canvas = loop.canvases["x"]
    changes = influence(loop, canvas, surrogate)
    positions = canvas.writable()
    assert changes.shape == (5, 5) and not changes.diagonal().any()
    rows = SequenceRows(tokens=canvas.tokens, logit_positions=positions, keep="all")
    for j in range(5):
        query = TokenImportance(
            candidates=np.delete(np.arange(5), j),
            objective=np.array([j]),
            active=None,
            surrogate=surrogate,
            context="frozen",
            sharpen=1.0,
        )
        expected = -oracle(dense, rows, query).detach().numpy()
        np.testing.assert_allclose(np.delete(changes[:, j], j), expected, rtol=1e-9, atol=1e-12)


def test_influence_at_the_mask_is_a_finite_difference():
    loop, dense = small_loop(6)
    canvas = loop.canvases["x"]
    changes = influence(loop, canvas, "mask")
    positions = canvas.writable()
    x = dense.embed(torch.from_numpy(canvas.tokens))
    p = dense.log_probs(dense.logits(x)).exp()[positions]
    way = p @ dense.w("wte")[:29] - dense.w("wte")[28]
    h = 1e-5
    for i, position in enumerate(positions):
        ends = []
        for sign in (h, -h):
            moved = x.clone()
            moved[position] += sign * way[i]
            ends.append(dense.entropies(dense.logits(moved))[positions])
        slope = ((ends[0] - ends[1]) / (2 * h)).numpy()
        np.testing.assert_allclose(np.delete(changes[i], i), np.delete(slope, i), atol=1e-7)


def ranks(values):
    return np.argsort(np.argsort(values, kind="stable"))


def prediction(made, writes):
    """Of the canvas with some tokens written, which it does not notice."""
    state = copy.copy(made.canvas)
    state.tokens, state.masked = state.tokens.copy(), state.masked.copy()
    state.account = Account()
    for position, token in writes.items():
        state.tokens[position], state.masked[position] = token, False
    return made.loop.predict([state])[2]


def test_influence_at_the_attention_outputs_is_nearest_to_what_writing_does(denoiser):
    made = recorder(denoiser, "confidence", task="sudoku6", number=3, rate=4)
    found = {"mask": [], "kv": [], "response": []}
    for _ in range(3):
        made.step(), made.step()  # 28, 20, 12 masks
        positions = made.canvas.writable()
        count, now = len(positions), prediction(made, {})
        others = [np.delete(np.arange(count), i) for i in range(count)]
        true = [
            prediction(made, {positions[i]: now.proposal[i]}).entropy - now.entropy[others[i]]
            for i in range(count)
        ]
        for surrogate, values in found.items():
            changes = influence(made.loop, made.canvas, surrogate)
            estimate = np.concatenate([changes[i][others[i]] for i in range(count)])
            both = ranks(estimate), ranks(np.concatenate(true))
            values.append(np.corrcoef(*both)[0, 1])
    mask, kv, response = (np.mean(values) for values in found.values())
    assert mask < kv < response and response > 0.3


# ---- JSON --------------------------------------------------------------------------------------


def test_a_recording_survives_json(recorded, tmp_path):
    path = tmp_path / "new" / "recording.json"
    recorded.write(path)
    assert read(path) == recorded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a file"),
        ("{", "expected JSON"),
        ('{"format": 99}', f"expected format {FORMAT}"),
        (f'{{"format": {FORMAT}}}', "expected the fields of a recording"),
    ],
)
def test_what_is_no_recording_is_refused(text, message, tmp_path, capsys):
    path = tmp_path / "recording.json"
    if text is not None:
        path.write_text(text)
    assert watch.main(["--replay", str(path)]) == 2
    assert message in capsys.readouterr().err


# ---- the trajectory's figure, and the terminal -------------------------------------------------


def test_the_timeline_marks_every_commit_once_in_order(recorded):
    made = timeline.draw(recorded)
    canvases = [axis for axis in made.axes if axis.images]
    assert len(canvases) == len(LABELS)
    for axis, trajectory in zip(canvases, recorded.trajectories, strict=True):
        commits = [text for text in axis.texts if text.get_gid() == "commit"]
        wanted = [(n, p) for n, step in enumerate(trajectory.steps) for p in step.committed]
        assert [tuple(map(int, text.get_position())) for text in commits] == wanted
        assert [text.get_text() for text in commits] == [str(n + 1) for n in range(len(wanted))]
        crosses = sum(text.get_gid() == "remask" for text in axis.texts)
        assert crosses == sum(len(step.remasked) for step in trajectory.steps)
        assert axis.images[0].get_array().shape[:2] == (16, len(trajectory.steps))
    lines = [axis.lines[0] for axis in made.axes if axis.lines]
    for line, trajectory in zip(lines, recorded.trajectories, strict=True):
        assert line.get_ydata() == pytest.approx([step.remaining for step in trajectory.steps])


def test_a_figure_is_the_same_file_whenever_it_is_drawn(recorded, tmp_path):
    one = dataclasses.replace(recorded, trajectories=recorded.trajectories[-1:])
    for name in ("a", "b"):
        figure.save(timeline.draw(one), tmp_path, name)
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_the_terminal_shows_every_policy_with_its_numbers(recorded):
    scene = Scene(recording=recorded, highest=recorded.highest_entropy)
    for frame in (0, 1, 5, 20):
        console = Console(record=True, width=160, file=io.StringIO(), force_terminal=True)
        console.print(scene.render(frame))
        text = console.export_text()
        for trajectory in recorded.trajectories:
            assert trajectory.label in text
            at = min(frame, len(trajectory.steps))
            holes = trajectory.state(at).count(recorded.mask_token)
            assert scene.canvas(trajectory, at).plain.count("·") == holes
        assert f"step {min(frame, 8)}" in text
    assert text.count("answer valid") + text.count("answer not valid") == len(LABELS)
    shades = {str(span.style) for span in scene.canvas(recorded.trajectories[0], 0).spans}
    assert len(shades) > 2 and all(" on #" in shade for shade in shades)


def test_watch_fills_a_real_terminal(recorded, tmp_path):
    path = tmp_path / "recording.json"
    recorded.write(path)
    code = "import sys; from boe_vllm.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "watch", "--replay", str(path), "--delay", "0"]
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "150", "LINES": "50"}
    process = subprocess.Popen(argv, stdout=child, stderr=child, stdin=child, env=environment)
    os.close(child)
    seen = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    os.close(parent)
    assert process.wait() == 0
    text = seen.decode()
    assert "\x1b[" in text and "step 1" in text and "answer valid" in text


def test_watch_prints_the_end_plainly_and_keeps_what_was_asked_for(tmp_path, capsys):
    files = [str(tmp_path / f"a.{kind}") for kind in ("json", "html", "png")]
    options = [x for file in files for x in (f"--{file.rsplit('.', 1)[1]}", file)]
    argv = ["watch", "--task", "sudoku4", "--item", "1", "--tokens-per-step", "4"]
    assert cli.main([*argv, "--policies", "confidence,boe:rho=0.5", *options]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "boe:rho=0.5" in printed
    assert printed.startswith(plain(read(tmp_path / "a.json")))
    assert printed.split()[-3:] == files
    kept = read(tmp_path / "a.json")
    assert all(step.influence is not None for t in kept.trajectories for step in t.steps)


def test_watch_takes_a_prompt_of_ones_own(capsys):
    argv = ["--prompt", "A:12+34=", "--gen-length", "8", "--policies", "entropy"]
    assert watch.main(argv) == 0
    printed = capsys.readouterr().out
    assert "a prompt" in printed and "answer not judged" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--task: expected one of"),
        (["--task", "a", "--prompt", "b"], "got --task and --prompt"),
        (["--task", "sudoku9"], "task: expected one of sudoku4"),
        (["--prompt", "x"], "--gen-length: expected a number with --prompt"),
        (["--task", "sudoku4", "--item", "-1"], "--item: expected at least 0"),
        (["--task", "sudoku4", "--tokens-per-step", "0"], "--tokens-per-step: expected at least 1"),
        (["--task", "sudoku4", "--delay", "nan"], "--delay: expected at least 0"),
        (["--task", "sudoku4", "--policies", "boe,boe"], "--policies: expected different names"),
        (["--task", "sudoku4", "--policies", "bow"], "policy: expected one of"),
        (["--task", "sudoku4", "--policies", "boe:rho"], "expected FIELD=VALUE"),
        (
            ["--task", "sudoku4", "--model", "/nowhere"],
            "checkpoint: expected a folder with a config.json",
        ),
        (["--task", "sudoku4", "--png", "a.gif"], "--png: expected a name that ends in .png"),
        (["--task", "sudoku4", "--html", "."], "--html: expected a file"),
        (["--task", "gsm8k"], "expected a folder with gsm8k.jsonl"),
        (["--prompt", "<|mdm_mask|>", "--gen-length", "8"], "without the mask token"),
        (["--prompt", "x", "--gen-length", "1000"], "expected a canvas of at most"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_watch_names_what_does_not_fit(argv, message, capsys):
    assert watch.main(argv) == 2
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    for main, argv in ((watch.main, ["--task", "sudoku4"]), (plot.main, [str(tmp_path)])):
        assert main(argv) == 2
        assert "got no matplotlib" in (text := capsys.readouterr().err)
        assert "pip install 'boe-vllm[eval]'" in text


def test_commands_answer_help_without_the_extras():
    code = (
        "import sys; sys.modules.update(matplotlib=None, rich=None)\n"
        "from boe_vllm.cli import main; sys.exit(main([sys.argv[1], '--help']))"
    )
    for name in ("plot", "watch"):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
        assert done.returncode == 0 and f"boe-vllm {name}" in done.stdout, done.stderr


# ---- figures of a run --------------------------------------------------------------------------

POLICIES = ("confidence", "BoE (full)", "w/o confidence gating")


def row(task, policy, rate, right, n=20, seconds=3.0):
    low, high = tables.wilson(right, n)
    numbers = dict(gen_length=16, tokens_per_step=rate, n=n, score=right / n, low=low, high=high)
    cost = dict(steps=16 / rate, forwards=16 / rate, backwards=1.0, rows=900.0 / rate)
    rest = dict(tokens=320, seconds=seconds, tokens_per_second=320 / seconds)
    extra = dict(exact=None, cell_accuracy=None, policy_name="boe", settings="{}")
    return dict(task=task, policy=policy, **numbers, **cost, **rest, **extra)


def run_folder(folder, rows, **identity):
    folder.mkdir(exist_ok=True)
    labels = [{"label": name, "fields": {}} for name in POLICIES]
    identity = {"tasks": ["sudoku4", "countdown"], "variants": labels} | identity
    (folder / "run.json").write_text(json.dumps(identity))
    if rows:
        (folder / "cells.csv").write_text(tables.to_csv(rows))
    return folder


@pytest.fixture
def sweep(tmp_path):
    rows = [
        row(task, policy, rate, 20 - rate - place)
        for task in ("sudoku4", "countdown")
        for rate in (1, 2, 4)
        for place, policy in enumerate(POLICIES)
    ]
    return run_folder(tmp_path / "sweep", rows)


def test_curves_have_a_line_per_policy_and_a_point_with_its_interval_per_rate(sweep):
    found = results.read(sweep)
    assert found.swept and found.finished
    for cost in curves.COSTS:
        made = curves.draw(found.panels, cost)
        assert [axis.get_title() for axis in made.axes] == ["sudoku4", "countdown"]
        for axis, rows in zip(made.axes, found.panels.values(), strict=True):
            assert len(axis.containers) == len(POLICIES)
            for drawn, policy in zip(axis.containers, POLICIES, strict=True):
                own = sorted(
                    (r for r in rows if r["policy"] == policy), key=lambda r: r["tokens_per_step"]
                )
                line, _, (bars_,) = drawn
                assert line.get_xdata() == pytest.approx([r[cost] for r in own])
                assert line.get_ydata() == pytest.approx([100 * r["score"] for r in own])
                ends = [segment[:, 1] for segment in bars_.get_segments()]
                for (low, high), r in zip(ends, own, strict=True):
                    assert (low, high) == pytest.approx((100 * r["low"], 100 * r["high"]))
        (legend,) = made.legends
        assert [text.get_text() for text in legend.get_texts()] == list(POLICIES)
        made.canvas.draw()
        boxes = [axis.get_window_extent() for axis in made.axes]
        assert not any(box.overlaps(legend.get_window_extent()) for box in boxes)


def test_bars_show_scores_times_and_the_full_method(tmp_path):
    rows = [
        row(task, policy, 1, 10 + n, seconds=2.0 + n)
        for task in ("sudoku4", "countdown")
        for n, policy in enumerate(POLICIES)
    ]
    folder = run_folder(tmp_path / "ablation", rows, one_by_one=True)
    found = results.read(folder)
    assert not found.swept and found.one_by_one
    scores, times = bars.draw_scores(found.panels), bars.draw_times(found.panels, shared=False)
    for made, values in ((scores, [50, 55, 60]), (times, [2, 3, 4])):
        for axis in made.axes:
            assert [patch.get_width() for patch in axis.patches] == pytest.approx(values)
            marked = [patch.get_hatch() is not None for patch in axis.patches]
            assert marked == [name == bars.FULL for name in POLICIES]
    texts = [text.get_text() for text in times.axes[0].texts]
    assert texts == ["2 s  ×1.00", "3 s  ×1.50", "4 s  ×2.00"]
    assert "measured" in times.get_supxlabel()
    assert plot.main([str(folder)]) == 0
    assert {path.name for path in folder.glob("*.[ps][nv]g")} == {
        *("scores.png", "scores.svg", "times.png", "times.svg")
    }


def test_an_unfinished_run_is_drawn_from_its_items(tmp_path):
    folder = run_folder(tmp_path / "half", [])
    lines = [
        {
            "cell": f"sudoku4/{policy}/16/{rate}",
            "index": index,
            "valid": index < 2,
            "exact": False,
            "cell_accuracy": None,
            "tokens": 16,
            **dict(denoising_steps=4, forwards=4, backwards=0, rows_forward=99, rows_backward=0),
            "times": {"session": 1, "scheduled": 0.0, "finished": 1.0},
        }
        for policy in reversed(POLICIES)
        for rate in (2, 1)
        for index in range(3)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "items.jsonl").write_text(text + '{"cell": "sudo')
    found = results.read(folder)
    assert not found.finished and found.swept
    assert [(r["policy"], r["tokens_per_step"]) for r in found.rows] == [
        (policy, rate) for rate in (1, 2) for policy in POLICIES
    ]
    assert all(r["n"] == 3 and r["score"] == pytest.approx(2 / 3) for r in found.rows)
    assert plot.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_finished_runs_table_and_its_items_give_the_same_figures(sweep):
    with (sweep / "cells.csv").open() as file:
        raw = list(csv.DictReader(file))
    rows = results.read(sweep).rows
    assert [str(r["score"]) for r in rows] == [r["score"] for r in raw]
    assert {type(r["n"]) for r in rows} == {int} and rows[0]["exact"] is None


def test_plot_names_what_does_not_fit(tmp_path, capsys, sweep):
    def message(*argv):
        assert plot.main(list(map(str, argv))) == 2
        return capsys.readouterr().err

    assert "expected the --out folder of a run" in message(tmp_path / "nowhere")
    assert "got" in (text := message(run_folder(tmp_path / "new", []))) and "without one" in text
    file = tmp_path / "file"
    file.touch()
    assert "--out: expected a folder" in message(sweep, "--out", file)
    bad = run_folder(tmp_path / "bad", [])
    (bad / "items.jsonl").write_text("{}\n")
    assert "items.jsonl:1: expected a record" in message(bad)
    table = (
        (sweep / "cells.csv").read_text().replace("sudoku4,confidence,16", "sudoku4,confidence,x")
    )
    (sweep / "cells.csv").write_text(table)
    assert "cells.csv:2: expected a number for gen_length" in message(sweep)
    (bad / "run.json").write_text("{")
    assert "expected JSON" in message(bad)
    with pytest.raises(SystemExit):
        plot.main([str(sweep), "--pdf"])
    assert "unrecognized arguments: --pdf" in capsys.readouterr().err
