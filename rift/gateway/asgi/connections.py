"""The sockets of clients: how many there are, how long each may wait, and how much each may buffer.

A client needs no key to connect, so every wait has a deadline and every buffer a size. This module knows
nothing of HTTP but the answers to requests that no protocol can answer.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import resource
from collections.abc import Callable
from typing import Literal

import anyio
import msgspec

from rift.gateway.asgi.cors import ALWAYS
from rift.gateway.asgi.errors import HTTPError, retry_after
from rift.gateway.asgi.tally import Tally
from rift.gateway.bounds import Bound

logger = logging.getLogger(__name__)

# More connections than one process can stream to; each may buffer about 200 KB.
CONNECTIONS_MAX = 8192

# Files that are kept for everything else: the log's connections, the process's own files, and the
# connections that are being refused.
FILES_RESERVED = 256

# Connections beyond the limit that may take time to read their refusal. Others are closed at once, which
# can reset the connection before the refusal is read.
REFUSED_MAX = 64

# The most connections that the loop accepts at once, as a part of the limit. Further ones are accepted after
# those before them have been read.
BACKLOG_SHARE = 4
BACKLOG_MAX = 1024

# A connection that has waited for less time is not closed for another: its client may be sending.
WAIT_S_MIN = 0.25

# How many waiting connections are looked at to find one that can be closed.
CANDIDATES = 16

# How long a client may take to send its first byte, and then the head of a request.
HEAD_S = 10

# How long an idle connection is kept after an answer: longer than most clients and proxies keep theirs.
KEEP_ALIVE_S = 75

# In this time a client must read WRITE_BYTES, or everything that waits for it: about 2 KB/s. A deadline for
# the whole buffer would cut slow clients off from long answers; one for any progress could be met by reading
# one byte now and then.
WRITE_S = 30

# The size of a connection's buffer from which a writer waits: asyncio's default.
WRITE_BYTES = 64 * 1024

# The bytes that clients have not read yet, of all connections: beyond it the one with the most is closed.
UNREAD_BYTES_MAX = 256 * 1024 * 1024

# The most bytes that are read before the server takes them.
READ_BYTES = 64 * 1024

# How long a client may take to close its side after the last answer. Closing at once, with bytes unread,
# would reset the connection, and the reset can overtake the answer.
LINGER_S = 2

# The pause between two checks of all deadlines.
CHECK_S = 1

# How much longer each pause between two probes is than the one before. Some clients, such as Go's, accept
# only five interim answers. But a relay passes on that its client is gone only after the third or fourth.
PROBE_GROWTH = 2

# What a connection waits for or does. A closed one only sends what it has left, and discards the rest.
Phase = Literal["idle", "head", "body", "answer", "closed"]

# One buffer for all sockets: the loop reads one at a time, and the bytes are copied at once.
_BUFFER = memoryview(bytearray(READ_BYTES))


def connections_max() -> int:
    """Raise this process's limit of open files as far as allowed, and return the connections it leaves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems refuse a limit that they report as possible.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    files = CONNECTIONS_MAX + FILES_RESERVED if soft == resource.RLIM_INFINITY else soft
    return min(CONNECTIONS_MAX, max(files - FILES_RESERVED, files // 2))


def backlog(limit: int) -> int:
    """Return how many connections may wait to be accepted while the loop is busy."""
    return max(1, min(BACKLOG_MAX, limit // BACKLOG_SHARE))


def last_answer(error: HTTPError) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the headers and the body of an error answer after which the connection is closed."""
    body = msgspec.json.encode(error.body())
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        *ALWAYS,
        *error.headers,
    ]
    return headers, body


def refusal(error: HTTPError) -> bytes:
    """Return the last answer as HTTP/1.1."""
    headers, body = last_answer(error)
    head = b"".join(b"%b: %b\r\n" % each for each in headers)
    return b"HTTP/1.1 %d \r\n%b\r\n%b" % (error.status, head, body)


class Connections:
    """All connections of one gateway. At the limit, a new one takes the place of the one that has waited
    longest for its client: for a request, for the rest of its body, or for the client to read. If all
    clients wait for the gateway, the new one is refused.

    `refused` is called with the status and the code of each answer that the app did not give.

    Many connections may be accepted before the first is read. So one whose bytes have arrived waits for the
    gateway, and each has WAIT_S_MIN to send."""

    def __init__(
        self, limit: int, *, refused: Callable[[int, str], None] = lambda status, code: None
    ) -> None:
        self.limit = limit
        self.refused = refused
        self._open: dict[ClientConnection, None] = {}
        # Those that wait for their clients, and since when, the longest wait first.
        self._waiting: dict[ClientConnection, float] = {}
        # Those whose clients must read before more is written, with their unread bytes then, and the sum.
        self._behind: dict[ClientConnection, int] = {}
        self._unread = 0
        self._tally = Tally()

    @property
    def open(self) -> int:
        return len(self._open)

    def bounds(self) -> list[Bound]:
        return [
            Bound("connections", self.limit, self.open),
            Bound("unread_bytes", UNREAD_BYTES_MAX, self._unread),
        ]

    def add(self, connection: "ClientConnection") -> None:
        """Accept, refuse or close a new connection."""
        is_full = len(self._open) >= self.limit
        self._open[connection] = None
        if is_full and (idle := self._longest_wait()):
            self._report("closed")
            idle.abort()
        elif is_full:
            self._report("refused")
            self._refuse(connection)
        self.wait(connection)

    def _longest_wait(self) -> "ClientConnection | None":
        until_s = anyio.current_time() - WAIT_S_MIN
        candidates = itertools.islice(self._waiting.items(), CANDIDATES)
        return next(
            (each for each, since_s in candidates if since_s <= until_s and not each.is_pending), None
        )

    def _refuse(self, connection: "ClientConnection") -> None:
        message = f"all {self.limit} connections of this gateway are busy with requests; try again"
        error = HTTPError(503, message, code="too_many_connections", headers=retry_after(2))
        connection.refuse(error, lingers=len(self._open) <= self.limit + REFUSED_MAX)

    def wait(self, connection: "ClientConnection") -> None:
        """Note that a connection waits for its client from now on, or still."""
        if connection in self._open:
            self._waiting.setdefault(connection, anyio.current_time())

    def work(self, connection: "ClientConnection") -> None:
        """Note that the client waits for the gateway."""
        self._waiting.pop(connection, None)

    def fall_behind(self, connection: "ClientConnection") -> None:
        """Note that a client must read before more is written. All such clients together have a limit."""
        self.wait(connection)
        if connection in self._open:
            self._behind[connection] = connection.unread
            self._unread += connection.unread
        while self._unread > UNREAD_BYTES_MAX:
            max(self._behind, key=self._behind.__getitem__).abort()

    def catch_up(self, connection: "ClientConnection") -> None:
        self._unread -= self._behind.pop(connection, 0)

    def remove(self, connection: "ClientConnection") -> None:
        self.catch_up(connection)
        self._open.pop(connection, None)
        self._waiting.pop(connection, None)

    def close_waiting(self) -> None:
        for connection in list(self._waiting):
            connection.close()

    def abort_all(self) -> None:
        for connection in list(self._open):
            connection.abort()

    async def check(self) -> None:
        """End every connection whose deadline has passed, for ever."""
        while True:
            await anyio.sleep(CHECK_S)
            now_s = anyio.current_time()
            for connection in list(self._open):
                connection.check(now_s)

    def _report(self, kind: Literal["closed", "refused"]) -> None:
        if counts := self._tally.add(kind):
            logger.warning(
                "all %d connections are in use: closed %d that waited for their clients, refused %d; "
                "add a gateway, or raise the hard limit of open files if it is below %d",
                self.limit,
                counts["closed"],
                counts["refused"],
                CONNECTIONS_MAX + FILES_RESERVED,
            )


class ClientConnection(asyncio.BufferedProtocol):
    """One client's socket. `reading` is the scope of the task that reads it; it ends when the client is gone,
    or `close` or `abort` is called.

    A client that has closed its side may be gone, or may still read its answer. Only bytes can tell: they
    reset the connection of a client that is gone. So during an answer `probe` is written to it, ever more
    rarely.
    """

    def __init__(self, connections: Connections, start: Callable[["ClientConnection"], object]) -> None:
        self._connections = connections
        self._start = start
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._arrived = asyncio.Event()
        self._at_eof = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._phase: Phase = "idle"
        # By when the head of a request must be here, or the client must have closed; none during a request.
        self._deadline_s = math.inf
        self._written = _Progress()
        self.probe = _Probe()
        self.reading = anyio.CancelScope()

    @property
    def peer(self) -> tuple[str, int] | None:
        """Return the address and port of the other side."""
        name = self._transport.get_extra_info("peername")
        return (name[0], name[1]) if isinstance(name, tuple) else None

    # --- called by the loop ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._deadline_s = anyio.current_time() + HEAD_S
        self._connections.add(self)
        self._start(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove(self)
        self._phase = "closed"
        self._received.clear()
        self._writable.set()
        self.reading.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _BUFFER if self._is_closed else _BUFFER[: READ_BYTES - len(self._received)]

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_closed:
            return
        # Further bytes of a head do not extend its deadline.
        if self._phase == "idle":
            self._phase = "head"
            self._deadline_s = anyio.current_time() + HEAD_S
        self._received += _BUFFER[:nbytes]
        self._arrived.set()
        if len(self._received) == READ_BYTES:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """Return whether the socket stays open: until what has arrived is read and answered."""
        self._at_eof = True
        self._arrived.set()
        self._probe(anyio.current_time())
        return not self._is_closed

    def pause_writing(self) -> None:
        self._writable.clear()
        self._connections.fall_behind(self)

    def resume_writing(self) -> None:
        self._writable.set()
        self._connections.catch_up(self)
        if self._phase == "answer":
            self._connections.work(self)

    # --- called by the server --------------------------------------------------------------------------

    @property
    def unread(self) -> int:
        """The bytes that the client has not taken."""
        return self._transport.get_write_buffer_size()

    @property
    def is_pending(self) -> bool:
        """Return whether the client has sent bytes that the server had no time to read."""
        return bool(self._received) and self._writable.is_set() and not self._is_closed

    @property
    def _is_closed(self) -> bool:
        return self._phase == "closed"

    async def read(self) -> bytes:
        """Return the next bytes. At the end, wait for the answer that is under way, and return b""."""
        while not self._received and not (self._at_eof and self._phase != "answer"):
            self._arrived.clear()
            await self._arrived.wait()
        data = bytes(self._received)
        self._received = bytearray()
        if not self._at_eof:
            self._transport.resume_reading()
        return data

    async def write(self, data: bytes) -> None:
        """Write, and wait while the client is slow. Do nothing if the connection is closed."""
        if not self._is_closed:
            self._put(data)
            await self._writable.wait()

    def write_now(self, data: bytes) -> bool:
        """Write without waiting. Return False, and write nothing, if the client is slow or gone."""
        if self._is_closed or self.unread > WRITE_BYTES:
            return False
        self._put(data)
        return True

    def _put(self, data: bytes) -> None:
        self._transport.write(data)
        self._written.bytes += len(data)

    def begin_body(self) -> None:
        """The head of a request has arrived."""
        if not self._is_closed:
            self._phase = "body"
            self._deadline_s = math.inf

    def begin_answer(self, probe: bytes) -> None:
        """The request has arrived."""
        if self._phase == "body":
            self._phase = "answer"
            self.probe.data = probe
            if self._writable.is_set():
                self._connections.work(self)

    def end_answer(self) -> None:
        """Keep the connection for another request."""
        if not self._is_closed:
            self._phase = "idle"
            self._deadline_s = anyio.current_time() + KEEP_ALIVE_S
            self._connections.wait(self)
            self._arrived.set()

    def refuse(self, error: HTTPError, *, lingers: bool = True, to_app: bool = False) -> None:
        """Answer with an error and close. Without `lingers`, do not wait for the client to close too. With
        `to_app`, the app has the request, and notes the error."""
        if not self._is_closed:
            self._transport.write(refusal(error))
            if not to_app:
                self._connections.refused(error.status, error.code)
            self.close()
            if not lingers:
                self._transport.close()

    def close(self) -> None:
        """Read nothing more, and close when the client has read everything."""
        if self._is_closed:
            return
        self._phase = "closed"
        self.reading.cancel()
        self._deadline_s = anyio.current_time() + LINGER_S
        self._connections.wait(self)
        if self._at_eof:
            self._transport.close()
        elif not self._transport.is_closing():
            self._transport.write_eof()
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close now, and discard what the client has not read."""
        self._phase = "closed"
        self._connections.remove(self)
        self.reading.cancel()
        self._transport.abort()

    # --- deadlines -------------------------------------------------------------------------------------

    def check(self, now_s: float) -> None:
        """End the connection if a deadline has passed."""
        self._probe(now_s)
        if self._written.is_stuck(self.unread, now_s):
            self.abort()
        elif now_s < self._deadline_s:
            return
        elif self._is_closed:
            # What is unread has its own deadline.
            if not self.unread:
                self.abort()
        elif self._phase == "head":
            message = f"the head of the request did not arrive within {HEAD_S} s; send it again"
            self.refuse(HTTPError(408, message, code="head_timeout"))
        else:
            self.close()

    def _probe(self, now_s: float) -> None:
        """Find out whether a client that has closed its side is gone."""
        if self._at_eof and self._phase == "answer" and not self.unread and not self._transport.is_closing():
            self._put(self.probe.due(now_s))


class _Probe:
    """What finds out whether a client that has closed its side is gone, and when to send it."""

    def __init__(self) -> None:
        self.data = b""
        self._at_s = 0.0
        # Ends before the next check.
        self._pause_s = CHECK_S / 2

    def due(self, now_s: float) -> bytes:
        """Return what to send now, or b"" if it is too early."""
        if not self.data or now_s < self._at_s:
            return b""
        self._at_s = now_s + self._pause_s
        self._pause_s *= PROBE_GROWTH
        return self.data


class _Progress:
    """How much a client reads of what is written to it."""

    def __init__(self) -> None:
        self.bytes = 0
        self._goal = 0
        self._goal_at_s = 0.0

    def is_stuck(self, unread: int, now_s: float) -> bool:
        """Return whether the client has missed its goal for WRITE_S, and set the next goal if it has not."""
        read = self.bytes - unread
        if read >= self._goal:
            self._goal = min(self.bytes, read + WRITE_BYTES)
            self._goal_at_s = now_s
        return now_s > self._goal_at_s + WRITE_S
