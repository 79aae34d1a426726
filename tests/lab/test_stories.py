"""The source of the stories: its probabilities, its entropies, and what it cannot produce."""

import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest

from boe_vllm.lab.eval.cells import item_seed
from boe_vllm.lab.eval.run import main
from boe_vllm.lab.tasks import open_task, stories
from boe_vllm.lab.tasks.grammar import Grammar, State
from boe_vllm.lab.tasks.story_grammar import END, STORIES
from boe_vllm.lab.tasks.story_words import ALL


def small() -> Grammar:
    """Texts of two to four words, in which a later word repeats the first one."""
    return Grammar(
        {
            "START": lambda memory: [
                (1, "a REST .", {"said": "a"}),
                (3, "b REST .", {"said": "b"}),
            ],
            "REST": lambda memory: (
                [(1, "", {}), (1, "x SAID", {})]
                if memory["said"] == "a"
                else [(1, "x SAID", {}), (2, "y SAID", {}), (1, "SAID", {})]
            ),
            "SAID": lambda memory: [(1, memory["said"], {})],
        },
        "START",
    )


TEXTS = {"a .": 1 / 8, "a x a .": 1 / 8, "b x b .": 3 / 16, "b y b .": 3 / 8, "b b .": 3 / 16}
"""Every text of the small grammar with its probability, by hand."""


def beginnings(length: int) -> Counter[tuple[str, ...]]:
    """The distribution of the first words of the small grammar's stream, from whole texts."""
    found: Counter[tuple[str, ...]] = Counter()

    def add(words: tuple[str, ...], p: float) -> None:
        if len(words) >= length:
            found[words[:length]] += p
        else:
            for text, q in TEXTS.items():
                add((*words, *text.split()), p * q)

    add((), 1.0)
    return found


def entropy(ps) -> float:
    return -math.fsum(p * math.log(p) for p in ps)


def test_the_probabilities_of_a_small_grammar_are_those_of_its_texts():
    grammar = small()
    for length in (1, 2, 5):
        expected = beginnings(length)
        assert sum(expected.values()) == pytest.approx(1.0)
        for words in itertools.product("abxy.", repeat=length):
            assert math.exp(grammar.log_likelihood(words)) == pytest.approx(expected[words])


def test_the_entropies_of_a_small_grammar_are_those_of_its_texts():
    grammar = small()
    whole = [entropy(beginnings(n).values()) for n in range(7)]
    assert grammar.entropies(6) == pytest.approx(np.diff(whole))
    length = sum(p * len(text.split()) for text, p in TEXTS.items())
    assert grammar.text_entropy() == pytest.approx((entropy(TEXTS.values()), length))
    assert grammar.entropy_rate() == pytest.approx(entropy(TEXTS.values()) / length)


def test_samples_of_a_small_grammar_have_its_probabilities():
    stream, n = small().stream(random.Random(0)), 20000
    counts = Counter()
    for _ in range(n):
        text = [next(stream)]
        while text[-1] != ".":
            text.append(next(stream))
        counts[" ".join(text)] += 1
    assert set(counts) == set(TEXTS)
    for text, p in TEXTS.items():
        assert counts[text] / n == pytest.approx(p, abs=5 * (p / n) ** 0.5)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"S": lambda m: [(1, "a b", {}), (1, "a c", {})]}, "expected one alternative that begins"),
        ({"S": lambda m: [(0, "a", {})]}, "expected an alternative, got none"),
        ({"S": lambda m: [(1, "a T", {})], "T": lambda m: [(1, "", {})]}, "a word at the end"),
    ],
)
def test_a_grammar_whose_words_do_not_say_how_they_came_about_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        Grammar(rules, "S").entropy_rate()


# ---- the stories -------------------------------------------------------------------------------


