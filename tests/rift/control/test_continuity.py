"""The check at a start: which logs continue the archive and the database, and which do not."""

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import duckdb
import msgspec
import pytest

from events import codec, ids, memory, subjects
from events.memory import MemoryBroker
from events.publisher import destination
from events.schema import (
    AccountOpened,
    AnyEvent,
    Price,
    PricePublished,
    RequestAccepted,
    SegmentSealed,
)
from events.subjects import BOOK, FLEET, KEYS, SECRETS
from replay.archive.archive import Archive
from replay.warehouse.warehouse import Warehouse, WarehouseError
from rift.control.projection import acceptances, continuity, key_continuity
from rift.control.projection.continuity import WrongLog
from rift.data_dir import DataDir, DataDirError
from tests.replay.conftest import AT, START_NS, Scribe

pytestmark = pytest.mark.anyio

SHARD = "RIFT_0"

HOLDER = """
import duckdb, sys
held = duckdb.connect(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


class Installation:
    """A log in memory, and the folder of its archive and its database."""

    def __init__(self, broker: MemoryBroker, folder: Path) -> None:
        self.broker = broker
        self.archive = Archive(folder / "archive", key=b"k" * 32)
        self.database = folder / "rift.duckdb"
        self.now_ns = START_NS
        self.secret = b"s" * 32
        self.requests = 0

    def begin(self, *, start_ns: int = START_NS, accounts: int = 1) -> None:
        """Replace the log by one with some accounts and a request under the last of them."""
        for name in (SHARD, FLEET, BOOK):
            stream = self.broker.streams[name]
            self.broker.streams[name] = type(stream)(stream.prefix)
        self.now_ns = start_ns
        price = Price(model="tiny:1", prompt_nanousd=1, output_nanousd=1)
        self.add(PricePublished(id="price.1", version=1, prices=(price,)))
        for number in range(accounts):
            self.add(AccountOpened(id=f"account.{number}", account=f"account-{number}"))
        self.broker.streams[FLEET].add(subjects.LEADER, codec.encode("test", ()), self.now_ns)
        self.accept()

    def add(self, event: AnyEvent) -> None:
        stream, subject = destination(event)
        self.now_ns += 1_000
        self.broker.streams[stream].add(subject, codec.encode("test", [event]), self.now_ns)

    def accept(self, *, digest: str | None = None, floor: int = 0, **changes: Any) -> RequestAccepted:
        self.requests += 1
        entropy = self.requests.to_bytes(ids.RANDOM_BYTES, "big")
        request = ids.new_request_id(secret=self.secret, account="dev", at=AT, floor=floor, entropy=entropy)
        book = self.broker.streams[BOOK].last_sequence
        accepted = Scribe().accepted(request, book=book, idempotency_hash=digest)
        accepted = msgspec.structs.replace(accepted, **changes)
        self.now_ns += 1_000
        self.broker.streams[SHARD].add(subjects.request(AT), codec.encode("test", [accepted]), self.now_ns)
        return accepted

    def project(self) -> None:
        warehouse = Warehouse.open(self.database)
        for name in (BOOK, FLEET, SHARD):
            warehouse.apply(name, self.broker.streams[name].messages)
        warehouse.close()

    def seal(self, stream: str = SHARD, *, is_named: bool = True) -> None:
        """Archive all of a stream, and name the segment in the book."""
        log = self.broker.streams[stream]
        records = log.messages[self.archive.last(stream) :]
        sealed = self.archive.seal(stream, records, last=log.last_sequence)
        if is_named:
            self.add(
                SegmentSealed(
                    id=f"segment.{stream}.{sealed.first}",
                    stream=stream,
                    first=sealed.first,
                    last=sealed.last,
                    manifest=sealed.sha256,
                )
            )

    def lose(self, stream: str, last: int = 0) -> None:
        """Keep the stream's records up to `last`, and remove it if that is 0."""
        log = self.broker.streams[stream]
        log.messages = log.messages[:last]
        log.last = {stored.subject: stored.sequence for stored in log.messages}
        if not last:
            del self.broker.streams[stream]

    async def check(self) -> None:
        log = memory.connect(self.broker)
        await continuity.check(log, self.archive, self.database, secret=self.secret)


@pytest.fixture
async def installation(tmp_path: Path) -> AsyncIterator[Installation]:
    async with anyio.create_task_group() as tasks:
        made = Installation(MemoryBroker(tasks, lambda: START_NS), tmp_path)
        made.begin()
        yield made


async def test_a_log_that_continues_its_files_is_accepted(installation: Installation) -> None:
    await installation.check()
    installation.project()
    installation.seal()
    installation.seal(BOOK)
    await installation.check()
    installation.accept()
    installation.seal(is_named=False)
    await installation.check()
    installation.project()
    installation.accept()
    await installation.check()


