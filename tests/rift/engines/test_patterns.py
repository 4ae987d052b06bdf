"""The estimate of a pattern's states."""

import time
from contextlib import suppress

import pytest

from rift.engines.patterns import TooManyStates, pattern_states
from rift.engines.schemas import PATTERN_STATES_MAX

# Patterns in the style of published schemas, written for this test.
HONEST = (
    r"^(([a-z0-9-]{1,63})\.){1,8}[a-z]{2,63}$",
    r"^([A-Z][a-z]{1,20} ?){1,5}$",
    r"^[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{1,255}$",
    r"^[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$",
    r"^[a-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[a-z0-9!#$%&'*+/=?^_`{|}~-]+)*@(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z0-9](?:[a-z0-9-]*[a-z0-9])?$",
    r"^\d{4}-\d{2}-\d{2}$",
    r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?(Z|[+-]\d{2}:\d{2})$",
    r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-5][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}$",
    r"^https?://[^\s/$.?#].[^\s]*$",
    r"^https?:\/\/(www\.)?[-a-zA-Z0-9@:%._\+~#=]{1,256}\.[a-zA-Z0-9()]{1,6}\b([-a-zA-Z0-9()@:%_\+.~#?&//=]*)$",
    r"^\+?[1-9]\d{1,14}$",
    r"^(\+\d{1,2}\s?)?\(?\d{3}\)?[\s.-]?\d{3}[\s.-]?\d{4}$",
    r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?(?:\+([0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?$",
    r"^(?:(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)\.){3}(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)$",
    r"^(([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}|([0-9a-fA-F]{1,4}:){1,7}:|([0-9a-fA-F]{1,4}:){1,6}:[0-9a-fA-F]{1,4}|::)$",
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
    r"^(?:@[a-z0-9-*~][a-z0-9-*._~]*/)?[a-z0-9-~][a-z0-9-._~]*$",
    r"^[A-Za-z_][A-Za-z0-9_]{0,62}$",
    r"^[a-zA-Z0-9_-]{1,64}$",
    r"^#([0-9a-fA-F]{3}|[0-9a-fA-F]{6}|[0-9a-fA-F]{8})$",
    r"^[A-Z]{2}\d{2}[A-Z0-9]{11,30}$",
    r"^[A-Z]{6}[A-Z0-9]{2}([A-Z0-9]{3})?$",
    r"^(?:\d[ -]*?){13,16}$",
    r"^\d{5}(-\d{4})?$",
    r"^[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}$",
    r"^(97(8|9))?\d{9}(\d|X)$",
    r"^[A-HJ-NPR-Z0-9]{17}$",
    r"^([01]?[0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9])?$",
    r"^(data:)([\w\/\+-]+);(charset=[\w-]+|base64).*,(.*)$",
    r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
    r"^[a-f0-9]{64}$",
    r"^sha(256|384|512)-[A-Za-z0-9+/=]{43,88}$",
    r"^arn:aws[a-zA-Z-]*:[a-z0-9-]+:[a-z0-9-]*:[0-9]{12}:[a-zA-Z0-9-_/.:]+$",
    r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?$",
    r"^([a-zA-Z]:)?(\\[a-zA-Z0-9_. -]+)+\\?$",
    r"^(/[^/\0]+)+/?$",
    r"^\$?\d{1,3}(,\d{3})*(\.\d{2})?$",
    r"^-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?$",
    r"^[a-z]{2,3}(-[A-Z][a-z]{3})?(-[A-Z]{2}|-\d{3})?$",
    r"^[\w.+-]+/[\w.+-]+(;\s*[\w-]+=[^;]+)*$",
    r"^([0-9A-Fa-f]{2}[:-]){5}([0-9A-Fa-f]{2})$",
    r"^(\*|([0-5]?\d)(-[0-5]?\d)?(,[0-5]?\d)*)( (\*|\d+)){4}$",
    r"^eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*$",
    r"^[A-Z][a-z]+( [A-Z][a-z]+){1,3}$",
    r"^[\p{L} .'-]{1,100}$",
    r"^[^<>]{1,120}$",
    r"^\S+(\s\S+)*$",
    r"^(x-)?[a-zA-Z][\w-]*(\.[a-zA-Z][\w-]*)*$",
    r"^.{1,128}$",
    r"^[^\s].{0,98}[^\s]$",
)
# Each took more than 5 s of CPU to compile, or never ended.
HOSTILE = (
    "[^a]{0,100}" * 4,
    "[^a]*" * 100,
    "[^a]*" * 300,
    "([^a]?){60}",
    "(([^a]?){10}){10}",
    "([^a]{0,50}){0,50}",
    "([^a]{0,12}){0,9}",
    "(([a-z]+ ?){1,9}){1,9}",
    "(([a-z]+ ?){1,7}){1,7}",
    "(([a-z]{1,3} ?){1,5}){1,5}",
    "(.{0,20},?){0,6}",
    "([a-z]{1,20} ?){1,12}",
    "(?i)([A-Z]{1,20} ?){1,12}",
    "([^a]{0, 60}){ 0 , 60 }",
    "([_=-]{0,40}){0,40}",
    "([^a]{0,000000050}){0,50}",
    "." * 2_000,
    "[^a]" * 2_000,
    ".{0,128}" * 3,
    "((a{1,100}){1,100}){1,100}",
    "a{99999999999999999999}",
)


@pytest.mark.parametrize("pattern", HONEST)
def test_honest_patterns_have_a_small_part_of_the_limit(pattern: str) -> None:
    assert pattern_states(pattern, PATTERN_STATES_MAX) < PATTERN_STATES_MAX / 4


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_that_compile_for_long_have_too_many_states(pattern: str) -> None:
    with pytest.raises(TooManyStates):
        pattern_states(pattern, PATTERN_STATES_MAX)


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("", 0),
        ("abc", 3),
        ("a{3}", 3),
        ("a{2,5}b", 6),
        ("(ab){3}", 6),
        ("((a{10}){5}){10}", 500),
        ("[a-z]{4}", 4),
        (r"\d{4}-\d{2}", 7),
        (r"\{5\}", 3),
        ("a{3,}", 3),
        ("a{0}", 1),
        (")(", 1),
        ("a**", 1),
        ("(?<year>a)|(?:b|)", 2),
        (r"(?=[a-z]{9})[a-z]{9}(?!x)", 19),
        (r"^(?=.{1,253}$)([a-z]([a-z-]{0,61}[a-z])?\.)+[a-z]{2,63}$", 1_543),
        ("a*?b{2,3}?", 4),
    ],
)
def test_counted_repetitions_are_expanded(pattern: str, states: int) -> None:
    assert pattern_states(pattern, PATTERN_STATES_MAX) == states


