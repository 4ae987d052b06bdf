"""The wall clock, for commands only. Everything computed from the log uses stored times."""

import time


def now_ns() -> int:
    """Return Unix nanoseconds."""
    return time.time_ns()
