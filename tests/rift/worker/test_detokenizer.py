"""The answer's text up to the first stop string is the same for any cut of the ids into steps."""

from hypothesis import given
from hypothesis import strategies as st

from rift.engines.sim import SimDecoder
from rift.worker.detokenizer import Detokenizer

LETTERS = "ab🌊é"
IDS = st.lists(st.sampled_from(sorted(LETTERS.encode())), max_size=40)
STOPS = st.lists(st.text(LETTERS + "\ufffd", min_size=1, max_size=4), max_size=4).map(tuple)


class Pieces:
    """A decoder whose token i is `pieces[i]`: many characters a token, as real ones have."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def feed(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return ""


def in_steps(text: Detokenizer, ids: list[int], cuts: list[int]) -> tuple[int, str]:
    """Feed `ids` in steps of the sizes in `cuts`, flush at a natural end; return used ids and text."""
    at, parts = 0, []
    sizes = iter(cuts)
    while at < len(ids) and not text.stopped:
        step = ids[at : at + next(sizes, len(ids))]
        used, piece = text.feed(step)
        assert used == len(step) or text.stopped
        at += used
        parts.append(piece)
    if not text.stopped:
        parts.append(text.flush())
    return at, "".join(parts)


def reference(whole: str, stops: tuple[str, ...]) -> tuple[str, int | None]:
    """The text before the stop string that completes first, and where that one ends."""
    for end in range(1, len(whole) + 1):
        if lengths := [len(stop) for stop in stops if whole[:end].endswith(stop)]:
            return whole[: end - max(lengths)], end
    return whole, None


@given(IDS, STOPS, st.lists(st.integers(1, 5)))
def test_any_cut_gives_the_text_of_the_whole(ids: list[int], stops: tuple[str, ...], cuts: list[int]) -> None:
    text = Detokenizer(SimDecoder(), stops)
    used, shown = in_steps(text, ids, cuts)
    expected, end = reference(bytes(ids).decode(errors="replace"), stops)
    assert shown == expected
    assert text.stopped == (end is not None)
    assert text.stopped or used == len(ids)


@given(st.lists(st.text("ab", max_size=5), max_size=12), STOPS, st.lists(st.integers(1, 5)))
def test_the_id_that_completes_a_stop_string_is_the_last_one_used(
    pieces: list[str], stops: tuple[str, ...], cuts: list[int]
) -> None:
    ids = list(range(len(pieces)))
    text = Detokenizer(Pieces(pieces), stops)
    used, shown = in_steps(text, ids, cuts)
    expected, end = reference("".join(pieces), stops)
    assert shown == expected
    if end is not None:
        assert len("".join(pieces[: used - 1])) < end <= len("".join(pieces[:used]))


def test_what_may_begin_a_stop_string_is_held_back_and_nothing_else_is() -> None:
    text = Detokenizer(Pieces(["one EN", "D", "less END", " two"]), ("END OF",))
    assert text.feed([0]) == (1, "one ")
    assert text.feed([1]) == (1, "")
    assert text.feed([2]) == (1, "ENDless ")
    assert text.feed([3]) == (1, "END two")
    assert text.flush() == ""


def test_ids_after_a_stop_string_are_not_used() -> None:
    text = Detokenizer(Pieces(["a", "b", "STOP", "c", "d"]), ("STOP",))
    assert text.feed([0, 1, 2, 3, 4]) == (3, "ab")
    assert text.stopped


def test_the_stop_string_that_completes_first_wins() -> None:
    assert Detokenizer(Pieces(["xabcd"]), ("abcd", "bc")).feed([0]) == (1, "xa")
    assert Detokenizer(Pieces(["xabcd"]), ("cd", "abcd", "d")).feed([0]) == (1, "x")


def test_a_stop_string_that_begins_inside_a_failed_one_is_found() -> None:
    assert Detokenizer(Pieces(["aab", "aabaaa"]), ("aabaaa",)).feed([0, 1]) == (2, "aab")


def test_an_unfinished_character_ends_as_a_whole_decode_would_show_it() -> None:
    text = Detokenizer(SimDecoder())
    assert text.feed(list("é🌊".encode()[:4])) == (4, "é")
    assert text.flush() == "\ufffd"


def test_the_end_of_an_unfinished_character_may_complete_a_stop_string() -> None:
    text = Detokenizer(SimDecoder(), ("\ufffd",))
    assert text.feed(list("a🌊".encode()[:3])) == (3, "a")
    assert text.flush() == ""
    assert text.stopped


def test_a_successor_that_replays_the_ids_goes_on_with_the_same_text() -> None:
    ids = list("the end 🌊 of the end.".encode())
    whole = in_steps(Detokenizer(SimDecoder(), ("end.",)), ids, [])
    for cut in range(1, len(ids)):
        first, second = Detokenizer(SimDecoder(), ("end.",)), Detokenizer(SimDecoder(), ("end.",))
        shown = first.feed(ids[:cut])[1]
        if first.stopped:
            continue
        assert second.feed(ids[:cut])[1] == shown
        assert shown + in_steps(second, ids[cut:], [])[1] == whole[1]