async def test_a_new_broker_is_accepted(installation: Installation) -> None:
    for stream in list(installation.broker.streams):
        del installation.broker.streams[stream]
    await installation.check()


async def test_a_log_without_content_keys_is_accepted_where_the_first_versions_made_it(
    installation: Installation, tmp_path: Path
) -> None:
    folder = DataDir(tmp_path / "old")
    folder.nats.mkdir(parents=True)
    (folder.folder / "secret").write_text(installation.secret.hex())
    del installation.broker.streams[SECRETS]
    log = memory.connect(installation.broker)
    await continuity.check_folder(log, folder)
    (folder.nats / "reserve").touch()
    with pytest.raises(DataDirError, match="the log has no stream RIFT_SECRETS, but holds"):
        await continuity.check_folder(log, folder)


async def test_a_trimmed_log_is_accepted(installation: Installation) -> None:
    installation.project()
    installation.seal()
    installation.broker.streams[SHARD].trim(1)
    await installation.check()


async def test_an_archive_that_lacks_the_last_segments_is_accepted(
    installation: Installation, tmp_path: Path
) -> None:
    """Control reports it and trims nothing, and the log goes on."""
    installation.seal()
    installation.accept()
    installation.seal()
    for file in (tmp_path / "archive" / SHARD).glob("00000000000000000002*"):
        file.unlink()
    await installation.check()


def keep_the_database(installation: Installation) -> None:
    installation.project()


def keep_the_archive(installation: Installation) -> None:
    for stream in (SHARD, FLEET, BOOK):
        installation.seal(stream)


@pytest.mark.parametrize("keep", [keep_the_database, keep_the_archive])
@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ({SHARD: 0, FLEET: 0, BOOK: 0}, "up to [0-9]+, but the log ends at 0"),
        ({SHARD: 0}, "the log has no stream RIFT_0, but holds RIFT_BOOK up to [0-9]"),
        ({FLEET: 0}, "the log has no stream RIFT_FLEET, but holds RIFT_BOOK up to [0-9]"),
        ({KEYS: 0}, "the log has no stream RIFT_KEYS, but holds RIFT_BOOK up to [0-9]"),
        ({SECRETS: 0}, "the log has no stream RIFT_SECRETS, but holds RIFT_BOOK up to [0-9]"),
        ({BOOK: 0}, "the log has no stream RIFT_BOOK, but holds RIFT_[0F].* up to 1"),
        ({BOOK: 1}, "holds RIFT_BOOK up to [0-9], but the log ends at 1"),
    ],
)
async def test_a_log_that_lost_records_is_refused(
    installation: Installation,
    keep: Callable[[Installation], None],
    lost: Mapping[str, int],
    words: str,
) -> None:
    keep(installation)
    for stream, last in lost.items():
        installation.lose(stream, last)
    with pytest.raises(WrongLog, match=words):
        await installation.check()


async def test_a_book_that_is_shorter_than_its_requests_know_is_refused(installation: Installation) -> None:
    installation.lose(BOOK, 1)
    with pytest.raises(WrongLog, match="RIFT_0 names the book's record 2, but the book ends at 1"):
        await installation.check()


async def test_a_stream_that_is_shorter_than_its_anchor_is_refused(
    installation: Installation, tmp_path: Path
) -> None:
    installation.accept()
    installation.seal()
    installation.archive = Archive(tmp_path / "none", key=b"k" * 32)
    installation.lose(SHARD, 1)
    with pytest.raises(WrongLog, match="book names records of RIFT_0 up to 2, but it ends at 1"):
        await installation.check()


@pytest.mark.parametrize("keep", [keep_the_database, keep_the_archive])
async def test_a_longer_log_of_another_installation_is_refused(
    installation: Installation, keep: Callable[[Installation], None]
) -> None:
    keep(installation)
    installation.begin(start_ns=START_NS + 10**12, accounts=9)
    for _ in range(9):
        installation.accept()
        installation.broker.streams[FLEET].add(subjects.LEADER, codec.encode("test", ()), installation.now_ns)
    with pytest.raises(WrongLog, match=r"holds another record RIFT_[A-Z0-9]+:[0-9]+ than the log"):
        await installation.check()


@pytest.mark.parametrize("keep", [keep_the_database, keep_the_archive])
async def test_files_of_another_installation_that_began_later_are_refused(
    installation: Installation, keep: Callable[[Installation], None]
) -> None:
    installation.begin(start_ns=START_NS + 10**12)
    keep(installation)
    installation.begin(accounts=9)
    for _ in range(9):
        installation.accept()
    with pytest.raises(WrongLog, match=r"holds another record RIFT_BOOK:[0-9]+ than the log"):
        await installation.check()


