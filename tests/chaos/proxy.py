"""A proxy to nats-servers that loses acknowledgements: appends are stored, but their writers do not know."""

import json
import random
import re
import ssl
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio
from anyio.abc import ByteStream, Listener, SocketStream, TaskGroup
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSStream

LINE_BYTES_MAX = 1 << 20
# The first acknowledgement of each event type is always lost, later ones by chance. Each lost one costs its
# writer two seconds.
CERTAIN = 1
CHANCE = 0.01
TYPE = re.compile(rb'"type":"(\w+)"')


class Proxy:
    """Forwards NATS's protocol in both directions, with a port for each server.

    `lost` counts lost acknowledgements by event type. `tls` is the folder of the servers' certificate, with
    which the proxy ends TLS on both sides.
    """

    def __init__(self, upstreams: Sequence[int], *, tls: Path | None = None) -> None:
        self.ports: list[int] = []
        self.lost: Counter[str] = Counter()
        self._upstreams, self._tls = upstreams, tls
        self._chance: random.Random | None = None
        self._before = 0

    def drop(self, chance: random.Random) -> None:
        self._chance, self._before = chance, self.lost.total()

    def stop_dropping(self) -> int:
        """Return how many acknowledgements were lost since `drop`."""
        self._chance = None
        return self.lost.total() - self._before

    async def start(self, tasks: TaskGroup) -> None:
        async def serve(listener: Listener[SocketStream], upstream: int) -> None:
            async with listener:
                await listener.serve(partial(self._serve, upstream))

        for upstream in self._upstreams:
            listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
            self.ports.append(listener.extra(anyio.abc.SocketAttribute.local_port))
            tasks.start_soon(serve, listener, upstream)

    async def _serve(self, upstream: int, client: SocketStream) -> None:
        appends: dict[bytes, set[str]] = {}
        async with client, await anyio.connect_tcp("127.0.0.1", upstream) as server:
            try:
                async with anyio.create_task_group() as tasks:
                    await self._one(BufferedByteReceiveStream(server), client, appends)
                    ends = (
                        (client, server) if self._tls is None else await _secured(client, server, self._tls)
                    )
                    for source, target in (ends, ends[::-1]):
                        tasks.start_soon(self._pass_on, source, target, appends)
            except* (anyio.EndOfStream, anyio.BrokenResourceError, anyio.IncompleteRead):
                pass  # one side has closed

    async def _pass_on(self, source: ByteStream, target: ByteStream, appends: dict[bytes, set[str]]) -> None:
        reader = BufferedByteReceiveStream(source)
        while True:
            await self._one(reader, target, appends)

    async def _one(
        self, reader: BufferedByteReceiveStream, target: ByteStream, appends: dict[bytes, set[str]]
    ) -> None:
        """Forward one line with its payload, or drop it."""
        line = await reader.receive_until(b"\r\n", LINE_BYTES_MAX)
        words, payload = line.split(), b""
        verb = words[0].upper() if words else b""
        if verb == b"INFO":
            line = _without_urls(line)
        if verb in (b"PUB", b"HPUB", b"MSG", b"HMSG"):
            payload = await reader.receive_exactly(int(words[-1]) + 2)
        if verb in (b"PUB", b"HPUB") and words[1].startswith(b"rift."):
            replies = len(words) == (4 if verb == b"PUB" else 5)
            if replies:
                appends[words[2]] = {name.decode() for name in TYPE.findall(payload)}
        elif verb in (b"MSG", b"HMSG") and (types := appends.pop(words[1], None)) and self._loses(types):
            return
        await target.send(line + b"\r\n" + payload)

    def _loses(self, types: set[str]) -> bool:
        if self._chance is None:
            return False
        lost = any(self.lost[name] < CERTAIN for name in types) or self._chance.random() < CHANCE
        if lost:
            self.lost.update(types)
        return lost


def _without_urls(line: bytes) -> bytes:
    """Return an INFO without the addresses of the cluster's servers, with which clients pass the proxy by."""
    info = json.loads(line.split(maxsplit=1)[1])
    info.pop("connect_urls", None)
    return b"INFO " + json.dumps(info).encode()


async def _secured(client: SocketStream, server: SocketStream, tls: Path) -> tuple[TLSStream, TLSStream]:
    """Return both sides in TLS, which begins after the server's first INFO."""
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(tls / "cert.pem", tls / "key.pem")
    trusted = ssl.create_default_context(cafile=tls / "ca.pem")
    wrap = partial(TLSStream.wrap, standard_compatible=False)
    return (
        await wrap(client, server_side=True, ssl_context=own),
        await wrap(server, hostname="127.0.0.1", ssl_context=trusted),
    )
