"""Questions to a leader that is slow, or ends before it answers."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec
import pytest

from events.log import LogError, NoResponders
from events.memory import MemoryBroker, MemoryLog
from rift.rpc import NO_LEADER_S, TAKEOVER_S, AnswerFailed, AskLeader, Sql, ask_leader
from tests.simulation import clock


async def never(data: bytes) -> bytes:
    await anyio.sleep_forever()
    raise AssertionError


def leads(epoch: int) -> Callable[[bytes], Awaitable[bytes]]:
    async def answer(data: bytes) -> bytes:
        return msgspec.json.encode({"answer": {"epoch": epoch}})

    return answer


@pytest.mark.parametrize("has_successor", [False, True])
def test_a_client_learns_that_the_process_it_asked_is_gone(has_successor: bool) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            broker = MemoryBroker(tasks, lambda: 1)
            leader, successor = MemoryLog(broker), MemoryLog(broker)

            async def replace() -> None:
                await anyio.sleep(30)
                leader.connection.kill()
                if has_successor:
                    async with successor.answer(AskLeader.topic, leads(2)):
                        await anyio.sleep_forever()

            async with leader.answer(AskLeader.topic, leads(1)), leader.answer(Sql.topic, never):
                tasks.start_soon(replace)
                with pytest.raises(AnswerFailed, match="before it answered; ask again"):
                    await ask_leader(MemoryLog(broker), Sql("select 1"))
                assert 30 <= anyio.current_time() < 33
            tasks.cancel_scope.cancel()

    clock.run(main)


def test_a_leader_that_is_slow_is_waited_for_while_standbys_come_and_go() -> None:
    async def main() -> None:
        async def slow(data: bytes) -> bytes:
            await anyio.sleep(50)
            return b'{"answer": 1}'

        async def leads_now(data: bytes) -> bytes:
            standbys = [f"standby-{anyio.current_time()}"]
            return msgspec.json.encode({"answer": {"epoch": 1, "standbys": standbys}})

        async with anyio.create_task_group() as tasks:
            leader: Any = MemoryLog(MemoryBroker(tasks, lambda: 1))
            async with leader.answer(AskLeader.topic, leads_now), leader.answer(Sql.topic, slow):
                assert await ask_leader(leader, Sql("select 1")) == 1
            tasks.cancel_scope.cancel()

    clock.run(main)


def test_a_frozen_leader_without_a_standby_is_named_soon() -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            log = MemoryLog(MemoryBroker(tasks, lambda: 1))
            async with log.answer(AskLeader.topic, never), log.answer(Sql.topic, never):
                with pytest.raises(LogError, match="it is frozen, or its machine is too busy"):
                    await ask_leader(log, Sql("select 1"))
                assert anyio.current_time() < TAKEOVER_S + 1
            tasks.cancel_scope.cancel()

    clock.run(main)


@pytest.mark.parametrize("after_s", [2, None])
def test_a_question_waits_for_the_next_leader_but_not_without_end(after_s: float | None) -> None:
    async def answer(data: bytes) -> bytes:
        return b'{"answer": 1}'

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            log = MemoryLog(MemoryBroker(tasks, lambda: 1))

            async def lead(after_s: float) -> None:
                await anyio.sleep(after_s)
                async with log.answer(AskLeader.topic, leads(1)):
                    await anyio.sleep(0.5)
                    async with log.answer(Sql.topic, answer):
                        await anyio.sleep_forever()

            if after_s is None:
                with pytest.raises(NoResponders):
                    await ask_leader(log, Sql("select 1"))
                assert NO_LEADER_S <= anyio.current_time() < NO_LEADER_S + 1
            else:
                tasks.start_soon(lead, after_s)
                assert await ask_leader(log, Sql("select 1")) == 1
            tasks.cancel_scope.cancel()

    clock.run(main)
