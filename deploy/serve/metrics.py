"""What a server counts of each bundle, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from action_diffusion.deploy.serve.wire import require

LATENCIES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
"""Seconds up to which answers are counted: of a small network on a CPU, up to a robot that holds."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Of one server: several in a process do not add up."""

    def __init__(self) -> None:
        prometheus: Any = require("prometheus_client")
        self._written: Callable[[Any], bytes] = prometheus.generate_latest
        self.content_type: str = prometheus.CONTENT_TYPE_LATEST
        self._registry = prometheus.CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": "action_diffusion"}
        labels = ["bundle"]
        self._requests = prometheus.Counter("requests", "Questions that clients asked", labels, **own)
        self._errors = prometheus.Counter(
            "errors",
            "Questions without an answer: refused, or failed",
            [*labels, "kind"],
            **own,
        )
        self._latency = prometheus.Histogram(
            "latency_seconds", "From a question to its answer", labels, buckets=LATENCIES, **own
        )
        self._inference = prometheus.Histogram(
            "inference_seconds", "Of a call of the policy", labels, buckets=LATENCIES, **own
        )
        self._sizes = prometheus.Histogram(
            "batch_size", "Questions that a call of the policy answered", labels, buckets=SIZES, **own
        )
        self._waiting = prometheus.Gauge("queue", "Questions that wait for the policy", labels, **own)
        self._connections = prometheus.Gauge("connections", "Clients that are connected", labels, **own)
        self._replaced = prometheus.Counter(
            "replacements", "Bundles that took the place of the one before, or were refused", [*labels, "kind"], **own
        )

    def of(self, name: str, n_connections: Callable[[], int], n_waiting: Callable[[], int]) -> BundleMetrics:
        """Of the bundle `name`, from zero on."""
        self._connections.labels(name).set_function(n_connections)
        self._waiting.labels(name).set_function(n_waiting)
        return BundleMetrics(
            requests=self._requests.labels(name),
            errors={kind: self._errors.labels(name, kind) for kind in ("refused", "failed")},
            latency=self._latency.labels(name),
            inference=self._inference.labels(name),
            sizes=self._sizes.labels(name),
            replacements={kind: self._replaced.labels(name, kind) for kind in ("taken", "refused")},
        )

    def text(self) -> bytes:
        """What `GET /metrics` answers."""
        return self._written(self._registry)


@dataclass(frozen=True, kw_only=True)
class BundleMetrics:
    """What happens to one bundle."""

    requests: Any
    errors: Mapping[str, Any]
    latency: Any
    inference: Any
    sizes: Any
    replacements: Mapping[str, Any]

    def asked(self) -> None:
        self.requests.inc()

    def answered(self, seconds: float) -> None:
        self.latency.observe(seconds)

    def not_answered(self, kind: str) -> None:
        """kind: "refused" or "failed"."""
        self.errors[kind].inc()

    def computed(self, seconds: float, rows: int) -> None:
        """A call of the policy."""
        self.inference.observe(seconds)
        self.sizes.observe(rows)

    def replaced(self, kind: str) -> None:
        """By another bundle that was "taken", or not, as it was "refused"."""
        self.replacements[kind].inc()
