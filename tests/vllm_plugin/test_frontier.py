"""Grammars without a finite automaton: a canvas from left to right, read by the engine's parser."""

import pytest
from test_grammar import VARIANTS, WORDS
from test_loop import EOS, MASK, NEEDED, finish, make_loop, model, params_of  # noqa: F401

from boe_vllm.request.grammar import Grammar, Vocabulary
from boe_vllm.sampling.constraints import TokenConstraints
from boe_vllm.vllm_plugin.prefix_grammars import GuidanceParser

# As many closing letters as opening ones, in their order: no finite automaton counts them.
NESTED = 'root ::= "a" root "b" | "c" root "d" | [e-h] root | "x" | "y" "z"?'
CLOSED_BY = {"a": "b", "c": "d"}


def satisfies_nested(text):
    """Whether a text does, by the grammar's definition."""
    opened = []
    while text and text[0] in "acefgh":
        if text[0] in CLOSED_BY:
            opened.append(CLOSED_BY[text[0]])
        text = text[1:]
    return text in {middle + "".join(reversed(opened)) for middle in ("x", "y", "yz")}


@pytest.fixture(scope="module")
def words():
    return GuidanceParser(Vocabulary(texts=WORDS), EOS)


@pytest.fixture(scope="module")
def nested(words):
    text = words.read(Grammar(kind="grammar", text=NESTED), 60.0)
    return TokenConstraints(prefix_grammar=text)


def text_of(tokens):
    return b"".join(WORDS[token] for token in tokens if token != EOS).decode()


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_policy_writes_what_the_grammar_says(model, words, nested, fields, temperature):  # noqa: F811
    """Beside requests without one, which it does not change, as it is not by them."""
    fields = {"block_length": 8, "tokens_per_step": 3} | fields | NEEDED.get(fields["policy"], {})
    free = params_of(fields, prompt_len=2, temperature=temperature)
    bound = params_of(fields, prompt_len=3, temperature=temperature, constraints=nested)
    results = []
    for company in ((), ("y", "z"), ("x", "y", "z")):
        loop = make_loop(model, cache_rows=100, matchers=words)
        for name in company or ("x",):
            if name == "x":
                loop.add(name, [1, 2, 3], bound)
            else:
                loop.add(name, [4, 5], free)
        results.append(finish(loop)[0])
    assert satisfies_nested(text_of(results[0]["x"]))
    assert results[2] == results[0] | results[1]
