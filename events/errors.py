"""The root of every error that `events` raises for a caller to handle, and any error's reason in words."""

import os
from socket import gaierror
from ssl import SSLError


class EventsError(Exception):
    """An operation on the log, a record or an amount of money failed; the message says which and why."""


def reason(error: BaseException) -> str:
    """Return an error's message, or the name of its type. One of the system is without number and address."""
    if isinstance(error, OSError) and error.strerror:
        # asyncio adds addresses as Python writes them. Errors of TLS and of names have numbers of their own.
        is_systems = error.errno is not None and not isinstance(error, SSLError | gaierror)
        return os.strerror(error.errno) if is_systems else error.strerror  # type: ignore[arg-type]
    return str(error) or type(error).__name__
