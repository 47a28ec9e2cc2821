"""The content of `/metrics`: requests, tokens, times, and load, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..generation.service import ServiceStats

__all__ = ["Counting", "ServerMetrics"]

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_RATES: Final = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class ServerMetrics:
    """The metrics of one server, in their own registry.

    Args:
        stats: returns the state of the model's thread.
        adapters: returns the number of adapters, the number in memory, and their bytes.
    """

    def __init__(self, stats: Callable[[], ServiceStats], adapters: Callable[[], tuple[int, int, int]]) -> None:
        self._registry = CollectorRegistry()
        self._stats, self._adapters = stats, adapters
        self._requests = Counter(
            "loralib_requests", "Requests, by route and status", ["route", "status"], registry=self._registry
        )
        self._first = Histogram(
            "loralib_time_to_first_token_seconds",
            "From a request to its first token",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._seconds = Histogram(
            "loralib_request_seconds", "From a request to its last token", registry=self._registry, buckets=_SECONDS
        )
        self._rate = Histogram(
            "loralib_tokens_per_second",
            "Tokens per second of one request, after the first token",
            registry=self._registry,
            buckets=_RATES,
        )
        self._registry.register(self)

    def collect(self) -> Iterator[Any]:
        """Yields the current values."""
        stats = self._stats()
        count, in_memory, size = self._adapters()
        gauges = {
            "running_requests": ("Requests being computed together", stats.running),
            "waiting_requests": ("Requests waiting for a free place", stats.waiting),
            "cache_used_tokens": ("Tokens whose keys and values are stored or reserved", stats.used_tokens),
            "cache_tokens": ("Tokens whose keys and values can be stored", stats.cache_tokens or 0),
            "adapters": ("Adapters that requests can choose", count),
            "adapters_in_memory": ("Adapters whose factors are in memory", in_memory),
            "adapter_bytes": ("Memory used by adapters", size),
        }
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(f"loralib_{name}", about, value=value)
        counters = {
            "prompt_tokens": ("Prompt tokens", stats.prompt_tokens),
            "generated_tokens": ("Generated tokens", stats.generated_tokens),
            "reused_tokens": ("Prompt tokens that did not have to be recomputed", stats.reused_tokens),
        }
        for name, (about, value) in counters.items():
            yield CounterMetricFamily(f"loralib_{name}", about, value=value)

    def request(self, route: str, status: int) -> None:
        """Counts a response."""
        self._requests.labels(route, str(status)).inc()

    def text(self, first: float, seconds: float, tokens: int) -> None:
        """Records a text: the times of its first and last token, and its number of tokens."""
        self._first.observe(first)
        self._seconds.observe(seconds)
        if tokens > 1 and seconds > first:
            self._rate.observe((tokens - 1) / (seconds - first))

    def page(self) -> bytes:
        """Returns the metrics in Prometheus' format."""
        return generate_latest(self._registry)


class Counting:
    """Middleware that counts responses."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            # Unknown URLs share a label; otherwise anybody could fill the memory with new ones.
            self._metrics.request(getattr(scope.get("route"), "path", "other"), status)
