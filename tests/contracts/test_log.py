"""The contract of a log: one suite for the log in memory and the one on a real nats-server."""

from contextlib import aclosing

import anyio
import pytest

from events import subjects
from events.log import (
    Conflict,
    ForeignDelivery,
    Log,
    LogError,
    LogFull,
    NoResponders,
    RecordTooLarge,
    Stored,
    append_until_known,
)
from events.subjects import Address
from tests.contracts.twins import (
    MIB,
    SMALL_BYTES,
    SMALL_STREAM,
    STREAM,
    Twin,
    append_many,
    comes_nothing,
    read,
    scan,
    take,
)

pytestmark = pytest.mark.anyio

# --- appends and reads ----------------------------------------------------------------------------


async def test_appends_are_numbered_and_read_back_in_order(log: Log, at: Address) -> None:
    sequences = await append_many(log, subjects.work(at), 700)
    assert sequences == sorted(set(sequences))
    async with log.follow(STREAM, subjects.history(at), after=0) as follower:
        stored = await read(follower, 700)
    assert [s.sequence for s in stored] == sequences
    assert [s.data for s in stored] == [b"%d" % n for n in range(700)]
    assert {s.subject for s in stored} == {subjects.work(at)}
    times = [s.stored_at_ns for s in stored]
    assert times == sorted(times)
    assert times[0] > 1_700_000_000_000_000_000


async def test_a_follower_gets_what_comes_later_and_only_its_subjects(log: Log, at: Address) -> None:
    other = Address(0, at.lane, "model-other")
    async with log.follow(STREAM, [subjects.work(at), subjects.cancel(at)], after=0) as follower:
        for n in range(3):
            await log.append(STREAM, subjects.work(other), b"not this")
            await log.append(STREAM, subjects.request(at), b"nor this")
            await log.append(STREAM, subjects.cancel(at), b"%d" % n)
            assert [s.data for s in await read(follower, 1)] == [b"%d" % n]


async def test_wildcards_are_the_brokers(log: Log, at: Address) -> None:
    lane, model = at.lane, at.model
    for subject in (subjects.work(at), subjects.cancel(at), subjects.request(at), subjects.lane(0, lane)):
        await log.append(STREAM, subject, subject.split(".")[2].encode())
    await log.append(STREAM, "rift.0.work.elsewhere.model-x", b"another")
    for topics, kinds in [
        ([f"rift.0.*.{lane}.>"], [b"work", b"cancel", b"request"]),
        ([f"rift.0.lane.{lane}", f"rift.0.work.{lane}.>"], [b"work", b"lane"]),
        ([f"rift.0.*.*.{model}"], [b"work", b"cancel", b"request"]),
        ([f"rift.0.work.*.{model}", f"rift.0.cancel.*.{model}"], [b"work", b"cancel"]),
    ]:
        async with log.follow(STREAM, topics, after=0) as follower:
            assert [s.data for s in await read(follower, len(kinds))] == kinds


async def test_a_follower_starts_behind_its_position(log: Log, at: Address) -> None:
    sequences = await append_many(log, subjects.work(at), 10)
    async with log.follow(STREAM, [subjects.work(at)], after=sequences[6]) as follower:
        assert follower.position == sequences[6]
        assert [s.sequence for s in await read(follower, 3)] == sequences[7:]


async def test_a_paced_follower_misses_nothing_and_hurries_when_told(log: Log, at: Address) -> None:
    await append_many(log, subjects.work(at), 700)
    async with log.follow(STREAM, [subjects.work(at)], after=0, pace_s=30.0) as follower:
        last = await log.last_sequence(STREAM, subjects.work(at))
        found = await read(follower, 700)
        assert [s.data for s in found] == [b"%d" % n for n in range(700)]
        assert follower.position == last
        late = [await log.append(STREAM, subjects.work(at), b"late %d" % n) for n in range(3)]
        with anyio.move_on_after(0.2) as waited:
            await anext(aiter(follower))
        assert waited.cancelled_caught, "the pace is kept"
        follower.hurry()
        assert [s.sequence for s in await read(follower, 3)] == late
        # Cancelled while it waits for a message, it is as good as before.
        follower.hurry()
        with anyio.move_on_after(0.2):
            await anext(aiter(follower))
        more = await log.append(STREAM, subjects.work(at), b"more")
        follower.hurry()
        assert [s.sequence for s in await read(follower, 1)] == [more]


