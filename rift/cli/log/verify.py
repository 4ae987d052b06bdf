"""`rift replay --verify`: compare a fresh replay with the database in use."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from anyio import to_thread

from events.jetstream import JetStream
from replay.billing import invoice
from replay.scaling import verify as decisions
from replay.warehouse.result import QueryResult
from replay.warehouse.warehouse import Warehouse
from rift.cli.connection import ask_control, with_log
from rift.cli.log.fresh_warehouse import archive, book_read_first, temporary_file
from rift.cli.output import CommandFailed, positions
from rift.control.projection.catch_up import fold_tail, rebuilt
from rift.rpc import LONG_TIMEOUT_S, Digests


def verify(options: Namespace) -> None:
    """Fold everything again in this process, and compare it with control's answer."""
    source = archive(options)

    async def compare(log: JetStream) -> tuple[list[str], int, Mapping[str, int]]:
        with temporary_file() as path:
            with book_read_first():
                warehouse = await rebuilt(log, source, path)
            try:
                # Asked after the rebuild, control has folded at least what the archive holds.
                in_use = await ask_control(log, Digests(), LONG_TIMEOUT_S)
                applied: Mapping[str, int] = in_use["positions"]
                await fold_tail(log, warehouse, until=applied)
                found = await to_thread.run_sync(lambda: list(differences(warehouse, in_use)))
                return found, await to_thread.run_sync(decisions.unverified, warehouse), applied
            finally:
                await to_thread.run_sync(warehouse.close)

    different, older, applied = with_log(options, compare)
    for line in different:
        print(line)
    if different:
        raise CommandFailed(f"{len(different)} differences between the database in use and a fresh replay")
    print(
        f"verified up to {positions(applied)}: "
        "replay gives the same invoices, closed periods, decisions, plans and relations"
    )
    if older:
        print(f"not made again: {older} decisions and plans of other versions of the policy")


def differences(fresh: Warehouse, in_use: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each difference between a fresh warehouse and the digests of the one in use."""
    digests, (lines, periods) = fresh.digests(
        ("from invoice_lines", []), ("from periods order by period", [])
    )
    if in_use["invoice_lines"]["rows"]:
        yield from _line_differences(in_use["invoice_lines"], lines)
    for relation, digest in digests.items():
        if digest != in_use["digests"][relation]:
            yield f"{relation}: {in_use['digests'][relation]} in use, {digest} by replay"
    for row in periods.rows:
        period = dict(zip(periods.columns, row, strict=True))
        digest = invoice.closing(fresh.read, period["period"]).digest
        if digest != period["digest"]:
            yield f"period {period['period']}: closed with digest {period['digest']}, {digest} by replay"
    yield from decisions.differences(fresh)
    yield from fresh.failed_checks()


def _line_differences(in_use: Mapping[str, Any], fresh: QueryResult) -> Iterator[str]:
    """Yield the invoice lines that only one of the two has."""
    used = {tuple(row) for row in in_use["rows"]}
    replayed = {tuple(row) for row in fresh.rows}
    for place, rows in (("in use", used - replayed), ("by replay", replayed - used)):
        for row in sorted(rows, key=str):
            fields = ", ".join(f"{name} {value}" for name, value in zip(fresh.columns, row, strict=True))
            yield f"invoice line only {place}: {fields}"
