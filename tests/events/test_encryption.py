"""A sealed event hides its content, counts as before, and only its own key decrypts it."""

from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from events import codec, encryption, redaction, subjects
from events.encryption import Cipher, ContentUndecipherable
from events.lifecycle import NEW, Life, advance
from events.memory import MemoryBroker, MemoryLog
from events.schema import AnyEvent, RequestAccepted, TokensGenerated

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))
KEY = b"k" * encryption.KEY_BYTES
SEAL = Cipher("req_1", KEY)


def event(path: Path) -> Any:
    return codec.decode(b'{"version":1,"writer":"w","events":[%s]}' % path.read_bytes())[1][0]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_every_event_comes_back_and_says_nothing_meanwhile(path: Path) -> None:
    was = event(path)
    closed = SEAL.closed(was)
    assert SEAL.opened(closed) == was
    told, content = redaction.split(closed)
    # The archive keeps and the fold counts the same for a sealed event.
    assert told == redaction.split(was)[0]
    if redaction.split(was)[1] is None:
        assert closed == was
    else:
        assert content[-1] == closed.content
        left = redaction.split(replace(closed, content=""))[1]
        assert not any(left[1:] if isinstance(was, TokensGenerated) else left)


@given(st.text(), st.lists(st.integers(0, 1 << 17), min_size=1, max_size=9))
def test_text_is_not_in_what_is_appended(text: str, ids: list[int]) -> None:
    said = TokensGenerated(attempt="att_1", index=7, token_ids=tuple(ids), text=f"planted {text} sentence")
    closed = SEAL.closed(said)
    assert b"planted" not in codec.encode_event(closed)
    assert SEAL.opened(closed) == said
    live = Life(phase="open", attempt="att_1", live=True, next_index=7)
    assert advance(live, closed) == advance(live, said) != live
    # A record that is sent again is the same bytes; other words never share a nonce.
    assert SEAL.closed(said) == closed
    other = SEAL.closed(replace(said, text="other"))
    assert other.content[:16] != closed.content[:16]


def test_another_key_or_request_opens_nothing() -> None:
    closed = SEAL.closed(TokensGenerated(attempt="a", index=0, token_ids=(1,), text="x"))
    for seal in (Cipher("req_2", KEY), Cipher("req_1", b"x" * encryption.KEY_BYTES)):
        with pytest.raises(ContentUndecipherable):
            seal.opened(closed)
    with pytest.raises(ContentUndecipherable):
        SEAL.opened(replace(closed, content="AAAA"))


@pytest.mark.anyio
async def test_a_key_that_is_erased_opens_nothing_any_more() -> None:
    async with anyio.create_task_group() as tasks:
        log = MemoryLog(MemoryBroker(tasks, lambda: 1))
        accepted: RequestAccepted = event(GOLDEN[[path.stem for path in GOLDEN].index("RequestAccepted.3")])
        assert await encryption.opened(log, accepted) == (accepted, None)
        sequence = await encryption.keep(
            log, subjects.SECRET_PASSING, encryption.Secret((accepted.request,), KEY)
        )
        accepted = replace(accepted, sealed=sequence)
        closed: AnyEvent = Cipher(accepted.request, KEY).closed(accepted)
        assert isinstance(closed, RequestAccepted)
        assert advance(NEW, closed) == advance(NEW, accepted)
        found, seal = await encryption.opened(log, closed)
        assert found == accepted
        assert seal is not None
        await log.erase(subjects.SECRETS, sequence)
        assert await encryption.opened(log, closed) == (closed, None)
