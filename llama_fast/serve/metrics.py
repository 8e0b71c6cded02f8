"""What /metrics tells, in a registry of its own, so that two servers of one process do not mix their counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = here = CollectorRegistry()
        self.requests = Counter(
            "llama_fast_requests", "Answered requests; 499: the client left.", ["path", "status"], registry=here
        )
        self.prompt_tokens = Counter("llama_fast_prompt_tokens", "Tokens of prompts, read once a row.", registry=here)
        self.reused_tokens = Counter(
            "llama_fast_reused_prompt_tokens", "Tokens of prompts whose keys and values stood there.", registry=here
        )
        self.pre_emptions = Counter("llama_fast_pre_emptions", "Rows that made way for older ones.", registry=here)
        self.generated_tokens = Counter("llama_fast_generated_tokens", "New tokens.", registry=here)
        self.cancelled_rows = Counter(
            "llama_fast_cancelled_rows", "Rows whose client left, or whose time was up.", registry=here
        )
        self.queue = Gauge("llama_fast_queue_rows", "Rows that wait for a slot.", registry=here)
        self.rows_in_use = Gauge("llama_fast_rows_in_use", "Rows that are answered.", registry=here)
        self.rows = Gauge("llama_fast_rows", "Rows that can be answered at once.", registry=here)
        self.first_token = Histogram(
            "llama_fast_first_token_seconds",
            "From a row's arrival to its first token.",
            buckets=SECONDS,
            registry=here,
        )
        self.between_tokens = Histogram(
            "llama_fast_between_tokens_seconds", "Between two tokens of a row.", buckets=SECONDS, registry=here
        )

    def page(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)


def labelled(registry: CollectorRegistry, **labels: str) -> list[Metric]:
    """What a registry holds, every sample with these labels too, so that it can stand on one page with that of others."""
    found = list(registry.collect())
    for metric in found:
        metric.samples = [sample._replace(labels={**sample.labels, **labels}) for sample in metric.samples]
    return found


class Together:
    """Metrics of several registries as one: samples of the same metric stand together, as Prometheus asks for."""

    def __init__(self, parts: Iterable[Sequence[Metric]]):
        self._metrics: dict[str, Metric] = {}
        for metric in (metric for part in parts for metric in part):
            known = self._metrics.setdefault(metric.name, metric)
            if known is not metric:
                known.samples = [*known.samples, *metric.samples]

    def collect(self) -> Iterable[Metric]:
        return self._metrics.values()

    def page(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self)  # type: ignore[arg-type]  # it only collects
