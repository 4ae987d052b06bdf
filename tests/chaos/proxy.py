"""A proxy to nats-server that loses acknowledgements: appends are stored, but their writers do not know."""

import random
import re
from collections import Counter

import anyio
from anyio.abc import SocketStream, TaskGroup
from anyio.streams.buffered import BufferedByteReceiveStream

LINE_BYTES_MAX = 1 << 20
# The first acknowledgement of each event type is always lost, later ones by chance. Each lost one costs its
# writer two seconds.
CERTAIN = 1
CHANCE = 0.01
TYPE = re.compile(rb'"type":"(\w+)"')


class Proxy:
    """Forwards NATS's protocol in both directions. `lost` counts lost acknowledgements by event type."""

    def __init__(self, upstream: int) -> None:
        self.port = 0
        self.lost: Counter[str] = Counter()
        self._upstream = upstream
        self._chance: random.Random | None = None
        self._before = 0

    def drop(self, chance: random.Random) -> None:
        self._chance, self._before = chance, self.lost.total()

    def stop_dropping(self) -> int:
        """Return how many acknowledgements were lost since `drop`."""
        self._chance = None
        return self.lost.total() - self._before

    async def start(self, tasks: TaskGroup) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        self.port = listener.extra(anyio.abc.SocketAttribute.local_port)

        async def serve() -> None:
            async with listener:
                await listener.serve(self._serve)

        tasks.start_soon(serve)

    async def _serve(self, client: SocketStream) -> None:
        appends: dict[bytes, set[str]] = {}
        async with (
            client,
            await anyio.connect_tcp("127.0.0.1", self._upstream) as server,
            anyio.create_task_group() as tasks,
        ):

            async def pass_on(source: SocketStream, target: SocketStream) -> None:
                reader = BufferedByteReceiveStream(source)
                try:
                    while True:
                        await self._one(reader, target, appends)
                except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.IncompleteRead):
                    tasks.cancel_scope.cancel()

            tasks.start_soon(pass_on, client, server)
            tasks.start_soon(pass_on, server, client)

    async def _one(
        self, reader: BufferedByteReceiveStream, target: SocketStream, appends: dict[bytes, set[str]]
    ) -> None:
        """Forward one line with its payload, or drop it."""
        line = await reader.receive_until(b"\r\n", LINE_BYTES_MAX)
        words, payload = line.split(), b""
        verb = words[0].upper() if words else b""
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
