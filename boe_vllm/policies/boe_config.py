"""Settings of `boe`: candidates, gain (steering), risk and interaction, and the named presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from boe_vllm.base.options import options
from boe_vllm.policies.base import PolicyConfig
from boe_vllm.policies.composition import CompositionConfig
from boe_vllm.steering.coupling import Estimator
from boe_vllm.steering.importance import Context, Surrogate

_IMPORTANCE: dict[str, Any] = {"selection": "top", "risk": 0.0, "gain": 1.0}
"""The paper's ranking: the most important candidates, each for itself."""

_OF_IMPORTANCE = frozenset(
    "rho candidates surrogate objective active context gate gate_power floor_weight floor_max "
    "sharpen normalize gain_scale gain".split()
)
"""Fields that mean nothing without a gain: to give one is to query for the paper's ranking."""

_JOINT: dict[str, Any] = {"selection": "conditional", "risk": 1.0, "gain": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    # Eq. 13 and 14 to the letter. The paper publishes neither lambda nor h_max ("tuned on a small
    # validation subset"); the values are those of the authors' prototype.
    "paper": _IMPORTANCE
    | {
        "surrogate": "mask",
        "objective": "masked",
        "active": "masked",
        "rho": 0.25,
        "gate": "entropy",
        "floor_weight": 0.2,
        "floor_max": 0.3,
    },
    # The authors' public prototype (toy model, June 2026), as described in `docs/method.md`.
    "prototype": _IMPORTANCE
    | {
        "surrogate": "inject",
        "context": "exact",
        "objective": "remaining",
        "active": "masked",
        "candidates": 3,
        "sharpen": 0.5,
        "gate": "confidence",
        "normalize": "minmax",
        "floor_weight": 0.2,
        "floor_max": 0.3,
    },
    # The paper's ranking with the importance taken in the keys and values, and nothing to tune.
    "kv": _IMPORTANCE,
    # Info-Gain's weighting: the risk as it is, the future as a mean over the masked positions.
    "future": {
        "selection": "top",
        "risk": 1.0,
        "gain": 1.0,
        "gain_scale": "mean",
        "gate": "none",
        "rho": 1.0,
    },
    # Sets with the interaction as a sum over pairs, from one packed pass over the pool.
    "pairwise": {
        "selection": "pairwise",
        "risk": 1.0,
        "gain": 0.0,
        "coupling": "pairs",
        "coupling_measure": "pmi",
        "interaction": 1.0,
    },
    # The same with the coupling measured on all masked rows: the oracle of the estimators.
    "exact": {
        "selection": "pairwise",
        "risk": 1.0,
        "gain": 0.0,
        "coupling": "exact",
        "coupling_measure": "kl",
        "interaction": 0.3,
    },
    # The default: the set is built one token at a time, each by its probability given the others.
    "joint": _JOINT,
    # The same with more to choose from.
    "thorough": _JOINT | {"pool": 3.0, "certain": 1.0},
}

MOST = 1e6
"""Largest weight: no product of a few of them overflows."""

Preset = Literal["paper", "prototype", "kv", "future", "pairwise", "exact", "joint", "thorough"]


