"""What happened to the fleet since this process began to count, for its metrics."""

from collections import Counter
from collections.abc import Iterable

from events.schema import ReplicaLost, ReplicaStarting, ScaleDecided


class FleetCounts:
    """Decisions by model and direction, starts of replicas by model, losses by model and cause."""

    def __init__(self) -> None:
        self.decisions: Counter[tuple[str, ...]] = Counter()
        self.starts: Counter[tuple[str, ...]] = Counter()
        self.lost: Counter[tuple[str, ...]] = Counter()

    def note(self, events: Iterable[object]) -> None:
        """Count events of the fleet's stream that count."""
        for event in events:
            match event:
                case ScaleDecided():
                    self.decisions[event.model, _direction(event)] += 1
                case ReplicaStarting():
                    self.starts[event.model,] += 1
                case ReplicaLost():
                    self.lost[event.model, event.cause] += 1


def _direction(event: ScaleDecided) -> str:
    """Return what a decision does; its reason has numbers, and so no bound."""
    if not event.from_replicas:
        return "from_zero"
    if not event.to_replicas:
        return "to_zero"
    return "up" if event.to_replicas > event.from_replicas else "down"
