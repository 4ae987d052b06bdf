"""`rift archive verify`: check the archive against its manifests, the book and the log."""

from argparse import ArgumentParser, Namespace

from events import codec, subjects
from events.jetstream import JetStream
from events.schema import SegmentSealed
from rift.cli import connection
from rift.cli.arguments import Commands, add_command, add_group
from rift.cli.output import CommandFailed
from rift.settings import SHARDS


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    actions = add_group(commands, "archive", "verify the archive")
    add_command(actions, "verify", verify, "check every hash of the archive", has_json=False)


def verify(options: Namespace) -> None:
    archive = connection.archive(options)
    anchors, log_first = connection.with_log(options, _anchors)
    problems = 0
    for problem in archive.verify(anchors=anchors, log_first=log_first):
        print(problem)
        problems += 1
    if problems:
        raise CommandFailed(
            f"the archive does not match its seals ({problems} problems): restore its files from a backup"
        )
    for stream in archive.streams():
        manifests = archive.manifests(stream)
        records = sum(manifest.records for manifest in manifests)
        head = manifests[-1]
        print(f"{stream}: {len(manifests)} segments, {records} records up to {head.last}, head {head.sha256}")
    print("verified: every hash matches, and the book names every segment")


async def _anchors(log: JetStream) -> tuple[dict[str, list[SegmentSealed]], dict[str, int]]:
    """Return the segments that the book names, and the first sequence that the log still holds, by stream."""
    sealed: dict[str, list[SegmentSealed]] = {}
    last = await log.last_sequence(subjects.BOOK)
    async for batch in log.scan(subjects.BOOK, ["rift.book.>"], first=1, target=last):
        for stored in batch:
            for event in codec.decode(stored.data)[1]:
                if isinstance(event, SegmentSealed):
                    sealed.setdefault(event.stream, []).append(event)
    streams = subjects.folded(range(SHARDS))
    return sealed, {stream: await log.first_sequence(stream) for stream in streams}
