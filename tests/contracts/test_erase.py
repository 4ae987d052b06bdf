"""One message of the keys' stream is erased, and all else stays where it is: the same from both logs."""

import pytest

from events import subjects
from events.log import Log
from tests.contracts.twins import Twin, comes_nothing, read

pytestmark = pytest.mark.anyio

SECRETS, KEPT, PASSING = subjects.SECRETS, subjects.SECRET_KEPT, subjects.SECRET_PASSING


async def test_what_is_erased_is_gone_and_its_neighbours_are_not(log: Log) -> None:
    first, second, third = [await log.append(SECRETS, KEPT, data) for data in (b"1", b"2", b"3")]
    got = await log.get(SECRETS, second)
    assert got is not None
    assert (got.subject, got.sequence, got.data) == (KEPT, second, b"2")
    await log.erase(SECRETS, second)
    assert await log.get(SECRETS, second) is None
    assert [(await log.get(SECRETS, at)).data for at in (first, third)] == [b"1", b"3"]  # type: ignore[union-attr]
    assert await log.last_sequence(SECRETS) == third
    await log.erase(SECRETS, third)
    last = await log.last(SECRETS, KEPT)
    assert last is not None
    assert last.sequence == first
    assert await log.append(SECRETS, KEPT, b"4") == third + 1


async def test_what_is_not_there_is_not_erased_twice(log: Log) -> None:
    sequence = await log.append(SECRETS, PASSING, b"1")
    for wanted in (sequence, sequence, sequence + 1000):
        await log.erase(SECRETS, wanted)
        assert await log.get(SECRETS, wanted) is None


async def test_a_reader_passes_over_what_is_erased(twin: Twin) -> None:
    log, after = twin.log, await twin.log.last_sequence(SECRETS)
    sequences = [await log.append(SECRETS, PASSING, b"%d" % n) for n in range(5)]
    await log.append(SECRETS, KEPT, b"other")
    for at in (sequences[0], sequences[2]):
        await log.erase(SECRETS, at)
    async with log.follow(SECRETS, [PASSING], after=after) as follower:
        got = await read(follower, 3)
        assert [stored.sequence for stored in got] == [sequences[1], sequences[3], sequences[4]]
        assert await comes_nothing(follower)  # type: ignore[arg-type]  # it is iterated, too
