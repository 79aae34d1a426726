"""Rivals of the chain rule on whole requests in float64: each equals a slow transcription of its
authors' rule, one dense forward after another, one position at a time."""

import math

import numpy as np
import pytest
import torch
from test_authors_rules import BLOCK, LENGTH, MASK, decoded, network, prompts  # noqa: F401
from test_loop import finish, make_loop, params_of
from test_policies import make_view, policy_of, run

from boe_vllm.policies.dapd import independent_set


class Slow:
    """One request; a rule sees `p`, the masked positions and the sequence."""

    def __init__(self, dense, prompt):
        self.dense, self.x = dense, list(prompt) + [MASK] * LENGTH
        self.prompt, self.memory, self.forwards = len(prompt), {}, 0

    def predict(self, x):
        logits = self.dense.logits(self.dense.embed(torch.tensor(x)))
        logits[:, MASK] = -1e30
        self.forwards += 1
        return logits.log_softmax(-1)

    def decode(self, rule):
        for begin in range(self.prompt, len(self.x), BLOCK):
            self.memory = {}
            while masked := [i for i in range(begin, begin + BLOCK) if self.x[i] == MASK]:
                logp = self.predict(self.x)
                tokens = {i: int(logp[i].argmax()) for i in masked}
                for i, token in rule(self, logp, masked, tokens).items():
                    self.x[i] = token
        return self.x[self.prompt :]


def ranked(p, masked):
    return sorted(masked, key=lambda i: (-p[i], i))


def hierarchy(slow, logp, masked, tokens, low=0.4, threshold=0.9):
    p = {i: math.exp(logp[i, tokens[i]]) for i in masked}
    best = ranked(p, masked)[0]
    written, run_ = {best}, []
    for i in [*masked, None]:
        if run_ and (i is None or i != run_[-1] + 1):
            surest = ranked(p, run_)[0]
            if p[surest] > low:
                written.add(surest)
            run_ = []
        run_.append(i)
    written |= {i for i in masked if p[i] > threshold}
    return {i: tokens[i] for i in written}


def credit(slow, logp, masked, tokens, threshold=0.9, weight=0.7, boost=0.2, decay=0.8):
    """Over the whole vocabulary, as the authors' matrix is."""
    matrix = slow.memory.setdefault("matrix", torch.zeros_like(logp))
    matrix *= decay  # of zeros at first
    for i in masked:
        matrix[i, tokens[i]] += math.exp(logp[i, tokens[i]]) ** boost
    fused = (logp + weight * (matrix + 1).log()).softmax(-1)
    best = {i: int(fused[i].argmax()) for i in masked}
    p = {i: float(fused[i, best[i]]) for i in masked}
    limit = min(threshold, max(p.values()) - 1e-5)
    return {i: best[i] for i in masked if p[i] >= limit}


def punt(slow, logp, masked, tokens, epsilon=0.01):
    p = {i: math.exp(logp[i, tokens[i]]) for i in masked}
    order = ranked(p, masked)
    left = list(range(len(order)))
    bits = math.ceil(math.log2(len(order))) if len(order) > 1 else 0
    for bit in reversed(range(bits)):
        anchors = [r for r in left if not r >> bit & 1]
        others = [r for r in left if r >> bit & 1]
        if not others:
            continue
        state = list(slow.x)
        for r in anchors:
            state[order[r]] = tokens[order[r]]
        after = slow.predict(state)
        for r in others:
            i = order[r]
            if float((logp[i].exp() * (logp[i] - after[i])).sum()) > epsilon:
                left.remove(r)
    return {order[r]: tokens[order[r]] for r in left}


