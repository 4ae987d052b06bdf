"""Child processes that are supervised, stopped in order, and never left behind.

Each child leads a process group of its own: a Ctrl-C reaches only us, and a whole group (an engine starts
processes too) can be ended at once. They share our session, for Linux shares the processor out among
sessions first, and an engine that polls in one of its own keeps the broker of another waiting for 100 ms. A
*guard*, a shell in yet another group, waits for our end by whatever cause and then ends the groups that we
named to it.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import anyio
import anyio.to_thread

GUARD = """
while read -r group; do groups="$groups -$group"; done
[ -z "$groups" ] || kill -9 $groups
"""

# A child that lives this long was well: the next start is at once again.
WELL_S = 60.0
BACK_OFF_S = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)

# Of a log that is looked at for its last line.
LAST_BYTES = 4096

# How often a child is looked at. The kernel's word would come sooner, through a thread per child.
POLL_S = 0.05


class Guard:
    """Ends process groups once this process is gone."""

    def __init__(self) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )

    def add(self, group: int) -> None:
        assert self._shell.stdin is not None, "the guard reads our words"
        self._shell.stdin.write(b"%d\n" % group)
        self._shell.stdin.flush()

    def dismiss(self) -> None:
        with self._shell:
            self._shell.kill()


class Child:
    """One supervised process. `command` is asked at each start; `ended` is told of each end."""

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        *,
        logs: Path,
        guard: Guard,
        say: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        ended: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        self.name = name
        self._command, self._guard, self._say, self._ended = command, guard, say, ended
        self._environment = environment or {}
        self._log = logs / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                env={**os.environ, **self._environment},
            )
        self._guard.add(self._process.pid)

    async def supervise(self) -> None:
        """Start the child again whenever it ends, later each time, until `stop`."""
        failures = 0
        while not self._stopping:
            began_at = anyio.current_time()
            status = await self._exit_status()
            self._end_group()
            if self._stopping:
                return
            if self._ended is not None:
                await self._ended(status)
            failures = 0 if anyio.current_time() - began_at > WELL_S else failures
            pause_s = BACK_OFF_S[min(failures, len(BACK_OFF_S) - 1)]
            failures += 1
            self._say(f"{self.name} ended ({_words(status)}): {self._last_line()}")
            self._say(f"starting it again in {pause_s:g} s; its log is {self._log}")
            await anyio.sleep(pause_s)
            if not self._stopping:
                self.start()

    async def stop(self, within_s: float) -> None:
        """Ask the child to end; end its whole group after `within_s`, or once it has."""
        self._stopping = True
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with anyio.move_on_after(within_s):
            await self._exit_status()
        self._end_group()

    async def _exit_status(self) -> int:
        assert self._process is not None, f"{self.name} was never started"
        while (status := self._process.poll()) is None:  # noqa: ASYNC110  # another process
            await anyio.sleep(POLL_S)
        return status

    def _last_line(self) -> str:
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError as error:
            return str(error)
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def _end_group(self) -> None:
        assert self._process is not None, f"{self.name} was never started"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _words(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
