"""Opening shards, and following which are open, on both logs."""

from functools import partial

import anyio
import pytest

from events import codec, shards, subjects
from events.log import Log
from events.schema import AccountOpened

pytestmark = pytest.mark.anyio


async def test_shards_are_opened_once_and_in_order_by_whoever_comes_first(log: Log) -> None:
    assert await shards.count(log) == 1
    seen: list[int] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shards.follow, log, 1, seen.append)
        async with anyio.create_task_group() as openers:
            for _ in range(3):
                openers.start_soon(partial(shards.open_up_to, log, 3, writer="test"))
        with anyio.fail_after(5):
            while len(seen) < 2:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert seen == [1, 2]
        await shards.open_up_to(log, 2, writer="test")
        assert await shards.count(log) == 3
        late: list[int] = []
        tasks.start_soon(shards.follow, log, 2, late.append)
        with anyio.fail_after(5):
            while not late:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert late == [2]
        tasks.cancel_scope.cancel()


async def test_a_record_that_opens_no_shard_is_told(log: Log) -> None:
    """This test is the last of its server: the book now names no number of shards."""
    account = codec.encode("test", [AccountOpened(id="a", account="acme")])
    await log.append(subjects.BOOK, subjects.SHARD_LIST, account)
    with pytest.raises(codec.RecordUnreadable, match="does not open a shard"):
        await shards.count(log)
