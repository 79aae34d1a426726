"""What denoising costs, as Prometheus series on vLLM's own `/metrics`.

vLLM makes one `DenoisingMetrics` in every API server (entry point `vllm.stat_logger_plugins`). The
worker's counters of each engine step reach it among vLLM's statistics (`decoding.accounting`,
`scheduler`). For models of other kinds there is nothing to record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from boe_vllm.decoding.accounting import CENTI, MICRO, PREFIX

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

LABELS = ("model_name", "engine")
COUNTERS = {
    "forwards": "Sequences in forward passes.",
    "backwards": "Sequences in backward passes.",
    "rows_forward": "Rows computed in forward passes.",
    "rows_backward": "Rows computed in backward passes.",
    "committed_tokens": "Tokens written on canvases.",
}
BY_LABEL = {
    "denoising_steps": ("policy", "Denoising steps of single requests."),
    "seconds": ("part", "Time of engine steps, by part: forward, queries, backward, policy."),
}
GAUGES = {
    "cache_rows": "Rows of keys and values that requests with a cache may hold.",
    "cache_rows_used": "Rows of keys and values that requests with a cache hold.",
}
TOKENS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
NATS = (0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


class DenoisingMetrics(AggregateStatLoggerBase):
    """Series whose names begin with `boe:`."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        """Register the series; those of an earlier engine of this process are replaced."""
        _unregister()
        self.model = vllm_config.model_config.served_model_name
        self.counters = {
            name: Counter(f"boe:{name}", text, LABELS) for name, text in COUNTERS.items()
        } | {
            name: Counter(f"boe:{name}", text, (*LABELS, label))
            for name, (label, text) in BY_LABEL.items()
        }
        self.gauges = {
            name: Gauge(f"boe:{name}", text, LABELS, multiprocess_mode="mostrecent")
            for name, text in GAUGES.items()
        }
        self.active = Gauge(
            "boe:active_requests",
            "Requests that hold a canvas.",
            (*LABELS, "policy"),
            multiprocess_mode="mostrecent",
        )
        self.histograms = {
            "tokens_per_step": Histogram(
                "boe:tokens_per_step",
                "Tokens that a request commits in a denoising step.",
                LABELS,
                buckets=TOKENS,
            ),
            "remaining_entropy": Histogram(
                "boe:remaining_entropy_nats",
                "Mean entropy of the block's masks that a commit leaves, nats.",
                LABELS,
                buckets=NATS,
            ),
        }
        self._policies: dict[str, set[str]] = {str(index): set() for index in engine_indexes}

    def log_engine_initialized(self) -> None:
        """Nothing to say at the start."""

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Take in the counters of one engine step, if there is one."""
        if scheduler_stats is None:
            return
        engine = str(engine_idx)
        counters = {
            key.removeprefix(PREFIX): value
            for key, value in scheduler_stats.running_lora_adapters.items()
            if key.startswith(PREFIX)
        }
        idle = scheduler_stats.num_running_reqs == scheduler_stats.num_waiting_reqs == 0
        active = {}
        for key, value in counters.items():
            name, _, label = key.partition("/")
            if name == "active":
                active[label] = value
            elif name in self.gauges:
                self.gauges[name].labels(self.model, engine).set(value)
            elif name in self.histograms:
                scale = CENTI if name == "remaining_entropy" else 1
                histogram = self.histograms[name].labels(self.model, engine)
                for _ in range(value):
                    histogram.observe(int(label) / scale)
            elif name in self.counters:
                labels: list[Any] = [self.model, engine, *([label] if label else [])]
                scale = MICRO if name == "seconds" else 1
                self.counters[name].labels(*labels).inc(value / scale)
        if idle:  # the step's counters are of requests that have left since
            self.gauges["cache_rows_used"].labels(self.model, engine).set(0)
        if idle or counters:
            self._set_active(engine, dict.fromkeys(active, 0) if idle else active)

    def _set_active(self, engine: str, active: dict[str, int]) -> None:
        known = self._policies.setdefault(engine, set())
        known.update(active)
        for policy in known:
            self.active.labels(self.model, engine, policy).set(active.get(policy, 0))


def _unregister() -> None:
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("boe:"):
            REGISTRY.unregister(collector)
