"""Classifier-free guidance: every query of a guided request gets the dense network's answer
with `V = V_u + (w + 1)(V_c - V_u)`, and an unguided request beside it is not touched."""

import dataclasses

import numpy as np
import pytest
import torch
from oracle import Dense
from test_importance import active_rows, ask_for, make_pass, response_drops, setting
from test_loop import NEEDED, VARIANTS, finish, make_loop, params_of

from boe_vllm.models.rows import pack
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.sampling.statistics import RowWrites, read_statistics
from boe_vllm.steering.chain import Conditional
from boe_vllm.steering.coupling import Coupling
from boe_vllm.steering.guidance import Guidance, guided, with_unconditional
from boe_vllm.steering.importance import TokenImportance
from boe_vllm.steering.lookahead import Lookahead
from boe_vllm.steering.step import DenoisingPass

MASK, W = 28, 1.5


def guided_pass(model, keep="masked", scales=(W, None, 0.5)):
    """The sequences of `make_pass`; those with a scale are guided."""
    plain = make_pass(model, keep)
    guides = [
        None if w is None else Guidance(scale=w, given=rows.tokens != MASK)
        for rows, w in zip(plain.sequences, scales, strict=True)
    ]
    packed, unconditional = with_unconditional(plain.sequences, guides, MASK)
    layout = pack(packed, plain.device)
    hidden, saved = model.run(model.embed(layout.tokens), layout)
    hidden = guided(hidden, layout, unconditional, guides)
    log_probs = plain.log_probs.of(hidden, np.zeros(len(hidden), bool))
    writes = RowWrites(temperature=np.zeros(len(hidden)), uniform=np.full(len(hidden), 0.5))
    read_statistics(log_probs, writes, keep=True)
    return DenoisingPass(
        model=model, sequences=plain.sequences, layout=layout, log_probs=log_probs, saved=saved,
        guides=tuple(guides), unconditional=unconditional, next_steps=plain.next_steps,
    )  # fmt: skip


class Pair:
    """The dense network on a sequence and its unconditional."""

    def __init__(self, dense, rows, guide):
        self.dense, self.guide, self.rows = dense, guide, rows
        tokens = torch.from_numpy(rows.tokens)
        empty = torch.from_numpy(np.where(guide.given, MASK, rows.tokens))
        self.x = [dense.embed(tokens), dense.embed(empty)]

    def log_probs(self, x, opened=None, networks=None):
        own, other = (
            network.logits(state, opened)
            for network, state in zip(networks or [self.dense] * 2, x, strict=True)
        )
        return self.dense.log_probs(other + (self.guide.scale + 1) * (own - other))

    def entropies(self, *args):
        logp = self.log_probs(*args)
        return -(logp.exp() * logp).sum(-1)

    def soft(self, positions, sharpen=1.0):
        logp = self.log_probs(self.x)[positions]
        return (logp / sharpen).softmax(-1) @ self.dense.w("wte")[: self.dense.config.vocab_size]


def importance_oracle(pair, query):
    """[C] by the definition: a write at position i changes both sequences."""
    dense, rows = pair.dense, pair.rows
    positions = rows.logit_positions[query.candidates]
    objective = rows.logit_positions[query.objective]
    soft, mask = pair.soft(positions, query.sharpen), dense.w("wte")[MASK]
    at = [x.clone() for x in pair.x]
    if query.surrogate == "inject":
        for x in at:
            x[positions] = soft
    at = [x.requires_grad_() for x in at]
    networks = [Kept(dense, x, rows, query) for x in pair.x]
    entropy = pair.entropies(at, active_rows(dense, query, rows), networks)[objective].sum()
    if query.surrogate in ("response", "rectified"):
        return sum(
            response_drops(
                dense,
                network,
                x,
                query,
                soft,
                positions,
                torch.autograd.grad(
                    entropy,
                    [o for _, o in network.attention],
                    allow_unused=True,
                    retain_graph=True,
                ),
            )
            for network, x in zip(networks, pair.x, strict=True)
        )
    if query.surrogate != "kv":
        gradients = torch.autograd.grad(entropy, at)
        return -sum((g[positions] * (soft - mask)).sum(-1) for g in gradients)
    scores = torch.zeros(len(positions), dtype=torch.float64)
    for network, x in zip(networks, pair.x, strict=True):
        flat = [t for kv in network.kv for t in kv]
        gradients = torch.autograd.grad(entropy, flat, allow_unused=True, retain_graph=True)
        old = [(k.detach(), v.detach()) for k, v in network.kv]
        for n, position in enumerate(positions):
            changed = x.clone()
            changed[position] = soft[n]
            dense.logits(changed, frozen=(int(position), old))
            for gradient, was, now in zip(
                gradients, [t for p in old for t in p], [t for p in dense.kv for t in p],
                strict=True,
            ):  # fmt: skip
                if gradient is not None:
                    scores[n] -= (gradient[position] * (now[position] - was[position])).sum()
    return scores


