"""Output token ids to the text a client sees: decoder and stop matcher, and nothing else.

The text is a pure function of the ids. The same ids give the same text, however they are cut into steps, in
the first attempt and in one that replays the log. Must not live here: finish reasons, token budgets, anything
that knows a request.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from rift.engines import Decoder

# Most requests repeat a few stop lists, and a few hundred cover the common ones.
STOPS_KEPT = 256


class Detokenizer:
    """One answer's text. Once `stopped` is set, a stop string is complete and nothing more may be fed.

    The stop string that completes first in the text wins, the longest if several complete at one character.
    It is not part of the text. A suffix that may begin a stop string is withheld until the next characters
    decide, or `flush` ends the answer.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stops = _automaton(tuple(stop)) if stop else None
        self._state = 0
        self._withheld = ""
        self.stopped = False

    @property
    def is_withholding(self) -> bool:
        """Whether a possible beginning of a stop string is withheld."""
        return bool(self._withheld)

    def feed(self, token_ids: Sequence[int]) -> tuple[int, str]:
        """Return the number of ids that belong to the answer, and the text that is now certain.

        The number is smaller than all only if a stop string completed; the id that completed it counts.
        """
        assert not self.stopped, "nothing follows a stop string"
        feed = self._decoder.feed
        if self._stops is None:
            if len(token_ids) == 1:
                return 1, feed(token_ids[0])
            return len(token_ids), "".join([feed(token_id) for token_id in token_ids])
        parts = []
        for used, token_id in enumerate(token_ids, 1):
            if piece := feed(token_id):
                parts.append(self._match(piece, self._stops))
                if self.stopped:
                    return used, "".join(parts)
        return len(token_ids), "".join(parts)

    def flush(self) -> str:
        """Return the withheld text, at the end of an answer without a stop string.

        The rest of an unfinished character may complete a stop string, so check `stopped` afterwards.
        """
        assert not self.stopped, "nothing follows a stop string"
        rest = self._decoder.flush()
        if self._stops is None:
            return rest
        text = self._match(rest, self._stops)
        if not self.stopped:
            text += self._withheld
        self._withheld = ""
        return text

    def _match(self, piece: str, stops: "_Stops") -> str:
        """Advance over `piece` and return the certain text, without the stop string if one completes."""
        state = self._state
        for at, character in enumerate(piece, 1):
            while (following := stops.next[state].get(character)) is None and state:
                state = stops.fall[state]
            state = following or 0
            if length := stops.matched[state]:
                self.stopped = True
                return (self._withheld + piece[:at])[:-length]
        self._state = state
        text = self._withheld + piece
        keep = stops.depth[state]
        self._withheld = text[len(text) - keep :]
        return text[: len(text) - keep]


class _Stops(NamedTuple):
    """An Aho-Corasick automaton. A state is the longest suffix of the text that begins some stop string.

    Each list has an entry per state: the states that one more character leads to, the state of its longest
    proper suffix, its length, and the length of the longest stop string it ends with (0: none).
    """

    next: list[dict[str, int]]
    fall: list[int]
    depth: list[int]
    matched: list[int]


@lru_cache(STOPS_KEPT)
def _automaton(stop: tuple[str, ...]) -> _Stops:
    assert all(stop), "the gateway rejects empty stop strings"
    stops = _Stops([{}], [0], [0], [0])
    for string in stop:
        state = 0
        for character in string:
            if (following := stops.next[state].get(character)) is None:
                following = len(stops.next)
                stops.next[state][character] = following
                stops.next.append({})
                stops.fall.append(0)
                stops.depth.append(stops.depth[state] + 1)
                stops.matched.append(0)
            state = following
        stops.matched[state] = len(string)
    queue = list(stops.next[0].values())
    for state in queue:
        for character, following in stops.next[state].items():
            fall = stops.fall[state]
            while character not in stops.next[fall] and fall:
                fall = stops.fall[fall]
            stops.fall[following] = stops.next[fall].get(character, 0)
            stops.matched[following] = stops.matched[following] or stops.matched[stops.fall[following]]
            queue.append(following)
    return stops
