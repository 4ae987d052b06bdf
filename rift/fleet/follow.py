"""From the fleet's stream to a driver: what was decided, and who was lost. Nothing is decided here."""

from events import fleet
from events.log import Log
from events.schema import ReplicaLost, ScaleDecided
from events.subjects import FLEET
from rift.fleet import Driver


async def follow(log: Log, driver: Driver) -> None:
    """Tell the driver each decision that counts and each loss, until cancelled; of the past only what was
    decided last for each model. Raises LogError, codec.RecordUnreadable."""
    found = await fleet.read(log)
    for model, replicas in found.wanted.items():
        driver.want(model, replicas)
    async with log.follow(FLEET, ["rift.fleet.>"], after=found.position) as reader:
        async for batch in reader:
            for stored in batch:
                for event in found.fold(stored):
                    match event:
                        case ScaleDecided():
                            driver.want(event.model, event.to_replicas)
                        case ReplicaLost():
                            driver.lost(event.model, event.replica)
