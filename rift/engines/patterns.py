"""The number of states of a regular expression, as an estimate of how long its grammar compiles.

The grammar compiler walks the vocabulary from each state of an automaton, and follows all states that the
text so far can have reached. So adjacent variable parts that match the same characters multiply, and a
character between them that neither matches separates them. The estimate builds such an automaton and walks it
with a few shapes of tokens.

Must not live here: limits, errors, whether a pattern is valid or supported.
"""

import re
from dataclasses import dataclass

# Atoms of any dialect: what is not recognised counts as one character, and a lazy quantifier as a greedy one.
ATOM = re.compile(
    r"(?P<zero>[\^$]|\\[bB])"
    r"|(?P<char>\\(?:u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]+\}|x[0-9a-fA-F]{2}|.)|\[\^?(?:\\.|[^\]\\])*+\]?)"
    r"|(?P<open>\((?:\?(?:(?P<look><?[=!])|P?<\w+>|:))?)|(?P<close>\))|(?P<either>\|)"
    r"|(?P<times>[*+?]|\{ *+(?P<least>\d++) *+(?P<range>, *+(?P<most>\d*+) *+)?\})\??|.",
    re.S,
)
# The only flag that the compiler knows.
ANY_CASE = "(?i)"
SIGNS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
LOWER, UPPER, DIGITS, SPACE, OTHER, WIDE, RUNS = GROUPS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " ",
    "!#$%&'()*+,-./:;<=>?@[]^_`{|}~",
    "éß中я€😀",
    "-=_*#. ",
)
# The shapes of tokens in a vocabulary, with the states that each character of a chain costs: of `[a-z]` one,
# of `.` five.
SHAPES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (1.0, (LOWER,) * 9),
    (1.6, (SPACE, *(LOWER,) * 7)),
    (0.6, (UPPER, *(LOWER,) * 4)),
    (0.2, (UPPER,) * 3),
    (0.1, (DIGITS,) * 2),
    (0.3, (OTHER,) * 3),
    (1.0, (WIDE,) * 4),
    (0.07, (RUNS,) * 8),
)
# Tokens hardly ever continue in a position that matches fewer of a group's characters, such as a letter.
SHARE_MIN = 0.1
# The compiler also distinguishes where a part began if its count is variable and that of a part in it is too.
NESTED_COST = 4
# The estimate itself takes time, 0.1 to 0.5 µs a step, so that its steps count too.
STEPS_PER_STATE = 50
STEPS_PER_ATOM = 10
STEPS_PER_CHAR = 25
STEPS_PER_CLASS = 100
# Python takes 1 ms for a class with a range of other characters than ASCII.
STEPS_PER_WIDE_CLASS = 4_000
# A longer class counts as all characters.
CLASS_CHARACTERS_MAX = 1_000


class TooManyStates(Exception):
    """The pattern has more states than were allowed."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A part of a pattern: bit sets of its first and last positions, and where its positions begin."""

    begin: int
    first: int = 0
    last: int = 0
    is_optional: bool = True


class Group:
    """A group while it is read: its earlier alternatives, its sequence, and the latest part of that."""

    def __init__(self, begin: int, *, is_look: bool = False) -> None:
        self.either: list[Fragment] = []
        self.sequence = self.latest = Fragment(begin)
        self._begin = begin
        self._is_look = is_look

    def whole(self) -> Fragment:
        """Return the group as one part. What follows does not follow a look-ahead."""
        if self._is_look:
            return Fragment(self._begin)
        parts = [*self.either, self.sequence]
        first = last = 0
        for part in parts:
            first |= part.first
            last |= part.last
        return Fragment(self._begin, first, last, any(part.is_optional for part in parts))


