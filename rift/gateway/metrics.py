"""The gateway's metrics: what it counts itself, and what it reads of its parts at a scrape."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rift.gateway.admission.log_room import ROOM_BYTES_MIN, LogRoom
from rift.gateway.admission.log_share import LogShare
from rift.gateway.api.health import HealthRoutes
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.bounds import Bound, Bounded
from rift.gateway.exchange import Exchange
from rift.gateway.state import GatewayConfig, LogState
from rift.gateway.streams.delivery import Delivery
from rift.gateway.streams.lane_counts import LaneCounts
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.streams.lane_registry import LaneRegistry
from rift.metrics.families import Collector, Counts, Figure, Histogram

APPEND_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2.5, 5, 8)

# The labels of statuses. 0 is that of a request whose client left before its answer began.
CODES = {0: "gone", **{status: str(status) for status in range(100, 600)}}


class Parts(NamedTuple):
    """What is read at a scrape."""

    state: LogState
    lanes: LaneRegistry
    delivery: Delivery
    health: HealthRoutes
    room: LogRoom
    share: LogShare
    bounded: Sequence[Bounded]


class GatewayMetrics:
    """`collectors` are what a scrape shows."""

    def __init__(self, state: LogState, config: GatewayConfig, own: LaneReader) -> None:
        self._by_account = config.metrics_accounts
        lane = LaneCounts(ttft_ms=config.ttft_ms, by_account=self._by_account)
        self._requests = Counts(
            "rift_gateway_requests_total",
            "HTTP requests by route, model and status.",
            ("route", "model", "code"),
        )
        self._refusals = Counts(
            "rift_gateway_refusals_total", "Answers with a status from 400 on, by error code.", ("reason",)
        )
        self._accounts = Counts(
            "rift_gateway_account_requests_total",
            "HTTP requests with a valid key, by account and status.",
            ("account", "code"),
        )
        appends = Histogram(
            "rift_gateway_append_seconds", "From an append until the log has stored it.", APPEND_S
        )
        self.collectors: list[Collector] = [self._requests, self._refusals, appends, lane]
        if self._by_account:
            self.collectors.append(self._accounts)
        own.counts = lane
        state.log.time_appends(appends.series().observe)

    def observe(self, exchange: Exchange) -> None:
        code = CODES[exchange.status]
        self._requests.add(exchange.route, exchange.model, code)
        if exchange.code:
            self._refusals.add(exchange.code)
        if self._by_account and exchange.account is not None:
            self._accounts.add(exchange.account, code)

    def read(self, parts: Parts) -> None:
        """Also show figures of these parts from now on."""
        self.collectors += figures(parts)


def figures(parts: Parts) -> Iterable[Figure]:
    """Yield what is read at a scrape."""
    log = parts.state.log
    health = parts.room.health
    queue = parts.lanes.own.queue

    def bounds() -> Iterable[Bound]:
        log_bytes_max = parts.share.shard_bytes_max
        if log_bytes_max > 0 and health.room_bytes is not None:
            yield Bound("log_bytes", log_bytes_max, log_bytes_max + ROOM_BYTES_MIN - health.room_bytes)
        for part in parts.bounded:
            yield from part.bounds()

    yield Figure(
        "rift_gateway_ready",
        "1 if `/readyz` answers 200, else 0.",
        lambda: _is_ready(parts.health),
    )
    yield Figure(
        "rift_gateway_open_answers",
        "Answers that clients are waiting for or reading.",
        parts.delivery.open_answers,
        ("kind",),
    )
    yield Figure(
        "rift_gateway_requests_waiting", "Requests that wait for a worker.", queue.waiting, ("model",)
    )
    yield Figure(
        "rift_gateway_requests_running",
        "Requests that a worker has begun.",
        queue.under_way,
        ("model",),
    )
    yield Figure(
        "rift_gateway_limit",
        "The limit of each bound.",
        lambda: {(b.name,): b.limit for b in bounds()},
        ("bound",),
    )
    yield Figure(
        "rift_gateway_used",
        "How much of each bound is used.",
        lambda: {(b.name,): b.used for b in bounds()},
        ("bound",),
    )
    yield Figure(
        "rift_gateway_log_room_bytes",
        "Bytes that the shard of this gateway has room for.",
        lambda: {} if health.room_bytes is None else {(): health.room_bytes},
    )
    yield Figure(
        "rift_gateway_log_silent_seconds",
        "For how long appends have waited or failed without one that was stored.",
        lambda: health.silent_s,
    )
    yield Figure(
        "rift_gateway_log_disconnections_total",
        "How often the connection to the log was lost.",
        lambda: log.epoch,
        kind="counter",
    )
    yield Figure(
        "rift_gateway_reader_gaps_total",
        "How often a reader of the log may have missed records, and read them again.",
        lambda: log.reader_gaps,
        kind="counter",
    )


def _is_ready(health: HealthRoutes) -> Mapping[tuple[str, ...], float]:
    try:
        health.check()
    except HTTPError:
        return {(): 0}
    return {(): 1}