@options
class BoEConfig(CompositionConfig):
    """Settings of `boe`, beside those of `CompositionConfig`; entropies in nats."""

    preset: Preset | None = None
    """Named settings; fields given beside it override its own."""
    rho: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the masked positions that are candidates (paper 4.1: 0.1, 0.25, 0.5)."""
    candidates: Annotated[int, Field(ge=1)] | None = None
    """A fixed number of candidates instead of a share."""
    prefilter: Literal["confidence", "margin", "entropy"] = "confidence"
    """What candidates are chosen by (paper 3.5)."""
    surrogate: Surrogate = "kv"
    """Where the entropy is linearised: "mask" (eq. 13, 14: at the mask embedding), "inject"
    (A.3.1: at the soft embeddings of all candidates), "kv" (in the keys and values), "response" (in
    the attention outputs of the other rows), "rectified" (the same, rises of entropy left out)."""
    objective: Literal["masked", "remaining"] = "masked"
    """Entropies that are summed: of all of M, or of M without the candidates (eq. 11)."""
    active: Literal["masked", "candidates", "all"] = "masked"
    """Rows whose attention passes a gradient (eq. 30): C and the objective's, C alone, or all."""
    context: Context = "frozen"
    """For "inject": whether the rows outside the block keep their old keys and values in the
    second forward (an approximation) or are computed again."""
    gate: Literal["entropy", "confidence", "none"] = "entropy"
    """Factor on the score: eq. 15, the confidence itself, or 1."""
    gate_power: Annotated[float, Field(ge=0, le=MOST)] = 1.0
    """Exponent of the gate."""
    floor_weight: Annotated[float, Field(ge=0, le=MOST)] = 0.0
    """Lambda of the entropy floor (eq. 19)."""
    floor_max: Annotated[float, Field(ge=0, le=MOST)] = 0.0
    """h_max of the entropy floor, nats (eq. 18): high at the start, 0 at the end."""
    sharpen: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """Temperature of the soft write: pi^(1/sharpen), renormalised."""
    normalize: Literal["none", "minmax"] = "none"
    """Rescale the scores of the candidates to [0, 1] before the floor's penalty."""

    risk: Annotated[float, Field(ge=0, le=MOST)] = 1.0
    """Weight of ln p_i, the log-probability of the candidate's own token."""
    gain: Annotated[float, Field(ge=0, le=MOST)] = 0.0
    """Weight of the Token Importance Score; 0 runs no backward."""
    gain_scale: Literal["sum", "mean"] = "sum"
    """Importance as the drop of the summed entropy, or of its mean over the objective."""
    selection: Literal["top", "pairwise", "conditional"] = "conditional"
    """How the set is chosen: the best scores; greedily less the coupling with what is chosen; or
    greedily by the scores once the chosen ones are written (all other rows frozen)."""
    interaction: Annotated[float, Field(ge=0, le=MOST)] = 1.0
    """Weight of the coupling ("pairwise")."""
    coupling: Estimator = "pairs"
    """Estimator of the coupling; see `steering.coupling`."""
    coupling_measure: Literal["kl", "pmi"] = "pmi"
    """What the coupling measures; see `steering.queries.Coupling`."""
    pool: Annotated[float, Field(ge=1, le=MOST)] = 2.0
    """Candidates as a multiple of the tokens due, for "pairwise" and "conditional"."""
    certain: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Probability from which a candidate joins the set without a round of its own
    ("conditional"); 1 for never."""

    def __post_init__(self) -> None:
        CompositionConfig.__post_init__(self)
        if self.active == "candidates" and self.objective == "remaining":
            raise ValueError(
                "active='candidates' with objective='remaining' gives an identically zero "
                "gradient: every path from a remaining position to a candidate passes through the "
                "remaining position's attention output, which eq. 30 stops; set active='masked' "
                "or objective='masked'"
            )
        if self.active == "all" and self.context == "frozen" and self.surrogate == "inject":
            raise ValueError(
                "active='all' with surrogate='inject' expected context='exact', got 'frozen': "
                "frozen rows pass no gradient; set context='exact'"
            )

    @classmethod
    def resolve(cls, fields: Mapping[str, Any], base: PolicyConfig | None) -> dict[str, Any]:
        """A preset replaces what the server set; the fields given beside it go on top.

        Without one, a field of the importance score turns the score on.
        """
        if fields.get("preset") in PRESETS:
            return PRESETS[fields["preset"]] | dict(fields)
        steered = base is not None and getattr(base, "gain", 0.0) > 0
        if _OF_IMPORTANCE & fields.keys() and not steered:
            fields = _IMPORTANCE | dict(fields)
        return PolicyConfig.resolve.__func__(cls, fields, base)  # type: ignore[attr-defined]
