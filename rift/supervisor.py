"""Child processes that are supervised, stopped in order, and never left behind.

Each child leads its own process group, so that Ctrl-C reaches only this process, and a child can be killed
together with the processes it started, such as an engine's. The children share our session: Linux divides the
processor among sessions first, and an engine that polls in another session delayed the broker by 100 ms. A
guard, a shell in a process group of its own, waits for the end of this process, even by kill -9, and then
kills the groups it was given.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import anyio
import anyio.to_thread

from events.errors import reason
from rift.logs import formats

# Ended groups are removed from the list, because the system soon reuses their numbers.
GUARD = """
while read -r word group; do
  rest=
  for one in $groups; do [ "$one" = "-$group" ] || rest="$rest $one"; done
  groups=$rest
  [ "$word" = end ] || groups="$groups -$group"
done
[ -z "$groups" ] || kill -9 $groups
"""

# A child adds its own group to the guard's list, because this process may die before it could. Until then the
# child holds the guard's pipe open, so the guard kills only once every child is on its list.
CHILD = 'echo "add $$"; exec "$@" >&2'

# Makes a worker claim no further requests, finish those it has, and exit.
RETIRE = signal.SIGUSR1

# Signals that come from another process. Any other end is the child's own failure.
KILLED_BY_HOST = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# After a run of this length, back-off starts again from its first step.
WELL_S = 60.0
BACK_OFF_S = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)

# Logs are looked at this often, and shortened above this size. One older file of each is kept.
LOGS_POLL_S = 10.0
LOG_BYTES_MAX = 16 * 1024 * 1024

# How much of a log is searched for the last message. Libraries may write after it.
LAST_BYTES = 16384


class Guard:
    """Kill process groups once this process is gone. A guard that was killed is replaced."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._shell = _shell()

    def start(
        self, command: Sequence[str], *, output: BinaryIO, environment: Mapping[str, str]
    ) -> "subprocess.Popen[bytes]":
        """Start a process that leads a group of its own, which is killed once this process is gone."""
        self.check()
        process = subprocess.Popen(
            ["/bin/sh", "-c", CHILD, "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=self._pipe,
            stderr=output,
            process_group=0,
            env=environment,
        )
        self._groups.add(process.pid)
        return process

    def add(self, group: int) -> None:
        """Add a group that was started elsewhere."""
        self._groups.add(group)
        self._send(b"add %d\n" % group)

    def ended(self, group: int) -> None:
        """Remove a group that has ended: the system may reuse its number."""
        self._groups.discard(group)
        self._send(b"end %d\n" % group)

    def check(self) -> None:
        """Start another guard if this one was killed."""
        if self._shell.poll() is not None:
            self._pipe.close()
            self._shell = _shell()
            for group in self._groups:
                self._send(b"add %d\n" % group)

    def _send(self, line: bytes) -> None:
        self.check()
        # Killed since then, it is replaced at the next check.
        with contextlib.suppress(BrokenPipeError):
            self._pipe.write(line)

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._shell.stdin is not None, "the guard was started with a pipe"
        return self._shell.stdin

    def dismiss(self) -> None:
        with self._shell:
            self._shell.kill()


def _shell() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        ["/bin/sh", "-c", GUARD],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )


def shorten_logs(logs: Path) -> None:
    """Move the content of each log that is larger than LOG_BYTES_MAX to one older file.

    The children append to open files, so the content is copied. Lines written during the copy are lost. If
    the disk has no room for a copy, the content is dropped: a log must not keep a disk full.
    """
    for log in logs.glob("*.log"):
        with contextlib.suppress(OSError):
            if log.stat().st_size > LOG_BYTES_MAX:
                older = log.with_suffix(".log.1")
                try:
                    shutil.copyfile(log, older)
                except OSError:
                    older.unlink(missing_ok=True)
                os.truncate(log, 0)


class Parent(NamedTuple):
    """Shared by the children of this process: the folder of their logs, the guard that kills them if this
    process dies, and `notify`, which shows the operator one line."""

    logs: Path
    guard: Guard
    notify: Callable[[str], None]


