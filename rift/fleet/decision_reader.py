"""From the fleet's stream to a driver: what was decided, and who was lost. Nothing is decided here."""

import logging

import anyio

from events.contracts import SECOND_NS
from events.fleet import Fleet
from events.log import Log, LogError
from events.schema import ReplicaLost, ScaleDecided
from events.subjects import FLEET
from rift.fleet import Driver

logger = logging.getLogger(__name__)

# A broker's restart takes a second or two.
AGAIN_S = 1.0

# Who was given up shortly before this began may still be there: whoever said so may have died of it.
LATELY_NS = 900 * SECOND_NS


async def follow(log: Log, driver: Driver) -> None:
    """Tell the driver each decision that counts and each loss, until cancelled. Of the past it is told what
    was decided last for each model, and the losses of the last quarter of an hour."""
    fleet = Fleet()
    lost: list[tuple[int, ReplicaLost]] = []
    while True:
        try:
            caught_up = await log.last_sequence(FLEET)
            async with log.follow(FLEET, ["rift.fleet.>"], after=fleet.position) as reader:
                if fleet.position >= caught_up:
                    _tell_past(fleet, lost, driver)
                async for batch in reader:
                    for stored in batch:
                        is_past = stored.sequence <= caught_up
                        for event in fleet.fold(stored):
                            if isinstance(event, ReplicaLost):
                                lost.append((stored.stored_at_ns, event))
                            if not is_past:
                                _tell(event, driver)
                        if stored.sequence == caught_up:
                            _tell_past(fleet, lost, driver)
                    lost = [(at_ns, event) for at_ns, event in lost if at_ns > fleet.at_ns - LATELY_NS]
        except LogError as error:
            logger.warning("what is decided cannot be read: %s; trying again", error)
            await anyio.sleep(AGAIN_S)


def _tell(event: object, driver: Driver) -> None:
    match event:
        case ScaleDecided():
            driver.want(event.model, event.to_replicas)
        case ReplicaLost():
            driver.lost(event.model, event.replica)


def _tell_past(fleet: Fleet, lost: list[tuple[int, ReplicaLost]], driver: Driver) -> None:
    for model, replicas in fleet.wanted.items():
        driver.want(model, replicas)
    for at_ns, event in lost:
        if at_ns > fleet.at_ns - LATELY_NS:
            driver.lost(event.model, event.replica)
