"""Replay and proof: `rift replay`, `rift archive verify`, `rift audit export`."""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from anyio import to_thread

from events import codec, subjects
from events.jetstream import JetStream
from events.log import Log
from events.schema import SegmentSealed
from replay import audit_export
from replay.archive.archive import Archive
from replay.billing import invoice
from replay.billing.invoice import Invoice
from replay.facts.fold import BookBehind
from replay.scaling import verify as decisions
from replay.warehouse.result import QueryRefused, QueryResult
from replay.warehouse.warehouse import Warehouse, checks
from replay.warehouse.warehouse import sql as sql_of
from rift.cli.connection import installation
from rift.cli.output import CommandFailed, asked, first_of, show, with_log
from rift.control.projection.catch_up import archived, fold_tail, rebuilt
from rift.control.projection.time_travel import fold_until, parse
from rift.rpc import LONG_TIMEOUT_S, Digests, Rebuild, SealSegment
from rift.settings import SHARDS


def replay(options: Namespace) -> None:
    if options.select and not options.until:
        raise CommandFailed("a SELECT goes with --until POSITION; `rift sql` asks the present")
    if options.rebuild:
        rebuild(options)
    elif options.until:
        until(options)
    elif options.verify:
        verify(options)
    else:
        digest(options)


def rebuild(options: Namespace) -> None:
    """Have control fold everything again into a fresh file, and go on with that."""
    applied = with_log(options, lambda log: asked(log, Rebuild(), LONG_TIMEOUT_S))
    print("rebuilt up to " + _positions(applied))


def digest(options: Namespace) -> None:
    told = with_log(options, lambda log: asked(log, Digests(), LONG_TIMEOUT_S))
    for relation, found in told["digests"].items():
        print(f"{found}  {relation}")


def until(options: Namespace) -> None:
    """Answer a SELECT as of a position."""
    position = parse(options.until)
    archive = _archive(options)

    async def ask(log: JetStream) -> QueryResult:
        with _temporary() as path:
            warehouse = await to_thread.run_sync(Warehouse.open, path)
            try:
                await fold_until(log, archive, warehouse, position, range(SHARDS))
                return await to_thread.run_sync(warehouse.query, options.select or "from lag")
            finally:
                await to_thread.run_sync(warehouse.close)

    try:
        show(with_log(options, ask), as_json=options.json)
    except* QueryRefused as refused:
        raise CommandFailed(first_of(refused)) from refused


def verify(options: Namespace) -> None:
    """Fold everything again by ourselves, and compare it with what control says."""
    archive = _archive(options)

    async def compare(log: JetStream) -> tuple[list[str], Mapping[str, int]]:
        with _temporary() as path:
            with _book_first():
                warehouse = await rebuilt(log, archive, path)
            try:
                # Asked now, control is at or behind every record that the archive holds.
                told = await asked(log, Digests(), LONG_TIMEOUT_S)
                await fold_tail(log, warehouse, range(SHARDS), until=told["positions"])
                return await to_thread.run_sync(lambda: list(differences(warehouse, told))), told["positions"]
            finally:
                await to_thread.run_sync(warehouse.close)

    found, positions = with_log(options, compare)
    for line in found:
        print(line)
    if found:
        raise CommandFailed(f"{len(found)} differences")
    print(
        f"verified up to {_positions(positions)}: "
        "invoices, closed periods, decisions and every relation come out again"
    )


def differences(rebuilt: Warehouse, told: Mapping[str, Any]) -> Iterator[str]:
    """Yield what of the warehouse in use does not come out of a fresh one, a line each."""
    digests, (lines, periods) = rebuilt.digests(
        ("from invoice_lines", []), ("from periods order by period", [])
    )
    if told["invoice_lines"]["rows"]:
        yield from _line_differences(told["invoice_lines"], lines)
    for relation, found in digests.items():
        if found != told["digests"][relation]:
            yield f"{relation}: {told['digests'][relation]} in use, {found} by replay"
    for row in periods.rows:
        period = dict(zip(periods.columns, row, strict=True))
        again = invoice.closing(rebuilt.read, period["period"]).digest
        if again != period["digest"]:
            yield f"period {period['period']}: closed with digest {period['digest']}, and it is {again}"
    yield from decisions.differences(rebuilt)
    for check in checks():
        for wrong, which in rebuilt.query(sql_of(check)).rows:
            yield f"{check}: {wrong}: {which}"


def _line_differences(told: Mapping[str, Any], found: QueryResult) -> Iterator[str]:
    """Yield the invoice lines that are only here or only there."""
    here = {tuple(row) for row in told["rows"]}
    there = {tuple(row) for row in found.rows}
    for word, rows in (("in use", here - there), ("by replay", there - here)):
        for row in sorted(rows, key=str):
            named = ", ".join(f"{name} {value}" for name, value in zip(found.columns, row, strict=True))
            yield f"invoice line only {word}: {named}"


