"""How answers are read and judged: ours by value, d1's by the rules of that family's tables."""

import gzip
import json

import pytest

from boe_vllm.lab.tasks import FILE_TASKS, Item, d1, grade, open_task
from boe_vllm.lab.tasks.answers import boxes, last_boxed, marked, tagged
from boe_vllm.lab.tasks.numbers import last_number, value

STRICT = {name: FILE_TASKS[name].rules() for name in ("gsm8k", "math500", "countdown-file")}
D1 = {name: FILE_TASKS[name].rules("d1") for name in STRICT}


def judged(task, text, answer, **meta):
    """By ours and by d1's rules."""
    item = Item(task=task, prompt="", answer=answer, meta=meta)
    return STRICT[task].score(item, text).valid, D1[task].score(item, text).valid


# ---- where an answer stands --------------------------------------------------------------------


def test_the_last_box_that_holds_something_is_the_answer():
    assert boxes(r"\boxed{1} \fbox {a{b}c} \boxed{2") == ["1", "a{b}c"]
    assert last_boxed(r"\boxed{1} \boxed{\frac{1}{2}} \boxed{ }") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1") is None and last_boxed("1") is None
    assert tagged("<answer>1</answer> <answer> 2") == "2"
    assert tagged("<answer>1</answer><answer> </answer>") == "1" and tagged("1</answer>") is None
    assert marked(r"<answer>1 \boxed{2}</answer>") == "2" and marked("<answer>1</answer>") == "1"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("a 1,234.50 b", "1234.5"),
        (r"10{,}000", 10000),
        (r"1\,000 or 385\,000", 385000),
        (r"11,\! 111,\! 100", 11111100),
        ("1040,000", 1040000),
        ("(3,4)", 4),
        ("at 2:00 pm", 2),
        ("2:30", "5/2"),
        (r"\frac{6}{3}", 2),
        (r"-\dfrac{1}{2}", "-1/2"),
        (r"\frac34", "3/4"),
        (r"1\frac{1}{2}", "3/2"),
        ("3 1/2 cups", "7/2"),
        ("3 / 4", "3/4"),
        (".75", "3/4"),
        ("-5", -5),
        ("= -5", -5),
        ("−5", -5),
        (r"-\$5", -5),
        ("10-7", 7),
        ("2x - 3", 3),
        (r"25\text{ m}^2", 25),
        ("25 m^{2}", 25),
        ("2^3", 8),
        ("2^{10}", 1024),
        (r"4210_5", 4210),
        (r"60\%", 60),
        (r"120\text{ minutes}", 120),
    ],
)  # fmt: skip
def test_numbers_are_read_as_they_are_written(text, number):
    found = last_number(text)
    assert found is not None and value(found) == value(str(number))


def test_what_has_no_number_or_no_value():
    assert last_number("none") is None
    assert value("1/0") is None and value("9" * 5000) is None and value("x") is None


# ---- both dialects, side by side ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "strict", "of_d1"),
    [
        (r"so 3 + 4 = 7 \boxed{7}", "7", True, True),
        (r"10 - 7 = 3 \boxed{}", "3", True, False),
        (r"10 - 7 = 3 \boxed{...}", "3", True, False),
        (r"\boxed{3} \boxed{}", "3", True, True),
        (r"\boxed{3} no, \boxed{4}", "4", True, False),
        (r"\boxed{3} no, \boxed{4}", "3", False, True),
        (r"\boxed{43,500}", "43500", True, False),
        (r"\boxed{43,500}", "43", False, True),
        (r"\boxed{2:00 pm}", "2", True, True),
        (r"\boxed{10{,}000}", "10000", True, False),
        (r"\boxed{1\,000}", "1000", True, False),
        (r"\boxed{1\,000}", "0", False, False),
        (r"\boxed{\frac{6}{3}}", "2", True, False),
        (r"\boxed{\frac{6}{3}}", "3", False, False),
        ("<answer>\n5 apples of 7\n</answer>", "7", True, True),
        ("it is 5", "5", True, False),
        (r"\boxed{36<|eot_id|>", "36", True, False),
        (r"\boxed{5.0}<|endoftext|>", "5", True, True),
        ("#### 1,234", "1234", True, False),
        (r"\boxed{no}<answer>no</answer>", "5", False, False),
    ],
)
def test_gsm8k(text, answer, strict, of_d1):
    assert judged("gsm8k", text, answer) == (strict, of_d1)


@pytest.mark.parametrize(
    ("answer", "gold", "strict", "of_d1"),
    [
        ("4210_5", "4210_5", True, True),
        ("4210_{5}", "4210_5", True, False),
        ("4210_6", "4210_5", False, False),
        ("4210_{6}", "4210_5", False, False),
        ("4210", "4210_5", True, False),
        (r"1\,000", "1000", True, False),
        ("10{,}000", "10000", True, False),
        ("10{,}000", "0", False, False),
        (r"\frac{6}{3}", "2", True, False),
        ("1/2", r"\frac{1}{2}", True, True),
        (r"\dfrac12", r"\frac{1}{2}", True, True),
        (r"\frac1{2}", r"\frac{1}{2}", True, True),
        ("0.5", r"\frac{1}{2}", True, True),
        ("0.25", r"\frac{1}{4}", True, False),
        (r"\sqrt3", r"\sqrt{3}", True, True),
        ("x = 5", "5", True, True),
        (r"5 \text{ cm}", "5", True, True),
        (r"10\%", "10", True, True),
        (r"90^\circ", "90", True, True),
        (".5", "0.50", True, False),
        ("a/b", "a/b", True, True),
        (r"\left( 3, 4 \right)", "(3,4)", True, True),
        (r"1 \text{ a} \text{ b}", r"1 \text{ a} \text{ b}", True, True),
        ("13", "12", False, False),
    ],
)
def test_math500(answer, gold, strict, of_d1):
    pytest.importorskip("math_verify")
    assert judged("math500", rf"So \boxed{{{answer}}}.", gold) == (strict, of_d1)


