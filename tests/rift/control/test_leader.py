"""One of several control processes leads, whichever of them ends, hangs or is disconnected."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup

from events import codec, fleet, subjects
from events.jetstream import connect
from events.log import LogError
from events.memory import Faults, MemoryBroker, MemoryLog
from events.schema import ControlElected
from rift import data_dir
from rift.control.leader import ASK_S, DOUBT_S, TIMEOUTS_MAX, Leadership
from rift.rpc import AskLeader, ask
from tests.service import environment
from tests.simulation import clock

# The time in which another process takes over, however its leader failed.
TAKEOVER_S = 5.0
STREAM_BYTES_MAX = 64 << 20


class Control:
    """One process: its connection, and since when it leads."""

    def __init__(self, log: Any, name: str) -> None:
        self.log, self.leadership = log, Leadership(log, name, metrics=f"{name}:1")
        self.name = name
        self.is_leading = False
        self.led: list[int] = []
        self.scope = anyio.CancelScope()

    async def run(self) -> None:
        with self.scope:
            try:
                await self.leadership.run(self.lead)
            except* LogError:
                assert self.scope.cancel_called, "only of one that was killed"

    async def lead(self, epoch: int) -> None:
        self.led.append(epoch)
        self.is_leading = True
        try:
            await anyio.sleep_forever()
        finally:
            self.is_leading = False

    def kill(self) -> None:
        self.log.connection.kill()
        self.scope.cancel()


class World:
    def __init__(self, tasks: TaskGroup, **faults: Any) -> None:
        self.tasks = tasks
        self.broker = MemoryBroker(tasks, lambda: 1 + int(anyio.current_time() * 1e9), **faults)
        self.controls: list[Control] = []

    def start(self) -> Control:
        control = Control(MemoryLog(self.broker), f"control-{len(self.controls)}")
        self.controls.append(control)
        self.tasks.start_soon(control.run)
        return control

    def leaders(self) -> list[str]:
        return [control.name for control in self.controls if control.is_leading]

    def elections(self) -> list[tuple[int, str]]:
        events = [codec.decode(stored.data)[1][0] for stored in self.broker.stream(subjects.FLEET).messages]
        return [(event.epoch, event.control) for event in events if isinstance(event, ControlElected)]

    async def until(self, *controls: Control, within_s: float) -> float:
        """Return how long it takes until one of these leads."""
        began_at = anyio.current_time()
        with anyio.fail_after(within_s):
            while not any(control.is_leading for control in controls):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        return anyio.current_time() - began_at


def played(play: Callable[[World], Awaitable[None]], **faults: Any) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            await play(World(tasks, **faults))
            tasks.cancel_scope.cancel()

    clock.run(main)


# --- in memory ----------------------------------------------------------------------------------------


def test_a_single_process_leads_at_once_and_so_does_its_successor() -> None:
    async def play(world: World) -> None:
        for number in range(3):
            control = world.start()
            assert await world.until(control, within_s=0.5) < 0.1
            assert control.led == [number + 1]
            control.kill()

    played(play)


def test_one_of_several_that_start_together_leads() -> None:
    async def play(world: World) -> None:
        for _ in range(4):
            world.start()
        await anyio.sleep(60)
        assert world.leaders() == ["control-0"]
        assert world.elections() == [(1, "control-0")], "the others stored nothing"

    played(play)


@pytest.mark.parametrize("how", ["kill", "freeze", "stop"])
def test_a_standby_takes_over(how: str) -> None:
    async def play(world: World) -> None:
        first = world.start()
        await anyio.sleep(0.7)
        others = world.start(), world.start()
        await anyio.sleep(30)
        assert world.leaders() == [first.name]
        match how:
            case "kill":
                first.kill()
            case "freeze":
                first.log.connection.freeze()
            case "stop":
                first.scope.cancel()
        takeover_s = await world.until(*others, within_s=TAKEOVER_S)
        assert takeover_s < (ASK_S * (TIMEOUTS_MAX + 1) + 0.2 if how == "freeze" else 1.5)
        [second] = [control.name for control in others if control.is_leading]
        first.log.connection.thaw()
        await anyio.sleep(1)
        assert world.leaders() == [second]
        await anyio.sleep(60)
        assert world.elections() == [(1, first.name), (2, second)], "it stays so"

    played(play)


@pytest.mark.parametrize("frozen_s", [0.5, 2.0, 2.9, 3.2, 10.0, 600.0])
def test_a_frozen_leader_stands_down_or_keeps_leading(frozen_s: float) -> None:
    async def play(world: World) -> None:
        first, second = world.start(), world.start()
        await anyio.sleep(10)
        first.log.connection.freeze()
        await anyio.sleep(frozen_s)
        first.log.connection.thaw()
        await anyio.sleep(30)
        leads = second if second.is_leading else first
        assert leads is first or frozen_s > ASK_S * (TIMEOUTS_MAX - 1)
        assert leads is second or frozen_s < ASK_S * (TIMEOUTS_MAX + 1)
        assert world.leaders() == [leads.name]
        assert world.elections()[-1] == (leads.led[-1], leads.name)

    played(play)


@pytest.mark.parametrize("down_s", [0.5, 2.0, 20.0])
def test_a_disconnected_leader_stops_before_another_leads(down_s: float) -> None:
    async def play(world: World) -> None:
        first, second = world.start(), world.start()
        await anyio.sleep(10)
        first.log.connection.disconnect(down_s)
        if down_s > DOUBT_S:
            await anyio.sleep(DOUBT_S + ASK_S)
            assert not first.is_leading, "it knows of no other, and does nothing any more"
        await anyio.sleep(down_s + 10)
        assert len(world.leaders()) == 1
        assert world.leaders() == [second.name] or down_s <= DOUBT_S
        assert len(world.elections()) <= 2

    played(play)


def test_a_disconnected_standby_does_not_stand() -> None:
    async def play(world: World) -> None:
        first, second = world.start(), world.start()
        await anyio.sleep(10)
        second.log.connection.disconnect(30)
        await anyio.sleep(60)
        assert world.leaders() == [first.name]
        assert world.elections() == [(1, first.name)]

    played(play)


def test_one_leads_after_the_broker_was_down() -> None:
    async def play(world: World) -> None:
        first, _ = world.start(), world.start()
        await anyio.sleep(10)
        world.broker.restart(20.0)
        await anyio.sleep(DOUBT_S + ASK_S)
        assert world.leaders() == []
        await anyio.sleep(30)
        assert len(world.leaders()) == 1
        assert first.led[0] == 1
        assert len(world.elections()) <= 2

    played(play)


@pytest.mark.parametrize("seed", range(12))
def test_one_leads_after_any_faults(seed: int) -> None:
    """Appends that are lost, late, doubled or unanswered, cut connections; then a minute of peace."""
    dice = random.Random(seed)

    async def play(world: World) -> None:
        for _ in range(3):
            world.start()
        for _ in range(40):
            control = world.controls[int(dice.random() * len(world.controls))]
            if dice.random() < 0.3:
                control.log.connection.freeze()
            elif dice.random() < 0.2:
                control.kill()
                world.start()
            await anyio.sleep(dice.uniform(0.0, 6.0))
            if not control.scope.cancel_called:
                control.log.connection.thaw()
        world.broker.faults = Faults()
        await anyio.sleep(60)
        assert len(world.leaders()) == 1
        log = MemoryLog(world.broker)
        whole = await fleet.read(log)
        assert [whole.leader] == world.leaders()
        told = await ask(log, AskLeader(), timeout_s=1)
        alive = {control.name for control in world.controls if not control.scope.cancel_called}
        others = sorted(alive - {whole.leader})
        assert (told["epoch"], told["control"], told["standbys"]) == (whole.epoch, whole.leader, others)
        assert told["metrics"] == {name: f"{name}:1" for name in alive}

    faults = Faults(
        append_s=0.3,
        unanswered=0.1,
        lost=0.1,
        late=0.1,
        doubled=0.1,
        disconnects=0.05,
        reader_s=0.2,
        reader_restarts=0.02,
    )
    played(play, chance=dice, faults=faults)


# --- on a real broker ---------------------------------------------------------------------------------


@asynccontextmanager
async def on_nats(server: Any, name: str) -> AsyncIterator[Control]:
    log = await connect(server.address.url, server.address.access("admin"), name=name)
    await log.ensure_streams(shards=1, replicas=1, max_bytes=STREAM_BYTES_MAX)
    try:
        yield Control(log, name)
    finally:
        await log.close()


@pytest.mark.anyio
async def test_on_a_real_broker(server: Any) -> None:
    async def leading(control: Control) -> float:
        began_at = anyio.current_time()
        with anyio.fail_after(TAKEOVER_S):
            while not control.is_leading:  # noqa: ASYNC110
                await anyio.sleep(0.005)
        return anyio.current_time() - began_at

    async with (
        on_nats(server, "control-a") as first,
        on_nats(server, "control-b") as second,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(first.run)
        assert await leading(first) < 0.3
        tasks.start_soon(second.run)
        await anyio.sleep(1.5)
        assert not second.is_leading
        told = await ask(second.log, AskLeader(), timeout_s=1)
        metrics = {"control-a": "control-a:1", "control-b": "control-b:1"}
        assert told == {"epoch": 1, "control": "control-a", "standbys": ["control-b"], "metrics": metrics}
        first.scope.cancel()
        assert await leading(second) < 2
        assert second.led == [2]
        told = await ask(first.log, AskLeader(), timeout_s=1)
        del metrics["control-a"]
        assert told == {"epoch": 2, "control": "control-b", "standbys": [], "metrics": metrics}
        tasks.cancel_scope.cancel()


# --- processes ----------------------------------------------------------------------------------------


class Installation:
    """Control processes on one broker, each with its own database, and what `rift sql` says."""

    def __init__(self, server: Any, folder: Path) -> None:
        self.folder = folder
        data_dir.DataDir(folder).make()
        (folder / "rift.toml").write_text(f'nats_monitor = "{server.address.monitor}"\n')
        self.options = ["--data", str(folder), "--nats", server.address.url]
        self._environment = environment() | server.environment
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        number = len(self.processes)
        database = self.folder / f"{number}.duckdb"
        command = [sys.executable, "-m", "rift", "control", *self.options, "--database", str(database)]
        with (self.folder / f"{number}.log").open("wb") as log:
            process = subprocess.Popen(command, env=self._environment, stderr=log)
        self.processes.append(process)
        return process

    def sql(self, select: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "rift", "sql", "--json", select, *self.options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=self._environment)
        return json.loads(done.stdout) if done.returncode == 0 else []

    def until(self, after: int, *, within_s: float) -> tuple[float, int, str]:
        """Return how long it takes until the leader of a later epoch answers, its epoch and its name."""
        began = time.monotonic()
        select = "select epoch, control from elections where counts order by epoch desc limit 1"
        while not (rows := self.sql(select)) or rows[0]["epoch"] <= after:
            assert time.monotonic() - began < within_s, self.logs()
        return time.monotonic() - began, rows[0]["epoch"], rows[0]["control"]

    def until_logged(self, text: str, times: int) -> None:
        deadline = time.monotonic() + 20
        while self.logs().count(text) < times:
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in self.folder.glob("*.log"))


@contextmanager
def installed(server: Any, folder: Path) -> Iterator[Installation]:
    found = Installation(server, folder)
    try:
        yield found
    finally:
        for process in found.processes:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_processes_take_over_from_each_other(server: Any, tmp_path: Path) -> None:
    with installed(server, tmp_path / "data") as rift:
        first = rift.start()
        _, epoch, name = rift.until(0, within_s=20)
        second = rift.start()
        rift.until_logged("stands by", 1)
        first.kill()
        killed_s, epoch, other = rift.until(epoch, within_s=TAKEOVER_S)
        assert other != name
        third = rift.start()
        rift.until_logged("stands by", 2)
        second.send_signal(signal.SIGSTOP)
        frozen_s, epoch, last = rift.until(epoch, within_s=TAKEOVER_S)
        assert last not in (name, other)
        second.send_signal(signal.SIGCONT)
        rift.until_logged(f"{other} stands by: {last} leads", 1)
        for _ in range(2):
            rows = rift.sql("select control, counts from elections order by epoch desc")
            assert rows[0] == {"control": last, "counts": True}
            assert len(rows) == epoch
        third.send_signal(signal.SIGTERM)
        stopped_s, _, again = rift.until(epoch, within_s=TAKEOVER_S)
        assert again == other, "the one that was frozen is as good as any"
        assert third.wait(5) == 0
        print(f"killed {killed_s:.2f} s, frozen {frozen_s:.2f} s, stopped {stopped_s:.2f} s")
