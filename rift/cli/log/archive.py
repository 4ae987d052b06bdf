"""`rift archive verify`: check the archive against its manifests, book and log. `rift archive key`."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import chain

from events import book as books
from events.log import Log, LogError
from replay.archive.archive import Archive
from replay.archive.signatures import is_valid
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
    anchored = fresh_warehouse.Anchored({}, set(), {})
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
    problems = 0
    hashes = archive.verify(anchors=anchored.segments, log_first=anchored.log_first, newest=newest)
    for problem in chain(hashes, _bad_signatures(anchored)):
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
        signed = sum(bool(one.signature) for segments in anchored.segments.values() for one in segments)
        print(
            "verified: every hash matches, the log's book names exactly these segments, and control signed "
            f"{signed} of them"
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


def _bad_signatures(anchored: fresh_warehouse.Anchored) -> Iterator[str]:
    for stream, segments in anchored.segments.items():
        for one in segments:
            where = f"{stream} {one.first} to {one.last}"
            if one.signature and not is_valid(one):
                yield f"{where}: the book has a signature that is not valid"
            elif one.signature and one.signer not in anchored.keys:
                yield f"{where}: signed with key {one.signer}, which no operator published"