async def test_scan_ends_at_its_target(log: Log, at: Address) -> None:
    sequences = await append_many(log, subjects.work(at), 1200)
    got = await scan(log, subjects.history(at), first=sequences[100], target=sequences[1100])
    assert [s.sequence for s in got] == sequences[100:1101]


async def test_a_scan_may_be_left(log: Log, at: Address) -> None:
    sequences = await append_many(log, subjects.work(at), 600)
    async with aclosing(log.scan(STREAM, [subjects.work(at)], first=1, target=sequences[-1])) as batches:
        batch = await anext(batches)
    assert [s.sequence for s in batch] == sequences[: len(batch)]


async def test_scan_of_nothing_is_empty(log: Log, at: Address) -> None:
    (sequence,) = await append_many(log, subjects.work(at), 1)
    assert await scan(log, subjects.history(at), first=sequence + 1, target=sequence) == []
    assert await scan(log, subjects.history(at), first=0, target=0) == []


async def test_scan_waits_for_its_target(log: Log, at: Address) -> None:
    """A target that its reader does not have yet is a message under way, not the end."""
    (first,) = await append_many(log, subjects.work(at), 1)
    async with anyio.create_task_group() as tasks:
        found: list[Stored] = []

        async def look() -> None:
            found.extend(await scan(log, [subjects.work(at)], first=first, target=first + 1))

        tasks.start_soon(look)
        await anyio.sleep(0.2)
        assert not found
        with anyio.fail_after(10):
            await log.append(STREAM, subjects.work(at), b"late")
    assert [s.data for s in found] == [b"0", b"late"]


async def test_what_was_appended_is_seen_from_every_connection(twin: Twin, at: Address) -> None:
    other = await twin.connect()
    sequence = await twin.log.append(STREAM, subjects.work(at), b"x")
    assert await other.last_sequence(STREAM, subjects.work(at)) == sequence
    assert [s.data for s in await scan(other, [subjects.work(at)], first=1, target=sequence)] == [b"x"]


async def test_last_sequences(log: Log, at: Address) -> None:
    assert await log.last_sequence(STREAM, subjects.work(at)) == 0
    work, cancel = [await log.append(STREAM, s, b"") for s in (subjects.work(at), subjects.cancel(at))]
    assert await log.last_sequence(STREAM) == cancel
    assert await log.last_sequence(STREAM, subjects.work(at)) == work
    with pytest.raises(LogError):
        await log.last_sequence("RIFT_77")


async def test_the_last_message_of_a_subject(log: Log, at: Address) -> None:
    assert await log.last(STREAM, subjects.work(at)) is None
    await append_many(log, subjects.work(at), 3)
    await log.append(STREAM, subjects.cancel(at), b"not this")
    last = await log.last(STREAM, subjects.work(at))
    assert last is not None
    assert last == (await scan(log, [subjects.work(at)], first=1, target=last.sequence))[-1]
    empty = await log.append(STREAM, subjects.work(at), b"")
    assert (
        await log.last(STREAM, subjects.work(at))
        == (await scan(log, [subjects.work(at)], first=empty, target=empty))[0]
    )


# --- refusals ---------------------------------------------------------------------------------------


async def test_expected_last_sequence_is_a_compare_and_set(log: Log, at: Address) -> None:
    subject = subjects.book("account", at.lane)
    first = await log.append(subjects.BOOK, subject, b"1", expect_last=0)
    with pytest.raises(Conflict):
        await log.append(subjects.BOOK, subject, b"2", expect_last=0)
    assert await log.last_sequence(subjects.BOOK, subject) == first
    assert await log.append(subjects.BOOK, subject, b"2", expect_last=first) > first
    with pytest.raises(Conflict):
        await log.append(subjects.BOOK, subject, b"3", expect_last=first)


