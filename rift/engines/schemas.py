"""Limits on the size of a grammar. vLLM compiles one for every JSON schema, one at a time, and bounds only
their depth.

Must not live here: whether a schema is valid, which vLLM decides.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec

from events.schema import Parameters
from rift.engines import InvalidRequest
from rift.engines.patterns import TooManyStates, pattern_states

# A schema of 40,000 characters with 1,500 properties compiled in 1.5 s on an idle core and in 8 s on a busy
# one. Twenty tools have 20,000 characters.
SCHEMA_CHARACTERS_MAX = 64 * 1024
# Of a property's name in an error.
NAME_CHARACTERS_MAX = 80
# One state compiles in about 1 ms of CPU, or in up to 2 ms on busy cores. The numbers below are the states of
# constructs that take as long.
PATTERN_STATES_MAX = 4_000
# An estimate takes up to 40 ms of the event loop, and a request's schema is checked twice for each of its
# choices. Patterns have up to 64 KiB.
PATTERNS_KEPT = 256
# A pattern that is used again shares its states, but not the transitions to them.
REPEATED_PATTERN_SHARE = 20
# An object whose properties are counted (`minProperties`) counts as a part of the square of its optional
# properties: 126 compiled in 3 s, and on busy cores 200 in 21 s, and 1,500 were only parsed in 16 s.
COUNTED_PROPERTIES_SHARE = 4
# So does any object, because each of its optional properties may follow any earlier one: 600 compiled in 1 s,
# 1,200 in 4 s to 8 s, and 1,500 in 10 s.
OPTIONAL_PROPERTIES_SHARE = 256
# A string of limited length (`maxLength`) has states for each character, up to this many characters, and
# strings of the same lengths share them: eight lengths of 200 compiled in 6 s, and 20 in 14 s.
LENGTH_CHARACTERS_MAX = 200
STATES_PER_CHARACTER = 2.5
# Uses of a format do not share their states: 160 of `uri-template` compiled in 8 s, 600 of `ipv6` in
# 13 s, and 1,200 of `email` in 3 s.
FORMAT_STATES = {"ipv6": 12, "uri-template": 32}
FORMAT_STATES_OTHERWISE = 3
# A numeric range has states for each digit of its limits: 200 ranges from -1e300 to 1e300 compiled in 4 s.
DIGITS_PER_STATE = 25

LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
PATTERNS = "patterns"
LENGTHS = "different lengths (minLength, maxLength)"
COUNTED = "objects with minProperties or maxProperties"
OPTIONAL = "optional properties"
FORMATS = "formats"
RANGES = "numeric ranges (minimum, maximum)"
ADVICE = {
    PATTERNS: "use smaller counts, and separate parts of variable length by characters that they exclude",
    LENGTHS: "use fewer different or smaller ones",
    COUNTED: "use them with fewer optional properties",
    OPTIONAL: "require them, or divide them among nested objects",
    FORMATS: "use them for fewer properties",
    RANGES: "use fewer, or limits with fewer digits",
}


def check_schemas(parameters: Parameters) -> None:
    """Raise InvalidRequest if the schemas together are too large."""
    response_format = parameters.response_format
    schemas = [("tools", tool.parameters) for tool in parameters.tools]
    schemas.append(("response_format", response_format.schema if response_format else None))
    used = [(param, text) for param, text in schemas if text]
    if (size := sum(len(text) for _, text in used)) > SCHEMA_CHARACTERS_MAX:
        raise InvalidRequest(
            f"the schemas have {size} characters, at most {SCHEMA_CHARACTERS_MAX} are allowed",
            code="schema_too_large",
            param=used[0][0],
        )
    count = StateCount()
    for param, text in used:
        for name, node in _objects(text, param):
            count.add(name, node)
            if count.total > PATTERN_STATES_MAX:
                raise InvalidRequest(count.reason(), code="schema_too_large", param=param)


class StateCount:
    """The approximate number of states of schemas, by what causes them."""

    def __init__(self) -> None:
        self.total = 0
        self._kinds: dict[str, int] = dict.fromkeys(ADVICE, 0)
        self._largest: dict[str, tuple[int, str]] = {}
        self._patterns: dict[str, int] = {}
        self._lengths: set[tuple[float, float]] = set()

    def add(self, name: str, node: dict[str, Any]) -> None:
        """Add the states of one object of a schema, without the objects in it."""
        for kind, states in self._states(node):
            self.total += states
            self._kinds[kind] += states
            self._largest[kind] = max(self._largest.get(kind, (0, "")), (states, name))

    def reason(self) -> str:
        """Return why the schemas are refused, with the place of the largest cause."""
        kind = max(self._kinds, key=self._kinds.__getitem__)
        return (
            f"the schemas expand to more than {PATTERN_STATES_MAX} states, most of them for {kind}, the "
            f"largest at {self._largest[kind][1]!r}; {ADVICE[kind]}"
        )

    def _states(self, node: dict[str, Any]) -> Iterator[tuple[str, int]]:
        for pattern in (node.get("pattern"), *_dict(node.get("patternProperties"))):
            if isinstance(pattern, str):
                yield PATTERNS, self._pattern(pattern)
        if lengths := _lengths(node) - self._lengths:
            self._lengths |= lengths
            yield (
                LENGTHS,
                sum(int(STATES_PER_CHARACTER * min(LENGTH_CHARACTERS_MAX, max(pair))) for pair in lengths),
            )
        if optional := _optional_properties(node):
            yield OPTIONAL, optional**2 // OPTIONAL_PROPERTIES_SHARE
            if node.get("minProperties") or "maxProperties" in node:
                yield COUNTED, optional**2 // COUNTED_PROPERTIES_SHARE
        if isinstance(name := node.get("format"), str):
            yield FORMATS, FORMAT_STATES.get(name, FORMAT_STATES_OTHERWISE)
        if digits := sum(_digits(node.get(name)) for name in LIMITS):
            yield RANGES, 1 + digits // DIGITS_PER_STATE

    def _pattern(self, pattern: str) -> int:
        if (states := self._patterns.get(pattern)) is not None:
            return 1 + states // REPEATED_PATTERN_SHARE
        states = self._patterns[pattern] = _pattern_states(pattern)
        return states


@lru_cache(maxsize=PATTERNS_KEPT)
def _pattern_states(pattern: str) -> int:
    try:
        return pattern_states(pattern, PATTERN_STATES_MAX)
    except TooManyStates:
        return PATTERN_STATES_MAX + 1


def _lengths(node: dict[str, Any]) -> set[tuple[float, float]]:
    """Return the limits of a string's length, or nothing."""
    least, most = (
        value if isinstance(value := node.get(name), (int, float)) else 0
        for name in ("minLength", "maxLength")
    )
    return {(least, most)} if max(least, most) > 0 else set()


def _digits(value: Any) -> int:
    """Return the digits of a number before or after its point, without an exponent."""
    return 1 + int(abs(math.log10(abs(value)))) if isinstance(value, (int, float)) and value else 0


def _optional_properties(node: dict[str, Any]) -> int:
    required = node.get("required")
    names = required if isinstance(required, list) else []
    return len(_dict(node.get("properties")).keys() - {name for name in names if isinstance(name, str)})


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(text: str, param: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every object in a schema's text, with the name under which it is. Raises InvalidRequest."""
    try:
        nodes = [(param, msgspec.json.decode(text))]
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise InvalidRequest(
            f"{param}: a schema is not valid JSON: {error}", code="invalid_value", param=param
        ) from error
    while nodes:
        match nodes.pop():
            case name, dict() as node:
                nodes += [(key[:NAME_CHARACTERS_MAX], value) for key, value in node.items()]
                yield name, node
            case name, list() as items:
                nodes += [(name, item) for item in items]
