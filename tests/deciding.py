"""Decides in a test's own words how many replicas a model shall have: one event, as the leader appends it."""

from collections.abc import Callable
from pathlib import Path

import anyio

from events import codec, fleet, subjects
from events.jetstream import connect
from events.log import Log, LogError
from events.schema import ScaleDecided
from rift import broker, catalogue

AGAIN_S = 0.1


async def decide(log: Log, model: str, replicas: int, **inputs: int) -> None:
    """Append the decision, unless that is what was decided last. Raises LogError."""
    found = await fleet.read(log)
    before = found.wanted.get(model, 0)
    if before == replicas:
        return
    decided = ScaleDecided(
        model=model,
        from_replicas=before,
        to_replicas=replicas,
        reason="a test says so",
        policy="test",
        positions={},
        decided_at_ns=0,
        inputs=inputs,
        epoch=found.epoch,
    )
    await log.append(subjects.FLEET, subjects.fleet(catalogue.slug(model)), codec.encode("test", [decided]))


def decide_there(folder: Path, model: str, replicas: int, *, while_: Callable[[], bool]) -> None:
    """Decide in the installation of this folder, as soon as its log answers and for as long as `while_`."""

    async def say() -> None:
        while while_():
            try:
                if (address := broker.address(folder / "nats")) is not None:
                    log = await connect(address.url, token=address.token, name="test")
                    try:
                        return await decide(log, model, replicas)
                    finally:
                        await log.close()
            except LogError:
                pass
            await anyio.sleep(AGAIN_S)

    anyio.run(say)
