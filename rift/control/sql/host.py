"""Start the SQL process, pass questions to it, and end it: after a while without questions, or at a limit."""

import contextlib
import os
import signal
import sys
from subprocess import PIPE

import anyio
import msgspec
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from events.contracts import (
    REPLY_BYTES_MAX,
    SQL_ANSWER_S,
    SQL_BYTES_MAX,
    SQL_CATCH_UP_S,
    SQL_KILL_S,
    SQL_QUEUE_S,
    SQL_START_S,
)
from rift.control.sql.frames import BEGUN, HEADER, QUESTION, SETUP, SqlSetup, frame
from rift.rpc import QuestionRefused

# An idle process holds some 100 MB and follows the log.
IDLE_S = 600.0
# Questions that wait for the one that is being answered.
WAITING_MAX = 8
PROCESS = "rift.control.sql.process"

AGAIN = "ask again, or for less"


class SqlHost:
    """One SQL process at a time, and the questions to it, one at a time and in their order. `asked` are under
    way, `answered` and `refused` have ended."""

    def __init__(self, setup: SqlSetup) -> None:
        self._setup = setup
        self._process: Process | None = None
        self._replies: BufferedByteReceiveStream | None = None
        self._turn = anyio.Lock()
        self.asked = 0
        self.answered = 0
        self.refused = 0
        self._asked_at_s = 0.0

    async def run(self) -> None:
        """End the process IDLE_S after its last question; kill it when cancelled."""
        try:
            while True:
                await anyio.sleep(IDLE_S / 10)
                async with self._turn:
                    if anyio.current_time() - self._asked_at_s >= IDLE_S:
                        await self.kill()
        finally:
            with anyio.CancelScope(shield=True):
                await self.kill()

    async def ask(self, sql: str) -> bytes:
        """Return the process's reply. Raises QuestionRefused."""
        try:
            reply = await self._ask(sql)
        except QuestionRefused:
            self.refused += 1
            raise
        self.answered += 1
        return reply

    async def _ask(self, sql: str) -> bytes:
        question = sql.encode(errors="surrogatepass")
        if len(question) > SQL_BYTES_MAX:
            raise QuestionRefused(f"the question has {len(question)} bytes, more than {SQL_BYTES_MAX}")
        if self.asked > WAITING_MAX:
            raise QuestionRefused(f"{WAITING_MAX} questions wait for an answer; ask again in a minute")
        self.asked += 1
        try:
            with anyio.move_on_after(SQL_QUEUE_S) as timer:
                await self._turn.acquire()
            if timer.cancelled_caught:
                why = f"earlier questions took more than {SQL_QUEUE_S:g} s; ask again in a minute"
                raise QuestionRefused(why)
            try:
                return await self._answer(question)
            finally:
                self._turn.release()
        finally:
            self.asked -= 1

    async def _answer(self, question: bytes) -> bytes:
        """Ask the process. Kill it if it does not reply in time, dies, or the asker is cancelled."""
        replied = False
        late = f"the SQL process does not answer; {AGAIN}"
        try:
            with anyio.fail_after(SQL_START_S + SQL_CATCH_UP_S):
                await self._write(frame(QUESTION, question))
                kind, reply = await self._read()
            if kind == BEGUN:
                late = f"not answered within {SQL_ANSWER_S:g} s; {AGAIN}"
                with anyio.fail_after(SQL_KILL_S):
                    kind, reply = await self._read()
            replied = True
            return reply
        except TimeoutError as error:
            raise QuestionRefused(late) from error
        except (anyio.BrokenResourceError, anyio.EndOfStream, anyio.IncompleteRead) as error:
            raise QuestionRefused(f"the SQL process {await self._end()} at this question; {AGAIN}") from error
        finally:
            self._asked_at_s = anyio.current_time()
            if not replied:
                with anyio.CancelScope(shield=True):
                    await self.kill()

    async def _write(self, data: bytes) -> None:
        """Send a question to the process; start it if none runs."""
        if self._process is not None and self._process.returncode is not None:
            await self.kill()
        if self._process is None:
            # The database is named for people who look at the list of processes.
            command = [sys.executable, "-P", "-m", PROCESS, self._setup.database, str(os.getpid())]
            self._process = await anyio.open_process(command, stdin=PIPE, stdout=PIPE, stderr=None)
            assert self._process.stdout is not None, "a pipe was asked for"
            self._replies = BufferedByteReceiveStream(self._process.stdout)
            data = frame(SETUP, msgspec.json.encode(self._setup)) + data
        assert self._process.stdin is not None, "a pipe was asked for"
        await self._process.stdin.send(data)

    async def _read(self) -> tuple[bytes, bytes]:
        assert self._replies is not None, "the process was started"
        kind, length = HEADER.unpack(await self._replies.receive_exactly(HEADER.size))
        if length > REPLY_BYTES_MAX:
            raise QuestionRefused(f"the answer has {length} bytes, more than {REPLY_BYTES_MAX}; use LIMIT")
        return kind, await self._replies.receive_exactly(length)

    async def _end(self) -> str:
        """Return how the process ended by itself."""
        assert self._process is not None, "its end was read"
        with anyio.move_on_after(1):
            await self._process.wait()
        status = self._process.returncode
        if status is not None and status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    async def kill(self) -> None:
        """Kill the process, if one runs: it can die at any time, and continues from its file."""
        process = self._process
        self._process = None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            await process.aclose()


async def ask_once(setup: SqlSetup, sql: str) -> bytes:
    """Return the reply of a process that is started for one question. Raises QuestionRefused."""
    host = SqlHost(setup)
    try:
        return await host.ask(sql)
    finally:
        with anyio.CancelScope(shield=True):
            await host.kill()
