"""End the open requests of a restored log, so that none of them is charged later.

A charge has the position of its request's end. In an old shard that position may be a lost record's, which an
invoice names. So requests that ran are ended without a charge, and an idempotency key whose request was not
accepted gets another request, in the shard that the restore opened.
"""

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import anyio
import msgspec
from anyio import to_thread
from msgspec.structs import replace

from events import codec, ids, subjects
from events.jetstream import JetStream
from events.publisher import Publisher
from events.request_history import HistoryReader
from events.schema import Problem, RequestFinished
from replay.archive.archive import Archive
from replay.warehouse.warehouse import ProjectionStopped, Warehouse
from rift.backup.gap import APPEND_S, BATCH
from rift.control.projection.catch_up import fold_tail, in_steps, rebuilt
from rift.data_dir import DataDir

WRITER = codec.RESTORE_WRITER

OPEN = "select request_id from requests where finished_position is null order by request_id"
KNOWN = "select request_id from requests where request_id in (select unnest(?))"

LOST = Problem(
    code="log_lost", message="the log was lost while the request ran, and was restored from a backup"
)


async def end(log: JetStream, archive: Archive, installation: DataDir, *, shard: int) -> int:
    """Build the database, end what was begun, and return the number of requests. `shard` is the new one.

    Raises LogError, ArchiveDamaged, WarehouseError.
    """
    warehouse = await rebuilt(log, archive, installation.database)
    try:
        with suppress(ProjectionStopped):
            # Control stops there too. What follows it is not ended.
            await fold_tail(log, warehouse)
        await to_thread.run_sync(warehouse.checkpoint)
        ended = await _end_open(log, warehouse)
        await _move_claims(log, warehouse, secret=installation.secret(), shard=shard)
    finally:
        await to_thread.run_sync(warehouse.close)
    return ended


async def _end_open(log: JetStream, warehouse: Warehouse) -> int:
    """End the open requests without a charge, and return how many they are. Raises LogError."""
    publisher = Publisher(log, WRITER)

    async def end(request: str) -> None:
        event = RequestFinished(request=request, attempt=None, reason="failed", output_tokens=0, error=LOST)
        await publisher.publish(event, within_s=APPEND_S)

    [result] = await to_thread.run_sync(warehouse.read, (OPEN, []))
    for start in range(0, len(result.rows), BATCH):
        async with anyio.create_task_group() as tasks:
            for (request,) in result.rows[start : start + BATCH]:
                tasks.start_soon(end, request)
    return len(result.rows)


async def _move_claims(log: JetStream, warehouse: Warehouse, *, secret: bytes, shard: int) -> None:
    """Name a request of `shard` in each idempotency key whose request was not accepted. Raises LogError."""
    async with aclosing(_claims(log, warehouse)) as claims:
        async for subject, entry in claims:
            claimed = ids.parsed(entry["request"])
            entry["request"] = ids.new_request_id(
                secret=secret,
                account=entry["account"],
                at=replace(claimed.at, shard=shard),
                floor=0,
                entropy=os.urandom(ids.RANDOM_BYTES),
            )
            await log.append(subjects.KEYS, subject, msgspec.json.encode(entry))


async def _claims(log: JetStream, warehouse: Warehouse) -> AsyncGenerator[tuple[str, dict[str, Any]]]:
    """Yield subject and entry of each key in force whose request was not accepted. An entry without an
    account, which only old versions wrote, cannot be signed again."""
    histories = HistoryReader(log)
    first, last = await log.first_sequence(subjects.KEYS), await log.last_sequence(subjects.KEYS)
    async with aclosing(in_steps(log, subjects.KEYS, "rift.keys.>", first, last)) as batches:
        async for batch in batches:
            entries = [(stored, msgspec.json.decode(stored.data)) for stored in batch]
            named = [entry["request"] for _, entry in entries]
            [result] = await to_thread.run_sync(warehouse.read, (KNOWN, [named]))
            known = {request for (request,) in result.rows}
            for stored, entry in entries:
                if entry["request"] in known or not entry.get("account"):
                    continue
                past = await histories.read(ids.parsed(entry["request"]))
                last = await log.last_sequence(subjects.KEYS, stored.subject)
                if past.accepted is None and last == stored.sequence:
                    yield stored.subject, entry
