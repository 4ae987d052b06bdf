"""How soon each of two gateways rejects a revoked key, and how soon a running stream of the key ends.

    python -m tests.bench.revocations --keys 1000

The times begin when the revocation is stored. The installation has the simulated engine, a second gateway,
real processes and a real broker. Keys are revoked as by `rift keys revoke`, on one connection.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
import httpx

from events import book as books
from events import codec, subjects
from events.book import Book, key_digest
from events.jetstream import JetStream, connect
from events.schema import AccountOpened, KeyIssued
from rift import book_admin, keys
from rift.data_dir import DataDir
from tests.rift.test_limits import MODEL, second_gateway
from tests.service import Service

ACCOUNT = "bench"
POLL_S = 0.001
# Every tenth key has a running stream.
STREAM_EVERY = 10
BODY = {
    "model": MODEL,
    "prompt": "Go on.",
    "parameters": {"max_tokens": 2000, "ignore_eos": True},
    "stream": True,
}


async def issue(log: JetStream, number: int) -> list[keys.Key]:
    """Issue many keys in few records."""
    issued = [keys.new_key(_entropy(index)) for index in range(number)]
    events: list[Any] = [AccountOpened(id=f"account.{ACCOUNT}", account=ACCOUNT)]
    events += [
        KeyIssued(id=f"key.{key.id}", key=key.id, account=ACCOUNT, sha256=key_digest(key.text))
        for key in issued
    ]
    for first in range(0, len(events), 100):
        data = codec.encode("bench", events[first : first + 100])
        await log.append(subjects.BOOK, subjects.book("bench", ACCOUNT), data)
    return issued


def _entropy(number: int) -> bytes:
    return number.to_bytes(keys.ID_BYTES, "big") + bytes(keys.SECRET_BYTES)


async def refused_s(client: httpx.AsyncClient, url: str, key: keys.Key, since: dict[str, float]) -> float:
    """Ask until the key is rejected, and return the seconds since its revocation was stored."""
    headers = {"authorization": f"Bearer {key.text}"}
    while True:
        answer = await client.get(f"{url}/v1/models", headers=headers)
        if answer.status_code == 401:
            return max(0.0, time.monotonic() - since["at"]) if "at" in since else 0.0
        assert answer.status_code == 200, answer.text
        await anyio.sleep(POLL_S)


async def one(
    log: JetStream, book: Book, client: httpx.AsyncClient, urls: list[str], key: keys.Key, *, streams: bool
) -> tuple[list[float], float | None]:
    """Revoke a key; return the seconds until each gateway rejects it, and until its stream ends."""
    since: dict[str, float] = {}
    refused: list[float] = []
    ended: list[float] = []
    running = anyio.Event()

    async def ask(url: str) -> None:
        refused.append(await refused_s(client, url, key, since))

    async def read() -> None:
        headers = {"authorization": f"Bearer {key.text}"}
        text = ""
        async with client.stream("POST", f"{urls[0]}/v1/inference", json=BODY, headers=headers) as answer:
            async for piece in answer.aiter_text():
                text += piece
                if "event: token" in text:
                    running.set()
        ended.append(time.monotonic() - since["at"])
        assert '"code":"revoked"' in text, text[-500:]

    async with anyio.create_task_group() as tasks:
        if streams:
            tasks.start_soon(read)
            await running.wait()
        for url in urls:
            tasks.start_soon(ask, url)
        await book_admin.revoke_key(log, book, key.id)
        since["at"] = time.monotonic()
    return refused, ended[0] if ended else None


async def measure(folder: Path, urls: list[str], number: int) -> None:
    address = DataDir(folder).log_address(None, {})
    log = await connect(address.url, address.access("admin"), name="bench")
    try:
        issued = await issue(log, number)
        book = await books.read(log)
        refused, ended = [], []
        async with httpx.AsyncClient(timeout=60) as client:
            await anyio.sleep(1)
            for index, key in enumerate(issued):
                some, end = await one(log, book, client, urls, key, streams=index % STREAM_EVERY == 0)
                refused += some
                ended += [end] if end is not None else []
    finally:
        await log.close()
    say(f"refused, of {len(refused)} ({number} keys, {len(urls)} gateways)", refused)
    say(f"streams ended, of {len(ended)}", ended)


def say(what: str, seconds: list[float]) -> None:
    ordered = sorted(seconds)
    shares = {"p50": 0.5, "p99": 0.99}
    percentiles = " · ".join(
        f"{name} {ordered[int(share * len(ordered))] * 1000:.1f} ms" for name, share in shares.items()
    )
    sys.stdout.write(f"{what}: {percentiles} · max {ordered[-1] * 1000:.1f} ms\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how soon revocations take effect.")
    parser.add_argument("--keys", type=int, default=1000)
    number = parser.parse_args().keys
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder) / "data", "--engine", "sim").start()
        try:
            with second_gateway(service) as url:
                anyio.run(measure, service.folder, [service.url, url], number)
        finally:
            service.stop()


if __name__ == "__main__":
    main()
