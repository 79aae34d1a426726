"""How faithful the estimates are to what they stand for.

Gain: every score against the exhaustive look-ahead, which writes a candidate's soft embedding alone
and takes the drop of the remaining masked entropy (candidates: the most confident share rho of the
masked positions). Coupling: every estimator of kappa against `exact`, over the pairs of the `2 b`
most confident positions. States are early, middle and late ones of unseen puzzles, decoded by
confidence one token a step.

Per state Spearman's correlation, and for gains the share of the possible gain that the best-scored
candidate achieves (0: an average candidate, 1: the best); means over states, with 95 % bootstrap
intervals over puzzles. Cost in rows of all forwards and backwards and in measured time of a step of
`--requests` states, each over a confidence step's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import boe_vllm
from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.lab.bench import checkpoint, common
from boe_vllm.lab.bench.decoded import PHASES, DecodedState, decoded_states, one_step
from boe_vllm.lab.bench.estimates import (
    CHEAP,
    COUPLINGS,
    GAINS,
    LOOKAHEAD,
    Fidelity,
    coupling_fidelity,
    gain_fidelity,
    step_fields,
)
from boe_vllm.lab.bench.machine import Environment, print_facts
from boe_vllm.lab.bench.ranks import bootstrap
from boe_vllm.lab.bench.states import open_loop
from boe_vllm.lab.tasks import TASKS

PLAIN = "confidence"
TOGETHER = 16
"""States of one pass."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    # The puzzles of seed 0 are those that the estimators were chosen on.
    parser.set_defaults(model=boe_vllm.tiny_model_path(), requests=24, repeats=9, seed=1)
    parser.add_argument("--states", type=int, default=300, help="at least so many")
    parser.add_argument(
        "--tasks", type=common.names(list(TASKS)), default=["sudoku6", "sudoku6-few"]
    )
    parser.add_argument("--rho", type=float, default=0.5, help="share of candidates for gains")
    parser.add_argument("--budget", type=int, default=4, help="b, tokens of a step")
    parser.add_argument("--no-time", action="store_true", help="leave out the measured times")


def run(args: argparse.Namespace) -> None:
    """Measure, print the tables and the JSON line."""
    from tokenizers import Tokenizer

    if args.states < 1 or args.budget < 2 or not 0 < args.rho <= 1:
        raise common.UsageError("expected --states at least 1, --budget at least 2, 0 < --rho <= 1")
    environment = Environment(args.device, args.dtype, args.clock)
    config = checkpoint.read_config(args)
    model = checkpoint.load_model(args, config, checkpoint.read_tensors(args, config))
    loop = open_loop(args, model)
    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    tasks = [TASKS[name] for name in args.tasks]
    items = math.ceil(args.states / (len(tasks) * len(PHASES)))
    states = decoded_states(loop, tokenizer, tasks, items=items, seed=args.seed)
    common.progress(f"{len(states)} states")
    gains = _over(loop, states, lambda *part: gain_fidelity(*part, rho=args.rho))
    couplings = _over(loop, states, lambda *part: coupling_fidelity(*part, budget=args.budget))
    times = {} if args.no_time else _times(loop, states, args)
    rows = [_row(name, gains, states, times, args) for name in (*GAINS, LOOKAHEAD)]
    kappas = {
        measure: [
            _row(name, [f for f in couplings if f.measure == measure], states, times, args)
            for name in COUPLINGS
        ]
        for measure in ("kl", "pmi")
    }
    facts = environment.facts()
    common.print_table("Gain scores against the exhaustive look-ahead", rows)
    for measure, table in kappas.items():
        title = f"Estimators of kappa against exact, pool of {2 * args.budget}, measure {measure}"
        common.print_table(title, table)
    print_facts(facts)
    best, cheapest = _best(rows, kappas["kl"])
    _explain(best, cheapest, len(states))
    common.print_result(
        "fidelity",
        {
            "fidelity.gain_spearman_best": best["spearman"],
            "fidelity.kappa_spearman_best": cheapest["spearman"] if cheapest else None,
        },
        details={"gain": rows, "kappa": kappas, "states": len(states)},
        environment=facts,
        args=args,
    )


