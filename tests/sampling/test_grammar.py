"""A grammar on a canvas that is filled in any order, against Python's `re` over all completions."""

import itertools
import re

import numpy as np
import pytest
from test_loop import EOS, MASK, NEEDED, finish, make_loop, model, params_of  # noqa: F401

from boe_vllm.policies import POLICY_NAMES
from boe_vllm.request.grammar import Grammar, over_bytes
from boe_vllm.sampling.automaton import END, TokenAutomaton, over_tokens
from boe_vllm.sampling.canvas_constraints import CanvasConstraints
from boe_vllm.sampling.constraints import Constraint, TokenConstraints
from boe_vllm.sampling.grammar import CanvasGrammar

TEXTS = [b"a", b"b", b"ab", b"-", b"1", b"ba-", None, b"\xc3", b"\xa9"]
VOCAB, LAST, SIZE = len(TEXTS) + 1, len(TEXTS), 4  # the last token ends the text
BLANK = VOCAB  # what stands for a mask here
REGEXES = ["(ab)+", "a{2,3}|b1?", "[ab]*-?1", "é|a?b?", "(a|ab)(b|-)*1?", ""]


@pytest.fixture(scope="module")
def automata():
    found = {}
    for regex in REGEXES:
        automaton = over_bytes(Grammar(kind="regex", text=regex), timeout=60.0)
        found[regex] = over_tokens(automaton, [*TEXTS, b"</s>"], LAST)
    return found


def satisfies(regex, tokens, end, early, ends):
    """Whether a full canvas does, by the definition."""
    if any(token in ends for token in tokens[:early]):
        return False
    texts = list(tokens)
    while texts and texts[-1] == LAST:
        texts.pop()
    if len(texts) > end or any(token == LAST or TEXTS[token] is None for token in texts):
        return False
    try:
        text = b"".join(TEXTS[token] for token in texts).decode()
    except UnicodeDecodeError:
        return False
    return re.fullmatch(regex, text) is not None


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("end, early", [(SIZE, 0), (3, 0), (SIZE, 2), (1, 1)])
def test_exactly_what_some_completion_allows_may_be_written(automata, regex, end, early):
    """In states that a random order of writes comes through, back and forth."""
    ends = (LAST, 4) if early else (LAST,)
    whole = [
        tokens
        for tokens in itertools.product(range(VOCAB), repeat=SIZE)
        if satisfies(regex, tokens, end, early, ends)
    ]
    canvas = CanvasGrammar(automata[regex], length=SIZE, end=end, early=early, ends=ends)
    assert canvas.possible == bool(whole)
    rng, base = np.random.default_rng(0), Constraint()
    for _ in range(12 if whole else 0):
        tokens = np.full(SIZE, BLANK)
        for position in rng.permutation(SIZE).tolist():
            masked = tokens == BLANK
            canvas.update(tokens, masked)
            fitting = [
                full
                for full in whole
                if all(blank or t == f for t, f, blank in zip(tokens, full, masked, strict=True))
            ]
            allowed = [{full[n] for full in fitting} for n in range(SIZE)]
            for n in np.flatnonzero(masked).tolist():
                assert set(canvas.constraint(n, base).allowed_token_ids) == allowed[n]
                assert {t for t in range(VOCAB) if canvas.permits(n, t)} == allowed[n]
            sure = {n: min(allowed[n]) for n in range(SIZE) if masked[n] and len(allowed[n]) == 1}
            assert canvas.certain() == sure
            tokens[position] = rng.choice(sorted(allowed[position]))


@pytest.mark.parametrize("regex", REGEXES)
def test_the_least_length_is_that_of_the_shortest_text(automata, regex):
    lengths = [
        length
        for length in range(SIZE + 1)
        for tokens in itertools.product(range(LAST), repeat=length)
        if satisfies(regex, tokens, SIZE, 0, (LAST,))
    ]
    assert automata[regex].least() == min(lengths)


def test_an_automaton_travels_as_text(automata):
    for automaton in automata.values():
        again = TokenAutomaton.from_text(automaton.to_text())
        assert (again.class_of_V == automaton.class_of_V).all()
        assert (again.next_TC == automaton.next_TC).all()
        assert (again.accepting_T == automaton.accepting_T).all()
        assert again.start == automaton.start


