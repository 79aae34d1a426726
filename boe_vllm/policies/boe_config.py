"""Settings of `boe`, and its named presets."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from boe_vllm.base.options import options, shown
from boe_vllm.policies.base import Certainty
from boe_vllm.policies.bounded import Rule
from boe_vllm.policies.bounded_config import BoundedConfig
from boe_vllm.steering.importance import Context, Surrogate

_PAPER: dict[str, Any] = {
    "rho": 0.25,
    "candidates": None,
    "prefilter": "confidence",
    "surrogate": "mask",
    "objective": "masked",
    "active": "masked",
    "context": "frozen",
    "gate": "entropy",
    "gate_power": 1.0,
    "floor_weight": 0.2,
    "floor_max": 0.3,
    "sharpen": 1.0,
    "normalize": "none",
    "risk": 0.0,
    "gain_scale": 1.0,
    "sets": "top",
    "bypass": None,
    "remask": "none",
    "commit": "quota",
    "rounds": 1,
    "pool": 64,
    "trust": 0.5,
    "bound": "entropy",
    "drafts": 3,
    "slack": 0.1,
}
"""Eq. 13 to 19 to the letter. The paper publishes neither lambda nor h_max ("tuned on a small
validation subset"); the values are those of the authors' prototype."""

_BARE = _PAPER | {"floor_weight": 0.0, "floor_max": 0.0}
"""The paper's ranking without a floor, which leaves nothing to tune."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    # The authors' public prototype (toy model, June 2026), as described in `docs/method.md`.
    "prototype": _PAPER
    | {
        "candidates": 3,
        "surrogate": "inject",
        "context": "exact",
        "objective": "remaining",
        "gate": "confidence",
        "sharpen": 0.5,
        "normalize": "minmax",
    },
    # The importance taken in the candidates' keys and values, or in what others make of them.
    "kv": _BARE | {"surrogate": "kv"},
    "response": _BARE | {"surrogate": "response"},
    # Info-Gain's weighting: the risk as it is, the future as a mean over the masked positions.
    "future": _BARE
    | {"surrogate": "kv", "risk": 1.0, "gain_scale": "mean", "gate": "none", "rho": 1.0},
}
"""Every preset gives every setting, so that no default reaches into one."""

MOST = 1e6
"""Largest weight: no product of a few of them overflows."""


def _one_error(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One error for a value that is neither; a union of types would give two."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError(
            f"expected a number above 0 and at most {MOST:.0f}, or 'mean', got {shown(value)}; "
            f"change or remove 'gain_scale'"
        ) from None


GainScale = Annotated[
    Annotated[float, Field(gt=0, le=MOST)] | Literal["mean"], WrapValidator(_one_error)
]


@options
class BoEConfig(BoundedConfig):
    """Backward-on-Entropy: prefer what, revealed, lowers the entropy of the masks, by one backward.

    A candidate's score is `risk ln p + gain_scale TIS`: how likely its token is right, and the
    Token Importance Score (eq. 14), gated by certainty (eq. 15) and less a penalty for entropies
    below a floor (eq. 18, 19). Entropies are in nats.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    preset: Literal["paper", "prototype", "kv", "response", "future"] | None = None
    """Named settings, which replace the server's; fields given beside it go on top. `paper` is
    Algorithm 1 to the letter, `prototype` the authors' public one, `kv` and `response` the paper's
    ranking with another surrogate, `future` the weighting of Info-Gain."""
    rho: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the masked positions that are candidates (paper 4.1: 0.1, 0.25, 0.5); at least the
    tokens due, and twice as many with `sets` "chain"."""
    candidates: Annotated[int, Field(ge=1)] | None = None
    """Number of candidates instead of a share, with the same lower limit."""
    prefilter: Certainty = "confidence"
    """What candidates are chosen by (paper 3.5)."""
    surrogate: Surrogate = "mask"
    """Where the entropy is linearised: at the mask embedding ("mask", eq. 13, 14), at the soft
    embeddings of all candidates ("inject", A.3.1), in the keys and values ("kv"), in the attention
    outputs of the other rows ("response"), or there without rises of entropy ("rectified")."""
    objective: Literal["masked", "remaining"] = "masked"
    """Entropies that are summed: of all masked positions of the block, or of those that are no
    candidates (eq. 11)."""
    active: Literal["masked", "candidates", "all"] = "masked"
    """Rows whose attention passes a gradient (eq. 30): those of the block's masks, of the
    candidates alone, or all."""
    context: Context = "frozen"
    """What becomes of the rows outside the block in the second forward of `surrogate` "inject":
    they keep their keys and values (an approximation), or are computed again ("exact")."""
    gate: Literal["entropy", "confidence", "none"] = "entropy"
    """Factor on the importance: `1 - H / ln V` ("entropy", eq. 15), the probability itself or 1."""
    gate_power: Annotated[float, Field(ge=0, le=MOST)] = 1.0
    """Exponent of the gate."""
    floor_weight: Annotated[float, Field(ge=0, le=MOST)] = 0.0
    """Weight lambda of the penalty below the entropy floor (eq. 19)."""
    floor_max: Annotated[float, Field(ge=0, le=MOST)] = 0.0
    """Height h_max of the entropy floor at the start, nats (eq. 18); it falls to 0 at the end."""
    sharpen: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """Temperature of the soft write: pi^(1/sharpen), renormalised."""
    normalize: Literal["none", "minmax"] = "none"
    """Whether the candidates' importance is rescaled to [0, 1] before the floor's penalty."""
    risk: Annotated[float, Field(ge=0, le=MOST)] = 1.0
    """Weight of ln p, the log-probability of the candidate's own token; 0 in the paper."""
    gain_scale: GainScale = 0.1
    """Weight of the importance, above 0; "mean" divides it by the number of objective positions,
    which is Info-Gain's weighting."""
    sets: Literal["top", "chain"] = "chain"
    """How several tokens are chosen: the best scores ("top", the paper's ranking), or the best one
    and then, by the chain rule, what is likeliest once the chosen ones are written ("chain")."""
    commit: Literal["rounds", "drafts", "quota", "eb", "threshold"] | None = None
    """How many positions are written: what `bound` allows, in the step's own prediction and then in
    a partial one ("rounds") or with drafted next steps ("drafts"), as `joint` does; where it allows
    but one that is not sure, that one is chosen by its score. As many as are due ("quota"), or a
    prefix of these ("eb", "threshold"). Default: "quota", with which every undecided step runs its
    backward."""
    bound: Rule = "entropy"
    """What may be written from one prediction under `commit` "rounds" and "drafts": as many as
    `gamma` allows; or all tokens of probability `threshold`, or the most probable one where there
    is none ("threshold")."""
    bypass: Annotated[float, Field(gt=0, le=1)] | None = 0.99
    """Probability from which no backward is run when all tokens of the step reach it; null for
    never. The positions are then taken by probability."""

    def __post_init__(self) -> None:
        BoundedConfig.__post_init__(self)
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
