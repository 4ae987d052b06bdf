"""Counts the system calls of a running process with strace."""

import shutil
import signal
import subprocess
from pathlib import Path

# A turn of an event loop is one of these calls: uvloop waits for events once in each turn, and so does Go's
# runtime. (The threads of zmq call `epoll_wait`.)
TURN = "epoll_pwait"
DETACHED_S = 10.0


class StraceMissing(Exception):
    """strace is not installed, or may not attach to a process."""


def check() -> None:
    """Raise StraceMissing if strace is not installed."""
    if shutil.which("strace") is None:
        raise StraceMissing("strace is not installed; install it, or leave out --syscalls")


class Trace:
    """The calls of one process between the first and the second `mark`, by name."""

    def __init__(self, pid: int, file: Path) -> None:
        self.calls: dict[str, int] = {}
        self._pid = pid
        self._file = file
        self._strace: subprocess.Popen[str] | None = None

    def mark(self) -> None:
        """Attach, and when called again detach and count. Raises StraceMissing."""
        if self._strace is None:
            command = ["strace", "-c", "-f", "-U", "calls,name", "-o", str(self._file), "-p", str(self._pid)]
            self._strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            assert self._strace.stderr is not None, "strace has a pipe"
            if "attached" not in (message := self._strace.stderr.readline()):
                self._strace.communicate(timeout=DETACHED_S)
                raise StraceMissing(f"strace cannot attach to a process: {message.strip()}")
        else:
            self._strace.send_signal(signal.SIGINT)
            self._strace.communicate(timeout=DETACHED_S)
            self.calls = parse(self._file.read_text())


def parse(table: str) -> dict[str, int]:
    """Return the calls by name of a table with the columns `calls` and `syscall`."""
    rows = [line.split() for line in table.splitlines()]
    return {row[1]: int(row[0]) for row in rows if len(row) == 2 and row[0].isdigit() and row[1] != "total"}


def turns(calls: dict[str, int]) -> int:
    return calls.get(TURN, 0)
