"""What a request says about its tokens holds at every position, whoever writes it and when."""

import itertools

import numpy as np
import pytest
import torch
from test_loop import EOS, MASK, NEEDED, finish, make_loop, model, params_of  # noqa: F401

from boe_vllm.policies import POLICY_NAMES
from boe_vllm.request.given_text import GivenText
from boe_vllm.request.resolved import plan_canvas
from boe_vllm.sampling.canvas_constraints import CanvasConstraints
from boe_vllm.sampling.constraints import NEVER, Constraint, TokenConstraints

VOCAB = 29
POLICIES = sorted(POLICY_NAMES)


def run(
    model,  # noqa: F811
    fields,
    constraints,
    *,
    temperature=1.0,
    seed=0,
    prompt=(1, 2, 3),
    others=0,
    **changes,
):  # noqa: F811
    """One request's tokens and report, with other requests beside it."""
    loop = make_loop(model)
    fields = fields | NEEDED.get(fields.get("policy"), {})
    params = params_of(
        fields if "choices" in fields else {"block_length": 8} | fields,
        prompt_len=len(prompt),
        temperature=temperature,
        seed=seed,
        constraints=constraints,
        **changes,
    )
    for n in range(others):
        loop.add(f"o{n}", [4, 5], params_of({"policy": "boe"}, prompt_len=2, temperature=1.0))
    loop.add("x", list(prompt), params)
    tokens, reports = finish(loop)
    return tokens["x"], reports["x"]


# ---- the rules themselves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "top_k, top_p, min_p", [*itertools.product((0, 3), (1.0, 0.6), (0.0, 0.3))]
)
def test_filters_are_vllms(top_k, top_p, min_p):
    """Against vLLM's own samplers, on random distributions."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    logits = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(1)).double()
    want = logits.clone()
    p = want.softmax(-1)
    want[p < min_p * p.amax(-1, keepdim=True)] = -torch.inf
    k = torch.full((64,), top_k) if top_k else None
    want = apply_top_k_top_p_pytorch(want, k, torch.full((64,), top_p).double())
    got = Constraint(top_k=top_k, top_p=top_p, min_p=min_p).filter(logits.softmax(-1))
    got = got / got.sum(-1, keepdim=True)
    torch.testing.assert_close(got, want.softmax(-1), atol=1e-12, rtol=0)


def test_edits_are_of_the_named_rows_only():
    logits = torch.zeros(3, VOCAB)
    rule = Constraint(
        allowed_token_ids=np.array([1, 2, 3]),
        banned_token_ids=np.array([2]),
        biased_token_ids=np.array([3, 9]),
        logit_bias=np.array([1.5, 4.0]),
    )
    rule.edit(logits, torch.tensor([0, 2]))
    assert logits[1].eq(0).all()
    for row in (0, 2):
        assert logits[row, 1] == 0 and logits[row, 3] == 1.5
        others = [t for t in range(VOCAB) if t not in (1, 3)]
        assert (logits[row, others] <= NEVER / 2).all()
    assert [t for t in range(VOCAB) if rule.permits(t)] == [1, 3]


def test_a_bad_word_forbids_the_token_that_would_complete_it():
    table = CanvasConstraints(TokenConstraints(bad_words=((5, 6, 7),)), prompt_len=0)
    tokens = np.array([MASK, 6, 7, MASK, 5, MASK, 7, MASK])
    masked = tokens == MASK
    rules = table.at(tokens, masked, np.flatnonzero(masked))
    assert [rule.banned_token_ids.tolist() for rule in rules] == [[5], [], [6], []]
    # Together, two writes of one step would make the word: the second does not stand.
    blank = np.full(3, MASK)
    stand = table.standing(blank, blank == MASK, np.array([2, 0, 1]), np.array([7, 5, 6]))
    assert stand.tolist() == [True, True, False]


# ---- every policy, alone and in a batch ----------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_every_demand(model, policy):  # noqa: F811
    allowed = np.array([2, 3, 5, 7, 11, EOS])
    constraints = TokenConstraints(
        everywhere=Constraint(allowed_token_ids=allowed, banned_token_ids=np.array([5]), top_k=4),
        min_tokens=9,
        stop_token_ids=(EOS,),
        bad_words=((2, 3), (7, 7)),
    )
    fields = {"policy": policy, "tokens_per_step": 3}
    tokens, report = run(model, fields, constraints, seed=2)
    assert set(tokens) <= {2, 3, 7, 11, EOS}
    assert EOS not in tokens[:9]
    assert not {(2, 3), (7, 7)} & set(itertools.pairwise(tokens))
    assert run(model, fields, constraints, seed=2, others=3) == (tokens, report)


def test_a_large_bias_decides(model):  # noqa: F811
    constraints = TokenConstraints(
        everywhere=Constraint(biased_token_ids=np.array([6]), logit_bias=np.array([100.0]))
    )
    tokens, _ = run(model, {"policy": "confidence"}, constraints)
    assert set(tokens) == {6}


def test_top_k_of_one_is_the_argmax(model):  # noqa: F811
    fields = {"policy": "confidence", "trace": True}
    greedy = run(model, fields, TokenConstraints(), temperature=0.0)
    assert (
        run(
            model, fields, TokenConstraints(everywhere=Constraint(top_k=1)), temperature=2.0, seed=3
        )
        == greedy
    )
    assert (
        run(
            model,
            fields,
            TokenConstraints(everywhere=Constraint(top_p=1e-9)),
            temperature=2.0,
            seed=3,
        )
        == greedy
    )
    assert (
        run(
            model,
            fields,
            TokenConstraints(everywhere=Constraint(min_p=1.0)),
            temperature=2.0,
            seed=3,
        )
        == greedy
    )
    assert run(model, fields, TokenConstraints(), temperature=2.0, seed=3) != greedy


def test_filters_change_no_confidence(model):  # noqa: F811
    """They restrict the sample; policies still see the model's own probabilities."""
    fields = {"policy": "confidence", "trace": True, "tokens_per_step": 16, "block_length": 16}
    _, report = run(model, fields, TokenConstraints(everywhere=Constraint(top_k=1)))
    _, greedy = run(model, fields, TokenConstraints(), temperature=0.0)
    assert report["trace"]["confidence"] == greedy["trace"]["confidence"]
    assert max(report["trace"]["confidence"]) < 0.999


