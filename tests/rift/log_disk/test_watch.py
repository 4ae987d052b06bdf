"""When the reserve is released and restored, and the broker restarted. `test_full_disk` has real ones."""

import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest

from rift.log_disk import reserve, watch
from rift.log_disk.reserve import Reserve
from rift.log_disk.watch import Broker, BrokerHealth, LogDisk

FULL = "JetStream stream '$G > RIFT_0' write error: no space left on device"


class FakeBroker:
    """A broker whose write error ends with a restart, unless its disk is broken."""

    def __init__(self) -> None:
        self.health = BrokerHealth(answers=True)
        self.is_broken = False
        self.restarts = self.hurries = 0

    async def ask(self) -> BrokerHealth:
        return self.health

    def restart(self) -> None:
        self.restarts += 1
        if not self.is_broken:
            self.health = BrokerHealth(answers=True)

    def hurry(self) -> None:
        self.hurries += 1


class Watched:
    def __init__(self, folder: Path) -> None:
        self.broker = FakeBroker()
        self.reserve = Reserve(folder / "reserve")
        self.lines: list[str] = []
        ours = Broker(self.broker.ask, self.broker.restart, self.broker.hurry)
        self.disk = LogDisk(self.reserve, ours, self.lines.append)

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(5):
            while not condition():  # noqa: ASYNC110  # a file
                await anyio.sleep(0.01)


@pytest.fixture
async def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    monkeypatch.setattr(reserve, "RESERVE_BYTES", 8192)
    monkeypatch.setattr(reserve, "MARGIN_BYTES", 4096)
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    monkeypatch.setattr(watch, "RESTART_S", 0.01)
    monkeypatch.setattr(watch, "PAUSE_S", (0.1, 60.0))
    one = Watched(tmp_path)
    one.reserve.restore()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.disk.watch)
        yield one
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.parametrize("problem", [FULL, "JetStream not enabled (10076)"])
async def test_a_write_error_releases_the_reserve_and_restarts_the_broker(
    watched: Watched, problem: str
) -> None:
    watched.broker.health = BrokerHealth(answers=True, problem=problem)
    await watched.until(lambda: not watched.reserve.is_whole())
    assert watched.broker.restarts == 1
    await watched.until(lambda: len(watched.lines) == 2)
    assert watched.reserve.is_whole()
    assert watched.broker.restarts == 1, "it can write, so it is not restarted again"
    assert watched.broker.hurries >= 1
    assert problem in watched.lines[0]
    assert "can be written to again" in watched.lines[1]


@pytest.mark.anyio
async def test_a_broker_that_still_cannot_write_is_restarted_before_requests_are_accepted(
    watched: Watched,
) -> None:
    watched.broker.is_broken = True
    watched.broker.health = BrokerHealth(answers=True, problem=FULL)
    await watched.until(lambda: watched.broker.restarts > 2)
    assert not watched.reserve.is_whole()
    watched.broker.is_broken = False
    await watched.until(watched.reserve.is_whole)
    await watched.until(lambda: len(watched.lines) == 2)


def read_only(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.anyio
async def test_on_a_read_only_disk_the_broker_runs_on_until_the_disk_takes_writes(watched: Watched) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reserve, "release", read_only)
        patch.setattr(Reserve, "restore", read_only)
        watched.broker.health = BrokerHealth(answers=True, problem=FULL)
        await watched.until(lambda: len(watched.lines) == 1)
        await anyio.sleep(0.3)
        assert watched.broker.restarts == 0
        assert "Read-only file system" in watched.lines[0]
    await watched.until(lambda: len(watched.lines) == 2)
    assert watched.broker.restarts == 1


@pytest.mark.anyio
async def test_other_problems_and_silence_change_nothing(watched: Watched) -> None:
    for health in (
        BrokerHealth(answers=False),
        BrokerHealth(answers=True, problem="JetStream stream '$G > RIFT_0' could not be recovered"),
    ):
        watched.broker.health = health
        await anyio.sleep(0.1)
    assert (watched.lines, watched.broker.restarts) == ([], 0)
    assert watched.reserve.is_whole()


@pytest.mark.anyio
async def test_a_disk_that_is_full_again_soon_is_restored_later(watched: Watched) -> None:
    watched.broker.health = BrokerHealth(answers=True, problem=FULL)
    await watched.until(lambda: len(watched.lines) == 2)
    watched.broker.health = BrokerHealth(answers=True, problem=FULL)
    await watched.until(lambda: len(watched.lines) == 3)
    await anyio.sleep(0.3)
    assert not watched.reserve.is_whole(), "the second pause is longer"
