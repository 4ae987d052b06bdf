"""The log against a real nats-server."""

from collections.abc import AsyncIterator

import anyio
import pytest

from events import subjects
from events.jetstream import BrokerWrong, JetStream, connect
from events.log import Conflict, LogError, LogFull, Stored, append_until_known
from events.subjects import Address

pytestmark = pytest.mark.anyio

AT = Address(0, "lane5678", "model-a")
STREAM = "RIFT_0"
MIB = 1024 * 1024


@pytest.fixture
async def log(server) -> AsyncIterator[JetStream]:
    opened = await connect(server.address.url, token=server.address.token, name="test")
    await opened.ensure_streams(shards=1, replicas=1, max_bytes=64 * MIB)
    yield opened
    await opened.close()


def lane(name: str) -> Address:
    return Address(0, name, "model-a")


async def read(follower, count: int) -> list[Stored]:
    found: list[Stored] = []
    with anyio.fail_after(20):
        async for batch in follower:
            found += batch
            if len(found) >= count:
                return found
    raise AssertionError("unreachable")


async def test_appends_are_numbered_and_read_back_in_order(log) -> None:
    at = lane("inorder1")
    sequences = [await log.append(STREAM, subjects.work(at), b"%d" % n) for n in range(700)]
    assert sequences == sorted(set(sequences))
    async with log.follow(STREAM, subjects.history(at), after=0) as follower:
        stored = await read(follower, 700)
    assert [s.sequence for s in stored] == sequences
    assert [s.data for s in stored] == [b"%d" % n for n in range(700)]
    times = [s.stored_at_ns for s in stored]
    assert times == sorted(times)
    assert times[0] > 1_700_000_000_000_000_000


async def test_a_follower_gets_what_comes_later(log) -> None:
    at = lane("later123")
    async with log.follow(STREAM, [subjects.work(at)], after=0) as follower:
        for n in range(3):
            await log.append(STREAM, subjects.work(at), b"%d" % n)
            assert [s.data for s in await read(follower, 1)] == [b"%d" % n]


async def test_scan_ends_at_its_target(log) -> None:
    at = lane("scan1234")
    sequences = [await log.append(STREAM, subjects.work(at), b"%d" % n) for n in range(1200)]
    got = [
        s.sequence
        async for batch in log.scan(
            STREAM, subjects.history(at), first=sequences[100], target=sequences[1100]
        )
        for s in batch
    ]
    assert got == sequences[100:1101]


async def test_expected_last_sequence_is_a_compare_and_set(log) -> None:
    subject = subjects.book("account", "cas")
    first = await log.append(subjects.BOOK, subject, b"1", expect_last=0)
    with pytest.raises(Conflict):
        await log.append(subjects.BOOK, subject, b"2", expect_last=0)
    assert await log.last_sequence(subjects.BOOK, subject) == first
    assert await log.append(subjects.BOOK, subject, b"2", expect_last=first) > first
    assert await log.last_sequence(subjects.BOOK, subjects.book("account", "none")) == 0


async def test_jobs_come_one_per_wanted_slot_and_again_when_given_back(log) -> None:
    at = Address(0, "jobs1234", "model-jobs")
    for n in range(5):
        await log.append(STREAM, subjects.request(at), b"%d" % n)
    async with log.jobs(0, at.model) as jobs:
        with anyio.fail_after(10):
            jobs.want(2)
            first, second = await anext(jobs), await anext(jobs)
            assert [first.stored.data, second.stored.data] == [b"0", b"1"]
            with anyio.move_on_after(0.3) as none:
                await anext(jobs)
            assert none.cancelled_caught
            await log.ack(first.ack)
            await log.give_back(second.ack)
            jobs.want(4)
            rest = [await anext(jobs) for _ in range(4)]
    assert sorted(job.stored.data for job in rest) == [b"1", b"2", b"3", b"4"]
    assert {job.deliveries for job in rest if job.stored.data == b"1"} == {2}


async def test_a_job_in_progress_is_not_delivered_again(log, monkeypatch) -> None:
    at = Address(0, "prog1234", "model-progress")
    await log.append(STREAM, subjects.request(at), b"x")
    async with log.jobs(0, at.model) as jobs:
        jobs.want(2)
        job = await anext(jobs)
        for _ in range(6):
            await anyio.sleep(1)
            await log.in_progress(job.ack)
        with anyio.move_on_after(1) as none:
            await anext(jobs)
        assert none.cancelled_caught
        await log.ack(job.ack)


async def test_a_full_log_refuses_and_keeps_everything(server) -> None:
    full = await connect(server.address.url, token=server.address.token, name="full")
    stream = "RIFT_9"
    await full.client.request(
        f"$JS.API.STREAM.CREATE.{stream}",
        b'{"name":"RIFT_9","subjects":["rift.9.>"],"max_bytes":20000,"discard":"new","storage":"file"}',
    )
    with pytest.raises(LogFull):
        for _ in range(100):
            await full.append(stream, "rift.9.work.a.b", b"x" * 1000)
    assert await full.last_sequence(stream) > 10
    await full.close()


async def test_a_stream_that_differs_stops_the_start(server) -> None:
    log = await connect(server.address.url, token=server.address.token, name="differs")
    await log.client.request(
        "$JS.API.STREAM.CREATE.RIFT_1",
        b'{"name":"RIFT_1","subjects":["rift.1.>"],"discard":"old","storage":"file","deny_delete":true}',
    )
    with pytest.raises(BrokerWrong, match="stream RIFT_1: discard is 'old', Rift needs 'new'"):
        await log.ensure_streams(shards=2, replicas=1, max_bytes=MIB)
    await log.close()


async def test_a_wrong_token_is_refused(server) -> None:
    with pytest.raises(LogError, match="no NATS server answers"):
        await connect(server.address.url, token="wrong", name="intruder")


async def test_questions_are_answered_and_unanswered_ones_say_so(log) -> None:
    async def shout(data: bytes) -> bytes:
        return data.upper()

    async with log.answer("rift.ask.test", shout):
        assert await log.ask("rift.ask.test", b"hello", timeout_s=2) == b"HELLO"
    with pytest.raises(LogError, match="nobody answers rift.ask.test"):
        await log.ask("rift.ask.test", b"hello", timeout_s=0.5)


async def test_a_follower_survives_the_brokers_kill_without_gap_or_repeat(server, log) -> None:
    at = lane("killed12")
    sent: list[int] = []
    async with log.follow(STREAM, [subjects.work(at)], after=0) as follower:
        for n in range(50):
            sent.append(await log.append(STREAM, subjects.work(at), b"%d" % n))
        before = [s.sequence for s in await read(follower, 50)]
        server.kill()
        server.start()
        for n in range(50):
            data = b"after %d" % n
            sent.append(await append_until_known(log, STREAM, subjects.work(at), data, within_s=20))
        after = [s.sequence for s in await read(follower, 50)]
    assert (before + after)[-50:] == sent[-50:]
    assert before + after == sorted(set(before + after))
    assert set(sent) <= set(before + after)
