"""The SQL process: it follows the log into its own database file and answers one question at a time.

Its main thread reads questions and answers them, so that DuckDB has the largest stack there is; a second
thread follows the log. It writes nothing but its file, so it may be killed at any time.
"""

import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO, NoReturn

import msgspec
from anyio.from_thread import start_blocking_portal

from events.errors import EventsError, reason
from replay.errors import ReplayError
from replay.warehouse.queries import MEMORY
from replay.warehouse.result import QueryRefused
from replay.warehouse.warehouse import Warehouse
from rift.control.rpc import replies
from rift.control.sql.frames import BEGUN, HEADER, REPLY, SqlSetup, frame
from rift.control.sql.standby import SqlWarehouse, Standby
from rift.errors import RiftError
from rift.logs.setup import set_up
from rift.rpc import QuestionRefused

logger = logging.getLogger(__name__)

# What the whole process may take, the question included.
MEMORY_MAX_BYTES = 2 * 1024**3
# A process of the service that wants a core gets it: nine times as much as this one.
NICE = 10
# The first process that the kernel ends if memory runs out.
OOM_SCORE = "1000"

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer questions until control closes the pipe or dies."""
    set_up()
    _be_modest(parent=int(sys.argv[2]))
    questions = sys.stdin.buffer
    # A library that prints must not write between the frames.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if (first := _read(questions)) is None:
        return
    setup = msgspec.json.decode(first, type=SqlSetup)
    set_up(setup.log_format)
    try:
        if setup.url:
            _answer_from_log(setup, questions, answers)
        else:
            _answer_from_file(Path(setup.database), questions, answers)
    except (EventsError, ReplayError, RiftError, OSError) as error:
        _write(answers, REPLY, replies.error(reason(error), failed=True))


def _be_modest(parent: int) -> None:
    """Give way to the processes of the service, and die with the process `parent`, which started this one."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # it died before the line above
    # Ctrl-C is for the process that started this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    # A question may crash DuckDB, and its core would be gigabytes.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # a container may not offer it
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)


def _answer_from_log(setup: SqlSetup, questions: BinaryIO, answers: BinaryIO) -> NoReturn:
    standby = Standby(setup)
    with start_blocking_portal(backend="asyncio", backend_options={"use_uvloop": True}) as portal:
        portal.start_task_soon(standby.run)
        while (question := _read(questions)) is not None:
            standby.is_idle = False
            try:
                portal.call(standby.catch_up)
            except QuestionRefused as refused:
                _write(answers, REPLY, replies.error(str(refused)))
            except Exception as error:  # whatever ended the other thread, or a log that does not answer
                logger.exception("a question could not be answered")
                why = f"the SQL database cannot follow the log: {reason(error)}"
                _write(answers, REPLY, replies.error(why, failed=True))
            else:
                _write(answers, BEGUN)
                _write(answers, REPLY, _reply(standby.warehouse, question))
            if standby.failed:
                break
            standby.is_idle = True
        # Without waiting for the other thread: the file is whole at any moment.
        os._exit(int(standby.failed))


def _answer_from_file(database: Path, questions: BinaryIO, answers: BinaryIO) -> None:
    warehouse = SqlWarehouse.open(database)
    while (question := _read(questions)) is not None:
        _write(answers, BEGUN)
        _write(answers, REPLY, _reply(warehouse, question))
    warehouse.close()


def _reply(warehouse: Warehouse, question: bytes) -> bytes:
    """Answer a question within MEMORY_MAX_BYTES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _address_space_max()
    resource.setrlimit(
        resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
    )
    try:
        answer = warehouse.query(question.decode(errors="surrogatepass"))
        return replies.answered(answer, failed=False)
    except QueryRefused as refused:
        return replies.error(str(refused))
    except MemoryError:
        return replies.error(MEMORY)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_max() -> int:
    """Return the address space that lets the resident memory grow to MEMORY_MAX_BYTES: much of what DuckDB
    reserves is never touched."""
    size, resident = Path("/proc/self/statm").read_text().split()[:2]
    return (int(size) - int(resident)) * resource.getpagesize() + MEMORY_MAX_BYTES


def _read(file: BinaryIO) -> bytes | None:
    """Return the next frame's bytes, None at the end."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    _, length = HEADER.unpack(header)
    return file.read(length)


def _write(file: BinaryIO, kind: bytes, data: bytes = b"") -> None:
    """Write a frame; end the process if control closed the pipe."""
    try:
        file.write(frame(kind, data))
        file.flush()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
