"""Whether a row's numbers depend on the rows beside it, and how exact the row-wise functions are.

A request alone and the same request in a batch decode the same tokens only if every row gets the
same bits in both: in products with the weights, and in what reduces along a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from boe_vllm.lab.gpu.attention import error
from boe_vllm.lab.gpu.report import Report
from boe_vllm.models import functional
from boe_vllm.models.experts import RoutedMlp
from boe_vllm.models.grouped import Groups, matmul_groups, matmul_groups_one_by_one
from boe_vllm.models.layers import Layers
from boe_vllm.models.products import matmul_rows
from boe_vllm.models.shape import ExpertsShape
from boe_vllm.sampling.distributions import entropy_gradient, normalise_

Tensor = torch.Tensor

COUNTS = (1, 3, 8, 27, 32, 64, 100, 128, 200, 352, 512, 1024, 2816)
"""Rows that a smaller batch may have."""
ROWS, SMALL_ROWS = 4096, 40
VOCABULARY = 126464
PRODUCTS = ((4096, 8192), (4096, 4096), (4096, 24576), (12288, 4096), (4096, VOCABULARY))
"""(depth, width) of LLaDA-8B's products; a backward multiplies by the same weights turned round."""
SMALL_PRODUCTS = ((32, 96),)
EXPERTS = (2048, ExpertsShape(count=64, chosen=8, inner=1024))
"""Width and experts of LLaDA-MoE-7B-A1B."""
SMALL_EXPERTS = (32, ExpertsShape(count=6, chosen=2, inner=16))
ERRORS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
EPS = 1e-5
START = 7
"""First row of the smaller batches, which lies in the middle of every tile."""


def check_products(report: Report, device: torch.device, *, small: bool) -> None:
    """Products with the network's weights, as they lie for a forward and for a backward."""
    most = SMALL_ROWS if small else ROWS
    generator = torch.Generator(device=device).manual_seed(0)
    for dtype in ERRORS:
        name = str(dtype).removeprefix("torch.")
        for depth, width in SMALL_PRODUCTS if small else PRODUCTS:
            for way in ("forward", "backward"):
                subject = dict(dtype=name, depth=depth, width=width, weights=way)
                if not report.time_left("products", **subject):
                    return
                with report.guard("products", **subject):
                    weight = torch.randn(width, depth, device=device, generator=generator)
                    weight = weight.to(dtype)
                    matrix = weight.t() if way == "forward" else weight
                    x = torch.randn(most, len(matrix), device=device, generator=generator)
                    # Logits are wanted before they are rounded to half precision.
                    wide = width == VOCABULARY and way == "forward"
                    depends = _depends(functools.partial(_product, matrix, wide), x.to(dtype))
                    report.line("products", ok=not depends, **subject, depends_at_rows=depends)


def check_functions(report: Report, device: torch.device, *, small: bool) -> None:
    """Norms, rotation, activation and the vocabulary's statistics, against float64."""
    width, inner, vocabulary = (32, 48, 100) if small else (4096, 12288, VOCABULARY)
    most = SMALL_ROWS if small else 2900
    for dtype in ERRORS:
        name = str(dtype).removeprefix("torch.")
        for label, (columns, function) in _functions(width, inner).items():
            if not report.time_left("functions", function=label):
                return
            with report.guard("functions", function=label, dtype=name):
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(most, columns, generator=generator).to(device, dtype)
                found = error(function(x[:64].clone()), function(x[:64].double().cpu()))
                depends = _depends(function, x)
                ok = found <= ERRORS[dtype] and not depends
                report.line(
                    "functions",
                    ok=ok,
                    function=label,
                    dtype=name,
                    error=found,
                    depends_at_rows=depends,
                )
    for label, function in _STATISTICS.items():
        with report.guard("functions", function=label):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(min(most, 1024), vocabulary, generator=generator).mul_(3).to(device)
            found = error(function(x[:16].clone()), function(x[:16].double().cpu()))
            depends = _depends(function, x)
            ok = found <= 1e-5 and not depends
            report.line(
                "functions",
                ok=ok,
                function=label,
                dtype="float32",
                error=found,
                depends_at_rows=depends,
            )


