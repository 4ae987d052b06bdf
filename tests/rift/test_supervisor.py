"""Children are restarted, stopped with their whole group, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

from rift import supervisor
from rift.supervisor import Child, Guard, Parent

pytestmark = pytest.mark.slow

LAST_WORDS = "echo before; echo rift: no weights here >&2; echo 'leaked 27 instances' >&2; exit 1"


def child(folder: Path, script: str, guard: Guard, ended: list[int], said: list[str]) -> Child:
    async def tell(status: int) -> None:
        ended.append(status)

    command = ["/bin/sh", "-c", script]
    return Child("child", lambda: command, Parent(folder, guard, said.append), ended=tell)


@pytest.mark.anyio
async def test_a_child_that_ends_is_restarted_and_its_last_message_is_shown(tmp_path: Path) -> None:
    guard, ended, said = Guard(), list[int](), list[str]()
    one = child(tmp_path, LAST_WORDS, guard, ended, said)
    one.start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.supervise)
        with anyio.fail_after(10):
            while len(ended) < 2:  # noqa: ASYNC110  # another process
                await anyio.sleep(0.05)
        await one.stop(1)
    guard.dismiss()
    assert ended[:2] == [1, 1]
    assert said[0] == "child ended (exit status 1): no weights here"
    assert said[1].startswith(f"restarting it in {supervisor.BACK_OFF_S[0]:g} s; its log is ")
    assert one.last_line() == "no weights here"
    assert not one.runs


@pytest.mark.anyio
async def test_a_retired_child_exits_and_is_not_restarted(tmp_path: Path) -> None:
    guard, ended, said = Guard(), list[int](), list[str]()
    one = child(tmp_path, "trap 'exit 0' USR1; while :; do sleep 0.05; done", guard, ended, said)
    one.start()
    await anyio.sleep(0.5)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.supervise)
        one.retire()
    guard.dismiss()
    assert (ended, said, one.runs) == ([0], [], False)


def test_the_guard_kills_remaining_groups_and_forgets_ended_ones() -> None:
    """The system reuses the number of an ended group, so the guard must not kill that number."""
    script = (
        "import subprocess, os; from rift.supervisor import Guard; guard = Guard();"
        "quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0);"
        "start = lambda: subprocess.Popen(['sleep', '100'], **quiet).pid;"
        "left, forgotten = start(), start(); guard.add(left); guard.add(forgotten); guard.ended(forgotten);"
        "print(left, forgotten, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    left, forgotten = map(int, done.stdout.split())
    deadline = time.monotonic() + 5
    while _runs(left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (_runs(left), _runs(forgotten)) == (False, True)
    os.kill(forgotten, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.anyio
async def test_a_failed_restart_is_retried(tmp_path: Path) -> None:
    guard, said, program = Guard(), list[str](), tmp_path / "program"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o700)
    one = Child("child", lambda: [str(program)], Parent(tmp_path, guard, said.append))
    one.start()
    program.rename(tmp_path / "away")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.supervise)
        with anyio.fail_after(10):
            while not any("cannot be started" in line for line in said):  # noqa: ASYNC110  # another process
                await anyio.sleep(0.05)
        program.write_text("#!/bin/sh\nexec sleep 100\n")
        program.chmod(0o700)
        with anyio.fail_after(10):
            while not one.runs:  # noqa: ASYNC110  # another process
                await anyio.sleep(0.05)
        await one.stop(0)
    guard.dismiss()