def dapd(slow, logp, masked, tokens, edge=0.05, layers=0.3, threshold=0.9):
    dense = slow.dense
    last = max(1, round(layers * dense.config.n_layers))
    total = {}
    for (q, _), (k, _) in list(zip(dense.attention, dense.kv, strict=True))[-last:]:
        heads = q.shape[1]
        k = k.repeat_interleave(heads // k.shape[1], 1)
        for h in range(heads):
            a = (q[:, h] @ k[:, h].T * q.shape[-1] ** -0.5).softmax(-1)
            for i in masked:
                for j in masked:
                    total[i, j] = total.get((i, j), 0.0) + float(a[i, j]) / (heads * last)
    strength = {(i, j): (total[i, j] + total[j, i]) / 2 for i in masked for j in masked if i != j}
    p = {i: math.exp(logp[i, tokens[i]]) for i in masked}
    degree = {i: sum(s for (a, _), s in strength.items() if a == i and s > edge) for i in masked}
    chosen = []
    for i in ranked({i: p[i] * degree[i] for i in masked}, masked):
        if all(strength[i, j] <= edge for j in chosen):
            chosen.append(i)
    if 2 * slow.x.count(MASK) < LENGTH:
        chosen += [i for i in masked if p[i] > threshold]
    return {i: tokens[i] for i in chosen}


CASES = [
    ("hierarchy", hierarchy, {}),
    ("hierarchy", hierarchy, {"low_threshold": 0.1, "threshold": 0.3}),
    ("credit", credit, {}),
    ("credit", credit, {"threshold": 0.6, "weight": 2.0, "boost": 1.0, "decay": 0.5}),
    ("punt", punt, {"epsilon": 0.02}),
    ("punt", punt, {"epsilon": 0.3}),
    ("dapd", dapd, {"edge": 0.03, "threshold": 0.3}),
]
NAMES = {"low_threshold": "low"}


@pytest.mark.parametrize("name, rule, settings", CASES, ids=lambda v: str(v) if v else "")
def test_a_rival_is_its_authors_rule(network, name, rule, settings):  # noqa: F811
    model, dense = network
    own = {NAMES.get(key, key): value for key, value in settings.items()}
    got, want, forwards = decoded(model, {"policy": name} | settings), [], 0
    for prompt in prompts():
        slow = Slow(dense, prompt)
        want.append(slow.decode(lambda *known: rule(*known, **own)))
        forwards += slow.forwards
    assert got == want
    if name != "punt":
        return
    loop = make_loop(model)
    shape = {"gen_length": LENGTH, "block_length": BLOCK}
    for n, prompt in enumerate(prompts()):
        params = params_of({"policy": name} | settings | shape, prompt_len=len(prompt))
        loop.add(str(n), prompt, params)
    _, reports = finish(loop)
    assert sum(report["forwards"] for report in reports.values()) == forwards


def test_the_cases_write_several_tokens_a_step_and_not_all(network):  # noqa: F811
    """Otherwise the rules could not be told apart."""
    model, _ = network
    for name, _, settings in CASES[1:]:
        loop = make_loop(model)
        fields = {"policy": name, "gen_length": LENGTH, "block_length": BLOCK} | settings
        loop.add("x", [1, 2, 3], params_of(fields, prompt_len=3))
        _, reports = finish(loop)
        assert 2 < reports["x"]["denoising_steps"] <= LENGTH, name


def test_what_comes_last_is_written_only_where_nothing_else_is_left():
    late = np.array([50])
    view = make_view([-np.inf, 0.3, 0.2], late_tokens=late, block_step=0, memory={})
    for fields in ({"policy": "hierarchy"}, {"policy": "credit"}, {"policy": "punt"}):
        answers = {"credit": lambda q: np.log(np.full(len(q.index), 0.3))}
        reply = answers.get(fields["policy"], lambda q: np.zeros(3))
        _, commit = run(policy_of(**fields), view, reply)
        assert 0 not in commit.chosen.tolist(), fields
    alone = make_view([-np.inf, -np.inf], late_tokens=np.array([50, 51]), memory={})
    for name in ("hierarchy", "credit", "punt"):
        reply = (lambda q: np.zeros(len(q.index))) if name == "credit" else lambda q: np.zeros(2)
        _, commit = run(policy_of(policy=name), alone, reply)
        assert len(commit.chosen) >= 1


def test_an_independent_set_has_no_edge_and_nothing_that_comes_last():
    edges = np.zeros((4, 4), bool)
    edges[0, 1] = edges[1, 0] = True
    assert independent_set(np.array([0.5, 0.9, 0.1, -np.inf]), edges).tolist() == [1, 2]
    assert independent_set(np.full(4, -np.inf), edges).tolist() == [0]
