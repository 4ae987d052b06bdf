"""`/metrics` in Prometheus' text format, on an address of its own.

Anyone who reaches the address may scrape, at any rate and speed, so every connection has a deadline, there
are few of them, and a page serves all scrapes of one second.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from events.clock import now_s
from events.errors import reason
from rift.errors import RiftError
from rift.metrics.address import Address, NamedAddress

logger = logging.getLogger(__name__)

# Further connections are closed at once. Each may hold a page of some 100 KB.
CONNECTIONS_MAX = 16
# From the connection until the last byte is read; Prometheus gives up after 10 s by default.
SCRAPE_S = 10.0
HEAD_BYTES_MAX = 8 * 1024
# A page takes some milliseconds of the event loop, and Prometheus scrapes every few seconds.
PAGE_S = 1.0

ANSWER = b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"


class MetricsRefused(RiftError):
    """The operator named an address for metrics that cannot be used."""


@asynccontextmanager
async def serving(address: Address | None, collectors: Sequence[Collector]) -> AsyncIterator[Address | None]:
    """Serve `/metrics` while the context is open, and yield the address that clients can use.

    Yields None if there is none: with no address given, or if the host cannot be used, which is logged.
    `collectors` may grow later. A collector that fails is left out, and logged once.

    Raises MetricsRefused if the operator named a port that cannot be used. Nothing else ends a process.
    """
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        scrapes = _Scrapes(_Page(collectors), tasks)
        server: asyncio.Server | None = None
        bound = None
        try:
            server = None if address is None else await _listen(address, scrapes)
            if address is not None and server is not None:
                bound = Address(address.host, server.sockets[0].getsockname()[1])
                logger.info("metrics: http://%s/metrics", bound)
            yield bound
        except Exception as error:  # noqa: BLE001  # raised below: a task group would raise a group
            failure = error
        finally:
            if server is not None:
                server.close()
            scrapes.abort_all()
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _listen(address: Address, scrapes: "_Scrapes") -> asyncio.Server | None:
    loop = asyncio.get_running_loop()
    problem = ""
    for port in dict.fromkeys((address.port, 0)):
        try:
            return await loop.create_server(lambda: _Connection(scrapes), address.host, port)
        except OSError as error:
            problem = reason(error)
            if isinstance(address, NamedAddress):
                raise MetricsRefused(
                    f"metrics: cannot listen on {address} ({problem}); free the port, or name another one "
                    "or none in `--metrics` or the setting `metrics`"
                ) from error
            if port:
                logger.warning("metrics: %s cannot be used (%s); trying a free port", address, problem)
    logger.error("no metrics: cannot listen on %s (%s); see the setting `metrics`", address, problem)
    return None


class _Page:
    """The text of a scrape."""

    def __init__(self, collectors: Sequence[Collector]) -> None:
        self._collectors = collectors
        self._failed: set[int] = set()
        self._text = b""
        self._made_at_s = -PAGE_S
        self._making = anyio.Lock()

    async def text(self) -> bytes:
        async with self._making:
            if now_s() >= self._made_at_s + PAGE_S:
                self._text = await self._make()
                self._made_at_s = now_s()
        return self._text

    async def _make(self) -> bytes:
        """Let other tasks run after each metric: some have hundreds of lines, which take milliseconds."""
        parts = []
        for at, collector in enumerate(list(self._collectors)):
            try:
                # Complete before any of it is shown.
                collected = []
                for metric in collector.collect():
                    collected.append(generate_latest(_One(metric)))
                    await anyio.lowlevel.checkpoint()
            except Exception:
                if at not in self._failed:
                    self._failed.add(at)
                    logger.exception("metrics of %s are left out", type(collector).__name__)
            else:
                parts += collected
        return b"".join(parts)


class _One:
    """A registry of one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


class _Scrapes:
    """The connections that are open, and the tasks that answer them."""

    def __init__(self, page: _Page, tasks: TaskGroup) -> None:
        self.open: set[_Connection] = set()
        self._page = page
        self._tasks = tasks

    def answer(self, request: bytes, transport: asyncio.Transport) -> None:
        """Answer a request, and close."""
        self._tasks.start_soon(self._try_answer, request, transport)

    def abort_all(self) -> None:
        for connection in list(self.open):
            connection.abort()

    async def _try_answer(self, request: bytes, transport: asyncio.Transport) -> None:
        try:
            await self._answer(request, transport)
        except Exception:
            logger.exception("a scrape failed")
            transport.abort()

    async def _answer(self, request: bytes, transport: asyncio.Transport) -> None:
        method, _, rest = request.partition(b"\r\n")[0].partition(b" ")
        status, body = b"404 Not Found", b"the metrics are at /metrics\n"
        if method == b"GET" and rest.partition(b" ")[0].partition(b"?")[0] == b"/metrics":
            status, body = b"200 OK", await self._page.text()
        if not transport.is_closing():
            transport.write(ANSWER % (status, CONTENT_TYPE_PLAIN_0_0_4.encode(), len(body)) + body)
            transport.close()


class _Connection(asyncio.Protocol):
    """One scrape: a request in, a page out."""

    def __init__(self, scrapes: _Scrapes) -> None:
        self._scrapes = scrapes
        self._head = b""
        self._transport: asyncio.Transport
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        if len(self._scrapes.open) >= CONNECTIONS_MAX:
            return transport.abort()
        self._scrapes.open.add(self)
        self._deadline = asyncio.get_running_loop().call_later(SCRAPE_S, transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self._scrapes.open.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._head += data
        if b"\r\n\r\n" in self._head:
            self._transport.pause_reading()
            self._scrapes.answer(self._head, self._transport)
        elif len(self._head) > HEAD_BYTES_MAX:
            self._transport.abort()
