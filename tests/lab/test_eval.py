"""`boe-vllm eval` without an engine: arguments, cells, the ledger, costs and tables."""

import csv
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_benchmarks import RECORDS, write

import boe_vllm
from boe_vllm.lab.eval import arguments, main, report, sweep, tables
from boe_vllm.lab.eval.cells import item_seed, make_cells, make_jobs
from boe_vllm.lab.eval.costs import busy_seconds, engine_seconds
from boe_vllm.lab.eval.ledger import Ledger
from boe_vllm.lab.eval.presets import PRESETS
from boe_vllm.lab.eval.prompts import Prompts
from boe_vllm.lab.eval.quality import Scorer, measure, unigram_entropy
from boe_vllm.lab.eval.settings import checkpoint_digest
from boe_vllm.lab.eval.statistics import wilson
from boe_vllm.lab.eval.variants import parse
from boe_vllm.lab.tasks import TASKS, TEXT_TASKS, open_task

FREQUENCIES = str(Path(__file__).parents[1] / "data" / "frequencies_29.json")


def settings(*argv):
    return arguments.read(arguments.parser().parse_args([*argv, "--out", "unused"]))


# ---- arguments ---------------------------------------------------------------------------------


def test_a_variant_is_a_policy_with_fields():
    assert parse("boe:rho=0.5:gate=none").fields == {"policy": "boe", "rho": 0.5, "gate": "none"}
    assert parse("boe:rho=0.5").label == "boe:rho=0.5"
    with pytest.raises(ValueError, match=r"--policies: expected FIELD=VALUE, got 'rho'"):
        parse("boe:rho")


def test_cells_are_the_product_in_the_order_of_the_tables():
    made = settings(
        *("--tasks", "sudoku4,countdown", "--policies", "confidence,boe:rho=0.5"),
        *("--gen-length", "16,32", "--tokens-per-step", "1,2", "--set", "cfg_scale=1"),
    )
    cells = make_cells(made, {name: TASKS[name] for name in made.tasks})
    assert len(cells) == len({cell.key for cell in cells}) == 16
    assert cells[0].key == "sudoku4/confidence/16/1" and cells[1].key == "sudoku4/boe:rho=0.5/16/1"
    assert cells[3].fields == {
        "policy": "boe",
        "rho": 0.5,
        "cfg_scale": 1,
        "block_length": 16,
        "tokens_per_step": 2,
    }
    assert cells[4].gen_length == 32 and cells[4].fields["block_length"] == 32


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_valid_cells_for_both_scales(name):
    kind, number = name.split()
    extra = ["--scorer", "x"] if name == "table 4" else []
    for model in ("tiny", "GSAI-ML/LLaDA-8B-Base"):
        made = settings(f"--{kind}", number, "--model", model, "--frequencies", FREQUENCIES, *extra)
        preset = PRESETS[name]
        assert made.tasks == (preset.bundled if model == "tiny" else preset.tasks)
        assert made.gen_lengths == (None if model == "tiny" else preset.gen_lengths)
        task = TASKS["sudoku6"]
        cells = make_cells(made, {task.name: task})
        lengths = len(made.gen_lengths or "1")
        assert len(cells) == lengths * len(preset.variants) * len(preset.tokens_per_step)
    assert (
        settings(f"--{kind}", number, "--policies", "random", *extra).variants[0].label == "random"
    )


def test_pc_takes_its_authors_lambda_in_a_preset_unless_told_otherwise():
    made = settings("--table", "2", "--policies", "pc,pc:lambd=0.5", "--frequencies", FREQUENCIES)
    cells = make_cells(made, {n: TASKS[n] for n in ("sudoku6", "countdown", "addition")})
    lambdas = {cell.key.rsplit("/", 2)[0]: cell.fields.get("lambd") for cell in cells}
    assert lambdas["sudoku6/pc"] == 0 and lambdas["countdown/pc"] == 1
    assert lambdas["addition/pc"] is None and lambdas["sudoku6/pc:lambd=0.5"] == 0.5


