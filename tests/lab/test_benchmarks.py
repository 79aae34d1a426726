"""The benchmark files: gold answers are right, garbage is wrong, malformed lines are named."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from boe_vllm.lab.tasks import FILE_TASKS, open_task
from boe_vllm.lab.tasks.sandbox import runs_to_its_end

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="needs the benchmark files in ../shared/data"
)
COUNTS = {
    "gsm8k": 1319,
    "math500": 500,
    "humaneval": 164,
    "mbpp": 427,
    "sudoku-file": 500,
    "countdown-file": 1000,
}
# Items of the published files that the published prompts show with their answers.
SHOWN = {"mbpp": 3, "countdown-file": 3}
GARBAGE = ("", "I do not know.", "\x00é☃ ][)(", "<|endoftext|>", "=" * 50, r"\boxed{no}")
EOS = "<|endoftext|>"


def gold(task, item):
    """A text as a perfect model would write it."""
    if task.name in ("gsm8k", "math500"):
        return item.meta["solution"] + EOS
    return item.answer + EOS


@needs_data
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "mbpp" else ()) for name in COUNTS],
)
def test_gold_is_right_and_garbage_is_wrong(name):
    task = open_task(name, DATA)
    items = task.all_items()
    assert len(items) == COUNTS[name]
    work = [(item, gold(task, item), True) for item in items]
    if task.slow_score:
        work += [(item, GARBAGE[n % len(GARBAGE)], False) for n, item in enumerate(items)]
    else:
        work += [(item, text, False) for item in items for text in GARBAGE]
    # Programs run in processes of their own; math-verify sets alarms and wants the main thread.
    run = map
    if name in ("humaneval", "mbpp"):
        run = ThreadPoolExecutor(os.cpu_count()).map
    scores = run(lambda entry: task.score(entry[0], entry[1]).valid, work)
    wrong = [
        (item.prompt[-300:], text, want)
        for (item, text, want), got in zip(work, scores, strict=True)
        if got != want
    ]
    assert not wrong, f"{len(wrong)} misjudged: {wrong[:3]}"
    assert len(task.items()) == COUNTS[name] - SHOWN.get(name, 0)


# ---- files that are wrong ----------------------------------------------------------------------

RECORDS = {
    "gsm8k": {"question": "1+1?", "answer": "It is 2.\n#### 2"},
    "math500": {"problem": "$1+1$?", "solution": r"\boxed{2}", "answer": "2"},
    "humaneval": {
        "prompt": 'import math\n\ndef f(x):\n    """One more."""\n',
        "canonical_solution": "    return x + 1\n",
        "test": "def check(f):\n    assert f(1) == 2\n",
        "entry_point": "f",
    },
    "mbpp": {
        "task_id": 7,
        "prompt": "Add one.",
        "code": "def f(x):\n  return x + 1",
        "test_list": ["assert f(1) == 2"],
        "test_imports": [],
    },
    "sudoku-file": {"Puzzle": "1234341221434320", "Solution": "1234341221434321"},
    "countdown-file": {"input": "1,2,3,9", "output": "1+2=3,3*3=9"},
    "text": {"text": "a b c", "prompt": "a b"},
}


def write(task_name, folder, records):
    file = folder / FILE_TASKS[task_name].file_name
    if file.suffix == ".csv":
        lines = [",".join(records[0]), *(",".join(map(str, r.values())) for r in records)]
        file.write_text("\n".join(lines) + "\n")
    elif file.suffix == ".json":
        file.write_text(json.dumps(records))
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize("name", FILE_TASKS)
def test_a_file_of_one_record_gives_an_item_whose_gold_answer_is_right(name, tmp_path):
    write(name, tmp_path, [RECORDS[name]])
    (item,) = open_task(name, tmp_path).items()
    task = open_task(name, tmp_path)
    assert task.score(item, gold(task, item)).valid
    assert not task.score(item, "?").valid
    assert item.task == name and item.prompt
    assert [m["role"] for m in task.messages(item)] == ["user"]
    assert task.gen_length % task.block_length == 0
    assert task.source


@pytest.mark.parametrize("name", FILE_TASKS)
def test_a_malformed_record_is_named_by_file_and_line(name, tmp_path):
    bad = dict(RECORDS[name])
    dropped = next(iter(FILE_TASKS[name].fields))
    bad[dropped] = 7 if name == "mbpp" else bad[dropped]
    if name == "sudoku-file":
        bad["Puzzle"] = "12"
    elif name == "mbpp":
        bad["test_list"] = "assert True"
    else:
        del bad[dropped]
    file = write(name, tmp_path, [RECORDS[name], RECORDS[name], bad])
    place = {".csv": f"{file}:4", ".json": f"{file}, item 3"}.get(file.suffix, f"{file}:3")
    with pytest.raises(ValueError) as error:
        open_task(name, tmp_path).items()
    assert str(error.value).startswith(f"{place}: expected ") and ", got " in str(error.value)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gsm8k", {"answer": "two"}, "'#### NUMBER'"),
        ("countdown-file", {"output": "1+2=3,3*3=8"}, "an output that solves the input"),
        ("countdown-file", {"input": "1,2"}, "numbers and a target"),
        ("sudoku-file", {"Solution": "1" * 16}, "a Solution of"),
        ("mbpp", {"test_list": []}, "at least one test"),
        ("mbpp", {"test_imports": [1]}, "a list of strings"),
        ("text", {"prompt": "b"}, "a prompt that the text starts with"),
        ("text", {"prompt": None}, "more than 64 words"),
        ("text", {"prompt": "a b c"}, "goes on after its prompt"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(name, fields, message, tmp_path):
    write(name, tmp_path, [RECORDS[name] | fields])
    with pytest.raises(ValueError, match=message):
        open_task(name, tmp_path).items()


def test_broken_json_missing_files_and_unknown_tasks_are_named(tmp_path):
    file = write("gsm8k", tmp_path, [RECORDS["gsm8k"]])
    file.write_text(file.read_text() + '{"question": \n')
    with pytest.raises(ValueError, match=r"gsm8k\.jsonl:2: expected JSON, got '\{\"question"):
        open_task("gsm8k", tmp_path).items()
    file.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="expected UTF-8"):
        open_task("gsm8k", tmp_path).items()
    file.write_text("\n")
    with pytest.raises(ValueError, match="got none"):
        open_task("gsm8k", tmp_path).items()
    with pytest.raises(ValueError, match=r"no file .*math500\.jsonl; name the folder"):
        open_task("math500", tmp_path)
    with pytest.raises(ValueError, match=r"task 'mbpp' expected a folder with sanitized-mbpp"):
        open_task("mbpp")
    with pytest.raises(ValueError, match=r"expected one of sudoku4.*gsm8k.*got 'gsm9k'"):
        open_task("gsm9k", tmp_path)


def test_a_limit_draws_the_same_items_by_seed_and_keeps_the_files_order(tmp_path):
    records = [RECORDS["gsm8k"] | {"question": f"{n}?"} for n in range(30)]
    write("gsm8k", tmp_path, records)
    task = open_task("gsm8k", tmp_path)
    some = task.items(10, seed=1)
    order = [item.prompt for item in task.all_items()]
    places = [order.index(item.prompt) for item in some]
    assert some == task.items(10, seed=1) != task.items(10, seed=2)
    assert places == sorted(set(places)) and task.items(99) == task.items()


# ---- what counts as right ----------------------------------------------------------------------


def item_of(name, folder, **fields):
    write(name, folder, [RECORDS[name] | fields])
    task = open_task(name, folder)
    return task, task.items()[0]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("so 1,234 it is. #### 1,234.0", True),
        (r"\boxed{1234} dollars, not 7", True),
        ("The answer is $1234.", True),
        ("The answer is 1234\n\n", True),
        ("#### 1234 #### 7", False),
        ("1234 or 7", False),
        ("12345", False),
        ("-1234", False),
        ("2468/2", True),
        ("1234/0", False),
    ],
)
def test_gsm8k_compares_numbers(text, right, tmp_path):
    task, item = item_of("gsm8k", tmp_path, answer="#### 1,234")
    assert task.score(item, text).valid is right


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\frac{3}{4}", "0.75", True),
        (r"\frac{3}{4}", r"\dfrac34", True),
        (r"\frac{3}{4}", "0.7", False),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        (r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)", True),
        ("x^2+1", "1+x^2", True),
        ("x^2+1", "x^2-1", False),
        (r"\text{Evelyn}", "Evelyn", True),
        ("12", "13", False),
        ("12", "}{", False),
    ],
)
def test_math500_compares_by_meaning(gold, answer, right, tmp_path):
    task, item = item_of("math500", tmp_path, answer=gold)
    assert task.score(item, rf"It is \boxed{{{answer}}}.").valid is right
    assert not task.score(item, f"It is {gold}.").valid  # no box, no answer


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Let's see. The answer is: 1+2=3,3*3=9", True),
        ("The answer is: [1 + 2 = 3, 3 * 3 = 9].\nquestion", True),
        ("3*(1+2)", True),
        ("(1+2)*3=9", True),
        ("(1+2)*3=8", False),
        ("9", False),
        ("3*3=9", False),
        ("1+2=3,3+3=6,6+3=9", False),
        ("1+2=9", False),
        ("1+2=3,3*3=9,9-0=9", False),
        ("The answer is: 1+2=3,3*3=9 The answer is: 3", False),
        ("2/1=2,2*3=6", False),
        ("1/0=3,3*3=9", False),
    ],
)
def test_countdown_checks_every_operation(text, right, tmp_path):
    task, item = item_of("countdown-file", tmp_path)
    assert task.score(item, text).valid is right


def test_sudoku_takes_any_solution_and_reports_cells(tmp_path):
    own, other = "1234341221434321", "3412123443212143"
    task, item = item_of("sudoku-file", tmp_path, Puzzle="0" * 16, Solution=own)
    clue = item_of("sudoku-file", tmp_path, Puzzle="1" + "0" * 15, Solution=own)
    score = task.score(item, "1234\n3412\n2143\n4321\n</answer> 7")
    assert score.valid and score.exact and score.cell_accuracy == 1
    score = task.score(item, f"I think: <answer>{other}</answer>")
    assert score.valid and not score.exact and score.cell_accuracy == 0
    assert task.score(item, "1" * 16).cell_accuracy == 0.25
    assert not task.score(item, own[:-1] + "2").valid
    assert task.score(item, "1 would go here, 2 there").cell_accuracy is None
    assert clue[0].score(clue[1], own).valid and not clue[0].score(clue[1], other).valid


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("    return x + 1\n", True),
        ("```python\ndef f(x):\n    return x + 1\n```\nThat is it.", True),
        ("def f(x):\n    return int(math.floor(x)) + 1", True),
        ("    return x + 1\n```\nThat is it.", True),
        ("    return x", False),
        ("    raise SystemExit(0)", False),
        ("    import os; os._exit(0)", False),
        ("    return (", False),
    ],
)
def test_humaneval_runs_completions_and_whole_functions(text, right, tmp_path):
    task, item = item_of("humaneval", tmp_path)
    assert task.score(item, text).valid is right


# ---- the sandbox -------------------------------------------------------------------------------

FORBIDDEN = {
    "network": "import socket\nsocket.socket()",
    "connecting": "import socket\nsocket.create_connection(('127.0.0.1', 1))",
    "fork": "import os\nif os.fork() == 0:\n  os._exit(0)",
    "subprocess": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "posix_spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "write": "open('x', 'w')",
    "write to shared memory": "open('/dev/shm/boe-vllm', 'w')",
    "remove": "import os\nos.unlink(__import__('sys').executable)",
    "make a folder": "import os\nos.mkdir('x')",
    "signal": "import os\nos.kill(os.getppid(), 0)",
    "memory": "x = bytearray(2 << 30)",
    "exception": "assert False",
    "early exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "guessed report": "import os\n[os.write(fd, b'ok') for fd in range(3, 9)]\nos._exit(0)",
    "recursion": "def f(): f()\nf()",
    "syntax": "def",
}  # fmt: skip


@pytest.mark.parametrize("source", FORBIDDEN.values(), ids=FORBIDDEN)
def test_the_sandbox_refuses(source):
    assert not runs_to_its_end(source)


def test_the_sandbox_lets_ordinary_programs_run():
    assert runs_to_its_end(
        "import math, re, itertools, collections, heapq, threading, typing\n"
        "thread = threading.Thread(target=print, args=('x' * 100_000,)); thread.start()\n"
        "thread.join(); assert sorted([3, 1]) == [1, 3]; assert __name__ == '__main__'"
    )


def test_the_sandbox_ends_what_does_not_end():
    assert not runs_to_its_end("while True: pass", cpu_seconds=1)
    assert not runs_to_its_end("import time; time.sleep(60)", wall_seconds=1)