class Automaton:
    """The positions of a pattern's characters, with `{m,n}` expanded, and those that may follow each."""

    def __init__(self, states_max: int) -> None:
        self.chars: list[str] = []
        self.follow: list[int] = []
        self.nesting: list[int] = []
        self._states_max = states_max
        self.work = 0

    def add(self, char: str) -> Fragment:
        begin = len(self.chars)
        self.chars.append(char)
        self.follow.append(0)
        self.nesting.append(0)
        self.spend(STEPS_PER_CHAR)
        return Fragment(begin, 1 << begin, 1 << begin, is_optional=False)

    def concat(self, left: Fragment, right: Fragment) -> Fragment:
        self._connect(left.last, right.first)
        return Fragment(
            left.begin,
            left.first | (right.first if left.is_optional else 0),
            right.last | (left.last if right.is_optional else 0),
            left.is_optional and right.is_optional,
        )

    def repeat(self, part: Fragment, least: int, most: int | None) -> Fragment:
        """Return `part{least,most}`; `part` must be the latest one."""
        if most == 0:
            return Fragment(part.begin)
        end = len(self.chars)
        chars, follow = self.chars[part.begin :], self.follow[part.begin :]
        nesting = self.nesting[part.begin :]
        whole = copy = part
        last = part.last if least <= 1 else 0
        for number in range(2, (most or least) + 1):
            shift = len(self.chars) - part.begin
            self.spend(STEPS_PER_CHAR * max(1, end - part.begin))
            self.chars += chars
            self.nesting += nesting
            self.follow += [following << shift for following in follow]
            copy = Fragment(part.begin, part.first << shift, part.last << shift, part.is_optional)
            whole = self.concat(whole, copy)
            last |= whole.last if number >= least else 0
        if most is None:
            self._connect(copy.last, copy.first)
        if most is None or most > max(1, least):
            self.nesting[part.begin :] = [level + 1 for level in self.nesting[part.begin :]]
        return Fragment(part.begin, whole.first, last, part.is_optional or least == 0)

    def active(self, position: int, masks: list[int]) -> float:
        """Return how many positions are active on average while a token is read, from this position on.

        Nested repetitions multiply those that are active at the same time.
        """
        active = 1 << position
        total = 1
        for mask in masks:
            if not active:
                break
            following = 0
            for index in bits(active):
                following |= self.follow[index]
            active = following & mask
            total += active.bit_count()
        self.spend(total)
        average = total / (len(masks) + 1)
        nested: int = NESTED_COST ** max(0, self.nesting[position] - 1)
        return average + max(0, average - 1) * (nested - 1)

    def _connect(self, before: int, after: int) -> None:
        self.spend(before.bit_count())
        for position in bits(before):
            self.follow[position] |= after

    def spend(self, work: int) -> None:
        self.work += work
        if self.work > self._states_max * STEPS_PER_STATE:
            raise TooManyStates


def bits(number: int) -> list[int]:
    """Return the indexes of the bits that are set."""
    indexes = []
    while number:
        lowest = number & -number
        indexes.append(lowest.bit_length() - 1)
        number ^= lowest
    return indexes


def pattern_states(pattern: str, states_max: int) -> int:
    """Return the number of states of a pattern, at least one a character. Raises TooManyStates."""
    flags = re.S | re.I if pattern.startswith(ANY_CASE) else re.S
    automaton = _automaton(pattern.removeprefix(ANY_CASE), states_max)
    shares = {}
    for char in set(automaton.chars):
        if char.startswith("["):
            is_wide = "\\u" in char or not char.isascii()
            automaton.spend(STEPS_PER_WIDE_CLASS if is_wide else STEPS_PER_CLASS)
        shares[char] = _shares(char, flags)
    masks = {
        group: sum(
            1 << index for index, char in enumerate(automaton.chars) if shares[char][group] > SHARE_MIN
        )
        for group in GROUPS
    }
    states = 0.0
    for position, char in enumerate(automaton.chars):
        cost = sum(
            weight * share * automaton.active(position, [masks[group] for group in shape[1:]])
            for weight, shape in SHAPES
            if (share := shares[char][shape[0]])
        )
        states += max(1, cost)
        if states > states_max:
            raise TooManyStates
    return int(max(states, automaton.work / STEPS_PER_STATE))


def _shares(char: str, flags: int) -> dict[str, float]:
    """Return the share of each group of characters that one character of a pattern matches."""
    if len(char) == 1 and char != ".":
        char = re.escape(char)
    elif len(char) > CLASS_CHARACTERS_MAX:
        return dict.fromkeys(GROUPS, 1.0)
    elif char.startswith("["):
        # Python warns of characters that other dialects use for operations on classes.
        char = "[" + re.sub(r"\\.|[\[&~|]", lambda match: match[0].rjust(2, "\\"), char[1:], flags=re.S)
    try:
        matches = re.compile(char, flags).fullmatch
    except (re.error, FutureWarning):
        return dict.fromkeys(GROUPS, 1.0)
    return {group: sum(1 for other in group if matches(other)) / len(group) for group in GROUPS}


def _automaton(pattern: str, states_max: int) -> Automaton:
    """Return the automaton of a pattern. Groups are on a stack, so no nesting is too deep."""
    automaton = Automaton(states_max)
    groups = [Group(0)]
    for atom in ATOM.finditer(pattern):
        automaton.spend(STEPS_PER_ATOM)
        group = groups[-1]
        if atom["zero"]:
            continue
        if atom["times"]:
            group.latest = automaton.repeat(group.latest, *_times(atom))
            continue
        group.sequence, group.latest = (
            automaton.concat(group.sequence, group.latest),
            Fragment(len(automaton.chars)),
        )
        if atom["open"]:
            groups.append(Group(len(automaton.chars), is_look=atom["look"] is not None))
        elif atom["either"]:
            group.either.append(group.sequence)
            group.sequence = group.latest
        elif atom["close"] and len(groups) > 1:
            groups.pop()
            groups[-1].latest = group.whole()
        else:
            group.latest = automaton.add(atom[0])
    while groups:
        group = groups.pop()
        automaton.concat(group.sequence, group.latest)
    return automaton


def _times(atom: re.Match[str]) -> tuple[int, int | None]:
    if (sign := SIGNS.get(atom["times"])) is not None:
        return sign
    # The compiler refuses a number of more digits, and int() is slow for very long ones.
    least, most = (int(digits[:9]) if digits else None for digits in (atom["least"], atom["most"]))
    return least or 0, most if atom["range"] else least
