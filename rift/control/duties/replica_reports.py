"""The fleet as the leader follows it: its fold, and which replicas have fallen silent."""

import anyio

from events.broker_clock import BrokerClock
from events.contracts import REPLICA_LOST_S
from events.fleet import Fleet
from events.log import Log, Stored

SILENT_S = REPLICA_LOST_S


class ReplicaReports:
    """A fold of the fleet's stream that also notes, by this process's clock, when each replica reported."""

    def __init__(self, log: Log, fleet: Fleet) -> None:
        self.fleet = fleet
        self.clock = BrokerClock()
        self.clock.note(fleet.at_ns)
        self._log = log
        self._reported_at_s: dict[str, float] = {}
        # Since when this process has listened without losing its connection.
        self._listening_since_s = 0.0
        self._listening_epoch = -1

    @property
    def position(self) -> int:
        return self.fleet.position

    def fold(self, stored: Stored) -> None:
        self.clock.note(stored.stored_at_ns)
        for event in self.fleet.fold(stored):
            if (replica := getattr(event, "replica", None)) is not None:
                self._reported_at_s[replica] = anyio.current_time()

    def note_outage(self) -> None:
        """Begin to listen anew: the log stored nothing, so no replica could report."""
        self._listening_epoch = -1

    def silent(self) -> list[tuple[str, str, int]]:
        """Return model, name and seconds of silence of each live replica that has been silent too long while
        this process was listening."""
        now_s = anyio.current_time()
        if not self._log.is_connected or self._listening_epoch != self._log.epoch:
            self._listening_since_s = now_s
            self._listening_epoch = self._log.epoch
        models = {name: model for model, replicas in self.fleet.replicas.items() for name in replicas}
        self._reported_at_s = {name: at_s for name, at_s in self._reported_at_s.items() if name in models}
        silences_s = {
            name: now_s - max(self._listening_since_s, self._reported_at_s.get(name, 0.0)) for name in models
        }
        return [(models[name], name, int(s)) for name, s in silences_s.items() if s > SILENT_S]
