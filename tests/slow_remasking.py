"""The remasking and look-ahead policies once more: slow and obvious, from policies.md.

Every rule decodes a whole request at temperature 0 with one dense forward after another, one
position at a time, in float64. `Model.logits` is all that is known of the network. Nothing of
`boe_vllm.policies` or `boe_vllm.steering` is used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from boe_vllm.sampling import randomness


def best(scores, count):
    """Indices of the `count` best; of equal ones the lower index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def number(seed, step, position, stream):
    return float(
        randomness.uniforms(seed, step=step, positions=np.array([position]), stream=stream)[0]
    )


@dataclasses.dataclass
class Model:
    logits: Callable[[list[int]], list[list[float]]]
    """Of a sequence: one row of logits for every position."""
    mask: int
    forwards: int = 0
    grid: float | None = None
    """What statistics are multiples of, as a toy's are."""

    def predict(self, tokens):
        """Every position's probabilities, the mask token excluded; counts one forward."""
        self.forwards += 1
        rows = []
        for logits in self.logits(tokens):
            logits = [-math.inf if v == self.mask else x for v, x in enumerate(logits)]
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            total = math.fsum(weights)
            rows.append([w / total for w in weights])
        return rows

    def statistic(self, value):
        return value if self.grid is None else round(value / self.grid) * self.grid

    def confidence(self, p):
        return self.statistic(max(p))

    def margin(self, p):
        first, second = sorted(p, reverse=True)[:2]
        return self.statistic(first - second)

    def entropy(self, p):
        return self.statistic(entropy(p))

    def certainty(self, p, name):
        if name == "entropy":
            return -self.entropy(p)
        return {"confidence": self.confidence, "margin": self.margin}[name](p)


def entropy(p):
    return -math.fsum(q * math.log(q) for q in p if q > 0)


def argmax(p):
    return max(range(len(p)), key=lambda v: (p[v], -v))


@dataclasses.dataclass
class Decoding:
    """A request in the hands of one of the rules below."""

    model: Model
    prompt: list[int]
    gen_length: int
    block_length: int
    seed: int = 0

    def __post_init__(self):
        self.x = list(self.prompt) + [self.model.mask] * self.gen_length
        self.inputs: list[list[int]] = []
        """What each forward saw that had something to write in its block."""

    def blocks(self):
        """Positions of each block that the request may write."""
        for begin in range(len(self.prompt), len(self.x), self.block_length):
            start = 0 if begin == len(self.prompt) else begin
            end = min(begin + self.block_length, len(self.x))
            own = [i for i in range(start, end) if self.x[i] == self.model.mask]
            if own:
                yield own

    def masked(self, own):
        return [i for i in own if self.x[i] == self.model.mask]

    def predict(self, own):
        if self.masked(own):
            self.inputs.append(list(self.x))
        return self.model.predict(self.x)