def test_demands_that_leave_nothing_fail_the_request_alone(model):  # noqa: F811
    """Of two tokens one may not follow itself nor the other: a third position has none left."""
    constraints = TokenConstraints(
        everywhere=Constraint(allowed_token_ids=np.array([2])), bad_words=((2, 2),)
    )
    loop = make_loop(model)
    fields = {"policy": "confidence", "tokens_per_step": 8}
    loop.add("x", [1], params_of(fields, prompt_len=1, constraints=constraints))
    loop.add("y", [1], params_of(fields, prompt_len=1))
    errors = {}
    for _ in range(4):
        for name, result in loop.step(list(loop.canvases)).items():
            if result.error:
                errors[name] = result.error
            if result.error or result.done:
                loop.remove(name)
    assert not loop.canvases
    assert list(errors) == ["x"] and "allowed_token_ids" in errors["x"]


def test_only_the_tokens_left_are_counted():
    rule = Constraint(allowed_token_ids=np.array([1, 2, MASK]), banned_token_ids=np.array([1]))
    assert TokenConstraints(everywhere=rule).tokens_left(VOCAB, MASK) == 1
    assert (
        TokenConstraints(everywhere=rule, min_tokens=1, stop_token_ids=(2,)).tokens_left(
            VOCAB, MASK
        )
        == 0
    )
    assert TokenConstraints().tokens_left(VOCAB, MASK) == VOCAB - 1


# ---- templates, infilling, answers ---------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_templates_text_stays_where_it_is(model, policy):  # noqa: F811
    template = [[7, 8], 5, [9], 6, [10, 11]]
    fields = {"policy": policy, "canvas_template": template, "tokens_per_step": 2, "eta": 1.0}
    if policy not in ("p2", "remdm"):
        fields.pop("eta")
    tokens, report = run(model, fields, TokenConstraints(), others=3)
    assert len(tokens) == 16 and MASK not in tokens
    assert tokens[:2] == [7, 8] and tokens[7] == 9 and tokens[14:] == [10, 11]
    assert run(model, fields, TokenConstraints()) == (tokens, report)


def test_a_templates_text_is_certain(model):  # noqa: F811
    loop = make_loop(model)
    fields = {"policy": "confidence", "canvas_template": [[7], 3]}
    loop.add("x", [1], params_of(fields, prompt_len=1, logprobs=True, top_logprobs=1))
    rows = []
    while loop.canvases:
        result = loop.step(["x"])["x"]
        rows += result.logprobs
        if result.done:
            loop.remove("x")
    assert (rows[0].token_ids, rows[0].logprobs) == ([7], [0.0])
    assert len(rows) == 4 and all(row.logprobs[0] < 0 for row in rows[1:])


def test_infilled_tokens_are_reported(model):  # noqa: F811
    prompt = (1, MASK, MASK, 4, MASK)
    tokens, report = run(model, {"policy": "confidence"}, TokenConstraints(), prompt=prompt)
    assert [run["position"] for run in report["infill"]] == [1, 4]
    assert [len(run["tokens"]) for run in report["infill"]] == [2, 1]
    assert MASK not in np.concatenate([run["tokens"] for run in report["infill"]])
    assert "infill" not in run(model, {"policy": "confidence"}, TokenConstraints())[1]