class Kept(Dense):
    """For "inject" with frozen context: rows that are not masked keep their keys and values."""

    def __init__(self, dense, x, rows, query):
        super().__init__(dense.config, dense.weights)
        self.live = None
        if query.surrogate == "inject" and query.context == "frozen":
            dense.logits(x)
            self.old = [(k.detach(), v.detach()) for k, v in dense.kv]
            self.live = torch.zeros(len(rows.tokens), dtype=torch.bool)
            self.live[dense.rows_of(rows.logit_positions)] = True

    def attend(self, q, k, v):
        if self.live is not None:
            was = self.old[len(self.kv) - 1]
            keep = self.live[:, None, None]
            k, v = torch.where(keep, k, was[0]), torch.where(keep, v, was[1])
        return super().attend(q, k, v)


CASES = [
    {"surrogate": "mask", "active": "all"},
    {"surrogate": "mask", "active": "masked", "objective": "remaining", "sharpen": 0.5},
    {"surrogate": "kv", "active": "masked"},
    {"surrogate": "kv", "active": "candidates"},
    {"surrogate": "response", "active": "masked"},
    {"surrogate": "rectified", "active": "all"},
    {"surrogate": "inject", "active": "masked"},
    {"surrogate": "inject", "active": "masked", "context": "exact"},
    {"surrogate": "inject", "active": "all", "context": "exact"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("shift", [0, 1])
def test_importance_is_that_of_the_guided_entropy(case, shift):
    model, dense = setting(shift=shift)
    keep = "all" if case["active"] == "all" else "masked"
    current = guided_pass(model, keep)
    queries = [(n, ask_for(rows, **case)) for n, rows in enumerate(current.sequences)]
    answers = TokenImportance.solve(current, queries)
    for s in (0, 2):
        want = importance_oracle(
            Pair(dense, current.sequences[s], current.guides[s]), queries[s][1]
        ).numpy()
        np.testing.assert_allclose(answers[s].value, want, rtol=1e-8, atol=1e-11)
        assert np.abs(want).max() > 1e-3
    plain = make_pass(model, keep)
    (alone,) = TokenImportance.solve(plain, [queries[1]])
    np.testing.assert_allclose(answers[1].value, alone.value, rtol=1e-10)
    cost = [dataclasses.astuple(answer)[1:] for answer in answers]
    assert cost[1] == dataclasses.astuple(alone)[1:]
    (unguided,) = TokenImportance.solve(plain, [queries[0]])
    assert cost[0] == tuple(2 * x for x in dataclasses.astuple(unguided)[1:])


def test_lookahead_states_are_guided():
    model, dense = setting()
    current = guided_pass(model)
    queries = []
    for s in range(len(current.sequences)):
        writes = (np.array([0]), np.array([1, 2]))
        queries.append((s, Lookahead(writes=writes, tokens=(np.array([4]), np.array([5, 6])))))
    for (s, query), answer in zip(queries, Lookahead.solve(current, queries), strict=True):
        rows, guide = current.sequences[s], current.guides[s]
        assert answer.forwards == (2 if guide is None else 4)
        assert answer.rows_forward == answer.forwards * len(rows.tokens)
        if guide is None:
            continue
        for written, tokens, prospect in zip(query.writes, query.tokens, answer.value, strict=True):
            pair = Pair(dense, rows, guide)
            for x in pair.x:
                x[rows.logit_positions[written]] = dense.embed(torch.from_numpy(tokens))
            want = pair.entropies(pair.x)[rows.logit_positions[prospect.index]]
            np.testing.assert_allclose(prospect.entropy, want.numpy(), rtol=1e-9)


def test_soft_lookahead_writes_both_sequences():
    model, dense = setting()
    current = guided_pass(model)
    rows, guide = current.sequences[0], current.guides[0]
    (answer,) = Lookahead.solve(current, [(0, Lookahead(writes=(np.array([1]),), tokens=None))])
    pair = Pair(dense, rows, guide)
    position = rows.logit_positions[[1]]
    soft = pair.soft(position)
    for x in pair.x:
        x[position] = soft
    want = pair.entropies(pair.x)[rows.logit_positions[answer.value[0].index]]
    np.testing.assert_allclose(answer.value[0].entropy, want.numpy(), rtol=1e-9)


def frozen_log_probs(pair, places, tokens, read):
    """Log-probabilities of the places with tokens there, all keys and values frozen but those of
    their rows and of the rows at which those in `read` are read."""
    query = dataclasses.replace(
        ask_for(pair.rows, surrogate="inject"), candidates=places, objective=places
    )
    networks = [Kept(pair.dense, x, pair.rows, query) for x in pair.x]
    changed = [x.clone() for x in pair.x]
    for network, x in zip(networks, changed, strict=True):
        network.live[:] = False
        network.live[pair.rows.logit_positions[places]] = True
        network.live[pair.dense.read_at(pair.rows.logit_positions[read])] = True
        x[pair.rows.logit_positions[places]] = pair.dense.embed(torch.from_numpy(tokens))
    return pair.log_probs(changed, None, networks)[pair.rows.logit_positions[places]]


@pytest.mark.parametrize("shift", [0, 1])
def test_conditionals_are_guided(shift):
    model, dense = setting(shift=shift)
    current = guided_pass(model)
    queries = [
        (s, Conditional(
            written=np.array([0]), tokens=np.array([4]), queried=np.array([1, 3]),
            temperature=0.0, uniform=np.full(2, 0.5),
        )) for s in range(3)
    ]  # fmt: skip
    answers = Conditional.solve(current, queries)
    for s in (0, 2):
        pair = Pair(dense, current.sequences[s], current.guides[s])
        logp = frozen_log_probs(pair, np.array([0, 1, 3]), np.array([4, MASK, MASK]), [1, 3])[1:]
        want = -(logp.exp() * logp).sum(-1).numpy()
        np.testing.assert_allclose(answers[s].value.entropy, want, rtol=1e-9)
        assert answers[s].value.proposal.tolist() == logp.argmax(-1).tolist()
    assert [a.forwards for a in answers] == [2, 1, 2]
    if not shift:
        assert [a.rows_forward for a in answers] == [6, 3, 6]


@pytest.mark.parametrize("estimator", ["exact", "pairs"])
@pytest.mark.parametrize("shift", [0, 1])
def test_measured_couplings_are_guided(estimator, shift):
    model, dense = setting(shift=shift)
    current = guided_pass(model)
    queries = [
        (s, Coupling(
            pool=np.array([0, 2]), tokens=np.array([4, 5]), entropy=np.ones(2),
            estimator=estimator, measure="kl",
        )) for s in range(3)
    ]  # fmt: skip
    answers = Coupling.solve(current, queries)
    for s in (0, 2):
        rows = current.sequences[s]
        pair = Pair(dense, rows, current.guides[s])
        old = pair.log_probs(pair.x)[rows.logit_positions]
        total = 0.0
        for written, other, token in ((0, 2, 4), (2, 0, 5)):
            places = np.array([0, 2]) if estimator == "pairs" else np.arange(len(old))
            tokens = np.where(places == written, token, MASK)
            new = frozen_log_probs(pair, places, tokens, [0, 2])[list(places).index(other)]
            total += float((new.exp() * (new - old[other])).sum())
        np.testing.assert_allclose(answers[s].value, [[0, total], [total, 0]], rtol=1e-9)
        assert answers[s].forwards == 2


def test_a_cache_is_refused_beside_guidance():
    message = r"cfg_scale: expected cache 'none' beside it, got cache='dual'.*remove one"
    with pytest.raises(ValueError, match=message):
        parse_sampler_config({"cfg_scale": 1, "cache": "dual"})


@pytest.fixture(scope="module")
def model():
    return setting()[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fields", VARIANTS, ids=lambda f: "-".join(map(str, f.values()))[:40])
def test_every_policy_ends_under_guidance_alone_as_in_a_batch(model, fields, temperature):
    prompt = [3, MASK, 9, 4]
    more = {"tokens_per_step": 2, "block_length": 5, "trace": True}
    params = params_of(
        fields | more | {"cfg_scale": 0.7}, prompt_len=4, max_tokens=10, temperature=temperature
    )
    alone = make_loop(model)
    alone.add("x", prompt, params)
    want = finish(alone)
    crowd = make_loop(model)
    crowd.add("a", [1, 2], params_of(fields | {"block_length": 5}, prompt_len=2, max_tokens=10))
    crowd.add("x", prompt, params)
    crowd.add("b", [5, 2], params_of({"cfg_scale": 2.0} | NEEDED["pc"] | {"policy": "pc"}))
    tokens, reports = finish(crowd)
    assert tokens["x"] == want[0]["x"] and reports["x"] == want[1]["x"]
    assert MASK not in tokens["x"] and len(tokens["x"]) == 10
    assert reports["x"]["forwards"] % 2 == 0


def test_guidance_of_zero_is_no_guidance(model):
    loop = make_loop(model)
    loop.add("x", [1, 2], params_of({"cfg_scale": 0}, prompt_len=2, max_tokens=4))
    _, reports = finish(loop)
    assert reports["x"]["forwards"] == 4