def check_experts(report: Report, device: torch.device, *, small: bool) -> None:
    """A routed MLP, forward and backward, and its grouped products against those one by one."""
    width, shape = SMALL_EXPERTS if small else EXPERTS
    subject = dict(dtype="bfloat16", width=width, experts=shape.count)
    if not report.time_left("experts", **subject):
        return
    with report.guard("experts", **subject):
        mlp = RoutedMlp(shape, width, Layers()).to(device, torch.bfloat16)
        generator = torch.Generator(device=device).manual_seed(0)
        for parameter in mlp.parameters():
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        rows = SMALL_ROWS if small else COUNTS[-1] + START
        x = torch.randn(rows, width, device=device, generator=generator).bfloat16()
        depends = {
            "forward": _depends(lambda x: mlp.run(x)[0], x),
            "backward": _depends(functools.partial(_expert_gradient, mlp), x),
        }
        chosen = torch.randint(shape.count, (rows, 1), device=device, generator=generator)
        groups = Groups.of(chosen, shape.count)
        operands = x[groups.order_M], mlp.experts.gate_up.transpose(1, 2), groups
        found = error(matmul_groups(*operands), matmul_groups_one_by_one(*operands).double())
        ok = found <= ERRORS[torch.bfloat16] and not any(depends.values())
        report.line("experts", ok=ok, **subject, error=found, depends_at_rows=depends)


def _expert_gradient(mlp: RoutedMlp, x_ND: Tensor) -> Tensor:
    _, saved = mlp.run(x_ND, torch.arange(len(x_ND), device=x_ND.device))
    assert saved is not None
    return mlp.backward(x_ND.flip(1), saved)


def _product(weight_DE: Tensor, float32: bool, x_ND: Tensor) -> Tensor:
    return matmul_rows(x_ND, weight_DE, float32=float32)


def _depends(function: Callable[[Tensor], Tensor], x_ND: Tensor) -> list[int]:
    """Numbers of rows at which some row's result differs from that among all rows."""
    whole = function(x_ND.clone())
    different = []
    for count in COUNTS:
        part = slice(START, START + count)
        if part.stop > len(x_ND):
            break
        if not torch.equal(function(x_ND[part].clone()), whole[part]):
            different.append(count)
    return different


def _functions(width: int, inner: int) -> Mapping[str, tuple[int, Callable[[Tensor], Tensor]]]:
    """Name -> columns of the input, and the function of its rows alone."""
    heads = max(1, width // 128)

    def weight(x: Tensor) -> Tensor:
        return torch.linspace(0.5, 1.5, width).to(x)

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]

    def angles(x: Tensor) -> Tensor:
        # Every row has the same position, so that its place in the batch does not matter.
        positions = torch.full((len(x),), 300, device=x.device)
        return functional.rotary_tables(positions, width // heads, 5e5, x.dtype)

    def split_rotated(x: Tensor) -> Tensor:
        q, kv = functional.split_rotated(x, angles(x), heads, heads)
        return torch.cat([q, *kv.unbind()], dim=1).flatten(1)

    def join_rotated_back(x: Tensor) -> Tensor:
        dq, dk, dv = x.unflatten(1, (3, heads, -1)).unbind(1)
        return functional.join_rotated_back(dq, dk, dv, angles(x))

    def add_norm(x: Tensor) -> Tensor:
        rows, added = halves(x)
        both = functional.add_rms_norm_(rows.contiguous(), added, weight(x), EPS)
        return torch.cat(both, dim=1)

    def norm_backward(x: Tensor) -> Tensor:
        gradient, rows = halves(x)
        beside = rows.flip(1)
        return functional.rms_norm_backward(gradient.contiguous(), rows, weight(x), EPS, beside)

    def swiglu_backward(x: Tensor) -> Tensor:
        return functional.swiglu_backward(x[:, :inner].contiguous(), x[:, inner:])

    return {
        "rms_norm": (width, lambda x: functional.rms_norm(x, weight(x), EPS)),
        "add_rms_norm": (2 * width, add_norm),
        "rms_norm_backward": (2 * width, norm_backward),
        "split_rotated": (3 * width, split_rotated),
        "join_rotated_back": (3 * width, join_rotated_back),
        "swiglu": (2 * inner, functional.swiglu_),
        "swiglu_backward": (3 * inner, swiglu_backward),
    }


def _summary(logits_NV: Tensor) -> Tensor:
    found = normalise_(logits_NV)
    return torch.stack([found.best, found.second, found.entropy], dim=1)


_STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "normalise: best, second, entropy": _summary,
    "normalise: log-probabilities": lambda x: (normalise_(x), x)[1],
    "entropy_gradient": lambda x: entropy_gradient(x.log_softmax(-1)),
}
