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

# Groups come and go as the fleet grows and shrinks, and a number that is free is another's soon.
GUARD = """
while read -r word group; do
  rest=
  for one in $groups; do [ "$one" = "-$group" ] || rest="$rest $one"; done
  groups=$rest
  [ "$word" = end ] || groups="$groups -$group"
done
[ -z "$groups" ] || kill -9 $groups
"""

# Tells a worker to take nothing more, to finish all that it has, and to end.
RETIRE = signal.SIGUSR1

# A child that ends by one of these was ended by somebody else; by any other, by itself.
KILLED_BY_HOST = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# A child that lives this long was well: the next start is at once again.
WELL_S = 60.0
BACK_OFF_S = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)

# Of a log that is looked at for its last words. Libraries have theirs behind ours.
LAST_BYTES = 16384
OURS = "rift: "

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
        self._tell(b"add %d\n" % group)

    def ended(self, group: int) -> None:
        """The group is gone, and its number free for others."""
        self._tell(b"end %d\n" % group)

    def _tell(self, words: bytes) -> None:
        assert self._shell.stdin is not None, "the guard reads our words"
        self._shell.stdin.write(words)
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
        self._command = command
        self._guard = guard
        self._say = say
        self._ended = ended
        self._environment = environment or {}
        self._log = logs / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._status = self._log_from = 0
        self._stopping = self._retiring = False

    @property
    def runs(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._log_from = output.tell()
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
        """Start the child again whenever it ends, later each time, until `stop` or `retire`."""
        failures = 0
        while True:
            began_at = anyio.current_time()
            await self._exit()
            self.kill()
            if self._stopping:
                return
            status = self._status
            if self._ended is not None:
                await self._ended(status)
            if self._retiring:
                return
            failures = 0 if anyio.current_time() - began_at > WELL_S else failures
            pause_s = BACK_OFF_S[min(failures, len(BACK_OFF_S) - 1)]
            failures += 1
            self._say(f"{self.name} ended ({words(status)}): {self.last_line()}")
            self._say(f"starting it again in {pause_s:g} s; its log is {self._log}")
            await anyio.sleep(pause_s)
            if self._stopping or self._retiring:
                return
            try:
                self.start()
            except OSError as error:
                self._say(f"{self.name} cannot be started: {error}")

    async def stop(self, within_s: float) -> None:
        """Ask the child to end; end its whole group after `within_s`, or once it has."""
        self._stopping = True
        self._signal(signal.SIGTERM)
        with anyio.move_on_after(within_s):
            await self._exit()
        self.kill()

    def retire(self) -> None:
        """Ask the child to finish what it has, and do not start it again. `ended` is told of its end."""
        self._retiring = True
        self._signal(RETIRE)

    def kill(self) -> None:
        """End the child's whole group at once, or what its leader left of it."""
        if (process := self._process) is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._status = process.wait()
        self._process = None
        self._guard.ended(process.pid)

    def last_line(self) -> str:
        """Return the last line that this start wrote into its log: the last of ours, else of anybody's."""
        try:
            with self._log.open("rb") as file:
                file.seek(max(self._log_from, file.seek(0, os.SEEK_END) - LAST_BYTES))
                lines = [line.strip() for line in file.read().decode(errors="replace").split("\n")]
        except OSError as error:
            return str(error)
        said = [line for line in lines if line]
        ours = [line.removeprefix(OURS) for line in said if line.startswith(OURS)]
        return (ours or said or ["it said nothing"])[-1]

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    async def _exit(self) -> None:
        while self._process is not None and self._process.poll() is None:  # noqa: ASYNC110  # another process
            await anyio.sleep(POLL_S)


def words(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def is_killed(status: int) -> bool:
    """Say whether somebody else ended the process that left this status."""
    return -status in KILLED_BY_HOST
