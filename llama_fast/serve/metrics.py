"""What /metrics tells, in a registry of its own, so that two servers of one process do not mix their counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        told = {"registry": self.registry, "namespace": "llama_fast"}
        self.requests = Counter("requests", "Answered requests.", ["path", "status"], **told)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts that were read.", **told)
        self.generated_tokens = Counter("generated_tokens", "New tokens.", **told)
        self.cancelled_rows = Counter("cancelled_rows", "Rows whose client left, or whose time was up.", **told)
        self.queue = Gauge("queue_rows", "Rows that wait for a slot.", **told)
        self.rows_in_use = Gauge("rows_in_use", "Rows that are answered.", **told)
        self.rows = Gauge("rows", "Rows that can be answered at once.", **told)
        self.first_token = Histogram(
            "first_token_seconds", "From a row's arrival to its first token.", buckets=SECONDS, **told
        )
        self.between_tokens = Histogram(
            "between_tokens_seconds", "Between two tokens of a row.", buckets=SECONDS, **told
        )

    def page(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