def test_an_items_seed_depends_on_the_item_and_the_runs_seed_alone():
    items = {"sudoku4": TASKS["sudoku4"].items(3)}
    made = settings("--tasks", "sudoku4", "--policies", "random,confidence", "--seed", "7")
    cells = make_cells(made, {"sudoku4": TASKS["sudoku4"]})
    jobs = list(make_jobs(cells, items, 7, {(cells[0].key, 1)}))
    assert [job.key for job in jobs] == [
        (cells[0].key, 0),
        (cells[0].key, 2),
        *((cells[1].key, n) for n in range(3)),
    ]
    assert jobs[0].seed == jobs[2].seed == item_seed(7, items["sudoku4"][0])
    assert len({item_seed(seed, item) for seed in (7, 8) for item in items["sudoku4"]}) == 6


def bad(tmp_path, capsys, *argv):
    """The message of a command that must be refused before any engine starts."""
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "sudoku9"], "task: expected one of sudoku4"),
        (["--tasks", "sudoku4", "--policies", "bow"], "policy: expected one of"),
        (["--tasks", "sudoku4", "--policies", "boe:rhow=1"], "did you mean 'rho'?"),
        (["--tasks", "sudoku4", "--policies", "boe:rho=2"], "boe:rho=2 on sudoku4: rho: "),
        (["--tasks", "sudoku4", "--policies", "boe,boe"], "expected different names"),
        (["--tasks", "sudoku4", "--set", "stepz=2"], "unknown field 'stepz'"),
        (["--tasks", "sudoku4", "--set", "steps=2"], "steps and tokens_per_step exclude"),
        (["--tasks", "sudoku4", "--gen-length", "16,x"], "--gen-length: expected different"),
        (["--tasks", "sudoku4", "--tokens-per-step", "0"], "--tokens-per-step: expected"),
        (["--tasks", "sudoku4", "--limit", "0"], "--limit: expected at least 1"),
        (["--tasks", "sudoku4", "--engine-args", "8"], "--engine-args: expected a JSON object"),
        (["--tasks", "gsm8k"], "task 'gsm8k' expected a folder with gsm8k.jsonl"),
        (["--tasks", "gsm8k", "--data", "/nowhere"], "got no file"),
        (["--table", "4"], "--scorer: expected the path"),
        ([], "--tasks: expected task names"),
        (["--tasks", "sudoku4", "--model", "/nowhere"], "--model: expected a folder"),
        (
            ["--model", "x", "--tasks", "sudoku4", "--policies", "pc"],
            "frequencies: policy 'pc' expected",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_arguments_are_named_before_the_engine_starts(argv, message, tmp_path, capsys):
    assert message in bad(tmp_path, capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_a_malformed_line_and_a_missing_package_are_named(tmp_path, capsys, monkeypatch):
    write("gsm8k", tmp_path, [RECORDS["gsm8k"], {"question": "2?"}])
    message = bad(tmp_path, capsys, "--tasks", "gsm8k", "--data", str(tmp_path))
    assert "gsm8k.jsonl:2: expected question (str), answer (str), got no 'answer'" in message
    write("math500", tmp_path, [RECORDS["math500"]])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = bad(tmp_path, capsys, "--tasks", "math500", "--data", str(tmp_path))
    assert "expected the package math-verify; pip install" in message


def test_a_chat_template_is_used_and_its_lack_is_an_error(tmp_path):
    write("humaneval", tmp_path, [RECORDS["humaneval"]])
    task = open_task("humaneval", tmp_path)
    (item,) = task.items()
    made = settings("--tasks", "humaneval", "--chat")
    prompts = Prompts(made, {"humaneval": task})
    assert prompts.text(item).startswith("<|startoftext|><|start_header_id|>user<|end_header_id|>")
    assert "Write a solution to the following problem" in prompts.text(item)
    assert prompts(item)["prompt_token_ids"][0] == 256  # one <|startoftext|>, not two
    assert prompts(item)["prompt_token_ids"][1] != 256
    assert Prompts(settings("--tasks", "humaneval"), {})(item) == {"prompt": item.prompt}

    copy = tmp_path / "model"
    shutil.copytree(boe_vllm.tiny_model_path(), copy, ignore=lambda *_: ["model.safetensors"])
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"--chat: expected a model with a chat template, got '.*'"
    ):
        Prompts(settings("--tasks", "humaneval", "--chat", "--model", str(copy)), {})


def test_another_checkpoint_is_another_run(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("a")
    before = checkpoint_digest(tmp_path)
    (tmp_path / "README.md").write_text("a")
    assert checkpoint_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("b")
    assert checkpoint_digest(tmp_path) != before
    assert checkpoint_digest(tmp_path / "nothing") is None


# ---- the ledger --------------------------------------------------------------------------------


def record(cell, index, **fields):
    return {"cell": cell, "index": index} | fields


def test_a_ledger_goes_on_after_half_a_line(tmp_path):
    ledger = Ledger(tmp_path / "run", {"seed": 0})
    ledger.append(record("b", 0, text="é\u2028"))
    ledger.append(record("a", 1))
    ledger.close()
    file = tmp_path / "run" / "items.jsonl"
    whole = file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1])):
        file.write_bytes(whole[:-cut] if cut > 1 else whole[:-1])
        again = Ledger(tmp_path / "run", {"seed": 0})
        assert list(again.records) == [("b", 0)]
        again.append(record("a", 1))
        again.close()
        assert file.read_bytes() == whole
    last = Ledger(tmp_path / "run", {"seed": 0})
    last.finish([("a", 1), ("b", 0)])
    last.close()
    assert [json.loads(line)["cell"] for line in file.read_text().split("\n")[:-1]] == ["a", "b"]


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    Ledger(tmp_path / "run", {"seed": 0, "limit": 5}).close()
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(ValueError, match=r"--out: .*whose limit is 5 and not 6; name another"):
        Ledger(tmp_path / "run", {"seed": 0, "limit": 6})
    assert (tmp_path / "run" / "run.json").read_text() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"--out: expected an empty folder .*no run.json"):
        Ledger(tmp_path / "other", {})
    with pytest.raises(ValueError, match=r"--out: expected a folder, got the file"):
        Ledger(tmp_path / "other" / "thesis.tex", {})


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    first = Ledger(tmp_path, {"seed": 0})
    with pytest.raises(ValueError, match="another run"):
        Ledger(tmp_path, {"seed": 0})
    first.close()
    Ledger(tmp_path, {"seed": 0}).close()


