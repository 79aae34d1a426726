"""Grammars without a finite automaton: a canvas from left to right, read by the engine's parser."""

import dataclasses
import json
import re

import jsonschema
import numpy as np
import pytest
from engine_config import engine_config
from test_grammar import VARIANTS, WORDS
from test_loop import EOS, MASK, NEEDED, finish, label, make_loop, model, params_of  # noqa: F401
from transformers import AutoTokenizer
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_types import StructuredOutputOptions

import boe_vllm
from boe_vllm.request.facts import ModelFacts
from boe_vllm.request.grammar import Grammar, Vocabulary
from boe_vllm.request.limits import ServerSettings
from boe_vllm.request.resolve import SamplingFields, resolve
from boe_vllm.request.resolved import ResolvedRequest
from boe_vllm.sampling.completions import Completions
from boe_vllm.sampling.constraints import Constraint, TokenConstraints
from boe_vllm.sampling.frontier import FrontierGrammar
from boe_vllm.vllm_plugin.grammars import vocabulary_of
from boe_vllm.vllm_plugin.prefix_grammars import GuidanceParser

# As many closing letters as opening ones, in their order: no finite automaton counts them.
NESTED = 'root ::= "a" root "b" | "c" root "d" | [e-h] root | "x" | "y" "z"?'
CLOSED_BY = {"a": "b", "c": "d"}
BLANK = len(WORDS)  # stands for a mask where the mask is a word


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
    return TokenConstraints(prefix_grammar=text, prefix_end=(23,))


def text_of(tokens):
    return b"".join(WORDS[token] for token in tokens if token != EOS).decode()


REWRITING = [
    {"policy": "remdm", "sigma_schedule": "rescale", "eta": 0.8},
    {"policy": "p2", "eta": 3.0},
    {"policy": "boe", "remask": "remdm", "sigma_schedule": "conf"},
    {"policy": "confidence", "block_length": 16, "steps": 4},
]


def paced(fields):
    pace = {} if "steps" in fields else {"tokens_per_step": 3}
    return {"block_length": 8} | pace | fields | NEEDED.get(fields["policy"], {})


def test_every_policy_writes_what_the_grammar_says_and_changes_no_other(model, words, nested):  # noqa: F811
    """All of them together, at two temperatures, beside free requests; some of them alone too."""
    asked = {}
    for n, fields in enumerate(VARIANTS + REWRITING):
        fields, two = paced(fields), {"prompt_len": 2, "max_tokens": 8}
        for temperature in (0.0, 1.0):
            one = {"temperature": temperature, "constraints": nested, "seed": n}
            name = f"{n} {label(fields)} {temperature}"
            asked[name] = ([1, 2, 3], params_of(fields, prompt_len=3, **one))
        asked[f"{n} free"] = ([4, 5], params_of(fields, temperature=1.0, seed=n, **two))
    crowd = make_loop(model, cache_rows=400, matchers=words)
    for name, request in asked.items():
        crowd.add(name, *request)
    tokens, _ = finish(crowd)
    for name, written in tokens.items():
        assert name.endswith("free") or satisfies_nested(text_of(written)), name
    for name in list(asked)[::7]:
        alone = make_loop(model, cache_rows=100, matchers=words)
        alone.add(name, *asked[name])
        assert finish(alone)[0][name] == tokens[name], name


@pytest.mark.parametrize("policy", ["confidence", "eb", "remdm"])
def test_a_prompts_masks_are_written_beside_it(model, words, nested, policy):  # noqa: F811
    loop = make_loop(model, matchers=words)
    fields = {"policy": policy, "block_length": 8}
    loop.add("x", [1, MASK, 2, MASK], params_of(fields, constraints=nested, temperature=1.0))
    canvas = loop.canvases["x"]
    tokens, _ = finish(loop)
    assert satisfies_nested(text_of(tokens["x"]))
    assert MASK not in canvas.tokens


def test_several_tokens_a_step_and_what_is_certain_without_one(model, words):  # noqa: F811
    """A text that can only be one takes no step; one with choices fewer than it has tokens."""
    constraints = [
        TokenConstraints(prefix_grammar=words.read(Grammar(kind="grammar", text=text), 60.0))
        for text in ('start: "klmno" "pq"', 'start: "k" start "l" | /[a-z]/', "start: /[a-z]{12}/")
    ]
    fields = {"policy": "confidence", "tokens_per_step": 4, "trace": True}
    loop = make_loop(model, matchers=words)
    for n, one in enumerate(constraints):
        loop.add(str(n), [1], params_of(fields, prompt_len=1, constraints=one, logprobs=True))
    assert loop.canvases["0"].done
    (result,) = loop.step(["0"]).values()
    assert result.done and text_of(result.tokens) == "klmnopq"
    loop.remove("0")
    tokens, reports = finish(loop)
    assert re.fullmatch("k*[a-z]l*", text_of(tokens["1"]))
    assert re.fullmatch("[a-z]{12}", text_of(tokens["2"]))
    assert reports["2"]["denoising_steps"] <= 6
    assert reports["2"]["trace"]["position"] == list(range(16))


