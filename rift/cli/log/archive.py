"""`rift archive verify`: check the archive against its manifests, the book and the log."""

from argparse import ArgumentParser, Namespace
from contextlib import aclosing

from events import codec, shards, subjects
from events.jetstream import JetStream
from events.log import LogError
from events.schema import SegmentSealed
from replay.archive.archive import Archive
from rift.cli import connection
from rift.cli.arguments import Commands, add_command, add_group
from rift.cli.log import fresh_warehouse
from rift.cli.output import CommandFailed, first_message
from rift.data_dir import DataDirError


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    actions = add_group(commands, "archive", "verify the archive")
    parser = add_command(
        actions,
        "verify",
        verify,
        "check every hash of the archive, and its segments by the log",
        has_json=False,
    )
    parser.add_argument(
        "--offline",
        action="store_true",
        help="check the hashes only, without the log that names the segments",
    )


def verify(options: Namespace) -> None:
    archive = fresh_warehouse.archive(options)
    # The archive may grow while the book is read.
    newest = archive.newest()
    anchors: dict[str, list[SegmentSealed]] = {}
    log_first: dict[str, int] = {}
    if options.offline:
        newest = {}
    else:
        try:
            anchors, log_first = connection.with_log(options, _anchors)
        except* (DataDirError, LogError) as silent:
            raise CommandFailed(
                "nothing was verified, because the archive cannot be compared with the log: "
                f"{first_message(silent)}; `rift archive verify --offline` checks its hashes only"
            ) from silent
    if not archive.streams():
        named = sum(map(len, anchors.values()))
        raise CommandFailed(_missing(archive, named, is_compared=not options.offline))
    problems = 0
    for problem in archive.verify(anchors=anchors, log_first=log_first, newest=newest):
        print(problem)
        problems += 1
    if problems:
        raise CommandFailed(
            f"the archive does not match its seals or this log ({problems} problems): restore it from the "
            "same backup as the log"
        )
    for stream in archive.streams():
        manifests = archive.manifests(stream)
        records = sum(manifest.records for manifest in manifests)
        head = manifests[-1]
        print(f"{stream}: {len(manifests)} segments, {records} records up to {head.last}, head {head.sha256}")
    if options.offline:
        print("every hash matches; not compared with the log, so segments may be missing at the end")
    else:
        print("verified: every hash matches, and the log's book names exactly these segments")


def _missing(archive: Archive, named: int, *, is_compared: bool) -> str:
    if named:
        return (
            f"{archive.folder} holds no segment, but the log's book names {named}: restore it from the same "
            "backup as the log"
        )
    compared = ", and the log's book names none" if is_compared else ""
    return (
        f"nothing was verified: {archive.folder} holds no segment{compared}; control seals the first one "
        "within an hour"
    )


async def _anchors(log: JetStream) -> tuple[dict[str, list[SegmentSealed]], dict[str, int]]:
    """Return the segments that the book names, and the first sequence that the log still holds, by stream."""
    sealed: dict[str, list[SegmentSealed]] = {}
    last = await log.last_sequence(subjects.BOOK)
    async with aclosing(log.scan(subjects.BOOK, ["rift.book.>"], first=1, target=last)) as batches:
        async for batch in batches:
            for stored in batch:
                for event in codec.decode(stored.data)[1]:
                    if isinstance(event, SegmentSealed):
                        sealed.setdefault(event.stream, []).append(event)
    streams = subjects.folded(range(await shards.count(log)))
    return sealed, {stream: await log.first_sequence(stream) for stream in streams}
