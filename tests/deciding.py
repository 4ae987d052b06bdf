"""Decides in a test's own words how many replicas a model shall have: one event, as the leader appends it."""

from events import codec, fleet, subjects
from events.log import Log
from events.schema import ScaleDecided


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
    await log.append(subjects.FLEET, subjects.fleet(subjects.slug(model)), codec.encode("test", [decided]))