class Child:
    """One supervised process. `command` is called at each start, `ended` with the exit status at each end."""

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        parent: Parent,
        *,
        environment: Mapping[str, str] | None = None,
        ended: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        self.name = name
        self._command = command
        self._parent = parent
        self._ended = ended
        self._environment = environment or {}
        self.log = parent.logs / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        # The exit status, and why we killed the child, "" if we did not.
        self._end = (0, "")
        self._log_start = 0
        self._is_stopping = False
        self._is_retiring = False
        self._hurry = anyio.Event()

    @property
    def runs(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        with self._output() as output:
            self._log_start = output.tell()
            self._process = self._parent.guard.start(
                self._command(), output=output, environment={**os.environ, **self._environment}
            )

    def _output(self) -> BinaryIO:
        """Open the log. A disk that takes no new file must not keep the child from running."""
        try:
            return self.log.open("ab")
        except OSError:
            return open(os.devnull, "ab")  # the caller closes it

    async def supervise(self) -> None:
        """Restart the child whenever it ends, with back-off, until `stop` or `retire`."""
        failures = 0
        while True:
            started_s = anyio.current_time()
            await self._exit()
            self.kill()
            if self._is_stopping:
                return
            status, why = self._end
            if self._ended is not None:
                await self._ended(status)
            if self._is_retiring:
                return
            failures = 0 if anyio.current_time() - started_s > WELL_S else failures
            pause_s = BACK_OFF_S[min(failures, len(BACK_OFF_S) - 1)]
            failures += 1
            if not self._hurry.is_set():
                self._parent.notify(f"{self.name} ended{f': {why}' if why else self._reason(status)}")
                self._parent.notify(f"restarting it in {pause_s:g} s; its log is {self.log}")
            with anyio.move_on_after(pause_s):
                await self._hurry.wait()
            self._hurry = anyio.Event()
            if self._is_stopping or self._is_retiring:
                return
            try:
                self.start()
            except OSError as error:
                self._parent.notify(f"{self.name} cannot be started: {reason(error)}")

    def restart(self) -> None:
        """Kill the child, and start it again at once and without a message."""
        self._hurry.set()
        self._signal(signal.SIGKILL)

    def hurry(self) -> None:
        """End the back-off of a child that has ended, because the reason is gone."""
        if not self.runs:
            self._hurry.set()

    async def stop(self, within_s: float) -> None:
        """Send SIGTERM, and kill the whole group when the child has ended or after `within_s`."""
        self._is_stopping = True
        self._signal(signal.SIGTERM)
        with anyio.move_on_after(within_s):
            await self._exit()
        self.kill()

    def retire(self) -> None:
        """Ask the child to finish its requests and exit, and do not restart it. `ended` is still called."""
        self._is_retiring = True
        self._signal(RETIRE)

    def kill(self, why: str = "") -> None:
        """Kill the child's whole group, including what an ended leader left behind. `why` is shown."""
        if (process := self._process) is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._end = (process.wait(), why)
        self._process = None
        self._parent.guard.ended(process.pid)

    def _reason(self, status: int) -> str:
        """Return why the child ended, as far as it is known: what a killed process wrote last is not it."""
        if status == -signal.SIGKILL:
            return f" ({words(status)}): Linux does this when memory runs out"
        # Nor is that of one that stopped in order, as after a signal.
        knows_why = status and not is_killed(status)
        return f" ({words(status)}): {self.last_line()}" if knows_why else f" ({words(status)})"

    def last_line(self) -> str:
        """Return the last line in the log since this start: Rift's own last message, else any last line."""
        try:
            with self.log.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                start = self._log_start if self._log_start <= end else 0  # the log was shortened meanwhile
                file.seek(max(start, end - LAST_BYTES))
                lines = [line.strip() for line in file.read().decode(errors="replace").split("\n")]
        except OSError as error:
            return reason(error)
        written = [formats.parsed(line) for line in lines if line]
        own = [message for logger, message in written if logger == formats.LAST]
        return (own or [message for _, message in written] or ["it logged nothing"])[-1]

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    async def _exit(self) -> None:
        """Return once the child has ended."""
        if self._process is None or self._process.poll() is not None:
            return
        # The descriptor of a process can be read once the process has ended.
        descriptor = os.pidfd_open(self._process.pid)
        try:
            await anyio.wait_readable(descriptor)
        finally:
            os.close(descriptor)


def words(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def is_killed(status: int) -> bool:
    """Return whether another process ended the one that left this status."""
    return -status in KILLED_BY_HOST
