"""A fold that is read, then followed; the broker's clock; and a wake-up that can be used again."""

from itertools import count

import anyio
import pytest

from events import memory, stream_fold
from events.broker_clock import BrokerClock
from events.log import Stored
from events.wakeup import Wakeup

pytestmark = pytest.mark.anyio


class Sequences:
    def __init__(self) -> None:
        self.position = 0
        self.folded: list[int] = []

    def fold(self, stored: Stored) -> None:
        self.position = stored.sequence
        self.folded.append(stored.sequence)


async def test_a_fold_is_read_and_then_followed() -> None:
    ticks = count(1_750_000_000_000_000_000)
    async with anyio.create_task_group() as tasks:
        broker = memory.MemoryBroker(tasks, lambda: next(ticks), shards=1)
        log = memory.connect(broker)
        fold = Sequences()
        changed = Wakeup()
        everything = ["rift.fleet.>"]
        for _ in range(3):
            await log.append("RIFT_FLEET", "rift.fleet.tiny", b"x")
        await stream_fold.read(log, "RIFT_FLEET", everything, fold)
        assert fold.folded == [1, 2, 3]

        async def follow() -> None:
            await stream_fold.follow(log, "RIFT_FLEET", everything, fold, changed=changed.set)

        tasks.start_soon(follow)
        pending = changed.pending
        await log.append("RIFT_FLEET", "rift.fleet.tiny", b"x")
        with anyio.fail_after(5):
            await pending.wait()
        assert fold.folded == [1, 2, 3, 4]
        tasks.cancel_scope.cancel()


async def test_a_wakeup_is_seen_only_by_those_who_wait() -> None:
    wakeup = Wakeup()
    wakeup.set()
    with anyio.move_on_after(0.01) as late:
        await wakeup.wait()
    assert late.cancelled_caught, "a change before the wait does not wake the waiter"
    pending = wakeup.pending
    wakeup.set()
    with anyio.fail_after(1):
        await pending.wait()


async def test_the_brokers_clock_never_runs_ahead_or_back() -> None:
    clock = BrokerClock()
    assert clock.now_ns() == 0
    clock.note(5_000_000_000)
    clock.note(4_000_000_000)
    assert clock.newest_ns == 5_000_000_000
    await anyio.sleep(0.01)
    assert 5_000_000_000 < clock.now_ns() < 6_000_000_000