@pytest.mark.parametrize(
    ("text", "strict", "of_d1"),
    [
        (r"\boxed{7} \boxed{}", True, False),
        (r"\boxed{} <answer>7</answer>", True, True),
        ("<answer>7</answer>", True, False),  # without a box d1 compares all of the text
        (r"\fbox{7}", True, True),
        ("7", False, True),
        (r"\boxed{7", False, False),
    ],
)
def test_where_math500_finds_its_answer(text, strict, of_d1):
    assert judged("math500", text, "7") == (strict, of_d1)


@pytest.mark.parametrize(
    "text", [r"\frac", r"\frac\frac12", r"\sqrt", r"\text{ a}\text{ b}", "x/y"]
)
def test_texts_that_cannot_be_normalised_are_compared_as_they_are(text):
    with pytest.raises(ValueError):
        d1.normalised(text)
    assert d1.same_mathematics(text, text) and not d1.same_mathematics(text, text + " ")


@pytest.mark.parametrize(
    ("text", "strict", "of_d1"),
    [
        (r"\boxed{3 \times (1 + 2)}", True, True),
        (r"<answer>\n(1+2)*3 = 9\n</answer>".replace(r"\n", "\n"), True, True),
        (r"I think \boxed{1+2=3, 3*3=9}.", True, False),
        ("<answer>1+2=3\n3*3=9</answer>", True, False),
        (r"\boxed{\left(1+2\right) \cdot 3}", True, False),
        (r"\boxed{\frac{3}{1} \cdot 2}", False, False),
        ("(1+2)*3", True, True),
        ("<answer>(1+2)*3", True, False),
        ("<answer>3*3</answer>", False, False),
        (r"\boxed{1+2**3}", False, True),
        (r"\boxed{1 + 2 + 3}", False, False),
        (r"\boxed{(1+2)*3+0}", False, False),
        ("<answer>__import__('os')</answer>", False, False),
    ],
)
def test_countdown(text, strict, of_d1):
    meta = {"numbers": [1, 2, 3], "target": 9, "input": "1,2,3,9"}
    assert judged("countdown-file", text, "", **meta) == (strict, of_d1)


def test_no_expression_takes_long():
    assert not d1.reaches("99**99**99**99", [99] * 4, 1)
    assert not d1.reaches("1/0", [1, 0], 1) and not d1.reaches("(" * 200, [], 1)


def test_sudoku_by_d1s_patterns(tmp_path):
    puzzle, solution = "1234341221430000", "1234341221434321"
    (tmp_path / "sudoku.csv").write_text(f"Puzzle,Solution\n{puzzle},{solution}\n")
    task = open_task("sudoku-file", tmp_path, dialect="d1")
    (item,) = task.items()
    for text, cells in (
        (f"<answer>\n{solution}\n</answer>", 1),
        (f"<answer>see ``` {solution} ```</answer>", 1),
        ("1234 3412 2143 4321</answer>", 1),
        (solution[:14] + "<|endoftext|>", 0.5),
        ("", 0),
        ("The grid is such and such.", 0),
    ):
        score = task.score(item, text)
        assert score.cell_accuracy == cells and score.valid is (cells == 1), text


# ---- the command -------------------------------------------------------------------------------


def test_the_command_prints_both_shares(tmp_path, capsys):
    answers = [
        {"gen_length": 128, "ground_truth": 1000.0, "generation": r"\boxed{1,000}"},
        {"gen_length": 128, "ground_truth": 7.0, "generation": r"\boxed{7}"},
        {"ground_truth": None, "generation": r"\boxed{7}"},
    ]
    answers = [{"task": "gsm8k", **answer} for answer in answers]
    file = tmp_path / "answers.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, answers)).encode()))
    assert grade.main([str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| gsm8k | 128 | 2 | 100.00 | 50.00 |",
        "| gsm8k | - | 1 | 0.00 | 0.00 |",
    ]


def test_what_the_command_cannot_read_is_named(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    for line in ("{", '{"task": "mbpp", "generation": "", "ground_truth": 1}', '{"task": "gsm8k"}'):
        file.write_text(line + "\n")
        assert grade.main([str(file)]) == 2
        assert f"{file}:1: expected an object with task" in capsys.readouterr().err
    assert grade.main([str(tmp_path / "none")]) == 2


def test_tasks_without_the_dialect_say_so(tmp_path):
    with pytest.raises(
        ValueError, match=r"grader: expected one of strict for task 'mbpp', got 'd1'"
    ):
        FILE_TASKS["mbpp"].rules("d1")
    with pytest.raises(ValueError, match=r"expected strict for the generated task 'addition'"):
        open_task("addition", tmp_path, dialect="d1")
