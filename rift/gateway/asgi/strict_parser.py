"""Refuse heads and chunks that two HTTP parsers could read differently.

A proxy in front of a gateway may see another request than the gateway, and let through what it should stop.
h11 accepts many such forms for old clients. It reads every head, chunk header and trailer through its buffer,
so the buffer checks them. No other module imports h11.
"""

import re
from collections.abc import Callable

import h11
from h11._receivebuffer import ReceiveBuffer

# The headers of which a request may have one: those that the gateway reads, or that frame the request.
SINGLE = {
    b"access-control-request-method",
    b"authorization",
    b"content-encoding",
    b"content-length",
    b"content-type",
    b"host",
    b"idempotency-key",
    b"if-none-match",
    b"last-event-id",
    b"transfer-encoding",
    b"x-request-id",
}

# The longest head of a request, in bytes, and the most lines in it: each line takes a few microseconds, in
# which nobody else is served.
HEAD_BYTES = 16 * 1024
HEAD_LINES = 200

# The headers that the gateway, hypercorn or h11 reads. Bytes beyond ASCII, whose meaning depends on an
# encoding, may only be in others: a browser sends the cookies of every program on the same host.
READ = SINGLE | {b"connection", b"expect", b"upgrade"}

_CONTROL = re.compile(rb"[^\t\r\n\x20-\x7e\x80-\xff]")
_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n")
_CHUNK_HEADER = re.compile(rb"[0-9A-Fa-f]{1,16}\r\n")


class StrictBuffer(ReceiveBuffer):
    """h11's buffer. `problem` says why a request was refused. `is_idle` says whether a head comes next."""

    def __init__(self, is_idle: Callable[[], bool]) -> None:
        super().__init__()
        self.problem = ""
        self._is_idle = is_idle
        self._has_lines = self._has_skipped = False

    def maybe_extract_lines(self) -> list[bytearray] | None:
        # Old clients end a body with a line that its length does not count: RFC 9112, 2.2.
        if self._data[:2] == b"\r\n" and not self._has_skipped and self._is_idle():
            self._extract(2)
            self._has_skipped = True
        self._has_lines = True
        try:
            return super().maybe_extract_lines()
        finally:
            self._has_lines = False

    def maybe_extract_next_line(self) -> bytearray | None:
        line = super().maybe_extract_next_line()
        if line is not None and not _CHUNK_HEADER.fullmatch(line):
            self.refuse("a chunk's first line must be its size in hexadecimal digits, and nothing else")
        return line

    def _extract(self, count: int) -> bytearray:
        data = super()._extract(count)
        if self._has_lines:
            self._has_skipped = False
            if count > HEAD_BYTES or data.count(b"\n") > HEAD_LINES:
                self.refuse("its head is too large", 431)
            if problem := head_problem(bytes(data)):
                self.refuse(problem)
        return data

    def clear(self) -> None:
        self._extract(len(self))

    def refuse(self, problem: str, status: int = 400) -> None:
        """Note the problem, and raise h11.LocalProtocolError, which h11 expects of its parts."""
        self.problem = problem
        raise h11.LocalProtocolError(problem, status)


def strict_buffer(connection: h11.Connection) -> StrictBuffer:
    """Give a new connection a strict buffer, and return it."""
    buffer = StrictBuffer(lambda: connection.their_state is h11.IDLE)
    connection._receive_buffer = buffer  # h11 has no parameter for it
    return buffer


def is_request_whole(connection: h11.Connection) -> bool:
    return connection.their_state not in (h11.SEND_BODY, h11.ERROR)


def is_last(connection: h11.Connection) -> bool:
    """Return whether a whole request has arrived after which the connection closes."""
    return connection.their_state is h11.MUST_CLOSE


def is_answer_due(connection: h11.Connection) -> bool:
    """Return whether the head of the answer was not sent yet."""
    return connection.our_state is h11.SEND_RESPONSE


def head_problem(head: bytes) -> str:
    """Return what is ambiguous in the lines of a head or of trailers, or ""."""
    if _CONTROL.search(head):
        return "its head must not have control characters"
    if _BARE.search(head):
        return "the lines of its head must end in CR LF, not in one of them"
    names = []
    first, *lines = head.split(b"\r\n")
    if not first.isascii():
        return "its first line must be ASCII; encode other characters"
    for line in lines:
        name, colon, value = line.partition(b":")
        if name.strip() != name:
            return "a header must not begin with a space, continue another, or have a space before its colon"
        name = name.lower()
        if colon and name in SINGLE:
            names.append(name)
        if name in READ and not value.isascii():
            return f"its header {name.decode()} must be ASCII; encode other characters"
        if name == b"content-length" and not value.strip().isdigit():
            return "content-length must be one number"
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        return f"it must have one header {twice.decode()}, not several"
    if b"content-length" in names and b"transfer-encoding" in names:
        return "it must have content-length or transfer-encoding, not both"
    return ""


def request_problem(request: h11.Request) -> str:
    """Return what is ambiguous in a request that h11 has parsed, or ""."""
    if request.method != request.method.upper():
        return "its method must be in upper case"
    if not request.target.startswith(b"/"):
        return "its target must be a path that begins with /"
    if request.http_version == b"1.0" and any(name == b"transfer-encoding" for name, _ in request.headers):
        return "HTTP/1.0 has no transfer-encoding; send content-length"
    return ""
