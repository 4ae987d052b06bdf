"""For how long nothing was stored: what counts as a proof, and what does not."""

from collections.abc import Awaitable, Callable

import anyio
import pytest

from events.append_health import AppendHealth
from events.log import Conflict, LogFull, OutcomeUnknown
from tests.simulation import clock

STREAM = "RIFT_0"


def timed(test: Callable[[AppendHealth], Awaitable[None]]) -> None:
    clock.run(lambda: test(AppendHealth()))


async def append(health: AppendHealth, seconds: float, error: Exception | None = None) -> None:
    with health.measured(STREAM):
        await anyio.sleep(seconds)
        if error is not None:
            raise error


def test_a_stream_without_appends_is_no_outage() -> None:
    async def test(health: AppendHealth) -> None:
        assert health.unwritable_s(STREAM) == 0.0
        await append(health, 1.0)
        await anyio.sleep(100.0)
        assert health.unwritable_s(STREAM) == 0.0

    timed(test)


@pytest.mark.parametrize("error", [OutcomeUnknown("no answer"), LogFull("full")])
def test_a_failure_counts_from_its_begin_until_a_record_is_stored(error: Exception) -> None:
    async def test(health: AppendHealth) -> None:
        for _ in range(2):
            with pytest.raises(type(error)):
                await append(health, 2.0, error)
        await anyio.sleep(5.0)
        assert health.unwritable_s(STREAM) == 9.0
        assert health.unwritable_s("RIFT_BOOK") == 0.0
        await append(health, 0.5)
        assert health.unwritable_s(STREAM) == 0.0

    timed(test)


def test_an_append_under_way_counts_and_one_that_was_given_up_does_not() -> None:
    async def test(health: AppendHealth) -> None:
        with anyio.move_on_after(3.0):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(append, health, 60.0)
                await anyio.sleep(2.0)
                assert health.unwritable_s(STREAM) == 2.0
        assert health.unwritable_s(STREAM) == 0.0

    timed(test)


def test_only_stored_appends_are_timed() -> None:
    async def test(health: AppendHealth) -> None:
        took_ns: list[int] = []
        health.took = took_ns.append
        await append(health, 0.25)
        with pytest.raises(OutcomeUnknown):
            await append(health, 1.0, OutcomeUnknown("no answer"))
        await append(health, 2.0)
        assert took_ns == [250_000_000, 2_000_000_000]

    timed(test)


def test_a_refusal_for_another_reason_proves_nothing() -> None:
    async def test(health: AppendHealth) -> None:
        with pytest.raises(Conflict):
            await append(health, 1.0, Conflict("another came first"))
        assert health.unwritable_s(STREAM) == 0.0
        with pytest.raises(OutcomeUnknown):
            await append(health, 1.0, OutcomeUnknown("no answer"))
        with pytest.raises(Conflict):
            await append(health, 1.0, Conflict("another came first"))
        assert health.unwritable_s(STREAM) == 2.0

    timed(test)


def test_a_lost_answer_from_before_the_last_stored_record_proves_nothing() -> None:
    async def test(health: AppendHealth) -> None:
        async def lose() -> None:
            with pytest.raises(OutcomeUnknown):
                await append(health, 10.0, OutcomeUnknown("no answer"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lose)
            await anyio.sleep(1.0)
            await append(health, 1.0)
            await anyio.sleep(5.0)
            assert health.unwritable_s(STREAM) == 0.0
        assert health.unwritable_s(STREAM) == 0.0

    timed(test)