def _over(
    loop: DenoisingLoop,
    states: Sequence[DecodedState],
    measure: Callable[[DenoisingLoop, Sequence[DecodedState]], list[Fidelity]],
) -> list[Fidelity]:
    """A measurement on all states, a few at a time."""
    found = []
    for start in range(0, len(states), TOGETHER):
        found += measure(loop, states[start : start + TOGETHER])
        common.progress(f"{min(start + TOGETHER, len(states))} of {len(states)} states measured")
    return found


def _times(
    loop: DenoisingLoop, states: Sequence[DecodedState], args: argparse.Namespace
) -> dict[str, float]:
    """Time of a step with each estimate over that of a confidence step in the same round."""
    chosen = [states[i * len(states) // args.requests] for i in range(args.requests)]
    every = {PLAIN: {"policy": PLAIN}} | {
        name: step_fields(name, rho=args.rho)
        for name in (*GAINS, LOOKAHEAD, *COUPLINGS)
        if name != PLAIN
    }

    def case(fields: dict[str, Any]) -> Callable[[], Callable[[], Any]]:
        return lambda: one_step(loop, chosen, fields | {"tokens_per_step": args.budget})

    measured = common.interleaved({name: case(f) for name, f in every.items()}, args, warm_up=3)
    return {name: common.median_ratio(times, measured[PLAIN]) for name, times in measured.items()}


def _row(
    name: str,
    found: Sequence[Fidelity],
    states: Sequence[DecodedState],
    times: dict[str, float],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One line of a table."""
    own = [(f, state) for f, state in _matched(name, found, states)]
    groups = [(state.task, state.item) for _, state in own]
    mean, low, high = bootstrap([f.spearman for f, _ in own], groups, seed=args.seed)
    row: dict[str, Any] = {"estimate": name, "spearman": mean, "low": low, "high": high}
    for phase in PHASES:
        values = [f.spearman for f, state in own if state.phase == phase]
        row[phase] = bootstrap(values, range(len(values)))[0]
    for task in args.tasks:
        values = [f.spearman for f, state in own if state.task == task]
        row[task] = bootstrap(values, range(len(values)))[0]
    if own[0][0].share is not None:
        shares = [math.nan if f.share is None else f.share for f, _ in own]
        row["share"], row["share low"], row["share high"] = bootstrap(shares, groups)
    length = sum(len(state.tokens) for _, state in own)
    row["rows"] = 1 + sum(f.rows for f, _ in own) / length
    row["time"] = times.get(name, math.nan)
    return row


def _matched(
    name: str, found: Sequence[Fidelity], states: Sequence[DecodedState]
) -> list[tuple[Fidelity, DecodedState]]:
    own = [f for f in found if f.name == name]
    return list(zip(own, states, strict=True))


def _best(
    gains: Sequence[dict[str, Any]], kappas: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The best gain score that is not the oracle, and the best cheap estimator of kappa."""
    best = max((row for row in gains if row["estimate"] != LOOKAHEAD), key=lambda r: r["spearman"])
    cheap = [
        row
        for row in kappas
        if row["estimate"] != "exact"
        and row["rows"] <= CHEAP
        and (math.isnan(row["time"]) or row["time"] <= CHEAP)
    ]
    return best, max(cheap, key=lambda row: row["spearman"], default=None)


def _explain(best: dict[str, Any], cheapest: dict[str, Any] | None, states: int) -> None:
    print(
        f"{states} states. spearman: mean over states, low and high its 95 % interval (puzzles "
        f"resampled); then its mean by phase and task. share: of the possible gain.\n"
        f"rows, time: of a step over a confidence step's; a step that couples with an estimator "
        f"writes its set greedily. Pairs whose predictions are all but decided have couplings of a "
        f"millionth of a nat, and count like any others in the ranks.\n"
        f"Best gain score: {best['estimate']}."
    )
    if cheapest is None:
        print(f"No estimator of kappa costs at most {CHEAP} confidence steps here.")
    else:
        print(f"Best estimator of kappa within {CHEAP} confidence steps: {cheapest['estimate']}.")
