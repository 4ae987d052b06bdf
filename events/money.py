"""Convert between amounts in USD as text and whole nano-USD, exactly and without floats."""

import re

from events.errors import EventsError

NANOUSD_PER_USD = 1_000_000_000
DIGITS = 9

_USD = re.compile(r"(?P<sign>-?)(?P<whole>[0-9]{1,9})(?:\.(?P<part>[0-9]{1,9}))?")


class InvalidMoney(EventsError):
    """The text is not an amount of money; the message gives a valid form."""


def usd(nanousd: int) -> str:
    """Return an amount in USD with all its digits, like `-0.000005990`."""
    whole, part = divmod(abs(nanousd), NANOUSD_PER_USD)
    return f"{'-' * (nanousd < 0)}{whole}.{part:09d}"


def nanousd(text: str) -> int:
    """Return the nano-USD of an amount in USD, like `10`, `0.25` or `-1.5`. Raises InvalidMoney."""
    match = _USD.fullmatch(text)
    if match is None:
        raise InvalidMoney(f"{text!r} is not an amount; write USD with at most {DIGITS} decimals, like 12.50")
    amount = int(match["whole"] + (match["part"] or "").ljust(DIGITS, "0"))
    return -amount if match["sign"] else amount
