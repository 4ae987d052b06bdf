"""Output token ids to the text a client sees: decoder and stop matcher, and nothing else.

The text is a pure function of the ids: however they are cut into steps, and whoever feeds them (the
first attempt, or a successor that replays the log), the same ids give the same text. What must not
live here: finish reasons, token budgets, anything that knows a request.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from rift.engines import Decoder

# A stop list comes with every request and most repeat; a few hundred keep the common ones.
STOPS_KEPT = 256


class Detokenizer:
    """One answer's text. `stopped` says that a stop string is complete; then nothing more is fed.

    The stop string that completes first in the text wins (of several at one character, the longest);
    it is not part of the text. A suffix that may be the beginning of a stop string is held back until
    the next characters decide, or `flush` ends the answer.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stops = _automaton(tuple(stop)) if stop else None
        self._state = 0
        self._held = ""
        self.stopped = False

    @property
    def holds(self) -> bool:
        """Say whether something is held back that may begin a stop string."""
        return bool(self._held)

    def feed(self, token_ids: Sequence[int]) -> tuple[int, str]:
        """Return how many of the ids belong to the answer, and the text that is now certain.

        Fewer than all only if a stop string completed: the id that completed it is used.
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
        """Return what was held back, at the end of an answer that no stop string ended.

        The rest of an unfinished character may complete a stop string: look at `stopped` after it.
        """
        assert not self.stopped, "nothing follows a stop string"
        rest = self._decoder.flush()
        if self._stops is None:
            return rest
        text = self._match(rest, self._stops)
        if not self.stopped:
            text += self._held
        self._held = ""
        return text

    def _match(self, piece: str, stops: "_Stops") -> str:
        """Advance over `piece`; return what is certain, without the stop string if one completes."""
        state = self._state
        for at, character in enumerate(piece, 1):
            while (following := stops.next[state].get(character)) is None and state:
                state = stops.fall[state]
            state = following or 0
            if length := stops.matched[state]:
                self.stopped = True
                return (self._held + piece[:at])[:-length]
        self._state = state
        text = self._held + piece
        keep = stops.depth[state]
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class _Stops(NamedTuple):
    """Aho-Corasick: a state is the longest suffix of the text that begins some stop string.

    For each state: the states that one more character leads to, the state of its longest proper
    suffix, its length, and the length of the longest stop string it ends with (0: none).
    """

    next: list[dict[str, int]]
    fall: list[int]
    depth: list[int]
    matched: list[int]


@lru_cache(STOPS_KEPT)
def _automaton(stop: tuple[str, ...]) -> _Stops:
    assert all(stop), "an empty stop string is refused at the door"
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
