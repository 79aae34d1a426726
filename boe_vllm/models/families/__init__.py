"""The families of checkpoints that are served, by the `architectures` of their `config.json`.

Dispatch is on `architectures`, never on `model_type`: "llada" is two networks. A family is a config
class, in a module of its own. Installed packages may add families (entry points in the group
`boe_vllm.families`, name = architecture, value = module:class); see `docs/extending.md`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

GROUP = "boe_vllm.families"

FAMILIES: dict[str, str] = {
    **{entry.name: entry.value for entry in entry_points(group=GROUP)},
    "LLaDAModelLM": "boe_vllm.models.llada:LLaDAConfig",
    "ILLaDAForCausalLM": "boe_vllm.models.families.illada:ILLaDAConfig",
    "DreamModel": "boe_vllm.models.families.dream:DreamConfig",
    "A2DQwen3LMHeadModel": "boe_vllm.models.families.a2d:A2DQwen3Config",
    "A2DQwen2LMHeadModel": "boe_vllm.models.families.a2d:A2DQwen2Config",
    "A2DLlamaLMHeadModel": "boe_vllm.models.families.a2d:A2DLlamaConfig",
    "MDLM": "boe_vllm.models.families.mdlm:MDLMConfig",
    "LLaDAMoEModelLM": "boe_vllm.models.families.llada_moe:LLaDAMoEConfig",
}
"""Architecture -> module:class of its config. No package can take a name of ours."""


def config_class(architecture: str) -> Any:
    """The config class of an architecture.

    Raises:
        ValueError: for one that is not served.
    """
    if architecture not in FAMILIES:
        raise ValueError(
            f"architectures: expected one of {', '.join(FAMILIES)}, got {architecture!r}; this "
            f"model is not served, see docs/models.md"
        )
    module, _, name = FAMILIES[architecture].partition(":")
    return getattr(importlib.import_module(module), name)


def config_classes() -> Iterator[Any]:
    """Those of all families."""
    return map(config_class, FAMILIES)


def tell_transformers() -> None:
    """Register every family's config, and tokenizer of its own, by the names that checkpoints have.
    Safe to call again."""
    from transformers import AutoConfig, AutoTokenizer

    for config in config_classes():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        tokenizer = getattr(config, "own_tokenizer", None)
        if tokenizer is not None:
            AutoTokenizer.register(config, tokenizer_class=tokenizer, exist_ok=True)


def route(
    cls: Any, make: Callable[..., Any], config_dict: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> Any:
    """The config of a `config.json`, by the class that its `architectures` name.

    Args:
        cls: the class that transformers chose by `model_type`.
        make: its own `from_dict`.
        config_dict: what the file says; without `architectures` it is `cls`'s.
        kwargs: of `from_dict`.

    Raises:
        ValueError: for an architecture that is not served.
    """
    named = config_dict.get("architectures") or [cls.architecture]
    right = config_class(named[0])
    if right is cls:
        return make(config_dict, **kwargs)
    return right.from_dict(dict(config_dict), **kwargs)


def refuse_variants(config: Any, supported: Mapping[str, Any], family: str) -> None:
    """Raise ValueError if a field that chooses a variant of the network has another value than the
    one that is implemented; what counts as false counts as absent."""
    for name, expected in supported.items():
        value = getattr(config, name, expected)
        if (value or None) != (expected or None):
            raise ValueError(
                f"{name}: expected {expected!r}, got {value!r}; this variant of {family} is not "
                f"supported"
            )


def check_token_ids(config: Any) -> None:
    """Raise ValueError for a special token that is not in the vocabulary."""
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, name)
        if token is not None and not 0 <= token < config.vocab_size:
            raise ValueError(
                f"{name}: expected a token id below vocab_size ({config.vocab_size}), "
                f"got {token}; correct the checkpoint's config.json"
            )
