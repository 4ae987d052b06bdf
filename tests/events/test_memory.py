"""The faults of the log in memory, one at a time, on a clock that jumps."""

import random
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from events import subjects
from events.log import API_TIMEOUT_S, APPEND_TIMEOUT_S, LogError, LogFull, OutcomeUnknown, append_until_known
from events.memory import Faults, MemoryBroker, MemoryLog
from events.subjects import Address
from tests.simulation import clock

AT = Address(0, "lane5678", "model-a")
WORK, REQUEST = subjects.work(AT), subjects.request(AT)
STREAM = "RIFT_0"
START_NS = 1_750_000_000_000_000_000

Test = Callable[[MemoryBroker], Awaitable[None]]


def simulate(test: Test, *, until_s: float = 600.0, **faults: float) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            broker = MemoryBroker(
                tasks,
                lambda: START_NS + int(anyio.current_time() * 1e9),
                chance=random.Random(7),
                faults=Faults(**faults),
            )
            await test(broker)
            tasks.cancel_scope.cancel()

    clock.run(main, until_s=until_s)


def stored(broker: MemoryBroker) -> list[bytes]:
    return [message.data for message in broker.streams[STREAM].messages]


def connect(broker: MemoryBroker) -> MemoryLog:
    return MemoryLog(broker)


def test_faults_take_a_random_source() -> None:
    async def test(broker: MemoryBroker) -> None:
        with pytest.raises(AssertionError, match="random source"):
            MemoryBroker(broker.tasks, lambda: 0, faults=Faults(lost=0.1))

    simulate(test)


def test_an_append_whose_answer_is_lost_is_stored() -> None:
    async def test(broker: MemoryBroker) -> None:
        with pytest.raises(OutcomeUnknown):
            await connect(broker).append(STREAM, WORK, b"x")
        assert stored(broker) == [b"x"]

    simulate(test, unanswered=1.0)


def test_an_append_that_is_lost_is_not_stored() -> None:
    async def test(broker: MemoryBroker) -> None:
        began_at = anyio.current_time()
        with pytest.raises(OutcomeUnknown):
            await connect(broker).append(STREAM, WORK, b"x")
        assert anyio.current_time() - began_at == APPEND_TIMEOUT_S
        await anyio.sleep(60)
        assert stored(broker) == []

    simulate(test, lost=1.0)


def test_an_append_may_land_after_its_writer_gave_up_and_after_later_ones() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)
        unknown = 0
        for n in range(40):
            try:
                await log.append(STREAM, WORK, b"%d" % n)
            except OutcomeUnknown:
                unknown += 1
        await anyio.sleep(60)
        found = [int(data) for data in stored(broker)]
        assert unknown > 5
        assert sorted(found) == list(range(40))
        assert found != list(range(40))

    simulate(test, late=0.5)


def test_an_append_may_be_stored_again_later() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)
        assert [await log.append(STREAM, WORK, b"%d" % n) for n in range(3)] == [1, 2, 3]
        await anyio.sleep(60)
        assert sorted(stored(broker)) == [b"0", b"0", b"1", b"1", b"2", b"2"]

    simulate(test, doubled=1.0)


def test_repeating_until_known_stores_at_least_once() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)
        sequences = [await append_until_known(log, STREAM, WORK, b"%d" % n, within_s=60) for n in range(30)]
        assert sequences == sorted(sequences)
        held = stored(broker)
        assert [held[sequence - 1] for sequence in sequences] == [b"%d" % n for n in range(30)]
        assert len(held) > 35

    simulate(test, unanswered=0.3, lost=0.2, append_s=0.3)


def test_a_full_log_is_no_answer_once_an_earlier_try_may_be_stored() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)

        async def fill() -> None:
            await anyio.sleep(1)
            broker.is_full = True

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fill)
            with pytest.raises(OutcomeUnknown):
                await append_until_known(log, STREAM, WORK, b"x", within_s=10)
        assert stored(broker) == [b"x"]
        broker.faults = Faults()
        with pytest.raises(LogFull):
            await append_until_known(log, STREAM, WORK, b"y", within_s=10)

    simulate(test, unanswered=1.0)