# ---- the end of the canvas -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(boe_vllm.tiny_model_path(), trust_remote_code=False)


@pytest.fixture(scope="module")
def byte_parser(tokenizer):
    return GuidanceParser(vocabulary_of(tokenizer, 264), tokenizer.eos_token_id)


LIST = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": 3, "maximum": 77},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "weight": {"type": "number", "exclusiveMinimum": 0},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name", "weight", "kids"],
            "additionalProperties": False,
        }
    },
}
SUM = 'root ::= term (("+" | "-") term)*\nterm ::= [0-9]+ | "(" root ")" | [a-z]+ "(" root ")"'
TAGS = 'start: tag\ntag: "<p>" (tag | /[a-z ]+/)* "</p>"'
GRAMMARS = [
    (Grammar(kind="json", text=json.dumps(LIST)), '{"value":10,"next":null}'),
    (Grammar(kind="json", text=json.dumps(TREE)), None),
    (Grammar(kind="json_object"), "{}"),
    (Grammar(kind="grammar", text=SUM), "0"),
    (Grammar(kind="grammar", text=TAGS), "<p></p>"),
    (Grammar(kind="regex", text="[a-z]{3,9}end|(no )+"), None),
    (Grammar(kind="choice", text='["red", "green", "blue!"]'), None),
]


@pytest.mark.parametrize("grammar, least", GRAMMARS, ids=lambda v: str(v)[-20:])
def test_whatever_is_proposed_the_text_ends_within_its_canvas(byte_parser, grammar, least):
    """Random writes, from whatever is allowed; what the parser of vLLM's backend says of them."""
    text, rng, end, eos = byte_parser.read(grammar, 60.0), np.random.default_rng(0), 48, 257
    never = np.array([one is None for one in byte_parser.texts])
    never[eos] = False
    found = Completions(byte_parser.texts, never).find(byte_parser.open(text), end)
    assert least is None or len(found) == len(least)
    for _ in range(4):
        canvas = FrontierGrammar(
            byte_parser, text, length=64, end=end, eos_token_id=eos, never_V=never
        )
        assert canvas.possible
        tokens, masked = np.zeros(64, np.int64), np.ones(64, bool)
        while masked.any():
            n = int(masked.argmax())
            canvas.update(tokens, masked)
            allowed = canvas.constraint(n, Constraint()).allowed_token_ids
            token = int(rng.choice(allowed))
            if not canvas.permits(n, token):
                token = canvas.sure
                assert canvas.permits(n, token)
            assert not canvas.permits(n + 1, token) or n + 1 == 64
            tokens[n], masked[n] = token, False
            if rng.random() < 0.1:  # as a policy takes something back
                first = int(rng.integers(max(0, n - 5), n + 1))
                masked[first:] = True
        written = [int(token) for token in tokens if token != eos]
        assert tokens[len(written) :].tolist() == [eos] * (64 - len(written))
        assert len(written) <= end
        matcher = byte_parser.open(text)
        assert all(matcher.accept(token) for token in written) and matcher.accepting()
        if grammar.kind == "json":
            jsonschema.validate(json.loads(bytes(written)), json.loads(grammar.text))


def test_vllms_own_backend_accepts_what_is_written(byte_parser, tokenizer):
    config = engine_config()
    backend = GuidanceBackend(config, tokenizer, 264)
    for grammar, kind in (
        (Grammar(kind="grammar", text=SUM), StructuredOutputOptions.GRAMMAR),
        (Grammar(kind="json", text=json.dumps(TREE)), StructuredOutputOptions.JSON),
    ):
        own = byte_parser.open(byte_parser.read(grammar, 60.0))
        never = np.array([one is None for one in byte_parser.texts])
        end = Completions(byte_parser.texts, never).find(own, 64)
        theirs = backend.compile_grammar(kind, grammar.text)
        assert theirs.accept_tokens("x", list(end)) and theirs.ll_matcher.is_accepting()


def test_a_supposed_text_that_no_grammar_allows_says_nothing(words, nested):
    """As look-ahead supposes; and the canvas goes on from where it is."""
    never = np.arange(len(WORDS)) == MASK
    canvas = FrontierGrammar(
        words, nested.prefix_grammar, length=8, end=8, eos_token_id=EOS, never_V=never
    )
    tokens, base = np.full(8, BLANK), Constraint()
    tokens[:2] = 0, 1  # "ab"
    canvas.update(tokens, tokens == BLANK)
    assert canvas.constraint(2, base) is base and not canvas.permits(2, 23)
    assert canvas.certain() == {}
    tokens[1] = BLANK
    canvas.update(tokens, tokens == BLANK)
    assert canvas.permits(1, 23) and not canvas.permits(1, 1) and not canvas.permits(2, 23)
    assert set(canvas.constraint(1, base).allowed_token_ids) == {0, 2, 4, 5, 6, 7, 23, 24}
    assert canvas.constraint(2, base) is base


