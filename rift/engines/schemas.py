"""Limits on the size of a grammar. vLLM compiles one for every JSON schema, one at a time, and bounds only
their depth.

Must not live here: whether a schema is valid, which vLLM decides.
"""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from events.schema import Parameters
from rift.engines import InvalidRequest

# A schema of 40,000 characters with 1,500 properties compiled in 1.5 s on an idle core and in 8 s on a busy
# one. Twenty tools have 20,000 characters.
SCHEMA_CHARACTERS_MAX = 64 * 1024
# States of all patterns together, with counted repetitions expanded. On busy cores 5,000 states compiled in
# 24 s, 18,000 in more than a minute, and 4,000,000 never finished; idle cores take a quarter of that.
PATTERN_STATES_MAX = 4_000
# An object whose properties are counted (`minProperties`) counts as a part of the square of its optional
# properties: on busy cores 126 compiled in 6 s, 200 in 21 s, and 1,500 were only parsed in 16 s.
COUNTED_PROPERTIES_SHARE = 4
# A string of limited length (`maxLength`) has a state for each character, up to this many, and strings of the
# same lengths share them: on busy cores 20 lengths of more than 100 compiled in 21 s, 500 lengths in minutes.
LENGTH_STATES_MAX = 200

ATOM = re.compile(
    r"\\.|\[(?:\\.|[^\]])*\]|(?P<open>\()|(?P<close>\))|\{(?P<least>\d+)(?:,(?P<most>\d*))?\}|.", re.S
)


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
    states = 0
    lengths: dict[tuple[float, float], int] = {}
    for param, text in used:
        for node in _objects(text, param):
            states += _states(node)
            lengths |= _length_states(node)
        if (total := states + sum(lengths.values())) > PATTERN_STATES_MAX:
            raise InvalidRequest(
                "the schemas' patterns, the different lengths of their strings (minLength, maxLength), and "
                f"objects with minProperties or maxProperties expand to {total} states, at most "
                f"{PATTERN_STATES_MAX} are allowed",
                code="schema_too_large",
                param=param,
            )


def pattern_states(pattern: str) -> int:
    """Return the approximate number of states of a regular expression, with `{m,n}` expanded."""
    sums = [0]
    last = 0
    for atom in ATOM.finditer(pattern):
        if atom["open"]:
            sums.append(0)
        elif atom["close"] and len(sums) > 1:
            last = sums.pop()
            sums[-1] += last
        elif atom["least"]:
            # A number of eight digits exceeds the limit anyway; int() is slow for very long ones.
            times = int((atom["most"] or atom["least"])[:8])
            sums[-1] += last * max(0, times - 1)
            last *= max(1, times)
        else:
            last = 1
            sums[-1] += 1
    return sum(sums)


def _states(node: dict[str, Any]) -> int:
    """Return the approximate number of states of one object of a schema, without the objects in it."""
    patterns = [node.get("pattern"), *_dict(node.get("patternProperties"))]
    states = sum(pattern_states(pattern) for pattern in patterns if isinstance(pattern, str))
    if node.get("minProperties") or "maxProperties" in node:
        required = node.get("required")
        names = required if isinstance(required, list) else []
        optional = _dict(node.get("properties")).keys() - {name for name in names if isinstance(name, str)}
        states += len(optional) ** 2 // COUNTED_PROPERTIES_SHARE
    return states


def _length_states(node: dict[str, Any]) -> dict[tuple[float, float], int]:
    """Return the lengths of one object of a schema with their states, or nothing."""
    least, most = (
        value if isinstance(value := node.get(name), (int, float)) else 0
        for name in ("minLength", "maxLength")
    )
    states = int(min(LENGTH_STATES_MAX, max(least, most)))
    return {(least, most): states} if states > 0 else {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(text: str, param: str) -> Iterator[dict[str, Any]]:
    """Yield every object in a schema's text. Raises InvalidRequest."""
    try:
        nodes = [msgspec.json.decode(text)]
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise InvalidRequest(
            f"{param}: a schema is not valid JSON: {error}", code="invalid_value", param=param
        ) from error
    while nodes:
        match nodes.pop():
            case dict() as node:
                nodes += node.values()
                yield node
            case list() as items:
                nodes += items
