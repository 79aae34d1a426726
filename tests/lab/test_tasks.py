"""The bundled tasks: what a prompt promises, what counts as a right answer, what is held out."""

import itertools
import random
import subprocess
import sys

import pytest

from boe_vllm.lab.tasks import TASKS, Item, get_task, split_of
from boe_vllm.lab.tasks.countdown import evaluate
from boe_vllm.lab.tasks.sudoku import BOARD4, BOARD6

ALL = sorted(TASKS)
EOS = "<|endoftext|>"
HELD_OUT = [38, 55]  # numbers i for which `A:i+i=` is a test prompt


def item_of(task: str, prompt: str, answer: str, **meta: object) -> Item:
    return Item(task=task, prompt=prompt, answer=answer, meta=meta)


@pytest.mark.parametrize("name", ALL)
def test_items_are_deterministic_distinct_and_depend_on_the_seed(name):
    task = TASKS[name]
    items = task.items(20, seed=1)
    assert items == task.items(20, seed=1)
    assert items != task.items(20, seed=2)
    assert len({item.prompt for item in items}) == 20
    assert items[:5] == task.items(5, seed=1)


@pytest.mark.parametrize("name", ALL)
def test_reference_answers_are_right_and_fit_the_canvas(name):
    task = TASKS[name]
    assert task.gen_length % task.block_length == 0
    for item in task.items(20, seed=3):
        assert item.task == name
        assert item.prompt.isascii() and item.prompt.endswith("=")
        assert len(item.answer) <= task.gen_length
        score = task.score(item, item.answer + 3 * EOS)
        assert score.valid and score.exact and score.cell_accuracy in (None, 1.0)
        assert not task.score(item, "").valid
        assert not task.score(item, item.answer + "1").valid
        assert not task.score(item, item.answer[:-1]).valid


@pytest.mark.parametrize("name", ALL)
def test_no_test_item_is_in_the_training_data(name, monkeypatch):
    task = TASKS[name]
    if hasattr(task, "pool_size"):
        monkeypatch.setattr(task, "pool_size", 20, raising=False)
    trained = {item.prompt for item in itertools.islice(task.stream(seed=0), 500)}
    trained |= {item.prompt for item in task.items(20, split="train")}
    held_out = {item.prompt for item in task.items(50, split="test")}
    assert {split_of(prompt) for prompt in trained} == {"train"}
    assert {split_of(prompt) for prompt in held_out} == {"test"}
    assert not trained & held_out


def test_the_split_never_moves():
    """Were the hash to change, the shipped checkpoint would have seen test items."""
    prompts = [f"A:{i}+{i}=" for i in range(64)]
    assert [i for i, prompt in enumerate(prompts) if split_of(prompt) == "test"] == HELD_OUT


@pytest.mark.parametrize(
    ("name", "clues"), [("sudoku4", (4, 6)), ("sudoku6", (10, 12)), ("sudoku6-few", (6, 6))]
)
def test_sudoku_clue_counts_and_number_of_solutions(name, clues):
    task = TASKS[name]
    for item in task.items(10, seed=5):
        puzzle = task.puzzle_of(item)
        assert len(puzzle) == task.gen_length
        assert clues[0] <= item.meta["clues"] <= clues[1]
        solutions = task.board.solutions(puzzle, limit=2)
        assert len(solutions) == (2 if name == "sudoku6-few" else 1)


def test_solver_counts_all_grids():
    assert len(BOARD4.solutions("0" * 16, limit=1000)) == 288
    assert BOARD4.solutions("11" + "0" * 14, limit=1) == []


def test_symmetries_keep_the_solution_unique():
    rng = random.Random(0)
    item = TASKS["sudoku6"].items(1)[0]
    for _ in range(10):
        puzzle, solution = BOARD6.symmetry(rng, item.prompt[3:-1], item.answer)
        assert BOARD6.solutions(puzzle, limit=2) == [solution]


def test_few_clues_accept_any_grid_that_keeps_them():
    task = TASKS["sudoku6-few"]
    item = task.items(1)[0]
    other = next(s for s in task.board.solutions(task.puzzle_of(item), limit=2) if s != item.answer)
    score = task.score(item, other)
    assert score.valid and not score.exact and score.cell_accuracy is None
    elsewhere = task.board.symmetry(random.Random(1), item.answer)[0]
    assert task.board.is_solved(elsewhere) and not task.score(item, elsewhere).valid


