"""What a server or a request may say about decoding, field by field.

`SamplerConfig` holds the frame (canvas, blocks, steps), the settings of one unmasking policy, and
the text that a request gives. Nothing here imports vLLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from boe_vllm.base import options
from boe_vllm.base.options import shown
from boe_vllm.policies import POLICY_NAMES, PolicyConfig, frequencies, load_policy
from boe_vllm.request.given_text import GIVEN, GivenText, split_given_text

PositiveInt = Annotated[int, Field(ge=1, le=2**63 - 1)]  # on the way to the engine, 64 bits

Schedule = Literal["linear", "cosine"]

DEFAULT_POLICY = "confidence"
CHOICES = "choices"  # what decodes a request that names its answers

# Keys of SamplingParams.extra_args that belong to vLLM itself.
VLLM_EXTRA_ARGS = frozenset({"kv_transfer_params", "session_id", "ec_transfer_params"})


@options.options
class FrameConfig:
    """The canvas and its schedule, whatever the policy (LLaDA's `generate.py`)."""

    gen_length: PositiveInt | None = None
    """Canvas length in tokens. Default: `max_tokens`, rounded up to whole blocks."""
    block_length: PositiveInt | None = None
    """Tokens per block; blocks are decoded left to right. Default: 32, or the canvas if shorter."""
    canvas: Literal["fixed", "growing"] = "fixed"
    """Whether the whole canvas is there from the start (LLaDA), or each block is appended once the
    one before is done (iLLaDA), so that no later mask, and no later text, is seen."""
    steps: PositiveInt | None = None
    """Denoising steps for the whole canvas; must be a multiple of the number of blocks."""
    tokens_per_step: PositiveInt | None = None
    """Tokens committed per denoising step; the alternative to `steps`. Default: what a policy
    decides itself where it does, otherwise 1."""
    schedule: Schedule = "linear"
    """How the tokens of a block are spread over its steps: evenly (LLaDA), or few at first and many
    at last (MaskGIT's "cosine"). Policies that decide themselves how many they write ignore it."""
    cfg_scale: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Classifier-free guidance w (LLaDA's option): logits `V_u + (w + 1)(V_c - V_u)`, with the
    prompt masked in `V_u`; two forwards a step. 0 for none."""
    cache: Literal["none", "prefix", "dual"] = "none"
    """Keys and values frozen within a block (Fast-dLLM): none, those before the block, or those
    after it too. An approximation."""
    cache_refresh: PositiveInt | None = None
    """Denoising steps after which frozen keys and values are computed again within a block."""
    logits_eos_inf: bool = False
    """Never propose EOS (LLaDA's option of the same name)."""
    confidence_eos_eot_inf: bool = False
    """Commit proposed EOS and EoT last, as LLaDA's code does at temperature 0: their logits are
    -inf in the softmax of the confidences, so that all others are divided by
    `1 - p_EOS - p_EOT`."""
    eos_eot_last: bool = False
    """Commit proposed EOS and EoT last, and leave all other confidences as they are (ours)."""
    trace: bool = False
    """Return for every token its step, entropy, confidence and score at commit."""
    stream_canvas: bool = False
    """Send, beside the text of a stream, the canvas itself as it fills. Streams only."""
    grammar_order: Literal["auto", "free", "frontier"] = "auto"
    """How a canvas under a grammar is written: in any order ("free"), which takes a grammar with a
    finite automaton, or from left to right ("frontier"), which takes any; "auto" is free wherever
    that can be."""
    infill: bool = True
    """Write the masks inside the prompt too. In a chat only if the request itself says so."""

    @property
    def late(self) -> bool:
        """Whether tokens that end a text are committed last."""
        return self.confidence_eos_eot_inf or self.eos_eot_last

    def __post_init__(self) -> None:
        if self.steps is not None and self.tokens_per_step is not None:
            raise ValueError(
                f"steps and tokens_per_step exclude each other, got steps={self.steps} and "
                f"tokens_per_step={self.tokens_per_step}; set one of them"
            )
        if self.cache_refresh is not None and self.cache == "none":
            raise ValueError(
                f"cache_refresh: expected cache 'prefix' or 'dual' beside it, got 'none' with "
                f"cache_refresh={self.cache_refresh}; set cache or remove cache_refresh"
            )
        if self.cfg_scale > 0 and self.cache != "none":
            raise ValueError(
                f"cfg_scale: expected cache 'none' beside it, got cache={self.cache!r} with "
                f"cfg_scale={self.cfg_scale}; remove one of them"
            )
        if self.gen_length is not None and self.block_length is not None:
            options.must_divide("gen_length", self.gen_length, "block_length", self.block_length)


@options.options
class ServerConfig:
    """What only the server's own configuration may set, for whatever policy requests name."""

    frequencies: str | None = None
    """Path of a token frequency table, for the policy `pc`."""

    def __post_init__(self) -> None:
        if self.frequencies is not None:
            frequencies.load(self.frequencies)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """A policy by name, its own settings, and the frame around it."""

    policy: str = DEFAULT_POLICY
    frame: FrameConfig = dataclasses.field(default_factory=FrameConfig)
    settings: PolicyConfig = dataclasses.field(
        default_factory=lambda: load_policy(DEFAULT_POLICY).Config()
    )
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    given_text: GivenText | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields as a flat, JSON-ready mapping; `parse_sampler_config` reads it back."""
        flat: dict[str, Any] = {"policy": self.policy}
        flat.update(dataclasses.asdict(self.frame))
        flat.update(dataclasses.asdict(self.server))
        flat.update(dataclasses.asdict(self.settings))
        return flat


def parse_sampler_config(
    fields: Mapping[str, Any], *, base: SamplerConfig | None = None
) -> SamplerConfig:
    """Read flat fields (server's or request's) over the defaults in `base`.

    A request that names another policy than the server's keeps the server's frame and starts
    from that policy's own defaults. Values may be JSON text, as `vllm_xargs` cannot be nested.

    Args:
        fields: by name.
        base: the server's configuration if the fields are a request's; None if they are the
            server's own, which alone may set the fields of `ServerConfig`.

    Raises:
        ValueError: for an unknown or invalid field, naming it, what was expected and what came.
    """
    own_word = base is None
    base = base or SamplerConfig()
    fields = _read_values(fields)
    given_text = None
    if not GIVEN.isdisjoint(fields):
        given_text, fields = split_given_text(fields)
    if given_text is not None:
        if own_word:
            raise _not_here("in a request", "the server's configuration", given_text.given())
        if given_text.choices is not None:
            return _for_choices(given_text, fields, base)
    policy = fields.pop("policy", base.policy)
    if not isinstance(policy, str) or policy not in POLICY_NAMES:
        raise ValueError(
            f"policy: expected one of {sorted(POLICY_NAMES)}, got {shown(policy)}; choose one of "
            f"them"
        )
    frame_names, own_names = options.names(FrameConfig), options.names(load_policy(policy).Config)
    server = {key: fields.pop(key) for key in options.names(ServerConfig) if key in fields}
    if server and not own_word:
        raise _not_here("in the server's own configuration", "a request", server)
    server_config = base.server
    if server:
        server_config = options.build(ServerConfig, dataclasses.asdict(base.server) | server)
    for name in fields:
        if name not in frame_names and name not in own_names:
            raise options.unknown_field(
                name, ["policy", *frame_names, *own_names], f" for policy {policy!r}"
            )
    own = {key: value for key, value in fields.items() if key in frame_names}
    frame = _frame(base.frame, own, given_text)
    own = {key: value for key, value in fields.items() if key in own_names}
    settings = _settings(policy, own, base, server_config)
    if frame.steps is not None or frame.tokens_per_step is not None:
        settings = settings.paced()
    return SamplerConfig(
        policy=policy,
        frame=frame,
        settings=settings,
        server=server_config,
        given_text=given_text,
    )


def _read_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields, with their JSON read. What is no name at all is refused later, by its name and
    not for its value."""
    return {
        name: options.read_json(name, value) if str(name).isidentifier() else value
        for name, value in fields.items()
        if name not in VLLM_EXTRA_ARGS
    }


def _settings(
    policy: str, own: dict[str, Any], base: SamplerConfig, server: ServerConfig
) -> PolicyConfig:
    """A request's settings of its policy, over the server's where they are of the same one."""
    kind, same = load_policy(policy).Config, policy == base.policy
    if same and not own and server is base.server:
        return base.settings
    shared, names = dataclasses.asdict(server), options.names(kind)
    own |= {key: value for key, value in shared.items() if key in names}
    return options.build(kind, kind.resolve(own, base.settings if same else None))


def _frame(base: FrameConfig, own: Mapping[str, Any], given_text: GivenText | None) -> FrameConfig:
    """A request's frame over the server's."""
    if not own and given_text is None:
        return base
    inherited = dataclasses.asdict(base)
    # A request that says `steps` replaces a server's `tokens_per_step`, and the reverse.
    for name, other in (("steps", "tokens_per_step"), ("tokens_per_step", "steps")):
        if own.get(name) is not None and other not in own:
            inherited[other] = None
    if given_text is not None:
        inherited["gen_length"] = None  # a request's own template goes before a server's length
    return options.build(FrameConfig, inherited | dict(own))


def _for_choices(
    given_text: GivenText, fields: Mapping[str, Any], base: SamplerConfig
) -> SamplerConfig:
    """The answers decide the canvas and its steps: few fields mean anything beside them."""
    kept = {name: getattr(base.frame, name) for name in ("cfg_scale", "infill", "trace")}
    for name in fields:
        if name not in kept:
            raise ValueError(
                f"choices: expected only {sorted(kept)} beside it, got "
                f"{name}={shown(fields[name])}; remove {name!r}"
            )
    from boe_vllm.policies.choices import ChoicesConfig  # which brings torch

    return SamplerConfig(
        policy=CHOICES,
        frame=options.build(FrameConfig, kept | dict(fields)),
        settings=ChoicesConfig(),
        server=base.server,
        given_text=given_text,
    )


def _not_here(where: str, found: str, fields: Mapping[str, Any]) -> ValueError:
    name, value = next(iter(fields.items()))
    return ValueError(
        f"{name}: expected {where} only, got {shown(value)} in {found}; remove it there"
    )
