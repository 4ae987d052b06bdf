"""A trim removes the same records from both logs, and their readers see the same."""

import anyio
import pytest

from events import subjects
from events.ids import RANDOM_BYTES, new_request_id, parse_request_id
from events.log import Log, LogError
from events.request_history import HistoryReader
from events.subjects import Address
from tests.contracts.twins import SMALL_STREAM, STREAM, Twin, append_many, comes_nothing, read, scan, take

pytestmark = pytest.mark.anyio


async def test_what_is_trimmed_is_gone_and_numbers_go_on(log: Log, at: Address) -> None:
    sequences = await append_many(log, subjects.work(at), 10)
    await log.trim(STREAM, sequences[3])
    assert await log.first_sequence(STREAM) == sequences[4]
    assert await log.last_sequence(STREAM) == sequences[-1]
    got = await scan(log, [subjects.work(at)], first=1, target=sequences[-1])
    assert [stored.sequence for stored in got] == sequences[4:]
    await log.trim(STREAM, sequences[-1])
    assert await log.first_sequence(STREAM) == sequences[-1] + 1
    assert await log.last_sequence(STREAM) == sequences[-1]
    assert await log.append(STREAM, subjects.work(at), b"next") == sequences[-1] + 1
    assert await log.first_sequence(STREAM) == sequences[-1] + 1


async def test_a_trim_of_nothing_does_nothing(log: Log, at: Address) -> None:
    *_, before, last = await append_many(log, subjects.work(at), 5)
    await log.trim(STREAM, before)
    for up_to in (before, 1, 0, -5):
        await log.trim(STREAM, up_to)
        assert await log.first_sequence(STREAM) == last
    with pytest.raises(LogError):
        await log.trim("RIFT_77", 1)


async def test_a_trim_ends_at_the_last_sequence(log: Log, at: Address) -> None:
    last = (await append_many(log, subjects.work(at), 3))[-1]
    await log.trim(STREAM, last + 1000)
    assert await log.first_sequence(STREAM) == last + 1
    assert await log.append(STREAM, subjects.work(at), b"next") == last + 1


async def test_a_stream_that_never_held_anything_begins_at_1(log: Log) -> None:
    assert await log.first_sequence(subjects.FLEET) == 1
    await log.trim(subjects.FLEET, 9)
    assert await log.first_sequence(subjects.FLEET) == 1
    assert await log.append(subjects.FLEET, subjects.fleet("m"), b"x") == 1
    assert await log.first_sequence(subjects.FLEET) == 1


async def test_a_trimmed_subject_is_as_if_it_had_never_been(log: Log, at: Address) -> None:
    old = (await append_many(log, subjects.work(at), 3))[-1]
    kept = await log.append(STREAM, subjects.cancel(at), b"kept")
    await log.trim(STREAM, old)
    assert await log.last_sequence(STREAM, subjects.work(at)) == 0
    assert await log.last(STREAM, subjects.work(at)) is None
    assert await log.last_sequence(STREAM, subjects.cancel(at)) == kept
    assert (await log.last(STREAM, subjects.cancel(at))).data == b"kept"
    assert await log.append(STREAM, subjects.work(at), b"new", expect_last=0) == kept + 1


@pytest.mark.parametrize("later", [False, True])
async def test_a_scan_whose_target_is_trimmed_ends(log: Log, at: Address, later: bool) -> None:
    target = (await append_many(log, subjects.work(at), 3))[-1]
    await log.append(STREAM, subjects.cancel(at), b"not this")
    await log.trim(STREAM, target)
    if later:
        await log.append(STREAM, subjects.work(at), b"later")
    with anyio.fail_after(5):
        assert await scan(log, [subjects.work(at)], first=1, target=target) == []
        assert await scan(log, [subjects.work(at)], first=target, target=target) == []


async def test_followers_go_on(log: Log, at: Address) -> None:
    sequences = await append_many(log, subjects.work(at), 6)
    everything = [subjects.work(at)]
    async with (
        log.follow(STREAM, everything, after=0) as live,
        log.follow(STREAM, everything, after=0, pace_s=0.05) as paced,
    ):
        for follower in (live, paced):
            assert [s.sequence for s in await read(follower, 6)] == sequences
        await log.trim(STREAM, sequences[-1])
        more = await append_many(log, subjects.work(at), 2)
        for follower in (live, paced):
            assert [s.sequence for s in await read(follower, 2)] == more
        await log.trim(STREAM, more[0])
    for pace_s in (0.0, 0.05):
        async with log.follow(STREAM, everything, after=sequences[1], pace_s=pace_s) as late:
            assert [s.sequence for s in await read(late, 1)] == more[1:]


async def test_a_job_that_is_trimmed_does_not_come_again(log: Log, at: Address) -> None:
    sequences = await append_many(log, subjects.request(at), 4)
    async with log.jobs(0, at.model) as jobs:
        first, second = await take(jobs, 2)
        await log.trim(STREAM, sequences[2])
        await log.give_back(first.ack)
        await log.ack(second.ack)
        (last,) = await take(jobs, 1)
        assert last.stored.sequence == sequences[3]
        jobs.want(1)
        assert await comes_nothing(jobs)


async def test_room_comes_back(log: Log) -> None:
    before = await log.room_bytes(SMALL_STREAM)
    for _ in range(5):
        last = await log.append(SMALL_STREAM, "rift.9.work.a.b", b"x" * 1000)
    assert await log.room_bytes(SMALL_STREAM) < before - 5000
    await log.trim(SMALL_STREAM, last)
    assert await log.room_bytes(SMALL_STREAM) == await log.capacity_bytes(SMALL_STREAM) == 20_000


async def test_every_connection_sees_it(twin: Twin, at: Address) -> None:
    other = await twin.connect()
    first, last = await append_many(twin.log, subjects.work(at), 2)
    await other.trim(STREAM, first)
    assert await twin.log.first_sequence(STREAM) == last


@pytest.mark.parametrize("later", [False, True])
async def test_a_request_that_is_trimmed_is_nobodys(log: Log, at: Address, later: bool) -> None:
    floor = await log.last_sequence(STREAM)
    entropy = floor.to_bytes(RANDOM_BYTES, "big")
    text = new_request_id(secret=b"s" * 32, account="dev", at=at, floor=floor, entropy=entropy)
    request = parse_request_id(text)
    assert request is not None
    for subject in subjects.history(at):
        last = await log.append(STREAM, subject, b'{"version":1,"writer":"w","events":[]}')
    await log.trim(STREAM, last)
    if later:
        await log.append(STREAM, subjects.work(at), b'{"version":1,"writer":"w","events":[]}')
    with anyio.fail_after(5):
        past = await HistoryReader(log).read(request)
    assert past.accepted is None
    assert past.counted == []