def verify_archive(options: Namespace) -> None:
    """Check every byte of the archive against its manifests, and these against the book and the log."""
    archive = _archive(options)

    async def anchors(log: JetStream) -> tuple[dict[str, list[SegmentSealed]], dict[str, int]]:
        found: dict[str, list[SegmentSealed]] = {}
        last = await log.last_sequence(subjects.BOOK)
        async for batch in log.scan(subjects.BOOK, ["rift.book.>"], first=1, target=last):
            for stored in batch:
                for event in codec.decode(stored.data)[1]:
                    if isinstance(event, SegmentSealed):
                        found.setdefault(event.stream, []).append(event)
        streams = subjects.folded(range(SHARDS))
        return found, {stream: await log.first_sequence(stream) for stream in streams}

    sealed, first = with_log(options, anchors)
    problems = 0
    for problem in archive.verify(anchors=sealed, log_first=first):
        print(problem)
        problems += 1
    if problems:
        raise CommandFailed(
            f"the archive is not as it was sealed ({problems} found): put the files back from a copy"
        )
    for stream in archive.streams():
        manifests = archive.manifests(stream)
        records = sum(manifest.records for manifest in manifests)
        head = manifests[-1]
        print(f"{stream}: {len(manifests)} segments, {records} records up to {head.last}, head {head.sha256}")
    print("verified: every hash comes out again, and the book names every segment")


def export(options: Namespace) -> None:
    """Write an account's slice of the archive, with proofs, for the auditor."""
    archive = _archive(options)
    account = options.account
    period = options.period

    async def write(log: JetStream) -> Invoice:
        await asked(log, SealSegment(), LONG_TIMEOUT_S)
        return await write_export(log, archive, account, period, options.folder)

    found = with_log(options, write)
    print(
        f"{found.account} {found.period}, {found.status}: {found.total_nanousd} nano-USD, in {options.folder}"
    )
    print(f"check it with: python replay/auditor.py {options.folder}", file=sys.stderr)


async def write_export(log: Log, archive: Archive, account: str, period: str, folder: Path) -> Invoice:
    """Write what is archived of an account's period. Raises CommandFailed, and as `archived`."""
    with _temporary() as path:
        with _book_first():
            warehouse = await archived(log, archive, path)
        try:
            return await to_thread.run_sync(export_of, archive, warehouse, account, period, folder)
        finally:
            await to_thread.run_sync(warehouse.close)


# What ended in the month, charged or not, or is on its invoice; the others of a group; and what was charged
# before for seconds that this month's requests ran in too. With the sequences of their ends.
REQUESTS = """
    with mine as (
        select request_id, group_id from requests
        where account = $account and finished_at_ns is not null and (
            strftime(make_timestamp(finished_at_ns // 1000), '%Y-%m') = $period
            or request_id in (select request_id from charges where account = $account and period = $period)
        )
    ),
    ran as (
        select period, charges.model, request_id, started_at_ns, last_event_at_ns
        from charges join attempts using (request_id)
        where account = $account and plan = 'per_second' and period <= $period
    ),
    named as (
        select request_id from mine
        union
        select requests.request_id from requests join mine using (group_id) where requests.account = $account
        union
        select older.request_id from ran as older join ran
            on ran.period = $period and older.period < $period and older.model = ran.model
            and older.started_at_ns < ran.last_event_at_ns and older.last_event_at_ns > ran.started_at_ns
    )
    select request_id, split_part(split_part(finished_position, ':', 2), '.', 1)::bigint
    from requests join named using (request_id)
    where finished_position is not null
"""


def export_of(archive: Archive, warehouse: Warehouse, account: str, period: str, folder: Path) -> Invoice:
    """Write what the warehouse holds of an account's period; the archive holds that, and maybe more."""
    for stream in archive.streams():
        archive.check(stream)
    found = invoice.invoice(warehouse.read, account, period)
    if found.status == "open":
        found = msgspec.structs.replace(found, positions=_reached(archive, warehouse))
    [requests] = warehouse.read((REQUESTS, {"account": account, "period": period}))
    audit_export.export(archive, msgspec.to_builtins(found), dict(requests.rows), folder)
    return found


def _reached(archive: Archive, warehouse: Warehouse) -> dict[str, int]:
    """Return where segments end in what the warehouse holds: the archive may have grown since it was read."""
    reached: dict[str, int] = {}
    for stream, applied in warehouse.positions().items():
        ends = [manifest.last for manifest in archive.manifests(stream) if manifest.last <= applied]
        reached |= {stream: ends[-1]} if ends else {}
    return reached


def _archive(options: Namespace) -> Archive:
    found = installation(options)
    return Archive(found.archive, key=found.archive_key())


@contextmanager
def _book_first() -> Iterator[None]:
    """The archive may grow behind the book that was read before it. Raises CommandFailed."""
    try:
        yield
    except BookBehind as behind:
        raise CommandFailed(
            f"while this read the book, requests were archived: {behind}; try again"
        ) from behind


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rift-replay-") as folder:
        yield Path(folder) / "rift.duckdb"


def _positions(positions: Mapping[str, int]) -> str:
    return ", ".join(f"{stream}:{sequence}" for stream, sequence in sorted(positions.items()))