def test_a_full_log_refuses_until_it_is_not() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)
        broker.is_full = True
        assert await log.room_bytes(STREAM) == 0
        with pytest.raises(LogFull):
            await log.append(STREAM, WORK, b"x")
        broker.is_full = False
        assert await log.append(STREAM, WORK, b"x") == 1

    simulate(test)


def test_one_shard_is_full_unwritable_or_silent_and_the_other_goes_on() -> None:
    async def test(broker: MemoryBroker) -> None:
        broker.add_shard()
        log, one, other = connect(broker), broker.stream("RIFT_0"), "RIFT_1"
        one.is_full = True
        assert await log.room_bytes(STREAM) == 0 < await log.room_bytes(other)
        with pytest.raises(LogFull):
            await log.append(STREAM, WORK, b"x")
        one.is_full, one.is_unwritable = False, True
        with pytest.raises(OutcomeUnknown):
            await log.append(STREAM, WORK, b"x")
        assert await log.last_sequence(STREAM) == 0
        one.is_unwritable = False
        await log.append(STREAM, WORK, b"x")
        async with log.follow(STREAM, [WORK], after=0) as follower:
            one.set_silent(True)
            for asked in (log.last_sequence(STREAM), log.append(STREAM, WORK, b"y"), follow(log)):
                with pytest.raises(OutcomeUnknown):
                    await asked
            with anyio.move_on_after(10.0) as waited:
                await anext(follower)
            assert waited.cancelled_caught
            assert await log.append(other, WORK.replace("rift.0", "rift.1"), b"z") == 1
            one.set_silent(False)
            assert [message.data for message in await anext(follower)] == [b"x"]

    async def follow(log: MemoryLog) -> None:
        async with log.follow(STREAM, [WORK], after=0):
            pass

    simulate(test)


def test_a_lost_connection_grows_the_epoch_and_comes_back() -> None:
    async def test(broker: MemoryBroker) -> None:
        log, other = connect(broker), connect(broker)
        async with log.follow(STREAM, [WORK], after=0) as follower:
            log.connection.disconnect(1.5)
            assert (log.is_connected, log.epoch, other.is_connected, other.epoch) == (False, 1, True, 0)
            await other.append(STREAM, WORK, b"meanwhile")
            # Messages that were sent meanwhile go out on the new connection.
            await log.append(STREAM, WORK, b"sent meanwhile")
            assert anyio.current_time() == pytest.approx(1.5)
            assert log.is_connected
            assert [message.data for message in await anext(follower)] == [b"meanwhile", b"sent meanwhile"]
        log.connection.disconnect(3.0)
        with pytest.raises(OutcomeUnknown):
            await log.append(STREAM, WORK, b"late")
        assert b"late" not in stored(broker)
        await anyio.sleep(1.1)
        assert stored(broker)[-1] == b"late"

    simulate(test)


def test_questions_of_a_cut_connection_say_so_in_time() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)
        log.connection.disconnect(100)
        with pytest.raises(LogError):
            await log.last_sequence(STREAM)
        assert anyio.current_time() == API_TIMEOUT_S
        with pytest.raises(LogError, match="was not read within"):
            async for _ in log.scan(STREAM, [WORK], first=1, target=1):
                pass

    simulate(test)


def test_a_cut_takes_some_of_what_was_under_way() -> None:
    async def test(broker: MemoryBroker) -> None:
        outcomes: list[Any] = []

        async def append(log: MemoryLog, n: int) -> None:
            try:
                outcomes.append(await log.append(STREAM, WORK, b"%d" % n))
            except OutcomeUnknown:
                outcomes.append(None)

        async with anyio.create_task_group() as tasks:
            for n in range(20):
                log = connect(broker)
                tasks.start_soon(append, log, n)
                await anyio.lowlevel.checkpoint()
                log.connection.disconnect(0.5)
        assert outcomes == [None] * 20
        assert 3 < len(stored(broker)) < 17

    simulate(test, append_s=0.2)


