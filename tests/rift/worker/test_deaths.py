"""A request that kills its worker and engine does so three times, wherever in the request they die.

Real workers on a real broker. The first attempt does not wait until its start is stored.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from events import ids
from events.jetstream import connect
from events.log import Log
from events.publisher import Publisher
from events.request_history import HistoryReader, RequestHistory
from events.schema import AttemptReleased, AttemptStarted, Parameters, RequestAccepted
from events.subjects import Address
from rift.worker.isolation import DEATHS_MAX
from tests.conftest import Server
from tests.service import environment

pytestmark = pytest.mark.anyio

POINTS = ("prompt", "frozen", "stored", "tokens")


@contextmanager
def workers(*arguments: str) -> Iterator[Sequence[subprocess.Popen[str]]]:
    """Start as many workers as may die, and one that must not, and return once all are ready."""
    command = [sys.executable, "-m", "tests.rift.worker.mortal", *arguments]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        for _ in range(DEATHS_MAX + 1)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


async def accept(log: Log, at: Address) -> ids.RequestId:
    floor = await log.last_sequence("RIFT_0")
    text = ids.new_request_id(
        secret=b"s" * 32, account="dev", at=at, floor=floor, entropy=os.urandom(ids.RANDOM_BYTES)
    )
    accepted = RequestAccepted(
        request=text,
        account="dev",
        key="k",
        model="m",
        kind="inference",
        input="poison",
        parameters=Parameters(max_tokens=8),
        stream=True,
        prompt_tokens_max=64,
        deadline_ms=60_000,
        price_version=1,
    )
    await Publisher(log, "gateway").publish(accepted, within_s=5)
    return ids.parsed(text)


async def release(log: Log, request: ids.RequestId, attempts: int) -> None:
    """Release the attempt of a dead worker, and have its job delivered again, as control does."""
    history = RequestHistory()
    with anyio.fail_after(5):
        while history.life.attempts < attempts:
            history = await HistoryReader(log).read(request)
    started = [event.event for event in history.counted if isinstance(event.event, AttemptStarted)][-1]
    await Publisher(log, "control").publish(
        AttemptReleased(attempt=started.attempt, why="lost"), within_s=5, at=request.at
    )
    await log.give_back(started.delivery)


@pytest.mark.parametrize("point", POINTS)
async def test_a_poison_request_causes_three_deaths(server: Server, tmp_path: Path, point: str) -> None:
    assert server.process is not None
    at = Address(0, ids.new_lane_id(os.urandom(ids.RANDOM_BYTES)), f"model-{point}")
    log = await connect(server.address.url, server.address.access("admin"), name="test")
    await log.ensure_streams(shards=1, replicas=1, max_bytes=64 * 1024 * 1024)
    broker = server.process.pid
    address = server.address.url, str(server.address.access("admin").password), at.model
    with workers(point, *address, str(tmp_path), str(broker)) as running:
        request = await accept(log, at)
        with anyio.fail_after(15):
            for deaths in range(1, DEATHS_MAX + 1):
                while sum(process.poll() is not None for process in running) < deaths:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                os.kill(broker, signal.SIGCONT)
                await release(log, request, deaths)
            while (await HistoryReader(log).read(request)).life.phase != "ended":  # noqa: ASYNC110
                await anyio.sleep(0.02)
    life = (await HistoryReader(log).read(request)).life
    await log.close()
    assert life.reason == "poison"
    assert life.deaths == DEATHS_MAX
    assert len((tmp_path / "prompts").read_text().splitlines()) == DEATHS_MAX