def test_sudoku_rejects_broken_grids_and_counts_cells():
    task = TASKS["sudoku4"]
    grid = "1234341221434321"
    item = item_of("sudoku4", "S4:1030000020000001=", grid)
    assert task.score(item, grid).valid
    score = task.score(item, "1234341221434331")
    assert not score.valid and score.cell_accuracy == pytest.approx(11 / 12)
    for prose in ("", "The grid is 1234341221434331.", grid + "1", grid[:-1]):
        assert task.score(item, prose).cell_accuracy is None
    for text in ("1234341221434320", "123434122143432", grid + "1", "²" * 16, "1 2 3 4"):
        assert not task.score(item, text).valid


def test_countdown_accepts_every_right_expression():
    task = TASKS["countdown"]
    item = item_of("countdown", "C:3,7,12>33=", "3*7+12", numbers=[3, 7, 12], target=33)
    texts = ["3*7+12", "12+7*3", "(7*3)+12", "7*3+12" + EOS]
    texts += [r"So it is \boxed{3 \times 7 + 12}.", "<answer> 12+7*3 </answer>" + EOS]
    for text in texts:
        assert task.score(item, text).valid, text
    assert task.score(item, "3*7+12").exact and not task.score(item, "12+3*7").exact
    for text in ("33", "3*7+12+0", "3*11", "7*3+12)", "3*7+-12", "3*7", "21+12", "3**7", "03*7+12"):
        assert not task.score(item, text).valid, text


@pytest.mark.parametrize(
    "text",
    ["", "1/0", "2**9", "7//2", "-1", "__import__('os')", "1_0+2", "0x1f", "1+" * 40, "(" * 60],
)
def test_evaluate_refuses_everything_but_plain_expressions(text):
    with pytest.raises(ValueError):
        evaluate(text)


def test_evaluate_is_exact():
    assert evaluate("7/2*2") == (7, [7, 2, 2])
    assert evaluate("(1+2)*3-4") == (5, [1, 2, 3, 4])


def test_addition_checks_every_step():
    task = TASKS["addition"]
    item = item_of("addition", "A:47+85+13=", "47+85=132,132+13=145", terms=[47, 85, 13])
    for text in ("47+85=132,132+13=145", "85+47=132,13+132=145" + EOS + "7"):
        assert task.score(item, text).valid, text
    wrong = (
        "47+85=132",
        "145",
        "47+85=131,131+13=144",
        "47+85=132,132+13=146",
        "47+85=132,132+31=163",
        "47+85=132,132+13=145,",
        "47+85=132,131+14=145",
        "47+85=132" + EOS + ",132+13=145",
        "47+85=132 132+13=145",
    )
    for text in wrong:
        assert not task.score(item, text).valid, text


@pytest.mark.parametrize("name", ALL)
def test_any_text_gets_a_score(name):
    task = TASKS[name]
    item = task.items(1)[0]
    for text in ("\x00", "=" * 200, "é☃", EOS, "<|mdm_mask|>" * 4, "9" * 5000, "1,2,3", "٣" * 16):
        assert not task.score(item, text).valid


def test_unknown_names_and_splits_are_errors():
    with pytest.raises(ValueError, match="unknown task 'x'; expected one of sudoku4, sudoku4-few"):
        get_task("x")
    with pytest.raises(ValueError, match="unknown split 'dev'; expected one of train, test"):
        TASKS["addition"].items(1, split="dev")
    with pytest.raises(ValueError, match="n must be at least 0"):
        TASKS["addition"].items(-1)


def test_tasks_import_neither_torch_nor_numpy():
    code = (
        "import importlib.util, sys, types\n"
        "home = importlib.util.find_spec('boe_vllm').submodule_search_locations\n"
        "package = types.ModuleType('boe_vllm'); package.__path__ = list(home)\n"
        "sys.modules['boe_vllm'] = package\n"
        "import boe_vllm.lab.tasks\n"
        "print({'torch', 'numpy', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
