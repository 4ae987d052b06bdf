"""The machine's clock: for commands alone. What follows from the log knows stored times only."""

import time


def now_ns() -> int:
    """Unix nanoseconds."""
    return time.time_ns()
