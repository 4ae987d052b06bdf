"""Compare the permission table with a real nats-server."""

import re
from collections.abc import Iterator

import anyio
import msgspec
import nats
import pytest
from nats.aio.client import Client

from events import codec, shards, subjects
from events.book import Book
from events.jetstream import connect
from events.log import LogError
from events.schema import KeyIssued
from events.subjects import Address
from rift.broker import roles
from rift.broker.roles import ADMIN, BACKUP, CONTROL, GATEWAY, OPERATOR, READER, SUPERVISOR
from tests.conftest import Server
from tests.service import ROOT

pytestmark = pytest.mark.anyio

MODEL, OTHER = "tiny-1", "large-2"
WORKER, ELSEWHERE = roles.worker(MODEL), roles.worker(OTHER)
AT = Address(0, "lane1234", MODEL)
ASK = "rift.ask."

# The roles that may publish to each subject. The server refuses all others.
WRITERS = {
    subjects.request(AT): {GATEWAY, CONTROL},
    subjects.work(AT): {WORKER, CONTROL},
    subjects.work(Address(0, AT.lane, OTHER)): {ELSEWHERE, CONTROL},
    subjects.cancel(AT): {GATEWAY, CONTROL},
    subjects.lane(0, AT.lane): {GATEWAY, CONTROL},
    subjects.fleet(MODEL): {WORKER, CONTROL, SUPERVISOR},
    subjects.fleet(OTHER): {ELSEWHERE, CONTROL, SUPERVISOR},
    subjects.LEADER: {CONTROL},
    # A subject of a shard with another stream in place of its number.
    **{
        f"rift.{kind}.x.{MODEL}": set[str]()
        for kind in (
            "book.work",
            "book.request",
            "book.cancel",
            "fleet.work",
            "keys.work",
            "secret.work",
            "ask.work",
        )
    },
    "rift.book.lane.x": set(),
    "rift.fleet.lane.x": set(),
    **{
        subjects.book(kind, "x"): {OPERATOR, SUPERVISOR}
        for kind in ("account", "key", "limits", "keylimits", "price", "quarantine", "signer")
    },
    **{
        subjects.book(kind, "x"): {OPERATOR, SUPERVISOR, CONTROL}
        for kind in ("correction", "segment", "period", "shard")
    },
    subjects.book("credit", "x"): {OPERATOR, SUPERVISOR, CONTROL, GATEWAY},
    subjects.idempotency("d" * 64): {GATEWAY},
    subjects.SECRET_PASSING: {GATEWAY},
    subjects.SECRET_KEPT: {GATEWAY},
    **{
        f"{ASK}{topic}": {GATEWAY, CONTROL, OPERATOR, READER}
        for topic in ("status", "leader", "problems", "lanes", "shards")
    },
    **{
        f"{ASK}{topic}": {GATEWAY, OPERATOR, READER} for topic in ("invoice", "invoices", "usage", "requests")
    },
    f"{ASK}sql": {OPERATOR, READER},
    **{f"{ASK}{topic}": {OPERATOR} for topic in ("close", "seal", "digests", "rebuild")},
    "$JS.API.STREAM.CREATE.RIFT_9": {CONTROL, SUPERVISOR},
    "$JS.API.STREAM.UPDATE.RIFT_0": {CONTROL, SUPERVISOR},
    "$JS.API.STREAM.PURGE.RIFT_0": set(),
    "$JS.API.STREAM.MSG.DELETE.RIFT_SECRETS": {GATEWAY, CONTROL},
    "$JS.API.STREAM.MSG.DELETE.RIFT_0": set(),
    "$JS.API.STREAM.MSG.DELETE.RIFT_BOOK": set(),
    "$JS.API.STREAM.DELETE.RIFT_0": set(),
    "$JS.API.STREAM.RESTORE.RIFT_0": set(),
    "$JS.API.STREAM.SNAPSHOT.RIFT_0": {BACKUP},
    "$JS.API.STREAM.MSG.GET.RIFT_SECRETS": {GATEWAY, CONTROL, SUPERVISOR, WORKER, ELSEWHERE, BACKUP},
    "$JS.API.CONSUMER.CREATE.RIFT_SECRETS.x": {GATEWAY, CONTROL, SUPERVISOR, WORKER, ELSEWHERE, BACKUP},
    "$JS.API.CONSUMER.MSG.NEXT.RIFT_SECRETS.x": {GATEWAY, CONTROL, SUPERVISOR, WORKER, ELSEWHERE, BACKUP},
    # Without a name in the subject, the request may name any consumer.
    "$JS.API.CONSUMER.CREATE.RIFT_SECRETS": set(),
    "$JS.API.CONSUMER.CREATE.RIFT_0": set(),
    "$JS.API.STREAM.LEADER.STEPDOWN.RIFT_0": set(),
    "$JS.API.CONSUMER.PAUSE.RIFT_0.worker-tiny-1": set(),
    # The consumer that hands out a model's requests.
    "$JS.API.CONSUMER.MSG.NEXT.RIFT_0.worker-tiny-1": {WORKER},
    "$JS.API.CONSUMER.CREATE.RIFT_0.worker-tiny-1": {WORKER},
    "$JS.API.CONSUMER.CREATE.RIFT_0.worker-tiny-1.rift.0.request.*.tiny-1": {WORKER},
    "$JS.API.CONSUMER.DURABLE.CREATE.RIFT_0.worker-tiny-1": set(),
    "$JS.API.CONSUMER.DELETE.RIFT_0.worker-tiny-1": {WORKER},
    "$JS.ACK.RIFT_0.worker-tiny-1.1.1.1.1.1": {WORKER, CONTROL},
    "$JS.ACK.RIFT_0.worker-large-2.1.1.1.1.1": {ELSEWHERE, CONTROL},
    "$SYS.REQ.SERVER.PING": set(),
    "elsewhere": set(),
}