def test_every_sampled_story_can_be_produced_and_its_mean_surprise_is_the_entropy():
    length, n = 127, 300
    samples = [
        list(itertools.islice(STORIES.stream(random.Random(seed)), length)) for seed in range(n)
    ]
    surprises = np.array([-STORIES.log_likelihood(words) for words in samples])
    assert np.isfinite(surprises).all()
    expected = STORIES.entropies(length).sum()
    assert abs(surprises.mean() - expected) < 4 * surprises.std() / n**0.5


def test_the_entropy_rate_is_what_the_entropies_of_the_words_tend_to():
    entropies = STORIES.entropies(1500)
    rate = STORIES.entropy_rate()
    assert entropies[1000:].mean() == pytest.approx(rate, rel=2e-3)
    assert not entropies[:127].mean() == pytest.approx(rate, rel=2e-3)


def test_states_that_are_alike_have_the_same_choices():
    """What the entropies rest on: a representative's probabilities are those of all it stands for,
    and its successors stand for theirs."""
    rng, state = random.Random(5), State()
    for _ in range(3000):
        options = STORIES.options(state)
        standing = STORIES.representative(state)

        def choices(options):
            return sorted((round(p, 12), repr(STORIES.representative(s))) for p, s in options)

        assert choices(options.values()) == choices(STORIES.options(standing).values())
        (state,) = rng.choices([s for _, s in options.values()], [p for p, _ in options.values()])


def test_the_words_are_those_that_occur():
    seen = set(itertools.islice(STORIES.stream(random.Random(1)), 60_000))
    assert seen == ALL | {END} and len(ALL) < 300


TALE = f"""\
yesterday , Vera and Carl hurried to the school with their dog . they painted three red hats .
the three red hats were cheap . soon Vera said " the bird always wakes " .
then Vera gave two of them to Carl and kept one . the red hat was rare .
suddenly their dog slept . but they were tired because it rained .
later Carl wrote " the bird always wakes " . at last Vera and Carl went home with one red hat .
everyone remembered " the bird always wakes " . {END} every day , Tom walks to the mill ."""


@pytest.mark.parametrize(
    ("before", "after", "broken"),
    [
        ("they painted", "she painted", "she"),
        ("they painted", "they paint", "paint"),
        ("three red hats .\n", "three red hat .\n", "hat"),
        ("the three red hats were", "the two red hats were", "two"),
        ("the three red hats were", "the three blue hats were", "blue"),
        ("the three red hats were", "the three red drums were", "drums"),
        ("hats were cheap", "hats was cheap", "was"),
        ("to Carl and kept", "to Tom and kept", "Tom"),
        ("kept one", "kept two", "two"),
        ("the red hat was", "the red hats were", "hats"),
        ("then Vera", "then Anna", "Anna"),
        ("their dog slept", "her dog slept", "her"),
        ("their dog slept", "their cat slept", "cat"),
        ('wrote " the bird always wakes', 'wrote " the bird never wakes', "never"),
        ("home with one red hat", "home with three red hats", "three"),
        ("Vera and Carl went", "Vera went", "went"),
        ("everyone", "Vera", "Vera"),
        ("every day , Tom walks", "every day , Tom walked", "walked"),
        ("school with", "school with with", "with"),
    ],
)
def test_a_text_that_breaks_an_agreement_is_impossible(before, after, broken):
    assert math.isfinite(STORIES.log_likelihood(TALE.split()))
    assert TALE.count(before) == 1
    words = TALE.replace(before, after).split()
    found = STORIES.log_probs(words)
    assert found[-1] == -math.inf and words[len(found) - 1] == broken
    assert STORIES.log_likelihood(words) == -math.inf


# ---- the task ----------------------------------------------------------------------------------


def test_items_share_a_prompt_and_differ_in_their_draws():
    task = open_task("stories")
    items = task.items(5, seed=1)
    assert items == task.items(5, seed=1) and items[:3] == task.items(3, seed=1)
    assert {item.prompt for item in items} == {END}
    assert [item.draw for item in items] == [0, 1, 2, 3, 4]
    assert len({item.answer for item in items}) == len({item_seed(0, item) for item in items}) == 5
    assert all(task.score(item, item.answer).valid for item in items)
    assert not task.score(items[0], "").valid
    with pytest.raises(ValueError, match="expected a number, got None"):
        task.items()


