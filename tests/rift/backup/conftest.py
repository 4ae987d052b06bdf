"""A log on a real broker with an archive, in a data folder that no process uses."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from events import ids, subjects
from events.jetstream import JetStream, connect
from events.publisher import Publisher
from events.schema import AnyEvent, Parameters, RequestAccepted, RequestFinished
from events.subjects import Address
from replay.archive.archive import Archive
from rift import startup
from rift.backup.save import Source
from rift.data_dir import DataDir
from rift.settings import Settings
from tests.conftest import Server
from tests.replay.conftest import started, tokens_of

MODEL = "smollm2:135m"
AT = Address(0, "laneaaaa", subjects.slug(MODEL))
BYTES = 1 << 28
SETTINGS = f"log_bytes_max = {BYTES}\n"


class Site:
    """One installation's folder and its log."""

    def __init__(self, folder: Path, log: JetStream) -> None:
        self.installation = DataDir(folder)
        self.log = log
        self.archive = Archive(self.installation.archive, key=b"k" * 32)
        self._settings = folder / "rift.toml"
        self._ids = 0

    @property
    def source(self) -> Source:
        return Source(self.log, self.installation, self._settings)

    async def begin(self) -> None:
        self.installation.make()
        self._settings.write_text(SETTINGS)
        await self.log.ensure_streams(shards=1, replicas=1, max_bytes=BYTES)
        await startup.write_book(self.log, self.installation, Settings(), lambda line: None)

    def request_id(self, *, floor: int, at: Address = AT) -> str:
        self._ids += 1
        entropy = self._ids.to_bytes(ids.RANDOM_BYTES, "big")
        secret = self.installation.secret()
        return ids.new_request_id(secret=secret, account="dev", at=at, floor=floor, entropy=entropy)

    async def tell(self, *events: AnyEvent, at: Address = AT) -> None:
        for event in events:
            await Publisher(self.log, "test").publish(event, at=at, within_s=5)

    async def ask(self, *, at: Address = AT, ends: bool = True, **fields: Any) -> str:
        """Append a request, with an end or without, and return its id."""
        request = self.request_id(floor=await self.log.last_sequence(subjects.shard_stream(at.shard)), at=at)
        accepted = RequestAccepted(
            request=request, account="dev", key="k", model=MODEL, kind="inference", input="hi",
            parameters=Parameters(), stream=True, prompt_tokens_max=9, deadline_ms=60_000, price_version=1,
            book=await self.log.last_sequence(subjects.BOOK), **fields,
        )  # fmt: skip
        attempt = f"att_{self._ids}"
        await self.tell(accepted, started(request, attempt), tokens_of(attempt, 0), at=at)
        if ends:
            end = RequestFinished(request=request, attempt=attempt, reason="stop", output_tokens=1)
            await self.tell(end, at=at)
        return request

    async def seal(self, stream: str = "RIFT_0") -> None:
        """Archive a stream up to its end."""
        last = await self.log.last_sequence(stream)
        first = self.archive.last(stream) + 1
        topics = [f"{subjects.prefix(stream)}>"]
        batches = self.log.scan(stream, topics, first=first, target=last)
        messages = [stored async for batch in batches for stored in batch]
        self.archive.seal(stream, messages, last=last)


@asynccontextmanager
async def opened(server: Server) -> AsyncIterator[JetStream]:
    log = await connect(server.address.url, server.address.access("admin"), name="test")
    try:
        for stream in await log.streams():
            await log._remove(f"STREAM.DELETE.{stream}")
        yield log
    finally:
        await log.close()


@pytest.fixture
async def site(server: Server, tmp_path: Path) -> AsyncIterator[Site]:
    async with opened(server) as log:
        made = Site(tmp_path / "data", log)
        await made.begin()
        yield made