# The roles that may subscribe to each subject.
SUBSCRIBERS = {
    "rift.>": set(),
    ">": set(),
    "$JS.>": set(),
    "$SYS.>": set(),
    "_INBOX.>": set(),
    f"{ASK}status": {CONTROL},
    **{
        f"{roles.inbox(role)}.x.*": {role}
        for role in (GATEWAY, CONTROL, SUPERVISOR, OPERATOR, READER, BACKUP, WORKER, ELSEWHERE)
    },
}
ROLES = (GATEWAY, CONTROL, SUPERVISOR, OPERATOR, READER, BACKUP, WORKER, ELSEWHERE)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("roles"), [MODEL, OTHER])
    server.start()
    yield server
    server.kill()


async def refused(server: Server, role: str) -> tuple[set[str], set[str]]:
    """Return what the server refuses to let a role publish and subscribe to."""
    found: tuple[set[str], set[str]] = set(), set()

    async def on_error(error: Exception) -> None:
        if what := re.search(r'permissions violation for (publish|subscription) to "(\S+)"', str(error)):
            found[what[1] == "subscription"].add(what[2])

    access = server.address.access(role)
    client: Client = await nats.connect(
        server.address.url, user=role, password=access.password, error_cb=on_error, allow_reconnect=False
    )
    for subject in SUBSCRIBERS:
        await client.subscribe(subject)
    for subject in WRITERS:
        # Without a reply the server answers no API call, and an empty record harms no test.
        await client.publish(subject, b"")
    await client.flush()
    # The library reports errors in separate tasks.
    count = -1
    while count < (count := len(found[0]) + len(found[1])):  # noqa: ASYNC110
        await anyio.sleep(0.05)
    await client.close()
    return found


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_may_do_what_it_needs_and_nothing_else(known: Server, role: str) -> None:
    published, subscribed = await refused(known, role)
    assert published == {subject.lower() for subject, may in WRITERS.items() if role not in may}
    assert subscribed == {subject.lower() for subject, may in SUBSCRIBERS.items() if role not in may}


async def test_every_role_reads_every_stream(known: Server) -> None:
    admin = await connect(known.address.url, known.address.access(ADMIN), name="test")
    await admin.ensure_streams(shards=1, replicas=1, max_bytes=64 << 20)
    await admin.append("RIFT_0", subjects.work(AT), b"record")
    await admin.close()
    for role in ROLES:
        log = await connect(known.address.url, known.address.access(role), name="test")
        assert await log.last_sequence("RIFT_0") == 1
        assert (await log.get("RIFT_0", 1)).data == b"record"  # type: ignore[union-attr]
        for pace_s in (0.0, 0.1):
            async with log.follow("RIFT_0", ["rift.0.>"], after=0, pace_s=pace_s) as reader:
                with anyio.fail_after(5):
                    assert [one.data for one in await anext(aiter(reader))] == [b"record"]
        await log.close()