async def test_of_racing_appends_one_wins(twin: Twin, at: Address) -> None:
    subject = subjects.book("account", at.lane)
    outcomes: list[str] = []

    async def race(log: Log) -> None:
        try:
            await log.append(subjects.BOOK, subject, b"x", expect_last=0)
            outcomes.append("won")
        except Conflict:
            outcomes.append("lost")

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(race, await twin.connect())
    assert sorted(outcomes) == ["lost", "lost", "lost", "won"]


async def test_a_subject_of_another_stream_is_refused(log: Log, at: Address) -> None:
    before = await log.last_sequence(STREAM)
    with pytest.raises(LogError):
        await log.append(subjects.BOOK, subjects.work(at), b"x")
    assert await log.last_sequence(STREAM) == before


async def settled(outcomes: list[int | LogError]) -> int | LogError:
    with anyio.fail_after(5):
        while not outcomes:  # noqa: ASYNC110
            await anyio.sleep(0.005)
    (outcome,) = outcomes
    return outcome


async def test_an_append_without_a_task_is_settled_with_its_sequence(log: Log, at: Address) -> None:
    outcomes: list[int | LogError] = []
    assert log.begin_append(STREAM, subjects.work(at), b"x", outcomes.append)
    assert not log.has_unsent
    assert await settled(outcomes) == await log.last_sequence(STREAM, subjects.work(at))
    assert not log.unwritable_s(STREAM)


async def test_an_append_that_may_not_be_never_counts_as_stored(log: Log, at: Address) -> None:
    before = await log.last_sequence(STREAM)
    outcomes: list[int | LogError] = []
    if log.begin_append(subjects.BOOK, subjects.work(at), b"x", outcomes.append):
        assert isinstance(await settled(outcomes), LogError)
    assert await log.last_sequence(STREAM) == before


async def test_a_record_that_is_too_large_is_refused(log: Log, at: Address) -> None:
    with pytest.raises(RecordTooLarge, match="larger than the broker's limit"):
        await log.append(STREAM, subjects.work(at), b"x" * (9 * MIB))
    assert await log.last_sequence(STREAM, subjects.work(at)) == 0


async def fill(log: Log) -> int:
    """Return how many records of 1,000 bytes the small stream took. Raises LogFull in the end."""
    before = await log.last_sequence(SMALL_STREAM)
    try:
        for _ in range(100):
            await log.append(SMALL_STREAM, "rift.9.work.a.b", b"x" * 1000)
    except LogFull:
        return await log.last_sequence(SMALL_STREAM) - before
    raise AssertionError("the stream took 100,000 bytes")


async def test_a_full_log_refuses_and_keeps_everything(log: Log) -> None:
    room = await log.room_bytes(SMALL_STREAM)
    assert room <= SMALL_BYTES
    took = await fill(log)
    assert 15 < took < 20
    assert 1000 * took < room - await log.room_bytes(SMALL_STREAM) < 1200 * took
    assert 0 <= await log.room_bytes(SMALL_STREAM) < 1200
    assert await fill(log) == 0
    outcomes: list[int | LogError] = []
    assert log.begin_append(SMALL_STREAM, "rift.9.work.a.b", b"x" * 1000, outcomes.append)
    assert isinstance(await settled(outcomes), LogFull)
    assert log.unwritable_s(SMALL_STREAM) > 0
    # Only one stream is full.
    await log.append(STREAM, "rift.0.work.a.b", b"x")


async def test_an_append_with_a_known_outcome_is_made_once(log: Log, at: Address) -> None:
    sequence = await append_until_known(log, STREAM, subjects.work(at), b"x", within_s=5)
    stored = await scan(log, [subjects.work(at)], first=1, target=sequence)
    assert [s.sequence for s in stored] == [sequence]


async def test_overlapping_subjects_are_refused(log: Log, at: Address) -> None:
    for topics in ([subjects.work(at)] * 2, [f"rift.0.work.{at.lane}.>", subjects.work(at)]):
        with pytest.raises(LogError, match="overlap"):
            async with log.follow(STREAM, topics, after=0):
                pass


# --- deliveries -------------------------------------------------------------------------------------