@pytest.mark.parametrize(
    ("multiplied", "separated"),
    [
        ("[a-z]{0,60}[a-z]{0,60}", "[a-z]{0,60}@[a-z]{0,60}"),
        ("[^a]{0,60}[^b]{0,60}", "[^a]{0,60}a[^a]{0,60}"),
        (r"\w{0,60}[a-z]{0,60}", r"\w{0,60}[-/][a-z]{0,60}"),
        ("([a-z]?){40}", "(-[a-z]?){40}"),
        ("([a-z]{1,60}|[a-m]{1,60}x){2}", "([a-z]{1,60}@|[a-m]{1,60}@){2}"),
        ("([a-z]{1,30}/?){0,9}", "([a-z]{1,30}/){0,9}"),
        (r"\S{0,60}\S{0,60}", r"\S{0,60}\s\S{0,60}"),
    ],
)
def test_a_character_that_neither_part_matches_separates_them(multiplied: str, separated: str) -> None:
    assert pattern_states(multiplied, 40_000) > 1.3 * pattern_states(separated, 40_000)


@pytest.mark.parametrize("char", ["[^]", r"[\q]", r"[^\q]", "[z-a]", "[a-z--x]", r"\i"])
def test_a_class_that_python_does_not_understand_counts_as_any_character(char: str) -> None:
    every = pattern_states(r"[\s\S]{99}", PATTERN_STATES_MAX)
    assert pattern_states(char + "{99}", PATTERN_STATES_MAX) == every


@pytest.mark.parametrize(
    "pattern",
    [
        "[" * 60_000,
        "(" * 2_000 + ")" * 2_000,
        "(){99999999}",
        "a?" * 30_000,
        "(a|b|c" * 9_000,
        "{1" * 30_000,
        "{1, " + " " * 30_000,
        "".join(f"[{chr(0x400 + number)}-{chr(0x4000 + number)}]" for number in range(1_400)),
    ],
)
def test_the_estimate_itself_is_fast(pattern: str) -> None:
    """Quadratic time would take minutes."""
    began = time.thread_time()
    with suppress(TooManyStates):
        pattern_states(pattern, PATTERN_STATES_MAX)
    assert time.thread_time() - began < 1
