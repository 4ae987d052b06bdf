"""The root of every error that `events` raises for a caller to handle."""


class EventsError(Exception):
    """An operation on the log, a record or an amount of money failed; the message says which and why."""
