"""`/metrics` in Prometheus' text format, on an address of its own.

Anyone who reaches the address may scrape, at any rate and speed, so every connection has a deadline, there
are few of them, and a page serves all scrapes of one second.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from events.clock import now_s
from rift.metrics.address import Address

logger = logging.getLogger(__name__)

# Further connections are closed at once. Each may hold a page of some 100 KB.
CONNECTIONS_MAX = 16
# From the connection until the last byte is read; Prometheus gives up after 10 s by default.
SCRAPE_S = 10.0
HEAD_BYTES_MAX = 8 * 1024
# A page takes some milliseconds of the event loop, and Prometheus scrapes every few seconds.
PAGE_S = 1.0

ANSWER = b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"


@asynccontextmanager
async def serving(address: Address | None, collectors: Sequence[Collector]) -> AsyncIterator[Address | None]:
    """Serve `/metrics` while the context is open, and yield the address that clients can use.

    Yields None if there is none: with no address given, or if the host cannot be used, which is logged.
    Metrics are never a reason to end a process. A collector that fails is left out, and logged once.
    `collectors` may grow later.
    """
    server = None if address is None else await _listen(address, collectors)
    if address is None or server is None:
        yield None
        return
    bound = Address(address.host, server.sockets[0].getsockname()[1])
    logger.info("metrics: http://%s/metrics", bound)
    try:
        yield bound
    finally:
        server.close()


async def _listen(address: Address, collectors: Sequence[Collector]) -> asyncio.Server | None:
    loop = asyncio.get_running_loop()
    page = _Page(collectors)
    open_connections: set[_Connection] = set()
    problems = []
    for port in dict.fromkeys((address.port, 0)):
        try:
            return await loop.create_server(
                lambda: _Connection(page.text, open_connections), address.host, port
            )
        except OSError as error:
            problems.append(error)
            if port:
                logger.warning("metrics: %s cannot be used (%s); trying a free port", address, error.strerror)
    logger.error("no metrics: cannot listen on %s (%s); see the setting `metrics`", address, problems[-1])
    return None


class _Page:
    """The text of a scrape."""

    def __init__(self, collectors: Sequence[Collector]) -> None:
        self._registry = _Registry(collectors)
        self._text = b""
        self._made_at_s = -PAGE_S

    def text(self) -> bytes:
        if now_s() >= self._made_at_s + PAGE_S:
            self._text = generate_latest(self._registry)
            self._made_at_s = now_s()
        return self._text


class _Registry:
    def __init__(self, collectors: Sequence[Collector]) -> None:
        self._collectors = collectors
        self._failed: set[int] = set()

    def collect(self) -> Iterable[Metric]:
        for at, collector in enumerate(self._collectors):
            try:
                # Complete before any of it is shown.
                metrics = list(collector.collect())
            except Exception:
                if at not in self._failed:
                    self._failed.add(at)
                    logger.exception("metrics of %r are left out", collector)
            else:
                yield from metrics


class _Connection(asyncio.Protocol):
    """One scrape: a request in, a page out."""

    def __init__(self, page: Callable[[], bytes], open_connections: "set[_Connection]") -> None:
        self._page = page
        self._open = open_connections
        self._head = b""
        self._transport: asyncio.Transport
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        if len(self._open) >= CONNECTIONS_MAX:
            return transport.abort()
        self._open.add(self)
        self._deadline = asyncio.get_running_loop().call_later(SCRAPE_S, transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self._open.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._head += data
        if b"\r\n\r\n" in self._head:
            self._transport.write(self._answer(self._head.partition(b"\r\n")[0]))
            self._transport.close()
        elif len(self._head) > HEAD_BYTES_MAX:
            self._transport.abort()

    def _answer(self, line: bytes) -> bytes:
        method, _, rest = line.partition(b" ")
        status, body = b"404 Not Found", b"the metrics are at /metrics\n"
        if method == b"GET" and rest.partition(b" ")[0].partition(b"?")[0] == b"/metrics":
            status, body = b"200 OK", self._page()
        return ANSWER % (status, CONTENT_TYPE_PLAIN_0_0_4.encode(), len(body)) + body
