"""Content, reasoning and calls are the same for any cut of the ids, and with any withheld text."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from events.schema import ToolCallDelta
from rift.engines import Delta, End
from rift.engines.sim import SimDecoder
from rift.worker.detokenizer import Detokenizer
from rift.worker.output_parser import OutputParser, joined, rest

CALLS = st.builds(
    ToolCallDelta,
    index=st.integers(0, 2),
    id=st.none() | st.just("call_x"),
    name=st.none() | st.just("f"),
    arguments=st.text("{}1", max_size=3),
)
DELTAS = st.builds(
    Delta, st.text("ab", max_size=3), st.text("cd", max_size=3), st.lists(CALLS, max_size=2).map(tuple)
)


class Halves:
    """A parser for which the text before the first "|" is reasoning. `seen` records its input."""

    def __init__(self) -> None:
        self.decoder = SimDecoder()
        self.seen: list[tuple[str, bytes, End | None]] = []
        self._text = ""

    def feed(self, text: str, token_ids: Sequence[int], end: End | None = None) -> Delta:
        self.seen.append((text, bytes(token_ids), end))
        before, self._text = self._text, self._text + text
        if "|" in before:
            return Delta(text)
        reasoning, _, content = text.partition("|")
        return Delta(content, reasoning)

    def reasoning_tokens(self, output_ids: Sequence[int]) -> int:
        return bytes(output_ids).find(b"|")


def parsed(stop: tuple[str, ...] = ()) -> tuple[OutputParser, Halves]:
    parser = Halves()
    return OutputParser(Detokenizer(parser.decoder, stop), parser, request="r"), parser


@given(
    st.text("a|é🌊", min_size=1, max_size=20), st.lists(st.integers(1, 5)), st.sampled_from([(), ("a|a",)])
)
def test_every_cut_gives_the_parser_the_same_input(text: str, cuts: list[int], stop: tuple[str, ...]) -> None:
    ids = [*text.encode(), 0]
    whole, once = parsed(stop)
    used, expected = whole.feed(ids, "stop")
    again, cut_up = parsed(stop)
    position = 0
    deltas = []
    sizes = iter(cuts)
    while position < used:
        step = ids[position : position + next(sizes, len(ids))]
        taken, delta = again.feed(step, "stop" if position + len(step) == len(ids) else None)
        position += taken
        deltas.append(delta)
    assert (position, joined(deltas)) == (used, expected)
    assert once.seen == cut_up.seen
    end = "cut" if stop and stop[0] in text else "complete"
    assert [end for _, _, end in once.seen] == [None] * (len(once.seen) - 1) + [end]
    assert b"".join(fed for _, fed, _ in once.seen) == bytes(ids[:used])


def test_ids_wait_for_withheld_text() -> None:
    answer, parser = parsed(("|END",))
    answer.feed(b"a|EN", None)
    assert parser.seen == [("a", b"a", None)]
    assert answer.feed(b"d", None) == (1, Delta("ENd", ""))
    assert parser.seen[1] == ("|ENd", b"|ENd", None)


def test_only_the_last_id_of_a_cut_answer_has_text() -> None:
    assert parsed()[0].feed(b"a|b!", "stop") == (4, Delta("b", "a"))
    assert parsed()[0].feed(b"a|b!", "length") == (4, Delta("b!", "a"))


def test_a_stop_string_ends_all_parts() -> None:
    answer, parser = parsed(("STOP",))
    assert answer.feed(b"a|b STOP c", "length") == (8, Delta("b ", "a"))
    assert parser.seen[-1] == ("", b"STOP", "cut")
    assert answer.reasoning_tokens == 1


@given(st.lists(DELTAS, max_size=6), st.integers(0, 6))
def test_the_rest_completes_a_beginning(deltas: list[Delta], cut: int) -> None:
    whole, begun = joined(deltas), joined(deltas[:cut])
    after = rest(whole, begun)
    if after is not None:
        assert joined((begun, after)) == whole
    assert rest(whole, whole) == Delta()
    assert rest(whole, Delta()) == whole


def test_the_rest_after_another_beginning_is_none() -> None:
    call = ToolCallDelta(index=0, id="c", name="f", arguments="{}")
    assert rest(Delta("ab"), Delta("b")) is None
    assert rest(Delta("", "ab"), Delta("", "b")) is None
    assert rest(Delta("ab"), Delta("ab", "", (call,))) is None
    assert (
        rest(Delta(tool_calls=(call,)), Delta(tool_calls=(ToolCallDelta(index=0, id="d", name="f"),))) is None
    )
    assert rest(Delta(tool_calls=(call,)), Delta(tool_calls=(ToolCallDelta(index=0, arguments="["),))) is None