async def test_a_consumer_is_no_way_to_write(known: Server) -> None:
    """Every reader names the subject to deliver to. That is neither an append nor a question."""
    worker = await connect(known.address.url, known.address.access(WORKER), name="worker")
    control = await connect(known.address.url, known.address.access(CONTROL), name="control")
    await control.ensure_streams(shards=1, replicas=1, max_bytes=64 << 20)
    await worker.append("RIFT_0", subjects.work(AT), b"forged")
    last = await control.last_sequence(subjects.BOOK)
    asked: list[bytes] = []

    async def answer(question: bytes) -> bytes:
        asked.append(question)
        return b"answer"

    async with control.answer(f"{ASK}rebuild", answer), control.answer(f"{ASK}status", answer):
        for number, target in enumerate((f"{ASK}rebuild", subjects.book("key", "x"))):
            config = {"name": f"evil{number}", "ack_policy": "none", "deliver_subject": target}
            request = {"stream_name": "RIFT_0", "config": config | {"inactive_threshold": 10**9}}
            await worker._api(f"CONSUMER.CREATE.RIFT_0.evil{number}", request)
        reader = await connect(known.address.url, known.address.access(READER), name="reader")
        assert await reader.ask(f"{ASK}status", b"question", timeout_s=5) == b"answer"
    assert asked == [b"question"]
    assert await control.last_sequence(subjects.BOOK) == last
    for log in (worker, control, reader):
        await log.close()


HEADERS = (
    # A consumer tells its reader so that it waits, and its reader answers at the subject.
    b"NATS/1.0\r\nStatus: 100\r\nNats-Consumer-Stalled: $JS.API.STREAM.PURGE.RIFT_BOOK\r\n\r\n",
    b"NATS/1.0 404 No Messages\r\n\r\n",
    # The client library cannot parse these.
    b"NATS/1.0 \xff\xff\xff \xff\xff\r\n\r\n",
    b"NATS/1.0\r\n",
    b"\xff",
)


async def test_a_writer_cannot_speak_as_the_broker(known: Server) -> None:
    """A record's headers are its writer's. They neither move a reader nor hide the record from it."""
    control = await connect(known.address.url, known.address.access(CONTROL), name="control")
    await control.ensure_streams(shards=1, replicas=1, max_bytes=64 << 20)
    await control.append(subjects.BOOK, subjects.book("shard", "x"), b"entry")
    worker = await connect(known.address.url, known.address.access(WORKER), name="worker")
    before = await control.last_sequence("RIFT_0")
    for head in HEADERS:
        size = f"{len(head)} {len(head) + 1}"
        assert worker.client.send(
            b"HPUB %b %b\r\n%bx\r\n" % (subjects.work(AT).encode(), size.encode(), head)
        )
    last = await worker.append("RIFT_0", subjects.work(AT), b"record")
    for pace_s in (0.0, 0.1):
        position = before
        async with control.follow("RIFT_0", ["rift.0.>"], after=before, pace_s=pace_s) as reader:
            with anyio.fail_after(5):
                while position < last:
                    for stored in await anext(aiter(reader)):
                        assert stored.sequence == position + 1
                        position = stored.sequence
    assert position == before + len(HEADERS) + 1
    assert await control.get(subjects.BOOK, await control.last_sequence(subjects.BOOK)) is not None
    for log in (worker, control):
        await log.close()


async def test_an_answer_removes_no_record(known: Server) -> None:
    """The broker sends its answers to any subject, also to one that the asker may not publish to."""
    control = await connect(known.address.url, known.address.access(CONTROL), name="control")
    await control.ensure_streams(shards=1, replicas=1, max_bytes=64 << 20)
    kept = await control.append(subjects.BOOK, subjects.book("shard", "x"), b"kept")
    # A key has the sequence that the worker's last record will have.
    forged = await control.last_sequence("RIFT_0") + 1
    gateway = await connect(known.address.url, known.address.access(GATEWAY), name="gateway")
    while await gateway.append(subjects.SECRETS, subjects.SECRET_PASSING, b"key") < forged:
        pass
    worker = await connect(known.address.url, known.address.access(WORKER), name="worker")
    config = {"ack_policy": "none", "filter_subject": subjects.work(AT), "deliver_policy": "new"}
    for number, target in enumerate(("STREAM.PURGE.RIFT_BOOK", "STREAM.DELETE.RIFT_BOOK")):
        reply = f"$JS.API.{target}"
        # The empty answer of a consumer without a record.
        pulled = {"stream_name": "RIFT_0", "config": config | {"name": f"pull{number}"}}
        await worker._api(f"CONSUMER.CREATE.RIFT_0.pull{number}.{subjects.work(AT)}", pulled)
        ask = {"batch": 1, "no_wait": True}
        pull = f"$JS.API.CONSUMER.MSG.NEXT.RIFT_0.pull{number}"
        await worker.client.publish(pull, msgspec.json.encode(ask), reply=reply)
        # The empty word of a consumer that it still lives.
        beats = config | {"name": f"push{number}", "deliver_subject": reply, "idle_heartbeat": 10**8}
        pushed = {"stream_name": "RIFT_0", "config": beats}
        await worker._api(f"CONSUMER.CREATE.RIFT_0.push{number}.{subjects.work(AT)}", pushed)
    # The acknowledgement of a record, which names a sequence as the removal of one record does.
    await worker.client.publish(subjects.work(AT), b"", reply="$JS.API.STREAM.MSG.DELETE.RIFT_SECRETS")
    await worker.client.flush()
    await anyio.sleep(0.3)
    assert await control.last_sequence("RIFT_0") == forged
    assert await control.get(subjects.SECRETS, forged) is not None
    assert await control.get(subjects.BOOK, kept) is not None
    for log in (worker, control, gateway):
        await log.close()


