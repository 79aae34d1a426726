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
        self.prompt, self.memory, self.forwards, self.rows = len(prompt), {}, 0, 0
        self.seen = set()

    def predict(self, x):
        logits = self.dense.logits(self.dense.embed(torch.tensor(x)))
        logits[:, MASK] = -1e30
        self.forwards += 1
        self.rows += len(x)
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


def dawn(slow, logp, masked, tokens, threshold=0.9, anchor=0.9, induce=0.7, low=0.7, edge=0.07,
         sink=0.01, layers=4):  # fmt: skip
    """The authors' matrices, [L, L]; the loop over the independent set ends where nothing is left,
    whereas theirs then takes position 0."""
    end = slow.prompt + -(-(masked[-1] + 1 - slow.prompt) // BLOCK) * BLOCK
    maps = []
    for (q, _), (k, _) in zip(slow.dense.attention, slow.dense.kv, strict=True):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("ihp,jhp->hij", q, k) * q.shape[-1] ** -0.5
        maps.append(scores.softmax(-1).mean(0))
    attention = torch.stack(maps[-layers:]).mean(0)
    attention[:, attention.mean(0) > sink] = 0.0
    attention.fill_diagonal_(0.0)
    edges = (attention >= edge).T
    p = logp.exp().max(-1).values
    mask = torch.tensor([i in masked for i in range(len(p))])
    sure = mask & (p >= threshold)
    decoded = ~mask & (p >= anchor)
    decoded[end:] = False
    induced = (edges & decoded[:, None]).any(0) & mask & (p >= induce)
    blocked = (edges & induced[:, None] & sure[:, None]).any(0)
    node = mask & (p >= low) & ~sure & ~induced & ~blocked
    conflict = (edges | edges.T) & node[:, None] & node[None, :]
    confidence, chosen = torch.where(node, p, -math.inf), set()
    excluded = False
    while confidence.max() > -math.inf:
        best = int(confidence.argmax())
        chosen.add(best)
        excluded |= bool((confidence[conflict[best]] > -math.inf).any())
        confidence[best] = -math.inf
        confidence[conflict[best]] = -math.inf
    kinds = {
        "sure": sure.any(),
        "induced": (induced & ~sure).any(),
        "blocked": (blocked & mask & (p >= low) & ~sure & ~induced).any(),
        "free": bool(chosen),
        "excluded": excluded,
    }
    slow.seen |= {name for name, there in kinds.items() if there}
    chosen |= {i for i in masked if sure[i] or induced[i]}
    return {i: tokens[i] for i in chosen or {ranked(p, masked)[0]}}


def two_views(slow, written, drafted, tokens):
    """[S, V] what the masked view predicts: the authors' pass over [written | drafts | masks], with
    their attention mask, all other keys those of the pass before."""
    dense, w, many = slow.dense, len(written), len(drafted)
    positions = [*written, *drafted, *drafted]
    held = [tokens[i] for i in [*written, *drafted]] + [MASK] * many
    total, order = w + 2 * many, torch.arange(many)
    sees = torch.ones(total, total, dtype=torch.bool)
    sees[:w, w : w + many] = False
    to, of = order[:, None], order[None, :]
    drafts = torch.cat([to >= of, to < of], 1)
    masks = torch.cat([to > of, to <= of], 1)
    sees[w:, w:] = torch.cat([drafts, masks])
    outside = [i for i in range(len(slow.x)) if i not in positions]

    def rotated(x):
        wide = torch.zeros(total, len(slow.x), *x.shape[1:], dtype=x.dtype)
        wide[torch.arange(total), positions] = x
        return torch.stack([dense.rotate(wide[n])[i] for n, i in enumerate(positions)])

    before, x = list(dense.kv), dense.embed(torch.tensor(held))
    for layer, (k_old, v_old) in enumerate(before):
        h = dense.norm(x, f"blocks.{layer}.attn_norm")
        q, k, v = (
            (h @ dense.w(f"blocks.{layer}.{n}_proj").T).view(total, -1, q_size(dense))
            for n in "qkv"
        )
        q, k = rotated(q), rotated(k)
        k, v = torch.cat([k_old[outside], k]), torch.cat([v_old[outside], v])
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("ihp,jhp->hij", q, k) / q.shape[-1] ** 0.5
        open_ = torch.cat([torch.ones(total, len(outside), dtype=torch.bool), sees], 1)
        mixed = torch.einsum("hij,jhp->ihp", scores.masked_fill(~open_, -math.inf).softmax(-1), v)
        x = x + mixed.reshape(total, -1) @ dense.w(f"blocks.{layer}.attn_out").T
        h = dense.norm(x, f"blocks.{layer}.ff_norm")
        gate, up = (h @ dense.w(f"blocks.{layer}.{n}_proj").T for n in ("ff", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ dense.w(f"blocks.{layer}.ff_out").T
    head = "wte" if dense.config.weight_tying else "ff_out"
    logits = (dense.norm(x, "ln_f") @ dense.w(head).T)[w + many :, : dense.config.vocab_size]
    logits[:, MASK] = -1e30
    return logits.softmax(-1)


def q_size(dense):
    return dense.config.d_model // dense.config.n_heads


def verify(slow, logp, masked, tokens, threshold=0.9, gamma=0.8, accept="product", drafts=0.5):
    p = {i: math.exp(logp[i, tokens[i]]) for i in masked}
    order = ranked(p, masked)
    keep = max(1, sum(value >= threshold for value in p.values()))
    many = min(len(order) - keep, int(drafts * BLOCK))
    written, drafted = order[:keep], order[keep : keep + many]
    if many:
        found = two_views(slow, written, drafted, tokens)
        slow.forwards += 1
        slow.rows += keep + 2 * many - 1  # the authors run the last draft's row, which none sees
        product = 1.0
        for n, i in enumerate(drafted):
            likely = float(found[n, tokens[i]])
            product *= likely
            agrees = int(found[n].argmax()) == tokens[i]
            good = product >= gamma if accept == "product" else likely >= gamma and agrees
            slow.seen.add("accepted" if good else "rejected")
            if not good:
                break
            written.append(i)
    return {i: tokens[i] for i in written}


DAWN = {
    "threshold": 0.5, "anchor": 0.3, "induce": 0.3, "low": 0.3, "edge": 0.06, "sink": 0.08,
    "layers": 2,
}  # fmt: skip
CASES = [
    ("hierarchy", hierarchy, {}),
    ("hierarchy", hierarchy, {"low_threshold": 0.1, "threshold": 0.3}),
    ("credit", credit, {}),
    ("credit", credit, {"threshold": 0.6, "weight": 2.0, "boost": 1.0, "decay": 0.5}),
    ("punt", punt, {"epsilon": 0.02}),
    ("punt", punt, {"epsilon": 0.3}),
    ("dapd", dapd, {"edge": 0.03, "threshold": 0.3}),
    ("dawn", dawn, {"threshold": 0.7, "low": 0.5}),
    ("dawn", dawn, DAWN),
    ("verify", verify, {"threshold": 0.5, "gamma": 0.3}),
    ("verify", verify, {"threshold": 0.4, "gamma": 0.2, "accept": "each", "drafts": 0.8}),
]
LAST = {case[0]: case for case in CASES}
NAMES = {"low_threshold": "low"}
MET = {
    "dawn": {"sure", "induced", "blocked", "free", "excluded"},
    "verify": {"accepted", "rejected"},
}
"""Kinds of decision that occur in the last case of a policy."""


@pytest.mark.parametrize("name, rule, settings", CASES, ids=lambda v: str(v) if v else "")
def test_a_rival_is_its_authors_rule(network, name, rule, settings):  # noqa: F811
    model, dense = network
    own = {NAMES.get(key, key): value for key, value in settings.items()}
    got, want, forwards, rows, met = decoded(model, {"policy": name} | settings), [], 0, 0, set()
    for prompt in prompts():
        slow = Slow(dense, prompt)
        want.append(slow.decode(lambda *known: rule(*known, **own)))
        forwards, rows = forwards + slow.forwards, rows + slow.rows
        met |= slow.seen
    assert (name, rule, settings) != LAST[name] or met == MET.get(name, set())
    assert got == want
    if name not in ("punt", "verify"):
        return
    loop = make_loop(model)
    shape = {"gen_length": LENGTH, "block_length": BLOCK}
    for n, prompt in enumerate(prompts()):
        params = params_of({"policy": name} | settings | shape, prompt_len=len(prompt))
        loop.add(str(n), prompt, params)
    _, reports = finish(loop)
    assert sum(report["forwards"] for report in reports.values()) == forwards
    assert sum(report["rows_forward"] for report in reports.values()) == rows


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
