"""Settings: a default that is given changes nothing, a preset is exactly what it names, and no
field turns a policy into another one."""

import dataclasses
import json

import numpy as np
import pytest
from test_policies import conditioned, make_view, policy_of, run
from toy import MASK, VOCAB, Driven, Toy

from boe_vllm.base import options
from boe_vllm.policies import POLICY_NAMES, load_policy
from boe_vllm.policies.composition import CompositionConfig
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.steering.coupling import Coupling
from boe_vllm.steering.importance import TokenImportance

COMPOSED = ("boe", "joint", "pairwise")
PRESETS = [(name, preset) for name in COMPOSED for preset in load_policy(name).Config.presets]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A token frequency table of the toy's vocabulary, which `pc` needs."""
    path = tmp_path_factory.mktemp("frequencies") / "table.json"
    counts = {str(token): 10 * token + 1 for token in range(VOCAB - 1)}
    path.write_text(json.dumps({"num_token": 500, "p_baseline_dict": counts}))
    return {"frequencies": str(path)}


def defaults():
    """(policy, field, default) of every setting of every policy, the table of `pc` left out."""
    return [
        (name, field.name, field.default)
        for name in sorted(POLICY_NAMES)
        for field in dataclasses.fields(load_policy(name).Config)
        if field.name != "frequencies"
    ]


def configured(fields, server=None):
    own = {k: v for k, v in fields.items() if k == "frequencies"}
    base = parse_sampler_config((server or {}) | own)
    return parse_sampler_config({k: v for k, v in fields.items() if k not in own}, base=base)


def decisions(config, seed):
    """Every step's decision of one request on a toy, without and with tokens that come last."""
    found = []
    for late in ((), (1, 2)):
        driven = Driven(
            Toy(seed), config, [1, MASK, 3], 12, seed=seed, late=late,
        ).finish()  # fmt: skip
        for view, commit in zip(driven.views, driven.commits, strict=True):
            tokens = view.proposal[commit.chosen] if commit.tokens is None else commit.tokens
            found.append((commit.chosen.tolist(), tokens.tolist(), commit.remask.tolist()))
    return found


@pytest.mark.parametrize("name, field, default", defaults(), ids=lambda v: str(v))
def test_giving_a_default_changes_nothing(name, field, default, table):
    frame = {"policy": name, "block_length": 6, "tokens_per_step": 3}
    frame |= {"confidence_eos_eot_inf": True} | (table if name == "pc" else {})
    plain, given = configured(frame), configured(frame | {field: default})
    assert given == plain
    assert configured({field: default}, frame) == plain  # on top of a server's own
    for seed in range(2):
        assert decisions(given, seed) == decisions(plain, seed)


def test_the_table_is_not_empty():
    named = defaults()
    assert len(named) > 80 and {name for name, _, _ in named} >= POLICY_NAMES - {"random"}


@pytest.mark.parametrize("name, preset", PRESETS)
def test_a_preset_is_exactly_its_settings(name, preset):
    """Complete, so that no default reaches into it; and it replaces what the server says."""
    own = load_policy(name).Config
    fields = dict(own.presets[preset])
    of_remasking_and_bounds = set(options.names(CompositionConfig)) - {"remask", "commit"}
    assert fields.keys() == set(options.names(own)) - of_remasking_and_bounds - {"preset"}
    named = parse_sampler_config({"policy": name, "preset": preset}).settings
    spelled = parse_sampler_config({"policy": name, **fields}).settings
    for field in options.names(own):
        value = getattr(named, field)
        assert value == (preset if field == "preset" else getattr(spelled, field))
    other = {"commit": "eb", "gamma": 3.0, "preset": None}
    other |= {"boe": {"rho": 0.9, "sets": "chain", "bypass": 0.5}}.get(name, {"pool": 5})
    server = parse_sampler_config({"policy": name, **other})
    assert parse_sampler_config({"preset": preset}, base=server).settings == named
    # Fields beside it go on top.
    over = parse_sampler_config({"preset": preset, "commit": "threshold"}, base=server).settings
    assert (over.preset, over.commit, over.gamma) == (preset, "threshold", named.gamma)


def test_boes_presets_are_those_of_the_paper_and_its_authors():
    paper = parse_sampler_config({"policy": "boe", "preset": "paper"}).settings
    assert (paper.surrogate, paper.objective, paper.active) == ("mask", "masked", "masked")
    assert (paper.sets, paper.risk, paper.gain_scale, paper.bypass) == ("top", 0.0, 1.0, None)
    assert (paper.rho, paper.gate, paper.floor_weight, paper.floor_max) == (
        0.25,
        "entropy",
        0.2,
        0.3,
    )
    prototype = parse_sampler_config({"policy": "boe", "preset": "prototype"}).settings
    assert (prototype.candidates, prototype.sharpen, prototype.normalize) == (3, 0.5, "minmax")
    future = parse_sampler_config({"policy": "boe", "preset": "future"}).settings
    assert (future.gain_scale, future.gate, future.rho) == ("mean", "none", 1.0)


OTHERS = {
    "rho": 0.9, "candidates": 6, "prefilter": "margin", "surrogate": "response",
    "objective": "remaining", "active": "all", "context": "exact", "gate": "none",
    "gate_power": 2.0, "floor_weight": 1.0, "floor_max": 0.5, "sharpen": 0.5,
    "normalize": "minmax", "risk": 0.0, "gain_scale": "mean", "sets": "top", "bypass": None,
    "remask": "remdm", "commit": "eb", "gamma": 9.0, "threshold": 0.1, "sigma_schedule": "loop",
    "eta": 0.02, "t_on": 0.6, "t_off": 0.1, "alpha_on": 0.8, "preset": "kv", "pool": 3,
    "rounds": 2, "trust": 0.1, "multiple": 3.0, "certain": 0.5, "coupling": "exact",
    "coupling_measure": "kl", "interaction": 0.1, "bound": "entropy", "drafts": 1, "slack": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, field", [(n, f) for n in COMPOSED for f in options.names(load_policy(n).Config)]
)
def test_no_field_turns_another_algorithm_on(name, field):
    """`boe` runs one backward in a step with a choice, whatever is set; the others never do."""
    value = OTHERS[field] if field != "preset" else next(iter(load_policy(name).Config.presets))
    view = make_view(np.linspace(0.3, 0.8, 10), quota=2)

    def reply(query):
        if isinstance(query, TokenImportance):
            return np.linspace(0, 1, len(query.candidates))
        if isinstance(query, Coupling):
            return np.zeros((len(query.pool), len(query.pool)))
        return conditioned(query)

    queries, commit = run(policy_of(policy=name, **{field: value}), view, reply)
    backwards = [query for query in queries if isinstance(query, TokenImportance)]
    assert len(backwards) == (name == "boe")
    assert len(commit.chosen) >= 1


@pytest.mark.parametrize("value", [0, -1, 1e7, "x", float("nan"), None, [1]])
def test_a_bad_gain_scale_is_one_error(value):
    with pytest.raises(
        ValueError, match=r"^gain_scale: expected a number above 0 and at most"
    ) as e:
        parse_sampler_config({"policy": "boe", "gain_scale": value})
    assert "'mean'" in str(e.value) and "change or remove 'gain_scale'" in str(e.value)