def chain(model, prompt, answer, length):  # noqa: F811
    """Log-likelihood of an answer from left to right, by the network alone."""
    from boe_vllm.models.rows import SequenceRows, pack

    total = 0.0
    for k in range(len(answer)):
        tokens = np.array([*prompt, *answer[:k], *[MASK] * (length - k)])
        rows = SequenceRows(tokens=tokens, logit_positions=np.array([len(prompt) + k]))
        layout = pack((rows,), torch.device("cpu"))
        hidden, _ = model.run(model.embed(layout.tokens), layout)
        logits = model.logits(hidden)[0].double()
        logits[MASK] = -torch.inf
        total += float(logits.log_softmax(-1)[answer[k]])
    return total


@pytest.mark.parametrize("others", [0, 4])
def test_the_answer_is_the_likeliest_one(model, others):  # noqa: F811
    answers = [[5, 6, 7], [5, 6], [5, 9], [12], [13, 14, 15, 16]]
    tokens, report = run(
        model, {"choices": answers}, TokenConstraints(), temperature=0.0, others=others
    )
    want = [chain(model, (1, 2, 3), answer, 5) for answer in answers]
    assert report["choices"]["logprobs"] == pytest.approx(want, abs=2e-4)
    best = int(np.argmax(want))
    assert report["choices"]["index"] == best and report["policy"] == "choices"
    assert tokens == answers[best] + [EOS] * (5 - len(answers[best]))


def test_an_answer_of_one_token_costs_two_forwards(model):  # noqa: F811
    _, report = run(model, {"choices": [[5], [6], [7]]}, TokenConstraints(), temperature=0.0)
    assert report["forwards"] == 1


def test_answers_are_drawn_by_their_likelihood(model):  # noqa: F811
    answers = [[5], [6], [7]]
    drawn = [
        run(model, {"choices": answers}, TokenConstraints(), seed=s)[1]["choices"]["index"]
        for s in range(60)
    ]
    logprobs = run(model, {"choices": answers}, TokenConstraints())[1]["choices"]["logprobs"]
    p = np.exp(logprobs) / np.exp(logprobs).sum()
    counts = np.bincount(drawn, minlength=3)
    assert (np.abs(counts / 60 - p) < 4 * np.sqrt(p * (1 - p) / 60) + 0.01).all()


# ---- their validation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"canvas_template": []}, "canvas_template: .*at least 1 item"),
        ({"canvas_template": [0]}, "canvas_template"),
        ({"choices": [""]}, "choices"),
        ({"choices": [[5]], "canvas_template": [3]}, "choices: expected no canvas_template"),
        ({"choices": [[5]], "policy": "boe"}, "choices: expected only .* policy"),
        ({"canvas_template": [[1], 40], "gen_length": 8}, "gen_length: expected at least the 41"),
        ({"canvas_template": [200]}, "canvas_template: expected a canvas of at most 125"),
    ],
    ids=str,
)
def test_bad_content_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        params_of(fields, prompt_len=3)


def test_content_is_encoded_once():
    encode = {"ab": [1, 2], "c": [3]}.get
    content = GivenText(canvas_template=["ab", 4, "c", [9]])
    tokens = content.encoded(encode, VOCAB)
    assert tokens.given() == {"canvas_template": [[1, 2], 4, [3], [9]]}
    assert tokens.encoded(None, VOCAB) == tokens
    assert tokens.template(0) == [1, 2, 0, 0, 0, 0, 3, 9]
    choices = GivenText(choices=["ab", "c"])
    assert choices.encoded(encode, VOCAB).given() == {"choices": [[1, 2], [3]]}
    with pytest.raises(ValueError, match="choices: expected answers that differ"):
        GivenText(choices=["ab", [1, 2]]).encoded(encode, VOCAB)
    with pytest.raises(ValueError, match="no tokenizer"):
        content.encoded(None, VOCAB)
    with pytest.raises(ValueError, match="expected token ids below 9, got 9"):
        content.encoded(encode, 9)


def test_a_template_is_as_long_as_it_is():
    from boe_vllm.request.config import parse_sampler_config

    base = parse_sampler_config({"gen_length": 64, "block_length": 8})
    config = parse_sampler_config({"canvas_template": [[1], 20]}, base=base)
    plan = plan_canvas(config, prompt_len=3, max_tokens=4, max_model_len=100)
    assert (plan.gen_length, plan.block_length) == (21, 8)
    with pytest.raises(ValueError, match="canvas_template: expected in a request only"):
        parse_sampler_config({"canvas_template": [3]})
