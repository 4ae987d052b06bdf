"""Behaviour of the log on a real nats-server alone; the contract is in `tests/contracts/test_log.py`."""

import asyncio
import gc
import socket
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from ssl import SSLCertVerificationError
from typing import Any

import anyio
import pytest

from events import subjects
from events.contracts import ACK_WAIT_S
from events.jetstream import Access, AccessRefused, InvalidBroker, JetStream, appends, connect, push_reader
from events.jetstream import access as jetstream_access
from events.jetstream import connection as jetstream
from events.jetstream.deliveries import PULL_EXPIRES_S
from events.jetstream.streams import servers
from events.log import LogFull, NoResponders, OutcomeUnknown, Stored, append_until_known
from events.subjects import Address
from tests.chaos.rig import free_port
from tests.conftest import Server

pytestmark = pytest.mark.anyio

STREAM = "RIFT_0"
MIB = 1024 * 1024


@pytest.fixture
async def log(server: Any) -> AsyncIterator[JetStream]:
    opened = await connect(server.address.url, server.address.access("admin"), name="test")
    await opened.ensure_streams(shards=1, replicas=1, max_bytes=64 * MIB)
    yield opened
    await opened.close()


async def test_the_streams_are_as_the_protocol_needs_them(log: JetStream) -> None:
    for name in (STREAM, subjects.FLEET, subjects.BOOK):
        info = await log._api(f"STREAM.INFO.{name}")
        found = {key: info["config"].get(key) for key in ("storage", "discard", "retention", "deny_delete")}
        assert found == {"storage": "file", "discard": "new", "retention": "limits", "deny_delete": True}
        assert info["config"]["max_age"] == 0
    # A second start finds them as they are.
    await log.ensure_streams(shards=1, replicas=1, max_bytes=32 * MIB)


async def test_a_stream_that_differs_stops_the_start(server: Any) -> None:
    log = await connect(server.address.url, server.address.access("admin"), name="differs")
    await log.client.request(
        "$JS.API.STREAM.CREATE.RIFT_1",
        b'{"name":"RIFT_1","subjects":["rift.1.>"],"discard":"old","storage":"file","deny_delete":true}',
    )
    with pytest.raises(InvalidBroker, match="stream RIFT_1: discard is 'old', Rift needs 'new'"):
        await log.ensure_streams(shards=2, replicas=1, max_bytes=MIB)
    await log.close()


async def room_of(log: JetStream) -> dict[str, int]:
    names = (STREAM, subjects.BOOK, subjects.FLEET)
    return {name: (await log._api(f"STREAM.INFO.{name}"))["config"]["max_bytes"] for name in names}