# ---- admission -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(byte_parser):
    return ModelFacts(
        vocab_size=264,
        max_model_len=256,
        mask_token_id=261,
        eos_token_id=257,
        encode=lambda text: list(text.encode()),
        vocabulary=lambda: Vocabulary(texts=byte_parser.texts),
        parser=lambda: byte_parser,
    )


def resolved(facts, grammar, fields=None, **sampling):
    return resolve(
        fields or {},
        prompt=[65],
        sampling=SamplingFields(grammar=grammar, **({"max_tokens": 32} | sampling)),
        server=ServerSettings(),
        model=facts,
    )


def test_free_order_wherever_it_can_be_and_a_request_may_choose(facts):
    regex, context_free = Grammar(kind="regex", text="a+"), GRAMMARS[3][0]
    bounded = Grammar(kind="json", text='{"type": "integer", "minimum": 3}')
    assert resolved(facts, regex).constraints.grammar is not None
    for grammar, fields in (
        (context_free, {}),
        (bounded, {}),
        (regex, {"grammar_order": "frontier"}),
        (context_free, {"grammar_order": "frontier"}),
    ):
        request = resolved(facts, grammar, fields)
        assert request.constraints.grammar is None and request.constraints.prefix_grammar
        again = ResolvedRequest.from_wire(request.to_wire()).constraints
        assert again.prefix_grammar == request.constraints.prefix_grammar


@pytest.mark.parametrize(
    "grammar, fields, sampling, message",
    [
        (GRAMMARS[3][0], {"grammar_order": "free"}, {}, "where grammar_order is 'free', got gram"),
        (GRAMMARS[0][0], {"grammar_order": "free"}, {}, "no 'maximum' in a schema"),
        (GRAMMARS[0][0], {}, {"max_tokens": 23}, "max_tokens: expected at least 24, the tokens of"),
        (GRAMMARS[3][0], {}, {"min_tokens": 2}, "min_tokens: expected none beside a grammar that"),
        (GRAMMARS[3][0], {"logits_eos_inf": True}, {}, "logits_eos_inf: expected none beside"),
        (GRAMMARS[3][0], {"canvas_template": ["a", 3]}, {}, "canvas_template: expected none"),
        (GRAMMARS[3][0], {}, {"bad_words": [[49, 49]]}, "bad_words: expected none beside"),
        (GRAMMARS[3][0], {}, {"allowed_token_ids": [40, 41]}, "some text of at most 256 tokens"),
        (Grammar(kind="grammar", text="start: ( a"), {}, {}, "a grammar that can be read, got"),
        (Grammar(kind="grammar", text=""), {}, {}, "a grammar that can be read, got"),
        (Grammar(kind="grammar", text="x" * (1 << 19)), {}, {}, "at most 262144 characters"),
        (Grammar(kind="json", text='{"not": {}}'), {}, {}, "no 'not' in a schema"),
        (Grammar(kind="structural_tag", text="{}"), {}, {}, "a structural_tag of a tag"),
        (
            Grammar(kind="grammar", text="start: " + "(" * 9000 + '"a"' + ")" * 9000),
            {},
            {},
            "too deeply nested",
        ),
        (
            # Which ends the process that reads it.
            Grammar(
                kind="grammar",
                text="start: r0\n"
                + "\n".join(f'r{n}: "a" r{n + 1} | "b" r{n + 1}' for n in range(8000))
                + '\nr8000: "z"',
            ),
            {},
            {},
            "got one where the parser has failed; make it smaller",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_followed_is_refused(facts, grammar, fields, sampling, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolved(facts, grammar, fields, **sampling)


def test_without_a_parser_only_automata_are_followed(facts, model, nested):  # noqa: F811
    bare = dataclasses.replace(facts, parser=None)
    assert resolved(bare, Grammar(kind="regex", text="a+")).constraints.grammar is not None
    with pytest.raises(ValueError, match="where no parser reads it from left to right"):
        resolved(bare, GRAMMARS[3][0])
    with pytest.raises(ValueError, match="where there is no parser"):
        make_loop(model).add("x", [1], params_of({}, constraints=nested))


def test_a_grammar_that_takes_too_long_is_refused(facts):
    own = Grammar(kind="grammar", text='start: "only here"')
    with pytest.raises(ValueError, match="grammar_timeout_s"):
        facts.parser().read(own, 1e-3)
