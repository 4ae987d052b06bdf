"""`rift archive verify`: check the archive against its manifests, book and log. `rift archive key`."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable

from events import book as books
from events.log import Log, LogError
from events.schema import PeriodClosed, SegmentSealed
from replay.archive import signatures
from replay.archive.archive import Archive
from rift import book_admin
from rift.cli import connection
from rift.cli.arguments import Commands, add_command, add_group
from rift.cli.log import fresh_warehouse
from rift.cli.output import CommandFailed, first_message
from rift.data_dir import DataDirError


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    actions = add_group(commands, "archive", "verify the archive, publish its signing key")
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
    add_command(actions, "key", publish_key, "publish the key that control signs with", has_json=False)


def publish_key(options: Namespace) -> None:
    """Put the public key of DIR/signing.key into the book, and print it."""
    folder = connection.installation(options)
    if (key := folder.signing_key()) is None:
        raise CommandFailed(
            f"{folder.folder}/signing.key is missing: make it with `openssl rand -hex 32`, also for control"
        )

    async def publish(log: Log) -> bool:
        return await book_admin.publish_signing_key(log, await books.read(log), key.public)

    state = "is now in the book" if connection.with_log(options, publish) else "is in the book"
    print(f"the public key {key.public} {state}; tell it to whoever checks your bills")


def verify(options: Namespace) -> None:
    archive = fresh_warehouse.archive(options)
    # The archive may grow while the book is read.
    newest = archive.newest()
    anchored = fresh_warehouse.Anchored({}, [], set(), {})
    if options.offline:
        newest = {}
    else:
        try:
            anchored = connection.with_log(options, fresh_warehouse.read_anchors)
        except* (DataDirError, LogError) as silent:
            raise CommandFailed(
                "nothing was verified, because the archive cannot be compared with the log: "
                f"{first_message(silent)}; `rift archive verify --offline` checks its hashes only"
            ) from silent
    if not archive.streams():
        named = sum(map(len, anchored.segments.values()))
        raise CommandFailed(_missing(archive, named, is_compared=not options.offline))
    hashes = archive.verify(anchors=anchored.segments, log_first=anchored.log_first, newest=newest)
    if wrong := _printed(hashes):
        raise CommandFailed(
            f"the archive does not match its seals or this log ({wrong} problems): restore it from the "
            "same backup as the log"
        )
    if wrong := _printed(signatures.problems(anchored.stated, anchored.keys)):
        raise CommandFailed(
            f"the book has {wrong} entries that control did not sign. If control ran without signing.key, "
            "put the key back; else whoever has control's password for the broker wrote them: replace it"
        )
    for stream in archive.streams():
        manifests = archive.manifests(stream)
        records = sum(manifest.records for manifest in manifests)
        head = manifests[-1]
        print(f"{stream}: {len(manifests)} segments, {records} records up to {head.last}, head {head.sha256}")
    if options.offline:
        print("every hash matches; not compared with the log, so segments may be missing at the end")
    else:
        segments = sum(isinstance(one, SegmentSealed) and bool(one.signature) for one in anchored.stated)
        months = sum(isinstance(one, PeriodClosed) and bool(one.signature) for one in anchored.stated)
        print(
            "verified: every hash matches, the log's book names exactly these segments, and control signed "
            f"{segments} of them and {months} closed months"
        )


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


def _printed(problems: Iterable[str]) -> int:
    """Print problems, and return how many they are."""
    count = 0
    for problem in problems:
        print(problem)
        count += 1
    return count
