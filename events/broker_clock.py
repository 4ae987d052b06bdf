"""The broker's time as one process can estimate it, so that no wall clock is compared with stored times."""

from events.clock import now_s
from events.contracts import SECOND_NS


class BrokerClock:
    """Estimate the broker's time: the newest stored time, plus the monotonic time since it was read.

    The estimate is never ahead of the broker. It lags by the time that the newest record waited to be
    read, so it may step back by that much when a newer one is read.
    """

    def __init__(self) -> None:
        self.newest_ns = 0
        self._read_at_s = 0.0

    def note(self, stored_at_ns: int) -> None:
        """Note the stored time of a record that has just been read. Older records change nothing."""
        if stored_at_ns > self.newest_ns:
            self.newest_ns = stored_at_ns
            self._read_at_s = now_s()

    def now_ns(self) -> int:
        """Return Unix nanoseconds; 0 before the first record."""
        if not self.newest_ns:
            return 0
        return self.newest_ns + int((now_s() - self._read_at_s) * SECOND_NS)