async def test_a_book_whose_clock_was_set_back_is_accepted(installation: Installation) -> None:
    installation.now_ns -= 10**9
    installation.add(AccountOpened(id="account.late", account="late"))
    keep_the_database(installation)
    keep_the_archive(installation)
    await installation.check()


async def test_a_book_that_lost_its_records_but_not_its_end_is_refused(installation: Installation) -> None:
    keep_the_database(installation)
    book = installation.broker.streams[BOOK]
    book.trim(book.last_sequence)
    with pytest.raises(WrongLog, match="holds another record RIFT_BOOK:2 than the log"):
        await installation.check()


HOUR_NS = 3600 * 10**9


@pytest.mark.parametrize("later_ns", [0, 22 * HOUR_NS])
async def test_a_stream_of_keys_that_lost_them_is_refused_until_they_would_have_expired(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, later_ns: int
) -> None:
    def wait_until(now_ns: int) -> None:
        monkeypatch.setattr(key_continuity, "now_ns", lambda: now_ns)

    keys = installation.broker.streams[KEYS]
    keys.add(subjects.idempotency("digest"), b"{}", installation.now_ns)
    installation.accept(digest="digest", floor=1)
    # It ends the log, and has no key.
    installation.accept()
    wait_until(installation.now_ns + later_ns)
    await installation.check()
    keys.trim(keys.last_sequence)
    with pytest.raises(WrongLog, match="RIFT_KEYS lacks the idempotency key of a request in RIFT_0:2"):
        await installation.check()
    wait_until(installation.now_ns + 24 * HOUR_NS)
    await installation.check()
    # Another gateway may accept a request long after its key was stored.
    installation.now_ns += 24 * HOUR_NS
    installation.accept(digest="older", floor=1)
    await installation.check()


async def test_the_secret_of_another_installation_is_refused(installation: Installation) -> None:
    installation.secret = b"t" * 32
    with pytest.raises(
        WrongLog, match="another secret than this folder's signed the ids of the last requests in RIFT_0"
    ):
        await installation.check()


async def test_forged_acceptances_keep_no_start_from_its_log(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway's password for the broker is enough to append them, but not to sign an id."""
    monkeypatch.setattr(acceptances, "RECORDS", (2, 20))
    copied = installation.accept().request
    for _ in range(3):
        installation.accept(request="req_0_laneaaaa_tiny-1_0_" + "a" * 16 + "_" + "a" * 13)
        await installation.check()
        installation.accept(request=copied, book=10**9, idempotency_hash="none")
        await installation.check()
        installation.broker.streams[SHARD].add(subjects.request(AT), b"garbage", installation.now_ns)
        await installation.check()


async def test_an_archive_of_another_log_is_refused_whatever_its_times(
    installation: Installation, tmp_path: Path
) -> None:
    installation.begin(start_ns=START_NS + 10**12)
    installation.seal()
    other = installation.archive
    installation.archive = Archive(tmp_path / "own", key=b"k" * 32)
    installation.begin()
    for _ in range(2):
        installation.accept()
        installation.seal()
    await installation.check()
    installation.archive = other
    with pytest.raises(WrongLog, match="book does not name the archive's segment 1 to 1 of RIFT_0"):
        await installation.check()


async def test_a_lost_archive_is_refused_only_where_its_files_belong(
    installation: Installation, tmp_path: Path
) -> None:
    installation.seal()
    (tmp_path / "archive").rename(tmp_path / "aside")
    with pytest.raises(WrongLog, match=r"book names segments of RIFT_0, but .*archive holds none"):
        await installation.check()
    log = memory.connect(installation.broker)
    await continuity.check(log, installation.archive, None, secret=installation.secret)


async def test_a_damaged_database_is_refused(installation: Installation) -> None:
    installation.database.write_bytes(b"x" * 50_000)
    with pytest.raises(
        WarehouseError, match=r"cannot be opened: .*; move the file away, and the log and the"
    ):
        await installation.check()
    installation.database.write_bytes(b"")
    await installation.check()
    with duckdb.connect(installation.database) as other:
        other.execute("create table x (y int)")
    await installation.check()


@contextmanager
def held(database: Path) -> Iterator[None]:
    """Keep the file open in another process."""
    command = [sys.executable, "-c", HOLDER, str(database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        yield
        holder.kill()


async def test_files_that_cannot_be_read_now_are_left_to_control(
    installation: Installation, tmp_path: Path
) -> None:
    installation.seal()
    (manifest,) = (tmp_path / "archive" / SHARD).glob("*.json")
    manifest.write_bytes(b"{")
    await installation.check()
    installation.project()
    with held(installation.database):
        await installation.check()