@pytest.mark.parametrize("line", ["{}", "nonsense", "[1]", json.dumps(record("a", 0))])
def test_a_broken_or_repeated_record_is_named_by_line(line, tmp_path):
    Ledger(tmp_path, {}).close()
    (tmp_path / "items.jsonl").write_text(json.dumps(record("a", 0)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"items\.jsonl:2: expected .*remove the line"):
        Ledger(tmp_path, {})


# ---- costs and intervals -----------------------------------------------------------------------


def ran(cell, start, end, rows=100, session=1):
    times = {"session": session, "scheduled": start, "finished": end}
    return {"cell": cell, "rows_forward": rows, "rows_backward": 0, "times": times}


def test_engine_time_is_shared_by_rows_and_adds_up():
    apart = [ran("a", 0, 2), ran("b", 3, 4)]
    assert engine_seconds(apart) == {"a": 2, "b": 1}
    together = [ran("a", 0, 2, rows=300), ran("b", 0, 2, rows=100)]
    assert engine_seconds(together) == pytest.approx({"a": 1.5, "b": 0.5})
    sessions = [ran("a", 0, 2), ran("a", 0, 3, session=2)]
    assert engine_seconds(sessions) == {"a": 5}
    rng = random.Random(0)
    starts = [rng.uniform(0, 50) for _ in range(200)]
    many = [ran(rng.choice("abc"), s, s + rng.uniform(0, 3), rng.randint(1, 9)) for s in starts]
    grid = np.linspace(0, 55, 200_001)
    busy = np.zeros(len(grid), bool)
    for one in many:
        busy |= (grid >= one["times"]["scheduled"]) & (grid < one["times"]["finished"])
    assert busy_seconds(many) == pytest.approx(busy.mean() * 55, rel=1e-3)


def test_the_interval_covers_its_share():
    for right, n in ((0, 10), (10, 10), (3, 7), (250, 500)):
        low, high = wilson(right, n)
        assert 0 <= low <= right / n <= high <= 1
        # The ends are where a normal test of the share would just fail.
        for end in {low, high} - {0.0, 1.0}:
            z = (right / n - end) / math.sqrt(end * (1 - end) / n)
            assert abs(z) == pytest.approx(1.959964, abs=1e-5)


def test_tables_say_what_the_records_say(tmp_path):
    made = settings("--table", "5", "--tasks", "sudoku4", "--policies", "confidence,boe")
    cells = make_cells(made, {"sudoku4": TASKS["sudoku4"]})
    records = {}
    for number, cell in enumerate(cells):
        for index in range(4):
            records[cell.key, index] = ran(cell.key, 10 * number, 10 * number + 2 + number) | {
                "valid": index > number,
                "exact": False,
                "cell_accuracy": 0.5,
                "denoising_steps": 8,
                "forwards": 8,
                "backwards": number,
                "tokens": 16,
            }
    rows = tables.summarise(cells, records, {"sudoku4": True})
    (low, high), first = wilson(3, 4), rows[0]
    assert (first["n"], first["score"], first["low"], first["high"]) == (4, 0.75, low, high)
    assert first["seconds"] == pytest.approx(2) and first["tokens_per_second"] == pytest.approx(32)
    assert rows[1]["score"] == 0.5 and rows[1]["backwards"] == 1
    read_back = list(csv.DictReader(tables.to_csv(rows).splitlines()))
    assert float(read_back[0]["score"]) == 0.75 and read_back[0]["policy"] == "confidence"
    assert json.loads(read_back[1]["settings"])["block_length"] == 16
    assert "| boe | 16 | 1 | 50.0 |" in tables.ablations(rows)
    assert "1.5 |" in tables.ablations(rows)
    assert "| confidence | 75.0 (30.1-95.4) |" in tables.methods_by_task(rows)
    assert "| sudoku4 | boe | 8 | 1 | 100 | 50.0 |" in tables.curves(rows)
    assert "| sudoku4 | confidence | 16 | 1 | 4 | 75.0 | 30.1 to 95.4 |" in tables.overview(rows)


# ---- text --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer_path(tmp_path_factory):
    """A small GPT-2 with random weights and the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("scorer")
    tokenizer = AutoTokenizer.from_pretrained(boe_vllm.tiny_model_path())
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=264, n_positions=1024, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_entropy_is_that_of_the_tokens_of_one_text():
    assert unigram_entropy([5, 5, 5]) == 0 and unigram_entropy([]) == 0
    assert unigram_entropy(range(7)) == pytest.approx(math.log(7))


def test_the_scorers_loss_is_that_of_the_continuation(scorer_path):
    import torch

    scorer = Scorer(scorer_path)
    model, tokenizer = scorer._model, scorer._tokenizer
    features, loss, tokens = scorer.judge("S4:12=", "12341<|endoftext|>")
    ids = [tokenizer.bos_token_id, *tokenizer.encode("S4:12=12341", add_special_tokens=False)]
    labels = [-100] * (len(ids) - 5) + ids[-5:]
    with torch.no_grad():
        out = model(torch.tensor([ids]), labels=torch.tensor([labels]), output_hidden_states=True)
    assert tokens == 5 and loss == pytest.approx(5 * out.loss.item(), rel=1e-5)
    assert np.allclose(features, out.hidden_states[-1][0, -1].numpy(), atol=1e-6)
    assert scorer.judge("S" * 1000, "1" * 100)[2] == 23  # 1024 tokens in all
    assert scorer.judge("S", "")[1:] == (0.0, 0)


@pytest.mark.slow
def test_mauve_tells_the_same_from_other_text(scorer_path):
    pytest.importorskip("mauve", reason="needs mauve-text: pip install 'boe-vllm[text]'")
    scorer = Scorer(scorer_path)
    rng = random.Random(0)

    def draw(letters):
        text = "".join(rng.choice(letters) for _ in range(12))
        return {"prompt": "S:", "text": text, "token_ids": [*text.encode(), 257, 257]}

    references = [draw("1234") for _ in range(60)]
    features = np.stack([scorer.judge(r["prompt"], r["text"])[0] for r in references])
    same, other = (
        measure(scorer, [draw(letters) for _ in range(60)], features, end_of_text=[257], seed=1)
        for letters in ("1234", "abc")
    )
    assert same["mauve"] > 0.8 > 0.2 > other["mauve"]
    assert same["n"] == 60 and same["perplexity"] > 1
    assert 1.0 < same["entropy"] <= math.log(4)


@pytest.mark.slow
def test_a_report_compares_texts_with_the_references(scorer_path, tmp_path):
    """Table 4 from records that need no engine: the references themselves, and noise."""
    pytest.importorskip("mauve", reason="needs mauve-text: pip install 'boe-vllm[text]'")
    made = settings("--table", "4", "--policies", "confidence,random", "--scorer", scorer_path)
    task = TASKS["sudoku6-few"]
    tasks, items = {task.name: task}, {task.name: task.items(50, seed=1)}
    cells = make_cells(made, tasks)
    ledger = Ledger(tmp_path / "run", {})
    for number, cell in enumerate(cells):
        for index, item in enumerate(items[task.name]):
            text = item.answer if number == 0 else "7" * 36
            score = task.score(item, text)
            ledger.append(
                ran(cell.key, index, index + 1)
                | record(cell.key, index, text=text, token_ids=[*text.encode(), 257], tokens=37)
                | {"valid": score.valid, "exact": score.exact, "cell_accuracy": None}
                | {"denoising_steps": 1, "forwards": 1, "backwards": 0}
            )
    text = report.write(made, tasks, items, cells, ledger, "the command")
    ledger.close()
    same, noise = csv.DictReader((tmp_path / "run" / "quality.csv").open())
    assert same["policy"] == "confidence" and float(same["mauve"]) > 0.99
    assert float(noise["mauve"]) < 0.2 and float(noise["entropy"]) == 0
    assert float(same["entropy"]) == pytest.approx(math.log(6), abs=0.05)
    assert "# Table 4" in text and "    the command" in text
    assert (tmp_path / "run" / "tables.md").read_text() == text


@pytest.mark.slow
def test_texts_of_a_known_source_are_compared_with_others_of_its_own(scorer_path, tmp_path):
    pytest.importorskip("mauve", reason="needs mauve-text: pip install 'boe-vllm[text]'")
    made = settings("--model", "tiny-text", "--table", "4", "--scorer", scorer_path)
    task = TEXT_TASKS["stories"]
    tasks, items = {task.name: task}, {task.name: task.items(40, seed=made.seed)}
    cell, *_ = make_cells(made, tasks)
    ledger = Ledger(tmp_path / "run", {})
    for index in range(40):
        words = ["she", "danced", "."] * 42
        ledger.append(
            ran(cell.key, index, index + 1)
            | record(cell.key, index, text=" ".join(words), token_ids=[1, 2, 3] * 42, tokens=126)
            | {"valid": False, "exact": False, "cell_accuracy": None}
            | {"denoising_steps": 1, "forwards": 1, "backwards": 0}
        )
    report.write(made, tasks, items, [cell], ledger, "the command")
    ledger.close()
    source, same_words = csv.DictReader((tmp_path / "run" / "quality.csv").open())
    assert source["policy"] == "source" and same_words["policy"] == cell.label
    assert float(source["mauve"]) > 0.5 > float(same_words["mauve"])
    assert float(source["entropy"]) > 3.5 and int(source["n"]) == 40
    assert float(same_words["entropy"]) == pytest.approx(math.log(3))


def test_cells_one_by_one_are_batches_of_their_own():
    made = settings("--table", "5", "--tasks", "sudoku4")
    cells = make_cells(made, {"sudoku4": TASKS["sudoku4"]})
    jobs = list(make_jobs(cells, {"sudoku4": TASKS["sudoku4"].items(2)}, 0, {(cells[0].key, 1)}))
    batches = sweep.batches(made, cells, jobs)
    assert [len({job.cell.key for job in batch}) for batch in batches] == [1] * len(cells)
    assert [job for batch in batches for job in batch] == jobs
    together = settings("--tasks", "sudoku4")
    assert sweep.batches(together, cells, jobs) == [jobs]


def test_a_missing_scorer_is_named():
    with pytest.raises(ValueError, match=r"--scorer: expected the path .*got '/nowhere'"):
        Scorer("/nowhere")
