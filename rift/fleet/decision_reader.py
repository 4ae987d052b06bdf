"""Pass decisions and losses from the fleet's stream to a driver."""

import logging

import anyio

from events.contracts import SECOND_NS
from events.fleet import Fleet
from events.log import Log, LogError
from events.schema import ReplicaLost, ScaleDecided
from events.subjects import FLEET
from rift.fleet import Driver

logger = logging.getLogger(__name__)

# A broker restarts within a second or two.
RETRY_S = 1.0

# A replica that was declared lost this long before the start may still run: the driver that had to end it may
# have died together with the old leader.
RECENT_NS = 900 * SECOND_NS


async def drive(log: Log, driver: Driver) -> None:
    """Pass each decision that counts, and each loss, until cancelled. From the past, pass only the
    last decision for each model and the losses of the last RECENT_NS."""
    fleet = Fleet()
    lost: list[tuple[int, ReplicaLost]] = []
    while True:
        try:
            caught_up = await log.last_sequence(FLEET)
            async with log.follow(FLEET, ["rift.fleet.>"], after=fleet.position) as reader:
                if fleet.position >= caught_up:
                    _pass_past(fleet, lost, driver)
                async for batch in reader:
                    for stored in batch:
                        is_past = stored.sequence <= caught_up
                        for event in fleet.fold(stored):
                            if isinstance(event, ReplicaLost):
                                lost.append((stored.stored_at_ns, event))
                            if not is_past:
                                _pass(event, driver)
                        if stored.sequence == caught_up:
                            _pass_past(fleet, lost, driver)
                    lost = [(at_ns, event) for at_ns, event in lost if at_ns > fleet.at_ns - RECENT_NS]
        except LogError as error:
            logger.warning("the fleet's decisions cannot be read: %s; trying again", error)
            await anyio.sleep(RETRY_S)


def _pass(event: object, driver: Driver) -> None:
    match event:
        case ScaleDecided():
            driver.want(event.model, event.to_replicas)
        case ReplicaLost():
            driver.lost(event.model, event.replica, event.why)


def _pass_past(fleet: Fleet, lost: list[tuple[int, ReplicaLost]], driver: Driver) -> None:
    for model, replicas in fleet.wanted.items():
        driver.want(model, replicas)
    for at_ns, event in lost:
        if at_ns > fleet.at_ns - RECENT_NS:
            driver.lost(event.model, event.replica, event.why)
