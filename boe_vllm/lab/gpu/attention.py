"""Attention on the device against the float64 reference, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from boe_vllm.attention import AttentionLayout, attention_backward, attention_forward
from boe_vllm.attention.api import IMPLS, explain_auto, resolve
from boe_vllm.lab.gpu.report import Report

Tensor = torch.Tensor

ERRORS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest relative errors: a few roundings of each dtype."""
LAYOUTS = (
    AttentionLayout(
        q_seqlens=(700, 33, 1, 260), kv_seqlens=(700, 33, 1, 260), active_seqlens=(20, 33, 0, 65)
    ),
    AttentionLayout(
        q_seqlens=(300, 33, 1, 260), kv_seqlens=(700, 400, 1, 260), active_seqlens=(20, 33, 0, 65)
    ),
    AttentionLayout(q_seqlens=(128,), kv_seqlens=(1024,), active_seqlens=(32,)),
)
SMALL_LAYOUTS = (
    AttentionLayout(q_seqlens=(9, 3, 1), kv_seqlens=(9, 8, 1), active_seqlens=(4, 3, 0)),
)
HEADS = ((32, 32), (32, 8))
"""Heads of queries and of keys."""
SMALL_HEADS = ((4, 4), (4, 2))


def check_attention(report: Report, device: torch.device, *, small: bool) -> None:
    """Errors of o, dq, dk and dv, whether runs repeat, and a sequence alone against in a batch."""
    layouts, heads = (SMALL_LAYOUTS, SMALL_HEADS) if small else (LAYOUTS, HEADS)
    size = 16 if small else 128
    for dtype, impl in implementations(device, size):
        for (h, g), layout in itertools.product(heads, layouts):
            subject = dict(
                impl=impl,
                dtype=str(dtype).removeprefix("torch."),
                heads=[h, g],
                rows=layout.q_seqlens,
            )
            if not report.time_left("attention", **subject):
                return
            with report.guard("attention", **subject):
                found = compare(layout, h, g, size, dtype, device, impl)
                worst = max(found[name] for name in ("o", "dq", "dk", "dv"))
                ok = worst <= ERRORS[dtype] and found["alone_equals_batch"]
                report.line("attention", ok=ok, **subject, **found)


def implementations(device: torch.device, size: int) -> Iterator[tuple[torch.dtype, str]]:
    """Every implementation that says it takes a dtype on the device, without the reference.

    xformers is left out where `auto` says that it does not run.
    """
    for dtype, impl in itertools.product(ERRORS, IMPLS):
        if impl in ("auto", "reference"):
            continue
        try:
            resolve(impl, device.type, dtype, size)
        except ValueError:
            continue
        if impl != "xformers" or explain_auto(device.type, dtype, size)[0] == "xformers":
            yield dtype, impl


def compare(
    layout: AttentionLayout,
    heads: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    impl: str,
) -> dict:
    """Relative errors against the reference on the same rounded inputs, and what repeats."""
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, size, generator=generator).to(device, dtype)

    q, k, v, do = (
        draw(layout.num_queries, heads),
        draw(layout.num_keys, kv_heads),
        draw(layout.num_keys, kv_heads),
        draw(layout.num_active, heads),
    )
    scale = size**-0.5
    active = q[layout.active_index(device)]
    o = attention_forward(q, k, v, layout=layout, scale=scale, impl=impl)
    grads, again = (
        attention_backward(do, active, k, v, layout=layout, scale=scale, impl=impl)
        for _ in range(2)
    )
    exact = [x.double().cpu() for x in (q, k, v, do, active)]
    wanted = attention_forward(*exact[:3], layout=layout, scale=scale, impl="reference")
    wanted_grads = attention_backward(
        exact[3], exact[4], *exact[1:3], layout=layout, scale=scale, impl="reference"
    )
    first = AttentionLayout(
        q_seqlens=layout.q_seqlens[:1],
        kv_seqlens=layout.kv_seqlens[:1],
        active_seqlens=layout.active_seqlens[:1],
    )
    rows, keys, saved = first.num_queries, first.num_keys, first.num_active
    alone = attention_forward(q[:rows], k[:keys], v[:keys], layout=first, scale=scale, impl=impl)
    alone_grads = attention_backward(
        do[:saved], active[:saved], k[:keys], v[:keys], layout=first, scale=scale, impl=impl
    )
    names = ("dq", "dk", "dv")
    return {
        "o": error(o, wanted),
        **{n: error(a, b) for n, a, b in zip(names, grads, wanted_grads, strict=True)},
        "backward_repeats": [torch.equal(a, b) for a, b in zip(grads, again, strict=True)],
        "alone_equals_batch": torch.equal(alone, o[:rows]),
        "alone_backward_equals_batch": [
            torch.equal(a, b[: len(a)]) for a, b in zip(alone_grads, grads, strict=True)
        ],
    }


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over that of what was wanted."""
    wanted = wanted.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-30))
