"""The root of every error that `rift` raises for a caller to handle."""


class RiftError(Exception):
    """A process or a command cannot continue; the message is one sentence for the operator.

    `exit_status` is what the command line exits with.
    """

    exit_status = 1


def printable(text: str, *, kept: str = "") -> str:
    """Return text for a terminal: its control characters are escaped, except those in `kept`.

    A terminal obeys control characters, and names, answers and errors may hold a client's.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one in kept else one.encode("unicode_escape").decode() for one in text
    )


def first_error(error: BaseException) -> BaseException:
    """Return the first error of a group, however deep it is, or the error itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
