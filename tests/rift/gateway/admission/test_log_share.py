"""What one account may store: bytes of the log per minute, idempotency keys and keys of sealed content."""

from typing import Any

import anyio
import msgspec
import pytest

from events import encryption, ids, subjects
from events.book import Book
from events.broker_clock import BrokerClock
from events.contracts import IDEMPOTENCY_S, SECOND_NS
from events.jetstream import JetStream, connect
from events.log import Stored
from events.schema import LaneOpened, LimitsSet
from events.subjects import Address
from rift.gateway.admission import log_share, request_size
from rift.gateway.admission.key_limits import KeyCounts, KeyLimits
from rift.gateway.admission.log_room import ROOM_BYTES_MIN
from rift.gateway.admission.log_share import CONTENT_KEY_BYTES, IDEMPOTENCY_KEY_BYTES, LogCapacity, LogShare
from rift.gateway.admission.rate_limits import RateLimits
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.state import GatewayConfig
from rift.gateway.streams.live_gateways import LiveGateways
from rift.gateway.submission.idempotency import KeyEntry
from tests.rift.gateway.admission.test_credit import World, live, opened
from tests.rift.gateway.admission.test_max_cost import accepted
from tests.rift.gateway.admission.test_rate_limits import OTHER, ask, key_of, tell, whole
from tests.simulation.client import Call
from tests.simulation.prepaid import ACCOUNT
from tests.simulation.processes import MODEL, SECRET, GatewayProcess

MIB = 1024 * 1024
LOG_BYTES = 256 * MIB
DAY_NS = int(IDEMPOTENCY_S) * SECOND_NS
MINUTE_NS = 60 * SECOND_NS


def submit(world: World, gateway: GatewayProcess, key: str, **more: Any) -> Call:
    return ask(world, gateway, key, background=True, **more)


def keyed(world: World, gateway: GatewayProcess, name: str, key: str, **more: Any) -> Call:
    headers = {"authorization": f"Bearer {key}", "idempotency-key": name}
    body = {"prompt": "a prompt", "background": True} | more
    return world.ask(gateway, headers=headers, **body)


def free_queue(account: str, **limits: int) -> LimitsSet:
    return LimitsSet(id=f"free.{account}.{limits}", account=account, queue_share_percent=100, **limits)


def book_of(*accounts: str) -> Book:
    book = Book()
    book.accounts = dict.fromkeys(accounts, 0)
    return book


# --- bytes ------------------------------------------------------------------------------------------------


