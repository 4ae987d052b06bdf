"""The client library with nothing between a message and its socket.

The library reads in one task and writes in another, so every message costs two turns of the event loop. Here
bytes are parsed where the loop hands them over, and a publish writes to the socket. The protocol, its parser
and reconnecting remain the library's; so does everything that this socket cannot take at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any
from urllib.parse import ParseResult

import nats.errors
from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from nats.protocol.parser import PERMISSIONS_ERR

# Beyond this the library's writer waits for the socket, as its transport does by default.
UNSENT_BYTES_MAX = 64 * 1024

Parse = Callable[[bytes], Coroutine[Any, Any, None]]


class DirectClient(Client):
    """A client whose publishes go to the socket at once, unless it takes no more."""

    def __init__(self) -> None:
        super().__init__()
        self._transport: DirectTransport = DirectTransport(self)

    def send(self, command: bytes) -> bool:
        """Write a command of the protocol; return False, and write nothing, if it would have to wait."""
        if not self.is_connected or not self._transport.is_writable:
            return False
        self._pending.append(command)
        self._write_pending()
        return True

    @property
    def has_unsent(self) -> bool:
        """Whether bytes wait here, or may wait, because there is no socket that takes them."""
        return not self.is_connected or bool(self._pending) or self._transport.has_unsent

    async def _process_err(self, err_msg: str) -> None:
        """Reconnect after an error with which the broker ends the connection, such as a user without rights.

        The library closes the client for good, so the process would never return if the error is mended.
        """
        if PERMISSIONS_ERR in err_msg or not self.is_connected:
            await super()._process_err(err_msg)
            return
        error = nats.errors.Error(f"nats: {err_msg}")
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _process_headers(self, headers: Any) -> Any:
        """Return no headers if the library cannot parse them: a record's writer chose them, and every
        reader of the record would lose its connection."""
        try:
            return await super()._process_headers(headers)
        except (IndexError, ValueError):
            return None

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        if not self.is_connected or not self._transport.is_writable:
            return await super()._flush_pending(force_flush)
        self._write_pending()
        return None

    def _write_pending(self) -> None:
        self._transport.writelines(self._pending)  # type: ignore[no-untyped-call]
        self._pending = []
        self._pending_data_size = 0


class DirectTransport(TcpTransport):
    """A TCP connection that parses what it receives while the library's read loop waits for bytes."""

    def __init__(self, client: Client) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._client = client

    def __bool__(self) -> bool:
        """The library replaces a transport that is false, as its own is before the first connection."""
        return True

    @property
    def is_writable(self) -> bool:
        """Whether the socket takes bytes. If it is full, they would pile up here; if it is lost and the read
        loop has not learned of that yet, uvloop raises."""
        assert self._io_writer is not None, "asked while connected"
        socket = self._io_writer.transport
        return not socket.is_closing() and socket.get_write_buffer_size() <= UNSENT_BYTES_MAX

    @property
    def has_unsent(self) -> bool:
        """Whether bytes may wait for the socket. With TLS they always may: it keeps some of its own."""
        assert self._io_writer is not None, "asked while connected"
        is_plain = isinstance(self._io_reader, DirectReader)
        return not is_plain or self._io_writer.transport.get_write_buffer_size() > 0

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        assert uri.hostname is not None, "the library completes each address"
        assert uri.port is not None, "the library completes each address"
        # What came after the library gave up the last connection.
        self._client._ps.reset()
        loop = asyncio.get_running_loop()
        reader = DirectReader(limit=buffer_size, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        async with asyncio.timeout(connect_timeout):
            transport, _ = await loop.create_connection(lambda: protocol, uri.hostname, uri.port)
        self._bare_io_reader = self._io_reader = reader
        self._bare_io_writer = self._io_writer = asyncio.StreamWriter(transport, protocol, reader, loop)

    async def connect_tls(self, *arguments: Any, **options: Any) -> None:
        await super().connect_tls(*arguments, **options)
        # The library's protocol does not learn of TLS, so asyncio would warn at the end of each connection.
        self._io_writer._protocol._over_ssl = True  # type: ignore[union-attr]

    async def read(self, buffer_size: int) -> bytes:
        """Return bytes for the parser, or have it take what arrives and return nothing at the end."""
        if isinstance(self._io_reader, DirectReader):
            return await self._io_reader.read_with(self._client._ps.parse, buffer_size)
        # With TLS, the library has put a reader of its own in between.
        return bytes(await super().read(buffer_size))


class DirectReader(asyncio.StreamReader):
    """Passes bytes to a parser as they arrive, for as long as a task waits in `read_with`."""

    def __init__(self, *, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=limit, loop=loop)
        self._is_empty = False
        self._parse: Parse | None = None
        self._stopped = loop.create_future()
        self._rest: Awaitable[None] | None = None

    async def read_with(self, parse: Parse, size: int) -> bytes:
        """Return what was received before; then have `parse` take all bytes until the end of the stream.

        Raises what `parse` raises, and the error that ended the connection.
        """
        if not self._is_empty or self.exception() is not None:
            data = await self.read(size)
            self._is_empty = len(data) < size
            return data
        self._stopped = asyncio.get_running_loop().create_future()
        self._parse = parse
        try:
            await self._stopped
        finally:
            self._parse = None
        if self._rest is not None:
            rest, self._rest = self._rest, None
            await rest
        elif (error := self.exception()) is not None:
            raise error
        return b""

    def feed_data(self, data: Any) -> None:
        if self._parse is None:
            self._is_empty = False
            super().feed_data(data)
            return
        parsing = self._parse(data)
        try:
            waits_for = parsing.send(None)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001  # raised where the library expects it
            self._rest = _raised(error)
        else:
            self._rest = _Rest(parsing, waits_for)
        self._stop()

    def feed_eof(self) -> None:
        super().feed_eof()
        self._stop()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self._stop()

    def _stop(self) -> None:
        """Let `read_with` return; what arrives until it is called again is buffered."""
        self._parse = None
        if not self._stopped.done():
            self._stopped.set_result(None)


class _Rest:
    """The rest of a coroutine that was begun outside a task and waits for a future."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        yield self._waits_for
        yield from self._coroutine.__await__()


async def _raised(error: Exception) -> None:
    raise error