async def test_jobs_come_one_per_wanted_slot_and_again_when_given_back(log: Log, at: Address) -> None:
    await append_many(log, subjects.request(at), 5)
    async with log.jobs(0, at.model) as jobs:
        first, second = await take(jobs, 2)
        assert [first.stored.data, second.stored.data] == [b"0", b"1"]
        assert (first.deliveries, first.epoch) == (1, log.epoch)
        assert first.ack != second.ack
        assert await comes_nothing(jobs)
        await log.ack(first.ack)
        await log.give_back(second.ack)
        rest = await take(jobs, 4)
    assert sorted(job.stored.data for job in rest) == [b"1", b"2", b"3", b"4"]
    assert {job.deliveries for job in rest if job.stored.data == b"1"} == {2}


async def test_only_a_delivery_of_the_queue_is_given_back_for_another_process(log: Log, at: Address) -> None:
    """An ack is published to, so one that a worker forged could be any subject, or more than one line."""
    await append_many(log, subjects.request(at), 1)
    async with log.jobs(0, at.model) as jobs:
        (job,) = await take(jobs, 1)
        other = Address(at.shard, at.lane, f"{at.model}-2")
        elsewhere = Address(at.shard + 1, at.lane, at.model)
        forged = [
            "",
            "rift.book.key.x",
            f" {job.ack}",
            f"$JS.ACK.{STREAM}.worker-x.>",
            "$JS.API.STREAM.DELETE.x",
        ]
        for of, acks in ((at, forged), (other, [job.ack]), (elsewhere, [job.ack])):
            for ack in acks:
                with pytest.raises(
                    ForeignDelivery, match=f"is no delivery of {of.model} in shard {of.shard}"
                ):
                    await log.give_back(ack, of=of)
        await log.give_back(job.ack, of=at)
        (again,) = await take(jobs, 1)
        assert again.deliveries == 2


async def test_a_job_given_back_with_a_delay_comes_after_it(log: Log, at: Address) -> None:
    await append_many(log, subjects.request(at), 1)
    async with log.jobs(0, at.model) as jobs:
        (job,) = await take(jobs, 1)
        given_back_at = anyio.current_time()
        await log.give_back(job.ack, delay_s=1.0)
        (again,) = await take(jobs, 1)
        assert 0.9 < anyio.current_time() - given_back_at < 3.5
        assert again.deliveries == 2
        await log.ack(again.ack)


async def test_a_queue_is_one_models_of_all_lanes(log: Log, at: Address) -> None:
    for lane in (at.lane, "otherlane"):
        await log.append(STREAM, subjects.request(Address(0, lane, at.model)), lane.encode())
        await log.append(STREAM, subjects.request(Address(0, lane, "model-none")), b"not this")
        await log.append(STREAM, subjects.work(Address(0, lane, at.model)), b"nor this")
    async with log.jobs(0, at.model) as jobs:
        found = await take(jobs, 2)
        jobs.want(1)
        assert await comes_nothing(jobs)
    assert [job.stored.data for job in found] == [at.lane.encode(), b"otherlane"]


async def test_workers_share_a_queue(twin: Twin, at: Address) -> None:
    other = await twin.connect()
    async with twin.log.jobs(0, at.model) as mine, other.jobs(0, at.model) as theirs:
        await append_many(twin.log, subjects.request(at), 6)
        found = [*await take(mine, 3), *await take(theirs, 3)]
    assert sorted(job.stored.data for job in found) == [b"%d" % n for n in range(6)]


async def test_a_job_that_waits_is_handed_out_when_it_comes(log: Log, at: Address) -> None:
    async with log.jobs(0, at.model) as jobs, anyio.create_task_group() as tasks:
        jobs.want(1)
        tasks.start_soon(log.append, STREAM, subjects.request(at), b"x")
        with anyio.fail_after(5):
            assert (await anext(aiter(jobs))).stored.data == b"x"


