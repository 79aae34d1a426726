"""The largest steps that the server's limits admit, run before the first request.

What does not fit into memory, or does not work at all, ends the start and not a request.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from vllm.logger import init_logger

from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.policies import POLICY_NAMES, Policy, load_policy
from boe_vllm.request.facts import ModelFacts
from boe_vllm.request.limits import ServerSettings
from boe_vllm.request.resolve import SamplingFields, resolve
from boe_vllm.request.resolved import ResolvedRequest

logger = init_logger("vllm." + __name__)

MEBI = 1 << 20


def warm_up(
    loop: DenoisingLoop,
    *,
    server: ServerSettings,
    model: ModelFacts,
    max_rows: int,
    max_requests: int,
) -> None:
    """Allocate what is allocated once; run the largest step with the server's policy, and with the
    policy that looks ahead at most rows of all that a request may name.

    Args:
        loop: to run them in; it is left as it was.
        server: its settings and limits.
        model: what the loop decodes with.
        max_rows: rows of all running requests, and of one packed look-ahead pass.
        max_requests: requests that run together.

    Raises:
        RuntimeError: when a request of them fails, with its error.
    """
    begin = time.perf_counter()
    pool = loop.pool.storage
    number = max(1, min(max_requests, max_rows // model.max_model_len))
    share = -(-max_rows // number)
    requests = {server.config.policy: largest_request({}, server, model, share)}
    for name in sorted(POLICY_NAMES):
        if load_policy(name).rows_ahead is not Policy.rows_ahead:
            requests.setdefault(name, largest_request({"policy": name}, server, model, max_rows))
    found = {name: request for name, request in requests.items() if request is not None}
    dearest = max(found, key=lambda name: found[name].rows_ahead, default=None)
    if server.config.policy in found:
        _run(loop, found[server.config.policy], number)
    if dearest is not None and dearest != server.config.policy:
        _run(loop, found[dearest], _together(found[dearest], number, max_rows, model))
    loop.read_counters()  # which are of no request
    network = sum(p.numel() * p.element_size() for p in loop.model.parameters())
    logger.info(
        "Warm-up: %d requests of %d rows with %s, the dearest look-ahead %d rows (%s), in %.1f s. "
        "Network %d MiB, frozen keys and values %d MiB, at most %d MiB so far.",
        number,
        model.max_model_len,
        server.config.policy,
        found[dearest].rows_ahead if dearest else 0,
        dearest,
        time.perf_counter() - begin,
        network // MEBI,
        pool.numel() * pool.element_size() // MEBI,
        _most_memory(loop.device) // MEBI,
    )


def largest_request(
    fields: Mapping[str, Any], server: ServerSettings, model: ModelFacts, enough: int
) -> ResolvedRequest | None:
    """A request of full length whose step computes most, among those that the limits admit.

    Args:
        fields: of the request; its canvas is added.
        server: its settings and limits.
        model: what will decode it.
        enough: rows of look-ahead beyond which more take more time, but no more memory.

    Returns:
        The request, or None if there is none that the server would serve.
    """
    best, most = None, (-1, 0)
    length = min(model.max_model_len - 1, server.limits.max_gen_length or model.max_model_len)
    prompt = [model.eos_token_id] * (model.max_model_len - length)
    for block in _halvings(length):
        for due in _halvings(block):
            try:
                request = resolve(
                    {"block_length": block, "tokens_per_step": due, "gen_length": None, **fields},
                    prompt=prompt,
                    sampling=SamplingFields(max_tokens=length, temperature=0.0, seed=0),
                    server=server,
                    model=model,
                )
            except ValueError:  # beyond a limit, or in need of a setting that the server lacks
                continue
            value = (min(request.rows_ahead, enough), -request.rows_ahead)
            if value > most:
                best, most = request, value
        if best is not None and most[0] == 0:
            break  # a policy that does not look ahead computes most with the longest block
    return best


def _together(request: ResolvedRequest, number: int, max_rows: int, model: ModelFacts) -> int:
    """How many such requests make the largest step: all, unless one alone fills the passes of its
    look-ahead and keeps nothing for a backward."""
    if request.policy(model.eos_token_id).needs().rows != "none":
        return number
    return min(number, -(-max_rows // max(1, request.rows_ahead)))


def _halvings(number: int) -> Iterator[int]:
    while number:
        yield number
        number //= 2


def _run(loop: DenoisingLoop, request: ResolvedRequest, number: int) -> None:
    prompt = [loop.special.eos] * request.prompt_len
    names = [f"warm-up-{n}" for n in range(number)]
    try:
        for name in names:
            loop.add(name, prompt, request)
        results = loop.step(names)
    finally:
        for name in names:
            loop.remove(name)
    for result in results.values():
        if result.error is not None:
            raise RuntimeError(
                f"warm-up: expected a step of {number} requests with policy "
                f"{request.config.policy!r} to work, got: {result.error}; if it is memory, lower "
                f"max_num_batched_tokens, max_model_len or max_lookahead_rows"
            )


def _most_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
