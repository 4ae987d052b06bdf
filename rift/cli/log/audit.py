"""`rift audit export`: a customer's own facts with proofs, for `replay/auditor.py`."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import msgspec
from anyio import to_thread

from events.jetstream import JetStream
from events.log import Log
from replay import audit_export
from replay.archive.archive import Archive
from replay.billing import invoice
from replay.billing.invoice import Invoice
from replay.sql_files import sql
from replay.warehouse.warehouse import Warehouse
from rift.cli.arguments import Commands, add_account, add_command, add_group, add_period
from rift.cli.connection import ask_control, with_log
from rift.cli.log import fresh_warehouse
from rift.cli.log.fresh_warehouse import Anchors, book_read_first, read_anchors, temporary_file
from rift.control.projection.catch_up import archived
from rift.rpc import LONG_TIMEOUT_S, SealSegment


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    actions = add_group(commands, "audit", "export proofs for customers")
    parser = add_command(
        actions, "export", export, "export an account's facts of a month with proofs", has_json=False
    )
    add_account(parser)
    add_period(parser)
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder, input of replay/auditor.py")


def export(options: Namespace) -> None:
    archive = fresh_warehouse.archive(options)

    async def write(log: JetStream) -> Invoice:
        await ask_control(log, SealSegment(), LONG_TIMEOUT_S)
        return await write_export(log, archive, options.account, options.period, options.folder)

    exported = with_log(options, write)
    print(
        f"{exported.account} {exported.period}, {exported.status}: {exported.total_nanousd} nano-USD, "
        f"in {options.folder}"
    )
    print(f"check it with: python replay/auditor.py {options.folder}", file=sys.stderr)


async def write_export(log: Log, archive: Archive, account: str, period: str, folder: Path) -> Invoice:
    """Export what the archive holds of an account's period. Raises CommandFailed, and as `archived`."""
    with temporary_file() as path:
        with book_read_first():
            warehouse = await archived(log, archive, path)
        anchored = await read_anchors(log)
        # A signature by a published key, if there is one.
        anchors = {
            stream: [one for one in named if one.signer in anchored.keys] or named
            for stream, named in anchored.segments.items()
        }
        try:
            return await to_thread.run_sync(export_of, archive, warehouse, account, period, folder, anchors)
        finally:
            await to_thread.run_sync(warehouse.close)


def export_of(
    archive: Archive,
    warehouse: Warehouse,
    account: str,
    period: str,
    folder: Path,
    anchors: Anchors | None = None,
) -> Invoice:
    """Export what the warehouse holds of an account's period. The archive must hold at least that.

    `anchors` are the book's, whose signatures the export shows.
    """
    for stream in archive.streams():
        archive.check(stream)
    exported = invoice.invoice(warehouse.read, account, period)
    if exported.status == "open":
        exported = msgspec.structs.replace(exported, positions=_segment_ends(archive, warehouse))
    parameters = {"account": account, "period": period}
    [requests] = warehouse.read((sql("cli/audit_requests"), parameters))
    audit_export.export(archive, msgspec.to_builtins(exported), dict(requests.rows), folder, anchors or {})
    return exported


def _segment_ends(archive: Archive, warehouse: Warehouse) -> dict[str, int]:
    """Return the end of the last segment that the warehouse holds, by stream: the archive may have grown."""
    ends: dict[str, int] = {}
    for stream, applied in warehouse.positions().items():
        folded = [manifest.last for manifest in archive.manifests(stream) if manifest.last <= applied]
        ends |= {stream: folded[-1]} if folded else {}
    return ends