def quotas(masks, steps):
    return [masks // steps + (1 if i < masks % steps else 0) for i in range(steps)]


# ---- ReMDM ---------------------------------------------------------------------------------------


def remdm_numbers(schedule, eta, k, steps, t_on=0.55, t_off=0.05, alpha_on=0.9):
    """(sigma or sigma_max, probability of a reveal) in iteration k, in exact arithmetic."""
    t, s = Fraction(steps - k, steps), Fraction(steps - k - 1, steps)
    on, off, share = (Fraction(str(v)) for v in (t_on, t_off, alpha_on))
    eta = None if eta is None else Fraction(str(eta))
    if s == 0:
        return Fraction(0), Fraction(1)
    if schedule == "loop":
        if t > on:
            alpha_t, alpha_s, sigma = (1 - t) * share / (1 - on), (1 - s) * share / (1 - on), 0
        elif t <= off:
            alpha_t, alpha_s, sigma = 1 - t * (1 - share) / off, 1 - s * (1 - share) / off, 0
        else:
            alpha_t, alpha_s, sigma = share, share, eta
    else:
        alpha_t, alpha_s = 1 - t, 1 - s
        sigma_max = min(1, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1
        if schedule == "conf":
            sigma = sigma_max
        else:
            sigma = min(eta, sigma_max) if schedule == "cap" else eta * sigma_max
    used = 0 if schedule == "conf" else sigma  # sigma is zero on masks
    return sigma, (alpha_s - (1 - used) * alpha_t) / (1 - alpha_t)


def remdm(decoding, *, steps_of, schedule="cap", eta=0.008, **loop):
    """kuleshov-group/remdm `_ddpm_caching_update`, one token at a time."""
    mask = decoding.model.mask
    for own in decoding.blocks():
        steps = steps_of(len(own))
        stored = {}
        for k in range(steps):
            sigma, reveal = remdm_numbers(schedule, eta, k, steps, **loop)
            p = decoding.predict(own)
            written = [i for i in own if decoding.x[i] != mask]
            total = math.fsum(math.exp(-stored[i]) for i in written)
            after = list(decoding.x)
            for i in own:
                if i in written:
                    chance = sigma
                    if schedule == "conf":
                        chance = sigma * math.exp(-stored[i]) / total
                    if number(decoding.seed, k, i, randomness.REMASK) < chance:
                        after[i] = mask
                elif number(decoding.seed, k, i, randomness.CHOOSE) < reveal:
                    after[i] = argmax(p[i])
                    stored[i] = decoding.model.confidence(p[i])
            decoding.x = after
    return decoding


def remdm_llada(decoding, *, steps_of, number=1):
    """guanghanwang/ReMDM-LLaDA `llada_remdm_sample`."""
    mask = decoding.model.mask
    for own in decoding.blocks():
        size, steps = len(own), steps_of(len(own))
        begin = int(size / 8 * 7)
        turns = iter(quotas(size, steps))
        stored = {}
        for k in range(2 * steps):
            window = begin <= k < begin + steps
            if window:
                written = sorted(i for i in own if decoding.x[i] != mask)
                lowest = best([-stored[i] for i in written], number)
                for i in [written[n] for n in lowest]:
                    decoding.x[i] = mask
            count = number if window else next(turns, 0)
            p = decoding.predict(own)
            masked = decoding.masked(own)
            for n in best([decoding.model.confidence(p[i]) for i in masked], count):
                decoding.x[masked[n]] = argmax(p[masked[n]])
                stored[masked[n]] = decoding.model.confidence(p[masked[n]])
    return decoding


# ---- P2 ------------------------------------------------------------------------------------------


def p2(decoding, *, steps_of, eta=1.0):
    """pengzhangzhi/Path-Planning `p2_sampling`."""
    mask = decoding.model.mask
    for own in decoding.blocks():
        steps = steps_of(len(own))
        for i in range(1, steps + 1):
            p = decoding.predict(own)
            kappa = Fraction(i, steps)
            to_mask = math.floor(len(own) * (1 - kappa))
            score = {}
            for j in own:
                log_p = math.log(decoding.model.confidence(p[j]))
                score[j] = log_p if decoding.x[j] == mask else eta * log_p
            # Lowest first; of equal ones masks before written ones, later positions before earlier.
            order = sorted(own, key=lambda j: (score[j], decoding.x[j] != mask, -j))
            lowest = set(order[:to_mask])
            for j in own:
                if j in lowest:
                    decoding.x[j] = mask
                elif decoding.x[j] == mask:
                    decoding.x[j] = argmax(p[j])
    return decoding


# ---- look-ahead ----------------------------------------------------------------------------------


def gumbel(scores, temperature, uniforms):
    return [s / temperature - math.log(-math.log(u)) for s, u in zip(scores, uniforms, strict=True)]


def future(decoding, x, observe, own):
    """Mean entropy in a next state, over what `observe` names."""
    p = decoding.model.predict(x)
    mask = decoding.model.mask
    seen = {
        "block": [i for i in own if x[i] == mask],
        "masked": [i for i in range(len(x)) if x[i] == mask],
        "all": list(range(len(x))),
    }[observe]
    return math.fsum(decoding.model.entropy(p[i]) for i in seen) / len(seen) if seen else 0.0


def written(decoding, chosen, p):
    x = list(decoding.x)
    for i in chosen:
        x[i] = argmax(p[i])
    return x


def info_gain(
    decoding, *, steps_of, candidates=8, position_temperature=0.2, bypass=0.8,
    bypass_writes="all", cost=True, observe="masked",
):  # fmt: skip
    """yks23/Information-Gain-Sampler `InfoGainSampler.sample`. The winner's forward is the next
    step's own, and counted once."""
    step = 0
    for own in decoding.blocks():
        count, turn = len(own), 0
        due = quotas(count, steps_of(count))
        looked = False
        while decoding.masked(own):
            masked = decoding.masked(own)
            p = decoding.predict(own)
            if looked:
                decoding.model.forwards -= 1
            looked = False
            b = min(len(masked), max(1, due[turn] if turn < len(due) else 1))
            confidence = [decoding.model.confidence(p[i]) for i in masked]
            if bypass > 0 and all(c >= bypass for c in confidence):
                sets = [best(confidence, len(masked) if bypass_writes == "all" else b)]
            else:
                sets = [best(confidence, b)]
                if len(masked) > b and position_temperature > 0:
                    for c in range(1, candidates):
                        u = [
                            number(decoding.seed, step, i, randomness.CANDIDATES + c)
                            for i in masked
                        ]
                        chosen = best(gumbel(confidence, position_temperature, u), b)
                        if sorted(chosen) not in [sorted(s) for s in sets]:
                            sets.append(chosen)
            if len(sets) > 1:
                gains = []
                for chosen in sets:
                    action = [masked[n] for n in chosen]
                    gain = -future(decoding, written(decoding, action, p), observe, own)
                    if cost:
                        gain -= math.fsum(decoding.model.entropy(p[i]) for i in action)
                    gains.append(gain)
                sets = [sets[best(gains, 1)[0]]]
                looked = True
            decoding.x = written(decoding, [masked[n] for n in sets[0]], p)
            turn += 1
            step += 1
    return decoding


def lookum(
    decoding, *, steps_of, paths=2, pool_size=5, pool_threshold=None, certainty="confidence",
    draw="uniform", draw_temperature=0.2, tau=0.1, observe="masked",
):  # fmt: skip
    """The rule of policies.md with the choices that `lookum` documents."""
    step = 0
    for own in decoding.blocks():
        count, turn = len(own), 0
        due = quotas(count, steps_of(count))
        looked = False
        while decoding.masked(own):
            masked = decoding.masked(own)
            p = decoding.predict(own)
            if looked:
                decoding.model.forwards -= 1
            looked = False
            b = min(len(masked), max(1, due[turn]))
            sure = [decoding.model.certainty(p[i], certainty) for i in masked]
            size = pool_size
            if pool_threshold is not None:
                size = sum(c >= pool_threshold for c in sure)
            pool = best(sure, max(size, b))
            drawn = []
            for n in range(paths):
                u = [number(decoding.seed, step, i, randomness.CANDIDATES + n) for i in masked]
                if draw == "certainty":
                    u = gumbel(sure, draw_temperature, u)
                drawn.append(tuple(sorted(pool[m] for m in best([u[m] for m in pool], b))))
            if len(pool) == b:
                drawn = [tuple(sorted(pool))]
            distinct = list(dict.fromkeys(drawn))
            pick = 0
            if len(distinct) > 1:
                looked = True
                rewards = {
                    chosen: -future(
                        decoding,
                        written(decoding, [masked[m] for m in chosen], p),
                        observe,
                        own,
                    )
                    for chosen in distinct
                }
                if tau == 0:
                    pick = best([rewards[c] for c in distinct], 1)[0]
                else:
                    weights = [drawn.count(c) * math.exp(rewards[c] / tau) for c in distinct]
                    u = number(decoding.seed, step, 0, randomness.LOOKAHEAD) * sum(weights)
                    while u >= weights[pick]:
                        u -= weights[pick]
                        pick += 1
            decoding.x = written(decoding, [masked[m] for m in distinct[pick]], p)
            turn += 1
            step += 1
    return decoding


def lookahead(
    decoding, *, steps_of, rho=1.0, prefilter="confidence", score="drop", state=None
):  # fmt: skip
    """Every candidate alone. `state(x, i, p)` gives the probabilities of every position once `i` is
    written softly; by default the argmax token is written."""
    for own in decoding.blocks():
        count, turn = len(own), 0
        due = quotas(count, steps_of(count))
        while decoding.masked(own):
            masked = decoding.masked(own)
            p = decoding.predict(own)
            b = min(len(masked), max(1, due[turn]))
            by = [decoding.model.certainty(p[i], prefilter) for i in masked]
            wanted = max(b, math.ceil(rho * len(masked)))
            candidates = best(by, wanted)
            scores = [-math.inf] * len(masked)
            if len(candidates) == b:
                chosen = candidates
            else:
                for n in candidates:
                    i = masked[n]
                    if state is None:
                        then = decoding.model.predict(written(decoding, [i], p))
                    else:
                        then = state(decoding.x, i, p)
                    rest = [j for j in masked if j != i]
                    scores[n] = -math.fsum(decoding.model.entropy(then[j]) for j in rest)
                    if score == "drop":
                        scores[n] += math.fsum(decoding.model.entropy(p[j]) for j in rest)
                chosen = best(scores, b)
            decoding.x = written(decoding, [masked[n] for n in chosen], p)
            turn += 1
    return decoding
