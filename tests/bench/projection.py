"""Folding the log into the warehouse: events per second from a real broker, and the lag under load."""

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread

from events import subjects
from events.jetstream import JetStream, connect
from events.log import LogError, Stored
from events.subjects import BOOK
from replay.warehouse.warehouse import Warehouse
from rift import nats_server
from rift.control.projection.catch_up import fold_tail
from rift.control.projection.projector import Projector
from tests.bench import bill, figures

STREAM = bill.STREAM
READY_S = 10.0
# Messages that are published before waiting for their storage, far below the broker's limit.
AHEAD = 1_000
# Under load: events per second, duration, and the interval of queries.
LOAD_PER_S = 5_000
LOAD_S = 10.0
ASK_S = 0.1
# An ordinary answer, with a few dozen token events.
ENTRY = bill.TraceEntry(0.0, "account", 200, 120, pieces=40)
EVENTS = 3 + ENTRY.pieces
# Requests per second, in the log's time.
REQUESTS_PER_S = 100


def run(requests: int, say: Callable[[str], None]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rift-bench-") as name:
        folder = Path(name)
        address = nats_server.configure(folder)
        with (folder / "nats.log").open("wb") as output:
            server = subprocess.Popen(
                nats_server.command(folder), stdout=output, stderr=output, process_group=0
            )
        try:
            measure = partial(_measure, address, folder, requests, say)
            return anyio.run(measure, backend_options={"use_uvloop": True})
        finally:
            server.terminate()
            server.wait(READY_S)


async def _measure(
    address: nats_server.Address, folder: Path, requests: int, say: Callable[[str], None]
) -> dict[str, Any]:
    log = await _connected(address)
    await log.ensure_streams(shards=1, replicas=1, max_bytes=8 << 30)
    entries = [ENTRY._replace(at_s=number / REQUESTS_PER_S) for number in range(requests)]
    messages = list(bill.records(entries))
    await _publish(log, BOOK, [bill.book_of(entries)])
    await _publish(log, STREAM, messages)
    events = EVENTS * requests
    say(f"{len(messages)} records with {events} events are stored")
    warehouse = Warehouse.open(folder / "rift.duckdb")
    began = time.perf_counter()
    await fold_tail(log, warehouse)
    seconds = time.perf_counter() - began
    say(f"folded in {seconds:.1f} s")
    load = [
        ENTRY._replace(at_s=number / REQUESTS_PER_S) for number in range(int(LOAD_PER_S * LOAD_S / EVENTS))
    ]
    answered, lags = await _under_load(log, warehouse, list(bill.records(load, first=requests)))
    await to_thread.run_sync(warehouse.close)
    await log.close()
    return {
        "events": events,
        "bytes_per_event": sum(len(stored.data) for stored in messages) // events,
        "records": len(messages),
        "events_per_s": round(events / seconds),
        "load_events_per_s": LOAD_PER_S,
        "answered_p50_ms": round(statistics.median(answered) * 1000),
        "answered_p99_ms": round(figures.percentile(answered, 0.99) * 1000),
        "unasked_p99_ms": round(figures.percentile(lags, 0.99) * 1000),
    }


async def _under_load(
    log: JetStream, warehouse: Warehouse, messages: Sequence[Stored]
) -> tuple[list[float], list[float]]:
    """Return the time that each query waits for the records stored before it, and the warehouse's lag before
    each query, in seconds."""
    projector = Projector(log, warehouse, subjects.folded([0]))
    answered: list[float] = []
    lags: list[float] = []
    per_s = len(messages) / LOAD_S
    stored_at: list[float] = []

    async def load() -> None:
        began = time.perf_counter()
        for number, message in enumerate(messages):
            await log.append(STREAM, message.subject, message.data)
            stored_at.append(time.perf_counter())
            await anyio.sleep(max(0.0, began + number / per_s - time.perf_counter()))

    first = await log.last_sequence(STREAM)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(projector.run)
        tasks.start_soon(load)
        until = time.perf_counter() + LOAD_S
        while time.perf_counter() < until:
            await anyio.sleep(ASK_S)
            asked_at = time.perf_counter()
            waiting = stored_at[max(0, projector.applied.get(STREAM, 0) - first) :]
            lags.append(asked_at - waiting[0] if waiting else 0.0)
            await projector.catch_up()
            answered.append(time.perf_counter() - asked_at)
        tasks.cancel_scope.cancel()
    return answered, lags


async def _publish(log: JetStream, stream: str, messages: Sequence[Stored]) -> None:
    """Store messages in order, without waiting for each."""
    for first in range(0, len(messages), AHEAD):
        for message in messages[first : first + AHEAD]:
            await log.client.publish(message.subject, message.data)
        target = min(first + AHEAD, len(messages))
        while await log.last_sequence(stream) < target:  # noqa: ASYNC110  # another process
            await anyio.sleep(0.001)


async def _connected(address: nats_server.Address) -> JetStream:
    with anyio.fail_after(READY_S):
        while True:
            try:
                return await connect(address.url, address.access("admin"), name="bench")
            except LogError:
                await anyio.sleep(0.05)