def test_texts_to_learn_from_are_others_than_those_to_be_judged():
    task = open_task("stories")
    stream = [item.answer for item in itertools.islice(task.stream(seed=1), 5)]
    assert stream == [item.answer for item in itertools.islice(task.stream(seed=1), 5)]
    assert len({*stream, *(item.answer for item in task.items(5, seed=1))}) == 10
    assert all(STORIES.log_likelihood(text.split()) > -math.inf for text in stream)


def test_a_text_is_the_beginning_of_a_stream_and_its_stories_are_judged_by_themselves():
    one, other = " ".join(TALE.split()).split(f" {END} ")
    right = stories.facts_of(TALE.split())
    assert right.possible and right.possible_stories == 2
    assert right.stories == (tuple(f"{one} {END}".split()), tuple(other.split()))
    assert right.first_wrong == right.words == len(TALE.split())
    assert right.surprise == pytest.approx(-STORIES.log_likelihood(TALE.split()))
    broken = TALE.replace("home with one red", "home with two red").split()
    wrong = stories.facts_of(broken)
    assert not wrong.possible and wrong.possible_stories == 1
    assert broken[wrong.first_wrong] == "two"
    assert broken[: wrong.first_wrong] == TALE.split()[: wrong.first_wrong]
    assert wrong.words == len(other.split())
    assert wrong.surprise == pytest.approx(-STORIES.log_likelihood(other.split()))
    assert stories.facts_of([]).stories == () and not stories.facts_of([]).possible


def test_entropy_and_repetitions_count_words_and_phrases():
    facts = stories.facts_of("a b c d a b c d a".split())
    assert facts.entropy == pytest.approx(entropy([3 / 9, 2 / 9, 2 / 9, 2 / 9]))
    assert facts.repeated == pytest.approx(2 / 6)  # abcd and bcda come a second time
    assert stories.facts_of(["a"]).repeated == 0


def test_the_figures_of_the_source_itself_are_right():
    texts = [item.answer.split() for item in open_task("stories").items(150, seed=3)]
    found = stories.figures(texts)
    assert found["possible"] == 1 and found["stories"].value == 1 and found["distinct"] == 1
    assert found["first wrong"] == stories.Mean(value=127.0, half=0.0)
    nats = found["nats a word"]
    assert abs(nats.value - STORIES.entropies(127).mean()) < 2 * nats.half < 0.1
    assert str(nats) == f"{nats.value:.3f} ± {nats.half:.3f}"
    assert stories.figures([["one"], ["the"]])["distinct"] is None


def test_a_ratio_of_means_has_the_interval_of_its_texts():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        weights = rng.integers(1, 9, 60).astype(float)
        values = weights * rng.normal(2.0, 0.7, 60)
        mean = stories.mean_of(values.tolist(), weights.tolist())
        inside += abs(mean.value - 2.0) < mean.half
    assert 0.90 < inside / 400 < 0.99
    assert stories.mean_of([1.0]) is None and stories.mean_of([0.0, 0.0], [0.0, 0.0]) is None


def test_eval_writes_what_the_source_says(tmp_path, capsys):
    command = ["--model", "tiny-text", "--tasks", "stories", "--policies", "ancestral,confidence"]
    command += ["--limit", "2", "--temperature", "1", "--tokens-per-step", "32", "--in-process"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:5]] == ["| source", "| ancestral", "| confidence"]
    records = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert len(records) == 4
    for record in records:
        words = record["text"].split()
        assert len(words) == record["tokens"] == 127 and set(words) <= ALL | {END, "<|unknown|>"}
        assert record["valid"] == math.isfinite(STORIES.log_likelihood(words))
    assert records[0]["text"] != records[1]["text"]