def test_a_frozen_process_hears_nothing_and_its_deliveries_go_to_others_in_time() -> None:
    async def test(broker: MemoryBroker) -> None:
        frozen, other = connect(broker), connect(broker)
        heard: list[Any] = []

        async def work() -> None:
            async with frozen.jobs(0, AT.model) as jobs:
                jobs.want(1)
                job = await anext(jobs)
                heard.append((anyio.current_time(), job.deliveries))
                await frozen.in_progress(job.ack)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            await anyio.sleep(1)
            frozen.connection.freeze()
            await other.append(STREAM, REQUEST, b"x")
            async with other.jobs(0, AT.model) as jobs:
                jobs.want(1)
                job = await anext(jobs)
            assert job.deliveries == 2
            assert 5.0 < anyio.current_time() < 8.0
            assert heard == []
            await other.ack(job.ack)
            await anyio.sleep(100)
            frozen.connection.thaw()
        ((at_s, deliveries),) = heard
        assert at_s > 100
        assert deliveries == 1

    simulate(test)


def test_a_frozen_writer_does_not_know_that_it_wrote() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)
        answered: list[float] = []

        async def write() -> None:
            try:
                await log.append(STREAM, WORK, b"x")
            finally:
                answered.append(anyio.current_time())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            await anyio.lowlevel.checkpoint()
            log.connection.freeze()
            await anyio.sleep(1.0)
            assert stored(broker) == [b"x"]
            assert not answered
            log.connection.thaw()
        assert answered == [1.0]

    simulate(test)


def test_readers_lag_and_restart_and_miss_nothing() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)
        async with log.follow(STREAM, [WORK], after=0) as follower:
            got: list[int] = []
            for n in range(50):
                await log.append(STREAM, WORK, b"")
                if n % 7 == 0:
                    log.connection.disconnect(0.2)
            while len(got) < 50:
                got += [message.sequence for message in await anext(follower)]
        assert got == list(range(1, 51))
        assert anyio.current_time() > 1.0

    simulate(test, reader_s=0.5, reader_restarts=0.3, append_s=0.05)


def test_delivery_counts_lie_and_answered_jobs_come_again() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)
        await log.append(STREAM, REQUEST, b"x")
        async with log.jobs(0, AT.model) as jobs:
            counts = []
            for _ in range(6):
                jobs.want(1)
                job = await anext(jobs)
                counts.append(job.deliveries)
                await log.ack(job.ack)
        assert counts == [1] * 6

    simulate(test, lying=1.0, again=1.0)


def test_lost_answers_bring_the_job_again_after_ack_wait() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)
        await log.append(STREAM, REQUEST, b"x")
        async with log.jobs(0, AT.model) as jobs:
            jobs.want(1)
            await log.ack((await anext(jobs)).ack)
            jobs.want(1)
            assert (await anext(jobs)).deliveries == 2
        assert 5.0 <= anyio.current_time() < 6.0

    simulate(test, lost_answers=1.0)


def test_a_restart_brings_every_job_again_and_some_that_were_answered_as_new() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)
        for n in range(40):
            await log.append(STREAM, REQUEST, b"%d" % n)
        async with log.jobs(0, AT.model) as jobs:
            jobs.want(40)
            held = [await anext(jobs) for _ in range(40)]
            for job in held[:30]:
                await log.ack(job.ack)
            broker.restart(2.0)
            assert log.epoch == 1
            jobs.want(40)
            again = []
            with anyio.move_on_after(4):
                while True:
                    again.append(await anext(jobs))
        found = {int(job.stored.data) for job in again}
        assert set(range(30, 40)) <= found
        assert 1 < len(found & set(range(30))) < 15
        assert {(job.deliveries, job.epoch) for job in again} == {(1, 1)}

    simulate(test)


def test_a_process_that_ended_says_nothing_more_and_what_it_sent_arrives() -> None:
    async def test(broker: MemoryBroker) -> None:
        log = connect(broker)
        with anyio.move_on_after(0.001):
            await log.append(STREAM, WORK, b"x")
        await log.close()
        assert not log.is_connected
        await anyio.sleep(5)
        assert stored(broker) == [b"x"]

    simulate(test, append_s=1.0)