def test_tokens_that_are_taken_away_lead_nowhere(automata):
    automaton = automata["(ab)+"]
    assert automaton.least() == 1  # one token is "ab"
    without = automaton.without(np.arange(VOCAB) == 2)
    assert without.least() == 2
    nothing = automaton.without(np.arange(VOCAB) != LAST)
    assert nothing.least() is None
    assert automaton.class_of_V[LAST] == END and without.class_of_V[LAST] == END


def test_writes_of_one_step_stand_together(automata):
    """Each alone leaves the rest writable; the second does not beside the first."""
    demanded = TokenConstraints(grammar=automata["a{2,3}|b1?"])
    rules = CanvasConstraints(demanded, 1, length=SIZE, end=SIZE)
    tokens = np.array([BLANK, *[BLANK] * SIZE])
    masked = tokens == BLANK
    positions, writes = np.array([1, 2, 3, 4]), np.array([0, 4, 0, LAST])  # a 1 a </s>
    assert rules.standing(tokens, masked, positions, writes).tolist() == [True, False, True, True]
    assert rules.standing(tokens, masked, positions[[1, 0]], writes[[1, 0]]).tolist() == [
        True,
        False,
    ]
    assert rules.depends_on_tokens and demanded.any


# ---- in the loop ---------------------------------------------------------------------------------

WORDS = [bytes([97 + n]) for n in range(26)] + [b"ab", b"</s>", None]  # 27 ends, 28 is the mask
WORDS[EOS] = b"</s>"
LOOP_REGEX = "(ab|cd|[e-h]{2})+x(yz)?"


@pytest.fixture(scope="module")
def demanded():
    automaton = over_bytes(Grammar(kind="regex", text=LOOP_REGEX), timeout=60.0)
    return TokenConstraints(grammar=over_tokens(automaton, WORDS, EOS))


def text_of(tokens):
    return b"".join(WORDS[token] for token in tokens if token != EOS).decode()


VARIANTS = [
    *({"policy": name} for name in sorted(POLICY_NAMES)),
    {"policy": "boe", "remask": "remdm"},
    {"policy": "remdm", "sigma_schedule": "loop"},
    {"policy": "joint", "cache": "dual"},
    {"policy": "confidence", "cfg_scale": 1.0},
    {"policy": "eb", "confidence_eos_eot_inf": True},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_policy_writes_what_the_grammar_says(model, demanded, fields, temperature):  # noqa: F811
    """Beside requests without one, which it does not change, as it is not by them."""
    fields = {"block_length": 8, "tokens_per_step": 3} | fields | NEEDED.get(fields["policy"], {})
    free = params_of(fields, prompt_len=2, temperature=temperature)
    bound = params_of(fields, prompt_len=3, temperature=temperature, constraints=demanded)
    results = []
    for company in ((), ("y", "z"), ("x", "y", "z")):
        loop = make_loop(model, cache_rows=100)
        for name in company or ("x",):
            if name == "x":
                loop.add(name, [1, 2, 3], bound)
            else:
                loop.add(name, [4, 5], free)
        results.append(finish(loop)[0])
    assert re.fullmatch(LOOP_REGEX, text_of(results[0]["x"]))
    assert results[2] == results[0] | results[1]


def test_what_is_certain_is_written_without_a_step(model):  # noqa: F811
    """A template of all but three letters, written as a grammar."""
    automaton = over_bytes(Grammar(kind="regex", text="abc[ab]{3}defghijk"), timeout=60.0)
    bytes_only = [*WORDS[:26], None, b"</s>", None]
    constraints = TokenConstraints(grammar=over_tokens(automaton, bytes_only, EOS))
    fields = {"policy": "confidence", "block_length": 8, "trace": True}
    loop = make_loop(model)
    loop.add("x", [1], params_of(fields, prompt_len=1, constraints=constraints, logprobs=True))
    tokens, reports = finish(loop)
    assert re.fullmatch("abc[ab]{3}defghijk", text_of(tokens["x"]))
    assert reports["x"]["denoising_steps"] == 3
    trace = reports["x"]["trace"]
    assert trace["position"] == list(range(16)) and MASK not in tokens["x"]