async def test_what_the_broker_can_be_made_to_store_counts_for_nothing(known: Server) -> None:
    """A delivery is stored with its first subject, an answer with the subject at which it was to arrive."""
    control = await connect(known.address.url, known.address.access(CONTROL), name="control")
    await control.ensure_streams(shards=1, replicas=1, max_bytes=64 << 20)
    await control.append(subjects.BOOK, subjects.book("shard", "x"), codec.encode("control", []))
    worker = await connect(known.address.url, known.address.access(WORKER), name="worker")
    issued = KeyIssued(id="forged", key="k", account="acme", sha256="0" * 64)
    forged = codec.encode("worker", [issued])
    last = await worker.append("RIFT_0", subjects.work(AT), forged)
    start = {"deliver_policy": "by_start_sequence", "opt_start_seq": last}
    config = {"name": "forge", "ack_policy": "none", "filter_subject": "rift.0.>"} | start
    request = {"stream_name": "RIFT_0", "config": config}
    await worker._api("CONSUMER.CREATE.RIFT_0.forge.rift.0.>", request)
    before = await control.last_sequence(subjects.BOOK)
    pull = "$JS.API.CONSUMER.MSG.NEXT.RIFT_0.forge"
    await worker.client.publish(pull, b'{"batch":2,"no_wait":true}', reply=subjects.book("key", "x"))
    reader = await connect(known.address.url, known.address.access(READER), name="reader")
    for subject in (subjects.SHARD_LIST, subjects.book("key", "x")):
        await reader.client.publish("$JS.API.INFO", b"", reply=subject)
    await reader.client.flush()
    await anyio.sleep(0.3)
    stored = await control.last_sequence(subjects.BOOK)
    assert stored == before + 4
    folded = Book()
    with anyio.fail_after(5):
        async with control.follow(subjects.BOOK, ["rift.book.>"], after=before) as live:
            folded.position = before
            while folded.position < stored:
                for one in await anext(aiter(live)):
                    folded.fold(one)
        scanned = [
            one
            async for batch in control.scan(subjects.BOOK, ["rift.book.>"], first=1, target=stored)
            for one in batch
        ]
    assert scanned[-1].sequence == stored
    assert not folded.keys
    assert await shards.count(control) == 1
    for log in (worker, control, reader):
        await log.close()


async def test_who_may_remove_records_does_so_under_a_secret_name(known: Server) -> None:
    for role in (CONTROL, ADMIN):
        log = await connect(known.address.url, known.address.access(role), name=role)
        await log.ensure_streams(shards=1, replicas=1, max_bytes=64 << 20)
        last = await log.append(subjects.BOOK, subjects.book("shard", "x"), b"kept")
        await log.trim(subjects.BOOK, last - 1)
        assert await log.first_sequence(subjects.BOOK) == last
        log._hidden = ""
        with pytest.raises(LogError):
            await log.purge(subjects.BOOK, last)
        assert await log.first_sequence(subjects.BOOK) == last
        await log.close()


def test_the_readme_has_the_table() -> None:
    text = (ROOT / "rift/broker/README.md").read_text()
    rows = re.findall(r"^\| `(\S+)` \|[^|]*\|([^|]*)\|$", text.partition("## What a stolen")[0], re.M)
    told = {role: set(re.findall(r"`(\S+)`", subjects)) for role, subjects in rows}
    assert set(re.findall(r"`(\$JS\S+)`", text.partition("Reading takes")[2])) == set(roles.READ)
    granted = roles.table(["MODEL"])
    assert told.keys() == granted.keys()
    asked = {*roles.ASK_STATUS, *roles.ASK_BILLS, *roles.READ, ">"}
    for role, permissions in granted.items():
        hidden = {f"$JS.API.SECRET.{call}" for call in permissions.hidden if role != ADMIN}
        assert told[role] == (set(permissions.publish) | hidden) - asked, role
    assert set(re.findall(r"^- `(\S+)`$", text, re.M)) == {*permissions.hidden}
