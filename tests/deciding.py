"""Set a model's number of replicas from a test, with the event that a leader appends."""

from events import codec, fleet, subjects
from events.log import Log
from events.schema import ScaleDecided


async def decide(log: Log, model: str, replicas: int, **inputs: int) -> None:
    """Append the decision, unless it equals the last one. Raises LogError."""
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
    await log.append(subjects.FLEET, subjects.fleet(subjects.slug(model)), codec.encode("test", [decided]))
