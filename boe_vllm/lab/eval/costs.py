"""Engine time of cells that ran together.

Requests of several cells share engine steps, so no clock can be stopped between them. Each
request's rows (positions that it put through the network, forward and backward) are spread evenly
over its time in the engine; every moment is then shared in proportion to the rows. The shares of
all requests add up to the time in which the engine had work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

Record = Mapping[str, Any]


def engine_seconds(records: Iterable[Record]) -> dict[str, float]:
    """Seconds of engine time by cell, over all sessions of a run.

    Args:
        records: with `cell`, `rows_forward`, `rows_backward`, and `times`: the number of the
            session, and when the request was scheduled and finished on that session's clock.
    """
    sessions: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        sessions[record["times"]["session"]].append(record)
    total: dict[str, float] = defaultdict(float)
    for session in sessions.values():
        for cell, seconds in _share(session).items():
            total[cell] += seconds
    return dict(total)


def busy_seconds(records: Iterable[Record]) -> float:
    """Time in which the engine had a request of these."""
    return sum(engine_seconds(records).values())


def _share(records: list[Record]) -> dict[str, float]:
    events: list[tuple[float, str, float]] = []
    for record in records:
        start, end = record["times"]["scheduled"], record["times"]["finished"]
        if end <= start:
            continue
        rate = (record["rows_forward"] + record["rows_backward"]) / (end - start)
        events += [(start, record["cell"], rate), (end, record["cell"], -rate)]
    events.sort(key=lambda event: event[0])
    shares: dict[str, float] = defaultdict(float)
    running: dict[str, int] = defaultdict(int)
    rates: dict[str, float] = defaultdict(float)
    before = 0.0
    for now, cell, rate in events:
        every = sum(rates[name] for name, count in running.items() if count)
        if every > 0:
            for name, count in running.items():
                if count:
                    shares[name] += (now - before) * rates[name] / every
        rates[cell] += rate
        running[cell] += 1 if rate > 0 else -1
        if not running[cell]:
            rates[cell] = 0.0  # not what rounding left
        before = now
    return dict(shares)