async def test_a_larger_setting_gives_full_streams_room_and_a_smaller_one_takes_none(tmp_path: Path) -> None:
    """The book is kept for ever: once it is full, only the operator's setting brings it back."""
    server = Server(tmp_path)
    server.start()
    log = await connect(server.address.url, server.address.access("admin"), name="small")
    await log.ensure_streams(shards=1, replicas=1, max_bytes=MIB)
    assert await room_of(log) == {STREAM: MIB, subjects.BOOK: MIB // 4, subjects.FLEET: MIB // 4}
    for _ in range(3):
        await log.append(subjects.BOOK, "rift.book.credit.a", b"x" * 80_000)
    await log.ensure_streams(shards=1, replicas=1, max_bytes=MIB // 2)
    with pytest.raises(LogFull):
        await log.append(subjects.BOOK, "rift.book.key.a", b"x" * 80_000)
    await log.ensure_streams(shards=1, replicas=1, max_bytes=4 * MIB)
    assert await room_of(log) == {STREAM: 4 * MIB, subjects.BOOK: MIB, subjects.FLEET: MIB}
    last = await log.last_sequence(subjects.BOOK)
    assert await log.append(subjects.BOOK, "rift.book.key.a", b"x" * 80_000) == last + 1
    await log.close()
    server.kill()


async def test_a_stream_without_a_limit_gets_none(log: JetStream) -> None:
    """An operator may have changed it; a limit would take room away."""
    name = subjects.FLEET
    limited = (await log._api(f"STREAM.INFO.{name}"))["config"]
    await log._api(f"STREAM.UPDATE.{name}", limited | {"max_bytes": -1})
    await log.ensure_streams(shards=1, replicas=1, max_bytes=64 * MIB)
    assert (await room_of(log))[name] == -1
    await log._api(f"STREAM.UPDATE.{name}", limited)


async def test_a_full_stream_of_content_keys_refuses_a_key_and_keeps_the_others(log: JetStream) -> None:
    name = subjects.SECRETS
    config = (await log._api(f"STREAM.INFO.{name}"))["config"]
    assert config["discard"] == "new"
    # An older Rift created it so.
    await log._api(f"STREAM.UPDATE.{name}", config | {"discard": "old"})
    await log.ensure_streams(shards=1, replicas=1, max_bytes=64 * MIB)
    first = await log.append(name, subjects.SECRET_PASSING, b"x" * MIB)
    for _ in range(2):
        await log.append(name, subjects.SECRET_PASSING, b"x" * MIB)
    with pytest.raises(LogFull):
        await log.append(name, subjects.SECRET_PASSING, b"x" * MIB)
    assert await log.get(name, first) is not None
    await log._remove(f"STREAM.PURGE.{name}", {})


async def test_room_that_the_broker_has_not_stops_the_start(log: JetStream) -> None:
    with pytest.raises(InvalidBroker, match=r"stream RIFT_0 of [0-9]+ bytes, 1 replicas: .*insufficient"):
        await log.ensure_streams(shards=1, replicas=1, max_bytes=1 << 60)


async def test_an_old_server_stops_the_start(log: JetStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetstream, "SERVER_VERSION_MIN", (99, 0))
    with pytest.raises(InvalidBroker, match="is too old"):
        await log.ensure_streams(shards=1, replicas=1, max_bytes=MIB)


async def test_a_lost_connection_closes_with_what_could_not_be_sent(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start()
    log = await connect(server.address.url, server.address.access("admin"), name="lost")
    server.kill()
    while log.is_connected:  # noqa: ASYNC110  # the library calls back only once
        await anyio.sleep(0.01)
    await log.client.publish("lost", b"x")
    await log.close()


async def test_a_dead_server_beside_a_live_one_prevents_no_connection(server: Any) -> None:
    """The client library tries them in any order."""
    for _ in range(8):
        either = f"nats://127.0.0.1:{free_port()},{server.address.url}"
        log = await connect(either, server.address.access("admin"), name="either")
        await log.close()


async def test_a_server_that_hangs_beside_a_live_one_prevents_no_connection(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetstream_access, "CONNECT_S", 0.5)
    monkeypatch.setattr("nats.aio.client.shuffle", lambda servers: None)
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        first = f"nats://127.0.0.1:{hangs.getsockname()[1]},{server.address.url}"
        log = await connect(first, server.address.access("admin"), name="first")
        await log.close()


def test_a_server_that_was_never_heard_is_silent() -> None:
    """As a cluster of three reports after two of its servers were killed, and one has returned."""
    never = {"name": "a", "current": False, "active": 0}
    late = {"name": "b", "current": True, "active": 7 * 10**9}
    returned = {"name": "b", "current": False, "active": 3 * 10**8, "lag": 2}
    myself = {"name": "c", "current": True, "active": 7 * 10**9}
    assert servers({"leader": "c", "replicas": [never, late]}) == {
        "a": "silent",
        "b": "silent",
        "c": "leader",
    }
    assert servers({"leader": "c", "replicas": [never, returned]})["b"] == "behind"
    leaderless = servers({"replicas": [never, late, myself]})
    assert leaderless == {"a": "leaderless", "b": "leaderless", "c": "leaderless"}
    assert servers({"leader": "alone"}) == {}


@pytest.mark.parametrize("access", [Access(), Access(token="wrong"), Access(user="admin", password="wrong")])
async def test_a_wrong_password_is_refused(server: Any, access: Access) -> None:
    with pytest.raises(AccessRefused, match=r"refuses (a process without user and password|user admin): "):
        await connect(server.address.url, access, name="intruder")


def test_a_certificate_that_is_not_trusted_is_no_silent_server() -> None:
    untrusted = SSLCertVerificationError(1, "certificate verify failed")
    error = jetstream_access._unconnected("nats://a:1", Access(tls="/tls"), untrusted)
    assert isinstance(error, AccessRefused)
    assert "has a certificate that /tls/ca.pem does not confirm: certificate verify failed" in str(error)


async def test_free_slots_are_filled_at_once(log: JetStream) -> None:
    """A slot that becomes free does not wait for the end of a pull that has already brought its job."""
    at = Address(0, "slots123", "model-slots")
    for n in range(12):
        await log.append(STREAM, subjects.request(at), b"%d" % n)
    async with log.jobs(0, at.model) as jobs:
        began_at = anyio.current_time()
        for _ in range(4):
            jobs.want(3)
            for _ in range(3):
                await log.ack((await anext(jobs)).ack)
    assert anyio.current_time() - began_at < 1.0


async def test_a_job_on_its_way_to_a_worker_that_leaves_is_given_back(log: JetStream, server: Server) -> None:
    at = Address(0, "leaver12", "model-leaver")

    async def append() -> None:
        other = await connect(server.address.url, server.address.access("admin"), name="other")
        await other.append(STREAM, subjects.request(at), b"x")
        await other.close()

    async with log.jobs(0, at.model) as jobs, anyio.create_task_group() as tasks:
        tasks.start_soon(jobs.__anext__)
        jobs.want(1)
        await anyio.sleep(0.3)
        tasks.cancel_scope.cancel()
        # Without a turn of this loop, so that the job is sent but not received.
        thread = threading.Thread(target=anyio.run, args=(append,))
        thread.start()
        thread.join(10)
        time.sleep(0.1)  # noqa: ASYNC251
    async with log.jobs(0, at.model) as jobs:
        jobs.want(1)
        with anyio.fail_after(ACK_WAIT_S - 1):
            assert (await anext(jobs)).stored.data == b"x"


async def test_pulls_that_were_served_in_turn_leave_no_slot_empty(log: JetStream) -> None:
    """Two pulls of ten get five jobs each: once the first has ended, ten free slots ask for five again."""
    at = Address(0, "turns123", "model-turns")
    async with log.jobs(0, at.model) as jobs, anyio.create_task_group() as tasks:
        taken: list[bytes] = []

        async def take() -> None:
            async for job in jobs:
                taken.append(job.stored.data)
                await log.ack(job.ack)

        tasks.start_soon(take)
        jobs.want(10)
        await anyio.sleep(PULL_EXPIRES_S / 2)
        jobs.want(20)
        await anyio.sleep(0.1)
        for n in range(10):
            await log.append(STREAM, subjects.request(at), b"%d" % n)
        await anyio.sleep(PULL_EXPIRES_S / 2 + 0.1)
        for n in range(10, 20):
            await log.append(STREAM, subjects.request(at), b"%d" % n)
        await anyio.sleep(0.3)
        assert taken == [b"%d" % n for n in range(20)]
        tasks.cancel_scope.cancel()


async def test_a_crowd_of_appends_is_stored_once_each_at_the_sequences_it_is_told(log: JetStream) -> None:
    at = Address(0, "crowd123", "model-crowd")
    told: dict[bytes, int] = {}

    async def append(data: bytes) -> None:
        told[data] = await log.append(STREAM, subjects.work(at), data)

    before = await log.last_sequence(STREAM)
    async with anyio.create_task_group() as tasks:
        for n in range(300):
            tasks.start_soon(append, b"%d" % n)
    target = await log.last_sequence(STREAM)
    found = [
        stored
        async for batch in log.scan(STREAM, [subjects.work(at)], first=before + 1, target=target)
        for stored in batch
    ]
    assert {stored.data: stored.sequence for stored in found} == told
    assert len(found) == 300


async def test_a_batch_whose_leader_is_gone_is_not_taken_for_stored(
    log: JetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every cancellation stops at a shield: asyncio's own does not."""
    at = Address(0, "leader12", "model-leader")
    became: list[object] = []

    async def gone(*_: Any) -> int:
        await anyio.sleep(0.05)
        raise asyncio.CancelledError

    async def append() -> None:
        try:
            became.append(await log.append(STREAM, subjects.work(at), b"x"))
        except (OutcomeUnknown, asyncio.CancelledError) as error:
            became.append(type(error))

    monkeypatch.setattr(appends.Appends, "_commit", gone)
    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(append)
    assert 0 not in became
    assert became.count(OutcomeUnknown) == 20 - appends.CROWD - 1
    assert became.count(asyncio.CancelledError) == 1


async def test_a_batch_that_does_not_fit_is_stored_as_far_as_it_does(
    log: JetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: Any) -> int:
        raise LogFull("the batch does not fit")

    monkeypatch.setattr(appends.Appends, "_commit", full)
    at = Address(0, "fits1234", "model-fits")
    before = await log.last_sequence(STREAM)
    async with anyio.create_task_group() as tasks:
        for n in range(30):
            tasks.start_soon(partial(log.append, STREAM, subjects.work(at), b"%d" % n))
    assert await log.last_sequence(STREAM) == before + 30


async def test_a_crowd_that_the_broker_takes_no_batch_of_is_stored_one_by_one(
    log: JetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of more than 1,000 messages is refused."""
    at = Address(0, "refused1", "model-refused")
    monkeypatch.setattr(appends, "BATCH_MESSAGES_MAX", 5_000)
    before = await log.last_sequence(STREAM)
    async with anyio.create_task_group() as tasks:
        for n in range(1_200):
            tasks.start_soon(partial(log.append, STREAM, subjects.work(at), b"%d" % n))
    assert await log.last_sequence(STREAM) == before + 1_200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("pace_s", [0.0, 0.01, 0.6])
async def test_a_follower_survives_the_brokers_kill_without_gap_or_repeat(
    server: Any, log: JetStream, pace_s: float
) -> None:
    """Live, and at a pace: killed while it waits for a message, and while it waits for its time."""
    at = Address(0, f"killed{int(pace_s * 100)}", "model-a")
    sent: list[int] = []
    async with (
        log.follow(STREAM, [subjects.work(at)], after=0, pace_s=pace_s) as follower,
        anyio.create_task_group() as tasks,
    ):
        for n in range(50):
            sent.append(await log.append(STREAM, subjects.work(at), b"%d" % n))
        before = [s.sequence for s in await read(follower, 50)]
        after: list[int] = []

        async def read_on() -> None:
            after.extend([s.sequence for s in await read(follower, 50)])

        tasks.start_soon(read_on)
        await anyio.sleep(0.1)
        server.kill()
        server.start()
        for n in range(50):
            data = b"after %d" % n
            sent.append(await append_until_known(log, STREAM, subjects.work(at), data, within_s=20))
    assert (before + after)[-50:] == sent[-50:]
    assert before + after == sorted(set(before + after))
    assert set(sent) <= set(before + after)
    assert log.epoch == 1
    # The client leaves the socket of a reconnection that failed to the garbage collector.
    gc.collect()


async def test_a_reader_that_reopens_hands_out_at_once_what_is_stored(log: JetStream) -> None:
    subject = subjects.request(Address(0, "reopen12", "model-reopen"))
    after = await log.last_sequence(STREAM)
    async with log.follow(STREAM, [subject], after=after) as reader:
        batches = aiter(reader)
        began_at = anyio.current_time()
        for _ in range(8):
            reader.interrupt()
            sequence = await log.append(STREAM, subject, b"x")
            assert [stored.sequence for stored in await anext(batches)] == [sequence]
    assert anyio.current_time() - began_at < 2 * push_reader.HEARTBEAT_S, "no reopening waits for a heartbeat"
    assert log.reader_gaps == 8


async def test_who_begins_to_answer_while_brokers_recover_tries_again(
    log: JetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(data: bytes) -> bytes:
        return data

    asked = log._api
    outcomes = [OutcomeUnknown("no answer to INFO: none within 5 s")]

    async def recovering(path: str, body: Any = None) -> dict[str, Any]:
        if outcomes:
            raise outcomes.pop()
        return await asked(path, body)

    monkeypatch.setattr(log, "_api", recovering)
    async with log.answer("rift.ask.recovery", answer):
        assert await log.ask("rift.ask.recovery", b"x", timeout_s=1) == b"x"


async def test_who_stops_answering_during_an_outage_is_not_asked_after_it(
    log: JetStream, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(data: bytes) -> bytes:
        return data

    async with log.answer("rift.ask.outage", answer):
        server.kill()
        with anyio.fail_after(5):
            while log.is_connected:  # noqa: ASYNC110  # another process
                await anyio.sleep(0.01)
    await anyio.sleep(1)
    assert caplog.text.count("connection to the log") <= 3, "not a line for each attempt"
    server.start()
    with anyio.fail_after(10):
        while not log.is_connected:  # noqa: ASYNC110  # another process
            await anyio.sleep(0.01)
    with pytest.raises(NoResponders):
        await log.ask("rift.ask.outage", b"", timeout_s=1)


async def read(follower: Any, count: int) -> list[Stored]:
    found: list[Stored] = []
    with anyio.fail_after(20):
        async for batch in follower:
            found += batch
            if len(found) >= count:
                break
    return found
