"""The ids of mask, end of text and end of turn, from wherever a checkpoint has them.

Each is read from the config, then from the tokenizer, then (the mask) from the server's settings,
then from what its family's published checkpoints are known to use. Without one, decoding cannot
begin, and nothing is guessed: LLaDA's mask is an ordinary word of iLLaDA.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boe_vllm.models.names import CheckpointConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """Token ids that have a meaning of their own in decoding."""

    mask: int
    eos: int
    late: frozenset[int] = frozenset()
    """EOS and end of turn, for `confidence_eos_eot_inf` and `eos_eot_last`."""

    @classmethod
    def of(cls, config: CheckpointConfig) -> SpecialTokens:
        """Those of a checkpoint whose ids are complete (`models.special`)."""
        mask, eos, eot = config.mask_token_id, config.eos_token_id, config.eot_token_id
        return cls(mask=mask, eos=eos, late=frozenset({eos, eot} - {None}))


def complete(config: Any, tokenizer: Any | None, mask_token_id: int | None = None) -> None:
    """Write the ids into a config, in place.

    Args:
        config: a `names.CheckpointConfig`.
        tokenizer: transformers'; None where there is none.
        mask_token_id: as the server's settings give it.

    Raises:
        ValueError: for an id that nobody names, or a mask that two name differently.
    """
    published = getattr(config, "published_ids", {}).get(config.vocab_size, {})
    said = config.mask_token_id
    if said is not None and said == config.eos_token_id:
        said = None  # a config class's placeholder
    own = _first(said, getattr(tokenizer, "mask_token_id", None))
    if None not in (own, mask_token_id) and own != mask_token_id:
        override = f"--hf-overrides '{{\"mask_token_id\": {mask_token_id}}}'"
        raise ValueError(
            f"mask_token_id: expected the checkpoint's own ({own}), got {mask_token_id}; remove "
            f"it, or override the config with {override}"
        )
    config.mask_token_id = _first(own, mask_token_id, published.get("mask_token_id"))
    config.eos_token_id = _first(
        config.eos_token_id, getattr(tokenizer, "eos_token_id", None), published.get("eos_token_id")
    )
    text = getattr(config, "end_of_turn", None)
    vocabulary = tokenizer.get_vocab() if tokenizer is not None and text else {}
    config.eot_token_id = _first(
        config.eot_token_id, vocabulary.get(text), published.get("eot_token_id")
    )
    _check(config)


def _first(*ids: int | None) -> int | None:
    return next((token for token in ids if token is not None), None)


def _check(config: Any) -> None:
    remedies = {
        "mask_token_id": "neither config.json nor the tokenizer names it: give it as "
        "--additional-config '{\"mask_token_id\": ...}', from the model's page",
        "eos_token_id": "give it with --hf-overrides '{\"eos_token_id\": ...}'",
    }
    for name, remedy in remedies.items():
        token = getattr(config, name)
        if token is None or not 0 <= token < config.vocab_size:
            raise ValueError(
                f"{name}: expected a token id below vocab_size ({config.vocab_size}), got {token}; "
                f"{remedy}"
            )
