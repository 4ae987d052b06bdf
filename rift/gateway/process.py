"""The gateway process: one lane, the book and the fleet followed, and the server in front."""

import gc
import logging
import secrets
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import anyio
from anyio.abc import TaskGroup

from events import book as books
from events import fleet, ids, subjects
from events.log import Log, LogError
from events.publisher import Publisher
from events.request_history import HistoryReader
from events.schema import LaneLost, LaneOpened, LaneReported
from rift.catalogue import Catalogue
from rift.gateway.admission.admission import Admission
from rift.gateway.admission.auth import Authenticator
from rift.gateway.admission.book_freshness import BookFreshness
from rift.gateway.admission.credit import CreditReservations
from rift.gateway.admission.lane_credit import LaneCredit
from rift.gateway.admission.live_gateways import LiveGateways
from rift.gateway.admission.log_room import LogRoom
from rift.gateway.admission.queue_share import QueueShare
from rift.gateway.admission.rate_limits import RateLimits
from rift.gateway.admission.reservation import Reservations
from rift.gateway.app import Gateway
from rift.gateway.asgi.server import serve
from rift.gateway.state import GatewayConfig, LogState
from rift.gateway.streams.delivery import STOPPING, Delivery
from rift.gateway.streams.lane_registry import LaneRegistry
from rift.gateway.streams.queue_status import QueueStatus

logger = logging.getLogger(__name__)

# The broker is there when a gateway starts; opening the lane waits out a restart.
OPEN_S = 30.0

# A lane that has not reported for three times as long is lost.
REPORT_S = 3.0

# The last word of a gateway that stops; without it the lane is found lost all the same.
LAST_WORD_S = 0.5

# From the word to stop until the server stops: enough for each stream's last frame.
LAST_FRAMES_S = 0.5


class Opened(NamedTuple):
    """A gateway that reads its lane; it accepts requests from now on."""

    gateway: Gateway
    relays: LaneRegistry
    credit: CreditReservations
    lane: str


async def run(
    log: Log,
    history_log: Log,
    *,
    host: str,
    port: int,
    models: Catalogue,
    served: Collection[str],
    secret: bytes,
    seal_content: bool,
    stop: anyio.Event,
) -> None:
    """Serve until `stop` is set. `served` models are accepted without a replica, too. `history_log` is a
    connection for reading the past, so that a burst of clients that resume cannot slow what is live. With
    `seal_content` all requests are sealed.

    Raises LogError, OSError (the port), codec.RecordUnreadable.
    """
    async with anyio.create_task_group() as tasks:
        opened = await open_gateway(
            log,
            history_log,
            models=models,
            served=served,
            secret=secret,
            seal_content=seal_content,
            entropy=secrets.token_bytes,
            tasks=tasks,
        )

        # What is here by now stays: the collector need not look at it again and again.
        gc.freeze()

        async def stopped() -> None:
            await stop.wait()
            await let_streams_go(opened)

        await serve(opened.gateway, host=host, port=port, stopped=stopped)
        await say_goodbye(log, opened)
        tasks.cancel_scope.cancel()


async def open_gateway(
    log: Log,
    history_log: Log,
    *,
    models: Catalogue,
    served: Collection[str],
    secret: bytes,
    entropy: Callable[[int], bytes],
    tasks: TaskGroup,
    seal_content: bool = False,
) -> Opened:
    """Open a lane and start what a gateway does beside its clients. Raises as `run`."""
    config = GatewayConfig(
        shard=0,
        lane=ids.new_lane_id(entropy(ids.RANDOM_BYTES)),
        secret=secret,
        models=models,
        served=served,
        seal_content=seal_content,
        entropy=entropy,
    )
    shard = config.shard
    lane = config.lane
    state = LogState(log, HistoryReader(history_log), await books.read(log), await fleet.read(log))
    opened_at_s = anyio.current_time()
    publisher = Publisher(log, lane, shard=shard)
    await publisher.publish(LaneOpened(lane=lane, shard=shard), within_s=OPEN_S)
    relays = await LaneRegistry.open(log, state.histories, shard=shard, lane=lane, tasks=tasks)
    own = relays.own
    holds = LaneCredit(state, config, own.clock, reported_at_s=opened_at_s)
    freshness = BookFreshness(log, state.book)
    tasks.start_soon(freshness.confirm)
    waiting = QueueStatus(state.fleet, relays.nudge, own.clock.now_ns)
    tasks.start_soon(_follow, log, subjects.FLEET, "rift.fleet.>", state.fleet, waiting.refresh)
    tasks.start_soon(_report, publisher, lane, holds)
    tasks.start_soon(holds.keep)
    gateways = LiveGateways(lane, own.position)
    tasks.start_soon(_follow, log, subjects.shard_stream(shard), subjects.lane(shard, "*"), gateways)
    rate_limits = RateLimits(own, book=state.book, gateways=gateways)
    credit = CreditReservations(holds, relays, state.book, tasks)
    room = LogRoom(log, shard)
    tasks.start_soon(room.watch)
    admission = Admission(
        state,
        config,
        Authenticator(state.book, freshness, rate_limits, own.clock),
        room,
        QueueShare(state.book, state.fleet, own, gateways),
        Reservations(log, config, own, (rate_limits, credit)),
    )
    delivery = Delivery(publisher, book=state.book, queue_status=waiting, tasks=tasks)

    ended_keys = len(state.book.revoked)

    def book_changed() -> None:
        nonlocal ended_keys
        holds.changed()
        freshness.moved()
        for key in state.book.revoked[ended_keys:]:
            for relay in relays.every():
                delivery.cancellation.revoke(relay.open_of(key))
            delivery.revoke(key)
        ended_keys = len(state.book.revoked)

    tasks.start_soon(_follow, log, subjects.BOOK, "rift.book.>", state.book, book_changed)
    return Opened(Gateway(state, config, relays, admission, delivery), relays, credit, lane)


async def let_streams_go(opened: Opened) -> None:
    """Accept nothing more, and tell every client where to go on."""
    opened.gateway.stop()
    for relay in opened.relays.every():
        relay.break_off_all(STOPPING)
    await anyio.sleep(LAST_FRAMES_S)


async def say_goodbye(log: Log, opened: Opened) -> None:
    await opened.credit.holds.settle_all()
    with anyio.move_on_after(LAST_WORD_S):
        await Publisher(log, opened.lane).publish(LaneLost(lane=opened.lane), within_s=OPEN_S)


async def _report(publisher: Publisher, lane: str, holds: LaneCredit) -> None:
    """Say that the gateway lives: who says nothing is lost, and its clients with it."""
    while True:
        await anyio.sleep(REPORT_S)
        began = anyio.current_time()
        try:
            await publisher.publish(LaneReported(lane=lane), within_s=OPEN_S)
            holds.note_report(began)
        except LogError as error:
            logger.warning("the lane could not report: %s", error)


async def _follow(
    log: Log, stream: str, topic: str, fold: Any, changed: Callable[[], None] = lambda: None
) -> None:
    """Keep a fold of one stream current for as long as the gateway lives."""
    async with log.follow(stream, [topic], after=fold.position) as reader:
        async for batch in reader:
            for stored in batch:
                fold.fold(stored)
            changed()
