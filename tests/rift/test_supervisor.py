"""Children are restarted, stopped with their whole group, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from rift import supervisor
from rift.supervisor import Child, Guard, Parent
from tests.small_disk import small_disk

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
async def test_the_last_words_of_a_killed_child_are_not_its_reason(tmp_path: Path) -> None:
    guard, ended, said = Guard(), list[int](), list[str]()
    one = child(tmp_path, "echo Triton is not available; kill -9 $$", guard, ended, said)
    one.start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.supervise)
        with anyio.fail_after(10):
            while not said:  # noqa: ASYNC110  # another process
                await anyio.sleep(0.05)
        await one.stop(1)
    guard.dismiss()
    assert said[0] == "child ended (killed by SIGKILL): Linux does this when memory runs out"


@pytest.mark.anyio
async def test_a_child_that_is_killed_for_a_reason_ends_with_that_reason(tmp_path: Path) -> None:
    guard, ended, said = Guard(), list[int](), list[str]()
    one = child(tmp_path, "exec sleep 60", guard, ended, said)
    one.start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.supervise)
        one.kill("no weights")
        with anyio.fail_after(10):
            while not said:  # noqa: ASYNC110  # another process
                await anyio.sleep(0.05)
        await one.stop(1)
    guard.dismiss()
    assert said[0] == "child ended: no weights"


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


@pytest.mark.parametrize("harm", ["", "guard._shell.kill(); guard._shell.wait();"])
def test_the_guard_kills_remaining_groups_and_forgets_ended_ones(harm: str) -> None:
    """The system reuses the number of an ended group, so the guard must not kill that number. A guard that
    was killed is replaced, and the other processes run on."""
    script = (
        "import subprocess, os; from rift.supervisor import Guard; guard = Guard();"
        "quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0);"
        "start = lambda: subprocess.Popen(['sleep', '100'], **quiet).pid;"
        f"left, forgotten = start(), start(); guard.add(left); guard.add(forgotten); {harm}"
        "guard.ended(forgotten);"
        "print(left, forgotten, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    left, forgotten = map(int, done.stdout.split())
    deadline = time.monotonic() + 5
    while _runs(left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (_runs(left), _runs(forgotten)) == (False, True)
    os.kill(forgotten, signal.SIGKILL)


def test_a_child_does_not_outlive_a_parent_that_dies_right_after_its_start(tmp_path: Path) -> None:
    script = (
        "import subprocess, os, pathlib; from rift import supervisor; guard = supervisor.Guard();"
        "folder = pathlib.Path(os.getcwd()); real = subprocess.Popen;"
        "started = lambda *a, **k: (print(real(*a, **k).pid, flush=True), os.kill(os.getpid(), 9));"
        "subprocess.Popen = started; parent = supervisor.Parent(folder, guard, print);"
        "supervisor.Child('child', lambda: ['sleep', '100'], parent).start()"
    )
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 5
    while _runs(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(done.stdout))


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
            while not any("exit status 127" in line for line in said):  # noqa: ASYNC110  # another process
                await anyio.sleep(0.05)
        program.write_text("#!/bin/sh\nexec sleep 100\n")
        program.chmod(0o700)
        with anyio.fail_after(10):
            while not one.runs:  # noqa: ASYNC110  # another process
                await anyio.sleep(0.05)
        await one.stop(0)
    guard.dismiss()


@pytest.mark.anyio
async def test_a_restart_comes_at_once_and_ends_a_back_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BACK_OFF_S", (60.0,))
    guard, said, program = Guard(), list[str](), tmp_path / "program"
    program.write_text(
        "#!/bin/sh\n[ -e fails ] || exec sleep 100\nexit 1\n".replace("fails", str(tmp_path / "fails"))
    )
    program.chmod(0o700)
    one = Child("child", lambda: [str(program)], Parent(tmp_path, guard, said.append))

    async def eventually(condition: Callable[[], object]) -> None:
        with anyio.fail_after(10):
            while not condition():  # noqa: ASYNC110  # another process
                await anyio.sleep(0.02)

    one.start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.supervise)
        first = one._process
        one.restart()
        await eventually(lambda: one.runs and one._process is not first)
        assert said == []
        one.hurry()
        (tmp_path / "fails").touch()
        one.restart()
        await eventually(lambda: said)
        assert not one.runs, "it waits"
        (tmp_path / "fails").unlink()
        one.hurry()
        await eventually(lambda: one.runs)
        await one.stop(0)
    guard.dismiss()


@pytest.mark.anyio
async def test_a_child_starts_although_its_log_cannot_be_opened(tmp_path: Path) -> None:
    guard = Guard()
    (tmp_path / "child.log").mkdir()
    one = child(tmp_path, "exec sleep 100", guard, [], [])
    one.start()
    assert one.runs
    await one.stop(0)
    guard.dismiss()


def test_a_large_log_is_moved_to_one_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOG_BYTES_MAX", 10)
    large, small = tmp_path / "large.log", tmp_path / "small.log"
    small.write_text("0123456789")
    with large.open("a") as writer:
        for text in ("older line\n", "newer line\n"):
            writer.write(text)
            writer.flush()
            supervisor.shorten_logs(tmp_path)
            assert (large.read_text(), (tmp_path / "large.log.1").read_text()) == ("", text)
        writer.write("last")
    assert (large.read_text(), small.read_text()) == ("last", "0123456789")


def test_a_large_log_is_dropped_where_its_copy_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOG_BYTES_MAX", 10)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        log = disk.path / "a.log"
        log.write_bytes(bytes(1 << 19))
        disk.fill()
        supervisor.shorten_logs(disk.path)
        assert {file.name: file.stat().st_size for file in disk.path.glob("*log*")} == {"a.log": 0}
