"""The gateway process: the one place that builds and connects its parts."""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import anyio
from anyio.abc import TaskGroup
from msgspec.structs import replace

from events import book, fleet, subjects
from events.log import Log
from events.publisher import Publisher
from events.stream_fold import Fold, follow
from rift.gateway.admission.admission import Admission
from rift.gateway.admission.auth import Authenticator
from rift.gateway.admission.book_freshness import BookFreshness
from rift.gateway.admission.credit import CreditReservations
from rift.gateway.admission.key_limits import KeyLimits
from rift.gateway.admission.lane_credit import LaneCredit
from rift.gateway.admission.log_room import LogRoom
from rift.gateway.admission.log_share import LogShare, capacity
from rift.gateway.admission.queue_share import QueueShare
from rift.gateway.admission.rate_limits import RateLimits
from rift.gateway.admission.reservation import Reservations
from rift.gateway.api import account_turns, openapi
from rift.gateway.api.billing import BillingRoutes
from rift.gateway.api.health import HealthRoutes
from rift.gateway.api.models import ModelRoutes
from rift.gateway.api.requests import RequestRoutes
from rift.gateway.api.responses import ResponseRoutes
from rift.gateway.api.routes import ROUTES, Handlers
from rift.gateway.api.stored_requests import StoredRequests
from rift.gateway.app import Gateway
from rift.gateway.asgi.body_budget import return_memory
from rift.gateway.asgi.connections import Connections, connections_max
from rift.gateway.asgi.server import serve
from rift.gateway.dialects.dialect import RESPONSES, native_dialect
from rift.gateway.exchange import Exchanges
from rift.gateway.histories import Histories
from rift.gateway.metrics import GatewayMetrics, Parts
from rift.gateway.request_log import RequestLog
from rift.gateway.state import GatewayConfig, LogState
from rift.gateway.streams.cancellation import Cancellation
from rift.gateway.streams.delivery import LOG_OUTAGE, STOPPING, Delivery
from rift.gateway.streams.lane_registry import LaneRegistry
from rift.gateway.streams.live_gateways import LiveGateways
from rift.gateway.streams.log_health import LogHealth
from rift.gateway.streams.own_lane import OwnLane
from rift.gateway.streams.queue_status import QueueStatus
from rift.gateway.streams.refusals import RefusalReports
from rift.gateway.submission.acceptance import AcceptanceBuilder
from rift.gateway.submission.acceptance_writer import AcceptanceWriter
from rift.gateway.submission.idempotency import IdempotencyKeys
from rift.gateway.submission.responder import Responder
from rift.gateway.submission.submit import Submission
from rift.metrics import families, listener
from rift.metrics.families import Collector

# From the signal to stop until the server stops: enough for each stream's last frame.
LAST_FRAMES_S = 0.5

# The objects that are made between two collections of garbage. Answers leave none that holds content; a
# connection leaves 30 objects and at most HEAD_BYTES, so at most 30 MB wait for the second generation.
GARBAGE_OBJECTS = 5_000


class Opened(NamedTuple):
    """A gateway whose lane is open and whose background tasks run: it accepts requests."""

    app: Gateway
    connections: Connections
    lane: OwnLane
    lanes: LaneRegistry
    credit: CreditReservations
    refusals: RefusalReports
    collectors: Sequence[Collector]
    stopping: anyio.Event

    async def end_streams(self) -> None:
        """Accept nothing more, and end every stream with the place to resume it."""
        self.stopping.set()
        self.lanes.break_off_all(STOPPING)
        await anyio.sleep(LAST_FRAMES_S)

    async def close(self) -> None:
        """Return the unused credit, and report refused requests and the lane lost, as far as the log stores
        that at once."""
        await self.credit.holds.settle_all()
        await self.refusals.close()
        await self.lane.close()


async def run(
    log: Log, history_log: Log, config: GatewayConfig, *, host: str, port: int, stop: anyio.Event
) -> None:
    """Serve until `stop` is set. `history_log` is a second connection, for reading the past.

    Raises LogError, OSError (the port), codec.RecordUnreadable.
    """
    return_memory()
    collectors = [families.process()]
    async with (
        listener.serving(config.metrics, collectors) as metrics,
        anyio.create_task_group() as tasks,
    ):
        config = replace(config, metrics=metrics)
        async with anyio.create_task_group() as opening:

            async def cancel_when_stopped() -> None:
                await stop.wait()
                tasks.cancel_scope.cancel()

            # The lane opens once the log stores records, which may be never.
            opening.start_soon(cancel_when_stopped)
            opened = await open_gateway(log, history_log, config, tasks)
            opening.cancel_scope.cancel()
        collectors += opened.collectors

        # Objects that exist now stay, so the collector need not look at them again.
        gc.freeze()
        gc.set_threshold(GARBAGE_OBJECTS, 10, 10)

        async def stopped() -> None:
            await stop.wait()
            await opened.end_streams()

        await serve(opened.app, opened.connections, host=host, port=port, stopped=stopped)
        await opened.close()
        tasks.cancel_scope.cancel()