def test_one_of_several_accounts_cannot_fill_the_log_before_it_is_trimmed() -> None:
    capacity = LogCapacity(LOG_BYTES, LOG_BYTES // 16, LOG_BYTES // 16)
    alone, many = LogShare(capacity, book_of("a")), LogShare(capacity, book_of("a", "b"))
    whole_minute, part = alone.bytes_per_minute("a"), many.bytes_per_minute("a")
    assert whole_minute is not None
    assert part is not None
    room = LOG_BYTES - ROOM_BYTES_MIN
    assert log_share.FILL_MINUTES == 17
    assert 0.99 * room < log_share.FILL_MINUTES * whole_minute <= room
    assert log_share.FILL_MINUTES * part <= room // log_share.ACCOUNT_PART
    # The smallest requests with `store: false` are bounded by it too: their keys stay 12 minutes at most.
    least = request_size.ENDS_BYTES + 400
    assert 12 * part // least < LOG_BYTES // 16 // CONTENT_KEY_BYTES // 2
    assert LogShare(LogCapacity(-1, -1, -1), book_of("a")).bytes_per_minute("a") is None


@pytest.mark.anyio
async def test_a_limit_of_the_book_replaces_the_share_and_is_divided_among_all_gateways() -> None:
    book = book_of("a", "b")
    share = LogShare(LogCapacity(LOG_BYTES, LOG_BYTES, LOG_BYTES), book)
    book.limits["a"] = LimitsSet(id="l", account="a", log_bytes_per_minute=900)
    gateways = LiveGateways(0, "lane-a")
    for shard, lane in ((0, "lane-b"), (1, "lane-c")):
        gateways.note(shard, LaneOpened(lane=lane, shard=shard))
    lane: Any = None
    limits = RateLimits(lane, book=book, gateways=gateways, share=share)
    part = share.bytes_per_minute("b")
    assert part is not None
    assert limits._shares("a", "k")["account a"].log_bytes == 300
    assert limits._shares("b", "k")["account b"].log_bytes == part // 2


def test_a_flood_of_bytes_is_refused_with_an_exact_hint_and_another_account_goes_on() -> None:
    async def test(world: World) -> None:
        world.broker.stream("RIFT_0").bytes_max = LOG_BYTES
        flood = key_of(world, OTHER)
        tell(world, free_queue(OTHER))
        gateway = await world.gateway(served=(MODEL,))
        large = "x" * 120_000
        answers = [await whole(submit(world, gateway, flood.text, prompt=large)) for _ in range(30)]
        accepted = [status for status, _ in answers].count(202)
        assert accepted == LOG_BYTES * 3 // 4 // 17 // 4 // 120_000
        refused = submit(world, gateway, flood.text, prompt=large)
        assert await whole(refused) == (429, "log_bytes_per_minute")
        assert b"account other has a limit of 2960" in refused.data
        at_s = anyio.current_time()
        stored = world.broker.stream("RIFT_0").size
        assert (await whole(submit(world, gateway, world.key)))[0] == 202
        wait_ms = int(refused.headers[b"retry-after-ms"])
        assert 0 < wait_ms <= 60_000
        await anyio.sleep_until(at_s + wait_ms / 1000 - 0.002)
        assert await whole(submit(world, gateway, flood.text, prompt=large)) == (429, "log_bytes_per_minute")
        await anyio.sleep_until(at_s + wait_ms / 1000)
        assert (await whole(submit(world, gateway, flood.text, prompt=large)))[0] == 202
        assert stored < LOG_BYTES * 3 // 4 // 17
        tell(world, free_queue(OTHER, log_bytes_per_minute=1))
        await anyio.sleep(0.1)
        assert await whole(submit(world, gateway, flood.text)) == (429, "log_bytes_per_minute")
        await anyio.sleep(61)
        # Alone in its minute, a request of any size is accepted, but not one that stores it several times.
        turn = {"role": "developer", "content": "x" * 2_000_000}
        group = {"messages": [turn, {"role": "user", "content": "hi"}], "n": 8}
        headers = {"authorization": f"Bearer {flood.text}"}
        call = world.ask(gateway, "/v1/chat/completions", headers=headers, **group)
        assert await whole(call) == (429, "log_bytes_per_minute")
        assert call.headers[b"x-should-retry"] == b"false"
        assert b"needs 16" in call.data
        assert (await whole(submit(world, gateway, flood.text)))[0] == 202

    live(test)


def test_answers_count_with_about_the_bytes_that_they_take() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        stream = world.broker.stream("RIFT_0")
        for tokens in (1, 200):
            before, size = len(stream.messages), stream.size
            assert (await whole(ask(world, gateway, world.key, tokens=tokens)))[0] == 200
            reports = [one.data for one in stream.messages[before:] if ".lane." in one.subject]
            stored = stream.size - size - sum(len(data) + 50 for data in reports)
            counted = request_size.ENDS_BYTES + 600 + tokens * request_size.TOKEN_LOG_BYTES
            assert stored / 2 < counted < stored * 2, (tokens, stored, counted)

    live(test)


# --- idempotency keys -------------------------------------------------------------------------------------


def test_the_keys_of_one_account_are_bounded_and_a_restart_forgets_none() -> None:
    async def test(world: World) -> None:
        world.broker.stream(subjects.KEYS).bytes_max = 4 * 5 * IDEMPOTENCY_KEY_BYTES
        flood = key_of(world, OTHER)
        tell(world, free_queue(OTHER), free_queue(ACCOUNT))
        gateway = await world.gateway(served=(MODEL,))
        for number in range(5):
            assert (await whole(keyed(world, gateway, f"k{number}", flood.text)))[0] == 202
        last = world.broker.stream(subjects.KEYS).last_sequence
        for at in (gateway, await world.gateway(served=(MODEL,))):
            await anyio.sleep(0.5)
            refused = keyed(world, at, "k5", flood.text)
            assert await whole(refused) == (429, "idempotency_keys")
            assert 86_300_000 < int(refused.headers[b"retry-after-ms"]) <= 86_460_000
            # Its earlier keys, requests without a key, and other accounts go on.
            assert (await whole(keyed(world, at, "k4", flood.text)))[0] == 202
            assert (await whole(submit(world, at, flood.text)))[0] == 202
        assert world.broker.stream(subjects.KEYS).last_sequence == last
        assert (await whole(keyed(world, gateway, "k5", world.key)))[0] == 202
        tell(world, free_queue(OTHER, idempotency_keys=6))
        await anyio.sleep(0.1)
        assert (await whole(keyed(world, gateway, "k5", flood.text)))[0] == 202

    live(test)


def test_full_streams_of_keys_say_so_and_other_requests_go_on() -> None:
    async def test(world: World) -> None:
        tell(world, free_queue(ACCOUNT, idempotency_keys=1000))
        gateway = await world.gateway(served=(MODEL,))
        assert (await whole(keyed(world, gateway, "first", world.key)))[0] == 202
        await anyio.sleep(100)
        for name in (subjects.KEYS, subjects.SECRETS):
            world.broker.stream(name).bytes_max = 500
        refused = keyed(world, gateway, "second", world.key)
        assert await whole(refused) == (503, "idempotency_keys_full")
        # When the oldest key expires.
        assert abs(int(refused.headers[b"retry-after"]) - (86_400 - 100)) <= 4
        world.broker.stream(subjects.SECRETS).bytes_max = 100
        assert await whole(submit(world, gateway, world.key, store=False)) == (503, "content_keys_full")
        assert (await whole(submit(world, gateway, world.key)))[0] == 202
        assert opened(gateway).lanes.own.queue.length(MODEL)[0] == 2

    live(test)


def test_a_try_that_loses_its_claim_leaves_no_content_key() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        calls = [keyed(world, gateway, "one", world.key, store=False) for _ in range(10)]
        assert {(await whole(call))[0] for call in calls} == {202}
        secrets = world.broker.stream(subjects.SECRETS)
        assert len([each for each in secrets.messages if each.subject]) == 1
        assert world.broker.stream(subjects.KEYS).last_sequence == 1
        # With other bodies, all but one are refused.
        calls = [
            keyed(world, gateway, "two", world.key, store=False, prompt=f"prompt {number}")
            for number in range(5)
        ]
        assert sorted([(await whole(call))[0] for call in calls]) == [202, 422, 422, 422, 422]
        assert len([each for each in secrets.messages if each.subject]) == 2
        world.broker.stream(subjects.KEYS).bytes_max = 0
        refused = keyed(world, gateway, "three", world.key, store=False)
        assert await whole(refused) == (503, "idempotency_keys_full")
        assert len([each for each in secrets.messages if each.subject]) == 2

    live(test, free_queue(ACCOUNT, idempotency_keys=100))


def test_a_record_that_is_too_large_leaves_no_key() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        turns = [{"role": "user", "content": "hi"}, {"role": "developer", "content": "x" * 7_000_000}]
        headers = {"idempotency-key": "large"}
        body = {"messages": turns, "store": False}
        call = world.ask(gateway, "/v1/chat/completions", headers=headers, **body)
        assert await whole(call) == (413, "body_too_large")
        for name in (subjects.KEYS, subjects.SECRETS):
            assert world.broker.stream(name).last_sequence == 0

    live(test)


def stored_key(account: str, at_ns: int, sequence: int = 1) -> Stored:
    return Stored("rift.keys.x", sequence, at_ns, msgspec.json.encode({"account": account, "request": "r"}))


def test_keys_are_counted_until_they_expire() -> None:
    counts = KeyCounts(IDEMPOTENCY_S)
    for sequence, (account, minute) in enumerate([("a", 0), ("a", 0), ("b", 1), ("a", 10), ("", 10)], 1):
        counts.fold(stored_key(account, minute * MINUTE_NS + 7, sequence))
    assert counts.position == 5
    now_ns = 11 * MINUTE_NS
    assert (counts.count("a", now_ns), counts.count("b", now_ns), counts.count("c", now_ns)) == (3, 1, 0)
    assert counts.wait_ns("a", now_ns, 1) == counts.wait_ns("a", now_ns, 2) == DAY_NS - 10 * MINUTE_NS
    assert counts.wait_ns("a", now_ns, 3) == DAY_NS
    assert counts.count("a", DAY_NS + MINUTE_NS - 1) == 3
    assert counts.count("a", DAY_NS + MINUTE_NS) == 1
    assert counts.count("a", DAY_NS + 11 * MINUTE_NS) == 0
    # Nobody asks about an account at a gateway that it does not use.
    counts.fold(stored_key("b", 2 * DAY_NS, 6))
    assert counts._accounts["b"].total == len(counts._accounts["b"].steps) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("seals", [False, True])
async def test_keys_of_kept_content_are_bounded_where_content_is_sealed(seals: bool) -> None:
    config = GatewayConfig(lane="l", secret=SECRET, models={}, served=(), seal_content=seals, entropy=bytes)
    book = book_of("a", "b")
    limits = KeyLimits(config, LogShare(LogCapacity(0, 0, 8 * CONTENT_KEY_BYTES), book), BrokerClock())
    for sequence in range(1, 3):
        limits._content.fold(stored_key("a", 5, sequence))
    request = msgspec.structs.replace(accepted(), account="a")
    if not seals:
        assert await limits.reserve((request,)) == (request,)
        return
    with pytest.raises(HTTPError) as refused:
        await limits.reserve((request,))
    assert (refused.value.status, refused.value.code) == (429, "content_keys")
    book.limits["a"] = LimitsSet(id="l", account="a", content_keys=3)
    assert await limits.reserve((request,)) == (request,)


@pytest.mark.anyio
async def test_a_key_takes_at_most_the_bytes_that_the_shares_assume(server: Any) -> None:
    log: JetStream = await connect(server.address.url, server.address.access("admin"), name="test")
    await log.ensure_streams(shards=1, replicas=1, max_bytes=64 * MIB)
    at = Address(0, "lane1234lane1234", "model-with-a-rather-long-name")
    account = "account-of-a-customer"
    request = ids.new_request_id(secret=SECRET, account=account, at=at, floor=10**12, entropy=b"x" * 10)
    entry = KeyEntry(request, "f" * 64, "f" * 20, 100, 10**6, "per_second", 10**9, account, "x" * 128)
    capacity = await log_share.capacity(log, 0)
    assert capacity == LogCapacity(64 * MIB, 4 * MIB, 4 * MIB)
    secret = encryption.Secret((request,), b"k" * encryption.KEY_BYTES, account)
    for stream, subject, data, most in (
        (subjects.KEYS, subjects.idempotency("f" * 32), msgspec.json.encode(entry), IDEMPOTENCY_KEY_BYTES),
        (subjects.SECRETS, subjects.SECRET_PASSING, msgspec.json.encode(secret), CONTENT_KEY_BYTES),
    ):
        before = await log.room_bytes(stream)
        await log.append(stream, subject, data)
        taken = before - await log.room_bytes(stream)
        assert 0.7 * most < taken <= most, (stream, taken)
    await log.close()