@pytest.mark.slow
async def test_unanswered_jobs_come_again_and_those_in_progress_do_not(twin: Twin, at: Address) -> None:
    log, other = twin.log, await twin.connect()
    await append_many(log, subjects.request(at), 3)
    async with log.jobs(0, at.model) as jobs, other.jobs(0, at.model) as others:
        kept, silent, late = await take(jobs, 3)
        others.want(3)
        began_at = anyio.current_time()
        for _ in range(2):
            assert await comes_nothing(others, 2)
            await log.in_progress(kept.ack)
        again = await take(others, 2)
        waited_s = anyio.current_time() - began_at
        assert {job.stored.data for job in again} == {silent.stored.data, late.stored.data}
        assert {job.deliveries for job in again} == {2}
        assert 4.5 < waited_s < 7.5
        # An answer to the older delivery is an answer.
        await log.ack(late.ack)
        await log.ack(kept.ack)
        for job in again:
            if job.stored.data == silent.stored.data:
                await other.give_back(job.ack)
        (last,) = await take(jobs, 1)
        assert (last.stored.data, last.deliveries) == (silent.stored.data, 3)
        await log.ack(last.ack)
        others.want(1)
        assert await comes_nothing(others, 5.5)


# --- questions --------------------------------------------------------------------------------------


async def test_questions_are_answered_and_unanswered_ones_say_so(twin: Twin) -> None:
    async def shout(data: bytes) -> bytes:
        return data.upper()

    other = await twin.connect()
    async with other.answer("rift.ask.test", shout):
        assert await twin.log.ask("rift.ask.test", b"hello", timeout_s=2) == b"HELLO"
    with pytest.raises(LogError, match=r"(no process answers|no answer on) rift\.ask\.test"):
        await twin.log.ask("rift.ask.test", b"hello", timeout_s=0.5)


async def test_who_hangs_keeps_no_question_from_another_who_answers(twin: Twin) -> None:
    released = anyio.Event()

    async def hang(data: bytes) -> bytes:
        await released.wait()
        return b"late"

    async def answer(data: bytes) -> bytes:
        return b"soon"

    hanging, answering = await twin.connect(), await twin.connect()
    async with hanging.answer("rift.ask.two", hang):
        with pytest.raises(LogError, match=r"no answer on rift\.ask\.two.* within 0\.1 s") as raised:
            await twin.log.ask("rift.ask.two", b"", timeout_s=0.1)
        assert not isinstance(raised.value, NoResponders)
        async with answering.answer("rift.ask.two", answer):
            for _ in range(8):
                assert await twin.log.ask("rift.ask.two", b"", timeout_s=1) == b"soon"
    await anyio.sleep(0.05)
    with anyio.fail_after(0.4), pytest.raises(NoResponders):
        await twin.log.ask("rift.ask.two", b"", timeout_s=5)
    released.set()


async def test_who_is_cancelled_is_not_asked_any_more(twin: Twin) -> None:
    async def answer(data: bytes) -> bytes:
        return data

    other = await twin.connect()
    opened = anyio.Event()

    async def serve() -> None:
        async with other.answer("rift.ask.cancelled", answer):
            opened.set()
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve)
        await opened.wait()
        tasks.cancel_scope.cancel()
    await anyio.sleep(0.05)
    with anyio.fail_after(0.4), pytest.raises(NoResponders):
        await twin.log.ask("rift.ask.cancelled", b"", timeout_s=5)


async def test_questions_are_answered_one_at_a_time(twin: Twin) -> None:
    under_way = 0

    async def slowly(data: bytes) -> bytes:
        nonlocal under_way
        under_way += 1
        assert under_way == 1
        await anyio.sleep(0.05)
        under_way -= 1
        return data

    async with twin.log.answer("rift.ask.slow", slowly), anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(lambda: twin.log.ask("rift.ask.slow", b"x", timeout_s=5))


async def test_concurrent_questions_do_not_wait_for_each_other(twin: Twin) -> None:
    all_asked = anyio.Event()
    under_way = 0

    async def answer(data: bytes) -> bytes:
        nonlocal under_way
        under_way += 1
        if under_way == 3:
            all_asked.set()
        await all_asked.wait()
        return data

    answers: list[bytes] = []

    async def ask(data: bytes) -> None:
        answers.append(await twin.log.ask("rift.ask.many", data, timeout_s=5))

    async with twin.log.answer("rift.ask.many", answer, concurrent=True), anyio.create_task_group() as tasks:
        for data in (b"1", b"2", b"3"):
            tasks.start_soon(ask, data)
    assert sorted(answers) == [b"1", b"2", b"3"]


async def test_a_connection_says_that_it_is_there(twin: Twin) -> None:
    log = await twin.connect()
    assert log.is_connected
    assert log.epoch == 0