async def open_gateway(log: Log, history_log: Log, config: GatewayConfig, tasks: TaskGroup) -> Opened:
    """Open the lane and start the background tasks. Raises as `run`, but for the port."""
    state = LogState(log, Histories(history_log), await book.read(log), await fleet.read(log))
    share = LogShare(await capacity(log, config.shard), state.book)
    lane = await OwnLane.open(log, config)
    lanes = await LaneRegistry.open(log, state.histories, shard=config.shard, lane=config.lane, tasks=tasks)
    # Until the lane's first report is read.
    lanes.own.clock.note(await lane.opened_at_ns())
    tasks.start_soon(lane.report)
    return build(state, config, share, lane, lanes, tasks)


def build(
    state: LogState,
    config: GatewayConfig,
    share: LogShare,
    lane: OwnLane,
    lanes: LaneRegistry,
    tasks: TaskGroup,
) -> Opened:
    """Construct and connect the parts, and start what follows the log for them."""
    own = lanes.own
    stopping = anyio.Event()
    freshness = BookFreshness(state.log, state.book)
    gateways = LiveGateways(config.shard, config.lane)
    rate_limits = RateLimits(own, book=state.book, gateways=gateways, share=share)
    holds = LaneCredit(state, config, own.clock, reported_at_s=lambda: lane.reported_at_s)
    credit = CreditReservations(holds, lanes, state.book, tasks)
    auth = Authenticator(state.book, freshness, rate_limits, own.clock)
    health = LogHealth(state.log, config.shard)
    room = LogRoom(state.log, config, health, stopping)
    queue = QueueShare(state.book, state.fleet, own, gateways)
    key_limits = KeyLimits(config, share, own.clock)
    reservations = Reservations(state.log, config, own, (rate_limits, key_limits, credit))
    admission = Admission(state, config, auth, room, queue, reservations)
    queue_status = QueueStatus(state.fleet, lanes.nudge, own.clock.now_ns)
    cancellation = Cancellation(Publisher(state.log, config.lane, shard=config.shard), health, tasks)
    delivery = Delivery(
        cancellation, book=state.book, queue_status=queue_status, tasks=tasks, stopping=stopping
    )
    refusals = RefusalReports(state.log, config, own.clock.now_ns)
    metrics = GatewayMetrics(state, config, own)
    exchanges = Exchanges(own.clock.now_ns, [metrics.observe, refusals.observe, RequestLog().observe])
    connections = Connections(connections_max(), refused=exchanges.refused)
    readers = account_turns.readers(connections.limit)
    responses = StoredRequests(state, config, lanes, auth, readers.take, only=RESPONSES)
    handlers = Handlers(
        submission=Submission(
            admission,
            IdempotencyKeys(state, config.secret, own.clock),
            AcceptanceBuilder(state.book, config, own),
            AcceptanceWriter(state, config, health, cancellation),
            Responder(state, lanes, delivery),
            readers.take,
        ),
        native=native_dialect(config.native_prompt_tokens_max),
        requests=RequestRoutes(state, StoredRequests(state, config, lanes, auth, readers.take), delivery),
        responses=ResponseRoutes(state, responses, delivery),
        models=ModelRoutes(state, config.models, admission),
        billing=BillingRoutes(state.log, auth, secret=config.secret),
        health=HealthRoutes(state, config, auth, room, connections, openapi.document(ROUTES)),
    )
    bounded = (handlers.submission.bodies, queue, key_limits, readers, state.histories, lanes, connections)
    metrics.read(Parts(state, lanes, delivery, handlers.health, room, share, bounded))
    end_revoked = _revocation(state, lanes, cancellation, delivery)

    def book_changed() -> None:
        holds.changed()
        freshness.moved()
        end_revoked()

    start_fold = partial(_start_fold, tasks, state.log)
    start_fold(subjects.BOOK, "rift.book.>", state.book, book_changed)
    start_fold(subjects.FLEET, "rift.fleet.>", state.fleet, queue_status.refresh)
    tasks.start_soon(gateways.follow, state.log)
    for watch in (freshness.confirm, holds.keep, health.ask, room.watch_reserve, refusals.keep):
        tasks.start_soon(watch)
    tasks.start_soon(key_limits.follow_log, state.log)
    tasks.start_soon(health.watch, lambda: lanes.break_off_all(LOG_OUTAGE))
    app = Gateway(ROUTES, handlers, exchanges, config.entropy)
    return Opened(app, connections, lane, lanes, credit, refusals, metrics.collectors, stopping)


def _revocation(
    state: LogState, lanes: LaneRegistry, cancellation: Cancellation, delivery: Delivery
) -> Callable[[], None]:
    """Return a function that ends the requests of the keys that were revoked since its last call."""
    ended_keys = len(state.book.revoked)

    def end_revoked() -> None:
        nonlocal ended_keys
        for key in state.book.revoked[ended_keys:]:
            for reader in lanes.every():
                cancellation.revoke(reader.open_of(key))
            delivery.revoke(key)
        ended_keys = len(state.book.revoked)

    return end_revoked


def _start_fold(
    tasks: TaskGroup, log: Log, stream: str, topic: str, fold: Fold, changed: Callable[[], None]
) -> None:
    tasks.start_soon(partial(follow, log, stream, [topic], fold, changed=changed))
