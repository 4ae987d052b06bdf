"""How large a grammar may be. vLLM makes one of every JSON schema, while everybody else's waits, and bounds
only how deep it goes. What must not live here: whether a schema is right, which vLLM says.
"""

import re

import msgspec

from events.schema import Parameters
from rift.engines import InvalidRequest

# A schema of 40,000 characters with 1,500 properties took 1.5 s on an idle core and 8 s on a busy one; twenty
# tools have 20,000.
SCHEMA_CHARACTERS_MAX = 64 * 1024
# States of all the schemas' patterns, counted repetitions written out. On busy cores 5,000 took 24 s, 18,000
# more than a minute, and 4,000,000 did not come back; on idle ones a quarter of that.
PATTERN_STATES_MAX = 4_000

ATOM = re.compile(
    r"\\.|\[(?:\\.|[^\]])*\]|(?P<open>\()|(?P<close>\))|\{(?P<least>\d+)(?:,(?P<most>\d*))?\}|.", re.S
)


def check_schemas(parameters: Parameters) -> None:
    """Raises InvalidRequest if the schemas are too much together."""
    wanted = parameters.response_format
    schemas = [("tools", tool.parameters) for tool in parameters.tools]
    schemas.append(("response_format", wanted.schema if wanted else None))
    given = [(param, text) for param, text in schemas if text]
    if (size := sum(len(text) for _, text in given)) > SCHEMA_CHARACTERS_MAX:
        raise InvalidRequest(
            f"the schemas have {size} characters; at most {SCHEMA_CHARACTERS_MAX} are taken",
            code="schema_too_large",
            param=given[0][0],
        )
    states = 0
    for param, text in given:
        states += sum(map(pattern_states, _patterns(text, param)))
        if states > PATTERN_STATES_MAX:
            raise InvalidRequest(
                f"the schemas' patterns repeat too much: {states} states, at most {PATTERN_STATES_MAX}",
                code="schema_too_large",
                param=param,
            )


def pattern_states(pattern: str) -> int:
    """Return about how many states a regular expression has, with `{m,n}` written out."""
    sums = [0]
    last = 0
    for atom in ATOM.finditer(pattern):
        if atom["open"]:
            sums.append(0)
        elif atom["close"] and len(sums) > 1:
            last = sums.pop()
            sums[-1] += last
        elif atom["least"]:
            # Eight digits are too many states in any case.
            times = int((atom["most"] or atom["least"])[:8])
            sums[-1] += last * max(0, times - 1)
            last *= max(1, times)
        else:
            last = 1
            sums[-1] += 1
    return sum(sums)


def _patterns(text: str, param: str) -> list[str]:
    try:
        waiting = [msgspec.json.decode(text)]
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise InvalidRequest(
            f"{param}: a schema is no JSON: {error}", code="invalid_value", param=param
        ) from error
    found: list[str] = []
    while waiting:
        match waiting.pop():
            case dict() as node:
                waiting += node.values()
                if isinstance(pattern := node.get("pattern"), str):
                    found.append(pattern)
                if isinstance(by_pattern := node.get("patternProperties"), dict):
                    found += by_pattern
            case list() as nodes:
                waiting += nodes
    return found
