"""Named questions about the log: the files of `sql/ask/`, each a SELECT with documented parameters.

The first line of a file says what its answer shows. A line for each parameter follows:

    -- since (time, default 24h): requests accepted since then
    -- model (text, optional): only this model
    -- account (text, required): the account that pays

In the SELECT, `$since` stands for the value. An optional parameter without a value is null.
"""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from importlib.resources import files

import msgspec

from events.contracts import SECOND_NS
from replay.errors import ReplayError
from replay.sql_files import sql, substituted

UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
MICROSECOND = timedelta(microseconds=1)
# Nanoseconds between them fit in a bigint.
TIMES = (datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC))

_PARAMETER = re.compile(r"-- (\w+) \((\w+), (?:default (\S+)|optional|(required))\): (.+)")


class WrongQuestion(ReplayError):
    """The question or one of its parameters is wrong; the message says what is possible."""


class Parameter(msgspec.Struct, frozen=True):
    """A parameter. Without a default it is required, or null if it is not given."""

    name: str
    kind: str
    default: str | None
    is_required: bool
    meaning: str

    def __str__(self) -> str:
        return f"{self.usage} ({self.meaning})"

    @property
    def usage(self) -> str:
        """Return `model=TEXT` if it is required, else `[model=TEXT]` or `[since=24h]`."""
        usage = f"{self.name}={self.default or self.kind.upper()}"
        return usage if self.is_required else f"[{usage}]"


class NamedQuestion(msgspec.Struct, frozen=True):
    name: str
    shows: str
    parameters: tuple[Parameter, ...]

    def select(self, given: Mapping[str, str], now_ns: int) -> str:
        """Return the SELECT for these values. Times such as `24h` are counted back from `now_ns`.

        Raises WrongQuestion, which names the parameter and its meaning.
        """
        for name in given:
            if name not in [parameter.name for parameter in self.parameters]:
                raise WrongQuestion(
                    f"{self.name} has no parameter {name!r}; it has {', '.join(map(str, self.parameters))}"
                )
        values = {one.name: _value(one, given.get(one.name), now_ns) for one in self.parameters}
        return substituted(_file(self.name), values)


def questions() -> list[NamedQuestion]:
    """Return all questions, by name."""
    names = (file.name for file in (files("replay") / "sql" / "ask").iterdir())
    return [
        _question(name.removesuffix(".sql").replace("_", "-"))
        for name in sorted(names)
        if name.endswith(".sql")
    ]


def named(name: str) -> NamedQuestion:
    """Return a question. Raises WrongQuestion, which lists the questions."""
    known = {question.name: question for question in questions()}
    if name not in known:
        raise WrongQuestion(f"no question is named {name!r}; choose from {', '.join(known)}")
    return known[name]


def _file(name: str) -> str:
    return f"ask/{name.replace('-', '_')}"


def _question(name: str) -> NamedQuestion:
    first, *lines = sql(_file(name)).splitlines()
    parameters = [
        Parameter(match[1], match[2], match[3], match[4] is not None, match[5])
        for line in lines
        if (match := _PARAMETER.fullmatch(line))
    ]
    return NamedQuestion(name, first.removeprefix("-- "), tuple(parameters))


# --- values ------------------------------------------------------------------------------------------------


def _text(text: str, _: int) -> str | None:
    return text or None


def _number(text: str, _: int) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,9}", text) and int(text) else None


def _duration(text: str, _: int) -> int | None:
    """Return nanoseconds."""
    if not (match := re.fullmatch("([0-9]{1,6})([smhd])", text)):
        return None
    return int(match[1]) * UNIT_S[match[2]] * SECOND_NS or None


def _time(text: str, now_ns: int) -> int | None:
    """Return Unix nanoseconds."""
    if text == "now":
        return now_ns
    if (ago_ns := _duration(text, now_ns)) is not None:
        return max(now_ns - ago_ns, 0)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
    return (at - TIMES[0]) // MICROSECOND * 1000 if TIMES[0] <= at < TIMES[1] else None


def time_ns(name: str, text: str, now_ns: int) -> int:
    """Return the time of an option as Unix nanoseconds. Raises WrongQuestion."""
    form, _ = _KINDS["time"]
    if (value := _time(text, now_ns)) is None:
        raise WrongQuestion(f"{name} must be {form}, got {text!r}")
    return value


# By kind: the form of its values, and how one is read: None if it does not have this form.
_KINDS: dict[str, tuple[str, Callable[[str, int], str | int | None]]] = {
    "text": ("a text that is not empty", _text),
    "number": ("a positive integer", _number),
    "duration": ("a duration like 10s, 15m, 2h or 1d", _duration),
    "time": ("now, a time ago like 15m, 24h or 7d, or a UTC time like 2026-11-28T09:30", _time),
}


def _value(parameter: Parameter, given: str | None, now_ns: int) -> str | int | None:
    text = parameter.default if given is None else given
    if text is None:
        if parameter.is_required:
            raise WrongQuestion(f"parameter {parameter.name} is missing; add {parameter}")
        return None
    form, read = _KINDS[parameter.kind]
    if (value := read(text, now_ns)) is None:
        raise WrongQuestion(f"{parameter.name} ({parameter.meaning}) must be {form}, got {text!r}")
    return value
