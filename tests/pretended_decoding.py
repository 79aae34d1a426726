"""Requests of every kind for the CPU and the pretended CUDA device, and what they cost there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from oracle import random_weights, small_config
from pretended_cuda import CUDA, PretendedDevice, move

from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.models.build import empty_model
from boe_vllm.models.decoder import Decoder
from boe_vllm.models.special import SpecialTokens
from boe_vllm.policies import POLICY_NAMES, load_policy
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.request.resolved import ResolvedRequest, plan_canvas
from boe_vllm.sampling.constraints import Constraint, TokenConstraints
from boe_vllm.steering.coupling import Estimator
from boe_vllm.steering.importance import Surrogate

MASK, EOS, VOCABULARY = 28, 27, 29
TABLE = Path(__file__).parent / "data" / "frequencies_29.json"

FILTERED = TokenConstraints(everywhere=Constraint(top_k=7, top_p=0.9, min_p=0.01))
EDITED = TokenConstraints(
    everywhere=Constraint(
        allowed_token_ids=np.arange(25),
        banned_token_ids=np.array([3, 4]),
        biased_token_ids=np.array([5, 6]),
        logit_bias=np.array([1.0, -1.0]),
    ),
    min_tokens=5,
    stop_token_ids=(9, 10),
    bad_words=((7, 8), (1, 2, 3)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """Requests of one kind."""

    fields: dict[str, Any]
    """Of the sampler."""
    request: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the resolved request."""

    def asking(self, **request: Any) -> Scenario:
        """The same requests with further demands."""
        return dataclasses.replace(self, request=request)


ONE = {"tokens_per_step": 1}
"""With it fewer tokens are due than there are candidates, so that importance is asked for."""


def _of(policy: str, **fields: Any) -> Scenario:
    return Scenario(fields={"policy": policy, **fields})


SCENARIOS: dict[str, Scenario] = (
    {name: _of(name) for name in sorted(POLICY_NAMES)}
    | {
        f"{name}, preset {preset}": _of(name, preset=preset, **(ONE if name == "boe" else {}))
        for name in sorted(POLICY_NAMES)
        for preset in load_policy(name).Config.presets
    }
    | {
        f"boe, {surrogate}": _of("boe", surrogate=surrogate, **ONE)
        for surrogate in get_args(Surrogate)
    }
    | {
        f"pairwise, {estimator}": _of("pairwise", coupling=estimator)
        for estimator in get_args(Estimator)
    }
    | {f"joint, {cache} cache": _of("joint", cache=cache) for cache in ("prefix", "dual")}
    | {
        "kv, every row active": _of("boe", preset="kv", active="all", **ONE),
        "kv, dual cache": _of("boe", preset="kv", cache="dual", **ONE),
        "kv, guided": _of("boe", preset="kv", cfg_scale=0.5, **ONE),
        "inject, guided": _of("boe", surrogate="inject", cfg_scale=0.5, **ONE),
        "inject, prefix cache": _of("boe", surrogate="inject", cache="prefix", **ONE),
        "joint, guided": _of("joint", cfg_scale=0.5),
        "joint, remasking": _of("joint", remask="remdm", eta=0.8),
        "joint, late ends": _of("joint", confidence_eos_eot_inf=True, logits_eos_inf=True),
        "joint, drawn and filtered": _of("joint").asking(temperature=0.7, constraints=FILTERED),
        "joint, edited": _of("joint").asking(constraints=EDITED),
        "joint, logprobs": _of("joint").asking(logprobs=True, top_logprobs=3),
        "confidence, drawn": _of("confidence").asking(temperature=1.0),
        "confidence, logprobs": _of("confidence").asking(logprobs=True, top_logprobs=2),
        "info-gain, every state": _of("info-gain", bypass=0.0),
        "klass, thresholds": _of("klass", confidence_threshold=0.2, kl_threshold=0.3),
        "lookahead, guided": _of("lookahead", cfg_scale=0.5),
        "lookum, cached": _of("lookum", cache="prefix"),
        "remdm, rescaled": _of("remdm", sigma_schedule="rescale", eta=0.8),
    }
)


def networks(
    layers: int = 2, dtype: torch.dtype = torch.float32, **sizes: int
) -> tuple[Decoder, Decoder]:
    """The same network on the CPU and on the pretended device."""
    sizes = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": layers} | sizes
    config = small_config(**sizes)
    made = []
    for _ in range(2):
        model = empty_model(config, dtype=dtype)
        model.load_weights(random_weights(config).items())
        made.append(model)
    return made[0], move(made[1])


def loop_of(model: Decoder, device: torch.device, scenario: Scenario, requests: int = 2, **plan):
    """A loop with some requests of different lengths."""
    special = SpecialTokens(mask=MASK, eos=EOS, late=frozenset({EOS}))
    loop = DenoisingLoop(model, special=special, device=device, cache_rows=100 * requests)
    server = {"frequencies": str(TABLE)} if scenario.fields.get("policy") == "pc" else {}
    fields = {"block_length": 6, "tokens_per_step": 3} | plan | scenario.fields
    for n in range(requests):
        prompt = np.random.default_rng(n).integers(0, 25, 9 + 5 * n % 7).tolist()
        config = parse_sampler_config(fields, base=parse_sampler_config(server))
        made = plan_canvas(config, prompt_len=len(prompt), max_tokens=12, max_model_len=128)
        request = {"temperature": 0.0} | scenario.request
        loop.add(str(n), prompt, ResolvedRequest(config=config, plan=made, seed=n, **request))
    return loop


def step(loop: DenoisingLoop) -> None:
    """One step of all requests that are not done."""
    results = loop.step([r for r, canvas in loop.canvases.items() if not canvas.done])
    assert not [result.error for result in results.values() if result.error]


def state(loop: DenoisingLoop) -> list[tuple]:
    """Tokens and costs of every request."""
    canvases = loop.canvases.values()
    return [(canvas.tokens.tolist(), dataclasses.asdict(canvas.account)) for canvas in canvases]


@dataclasses.dataclass
class Cost:
    """What some steps cost on the device."""

    device: PretendedDevice
    steps: int = 0
    passes: int = 0
    """Forwards, whole or partial, and backwards, each over all requests."""

    def per_step(self, *kinds: str) -> float:
        """Events of some kinds in a step."""
        return self.device.counts.total(*kinds) / self.steps

    def per_pass(self, *kinds: str) -> float:
        """Events of some kinds in a pass."""
        return self.device.counts.total(*kinds) / self.passes


@contextlib.contextmanager
def counting_passes(model: Decoder, cost: Cost) -> Iterator[None]:
    """Every pass goes through the first layer once, forwards or backwards."""
    first = model.layers[0]
    names = ("project", "backward")

    def counted(run):
        def call(*args, **kwargs):
            cost.passes += 1
            return run(*args, **kwargs)

        return call

    for name in names:
        setattr(first, name, counted(getattr(first, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(first, name)


def cost_of(model: Decoder, scenario: Scenario, requests: int, steps: int = 2, **plan: Any) -> Cost:
    """What the first steps of some requests cost on the pretended device."""
    device = PretendedDevice()
    loop = loop_of(model, CUDA, scenario, requests, **plan)
    cost = Cost(device)
    with device, counting_passes(model, cost):
        for _ in range(steps):
            step(loop)
            cost.steps += 1
    return cost
