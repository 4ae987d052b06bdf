"""Limits and keys at real gateways on a simulated log: errors and headers, floods by another account, a book
that is out of date, and revoked keys."""

import json
from typing import Any

import anyio
import pytest

from events import codec
from events.book import key_digest
from events.publisher import destination
from events.schema import AccountOpened, AnyEvent, KeyIssued, KeyLimitsSet, KeyRevoked, LimitsSet
from rift import keys
from rift.control.duties.supervision import Supervision
from rift.gateway.admission import queue_share
from rift.gateway.streams.cancellation import Cancellation
from tests.rift.gateway.admission.test_credit import World, live
from tests.simulation.client import Call
from tests.simulation.prepaid import ACCOUNT
from tests.simulation.processes import MODEL, SLOTS, GatewayProcess

OTHER = "other"
TOKENS = 10
# The tokens of the prompt by the simulated engine, and by the gateway's estimate.
PROMPT, PROMPT_TOKENS = "a prompt", 2


def tell(world: World, *events: AnyEvent) -> None:
    for event in events:
        world.broker.store(*destination(event), codec.encode("cli", [event]), None)


def key_of(world: World, account: str, **granted: Any) -> keys.Key:
    """Open an account, if it is new, and issue a key."""
    key = keys.new_key(world.chance.randbytes(keys.ID_BYTES + keys.SECRET_BYTES))
    issued = KeyIssued(
        id=f"key.{key.id}", key=key.id, account=account, sha256=key_digest(key.text), **granted
    )
    tell(world, AccountOpened(id=f"account.{account}", account=account), issued)
    return key


def revoke(world: World, key: keys.Key, account: str = OTHER) -> None:
    tell(world, KeyRevoked(id=f"revoked.{key.id}", key=key.id, account=account))


def get(gateway: GatewayProcess, path: str, key: str) -> Call:
    call = Call("GET", path, headers={"authorization": f"Bearer {key}"})
    gateway.serve(call)
    return call


def ask(world: World, gateway: GatewayProcess, key: str, *, tokens: int = TOKENS, **more: Any) -> Call:
    given = {"authorization": f"Bearer {key}"}
    body = {"prompt": PROMPT, "parameters": {"max_tokens": tokens}} | more
    return world.ask(gateway, headers=given, **body)


async def whole(call: Call) -> tuple[int, Any]:
    """Return the status, and the JSON or an error's code."""
    while await call.more():
        pass
    shown = json.loads(call.data) if call.data else None
    return call.status, shown["error"]["code"] if call.status >= 400 else shown


# --- limits ----------------------------------------------------------------------------------------------


def test_a_client_that_waits_as_the_headers_say_is_admitted() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        for left in (1, 0):
            call = ask(world, gateway, world.key)
            assert (await whole(call))[0] == 200
            assert call.headers[b"x-ratelimit-limit-requests"] == b"2"
            assert call.headers[b"x-ratelimit-remaining-requests"] == b"%d" % left
            await anyio.sleep(7)
        refused = ask(world, gateway, world.key)
        assert await whole(refused) == (429, "requests_per_minute")
        assert refused.headers[b"x-ratelimit-remaining-requests"] == b"0"
        wait_ms = int(refused.headers[b"retry-after-ms"])
        assert int(refused.headers[b"retry-after"]) == -(-wait_ms // 1000)
        await anyio.sleep(wait_ms / 1000 - 0.002)
        assert (await whole(ask(world, gateway, world.key)))[0] == 429
        await anyio.sleep(0.002)
        assert (await whole(ask(world, gateway, world.key)))[0] == 200

    live(test, LimitsSet(id="l", account=ACCOUNT, requests_per_minute=2))


def test_tokens_are_estimated_first_and_counted_at_the_end() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        stop = {"parameters": {"max_tokens": 90, "stop": ["zzz"]}}
        first = ask(world, gateway, world.key, **stop)
        await anyio.sleep(0.2)
        # 92 of 100 tokens are reserved, so nothing else fits before the first request has ended.
        assert await whole(ask(world, gateway, world.key)) == (429, "tokens_per_minute")
        first.leave()
        await anyio.sleep(1)
        again = ask(world, gateway, world.key)
        status, shown = await whole(again)
        assert status == 200
        used = 100 - int(again.headers[b"x-ratelimit-remaining-tokens"])
        world.ledger.catch_up()
        totals = [entry.life.prompt_tokens + entry.life.next_index for entry in world.ledger.entries.values()]
        assert used == sum(totals) < 90
        assert shown["usage"]["total_tokens"] in totals
        too_large = ask(world, gateway, world.key, tokens=101)
        assert await whole(too_large) == (429, "tokens_per_minute")
        assert too_large.headers[b"x-should-retry"] == b"false"
        assert b"retry-after" not in too_large.headers

    live(test, LimitsSet(id="l", account=ACCOUNT, tokens_per_minute=100))


def test_the_concurrent_limit_counts_requests_without_a_client() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        for _ in range(2):
            assert (await whole(ask(world, gateway, world.key, background=True)))[0] == 202
        third = ask(world, gateway, world.key)
        assert await whole(third) == (429, "concurrent_requests")
        assert third.headers[b"x-ratelimit-remaining-concurrent"] == b"0"
        await anyio.sleep(5)
        # Each choice counts: three never fit.
        given = {"messages": [{"role": "user", "content": "hi"}], "n": 3}
        assert await whole(world.ask(gateway, "/v1/chat/completions", **given)) == (
            429,
            "concurrent_requests",
        )
        assert (await whole(world.ask(gateway, "/v1/chat/completions", **given | {"n": 2})))[0] == 200

    live(test, LimitsSet(id="l", account=ACCOUNT, concurrent=2))


def test_requests_that_are_refused_for_another_reason_do_not_count() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        assert (await whole(ask(world, gateway, world.key, tokens=10_000)))[0] == 400
        tell(world, LimitsSet(id="m", account=ACCOUNT, requests_per_minute=1, budget_nanousd=0))
        await anyio.sleep(0.1)
        assert (await whole(ask(world, gateway, world.key)))[0] == 402
        tell(world, LimitsSet(id="n", account=ACCOUNT, requests_per_minute=1))
        await anyio.sleep(0.1)
        assert (await whole(ask(world, gateway, world.key)))[0] == 200
        assert (await whole(ask(world, gateway, world.key)))[0] == 429

    live(test, LimitsSet(id="l", account=ACCOUNT, requests_per_minute=1))


def test_a_key_has_limits_within_those_of_its_account() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        second = key_of(world, ACCOUNT)
        tell(world, KeyLimitsSet(id="k", account=ACCOUNT, key=second.id, requests_per_minute=1))
        await anyio.sleep(0.1)
        answers = [await whole(ask(world, gateway, key)) for key in (second.text, second.text, world.key)]
        assert [status for status, _ in answers] == [200, 429, 200]
        assert await whole(ask(world, gateway, world.key)) == (429, "requests_per_minute")

    live(test, LimitsSet(id="l", account=ACCOUNT, requests_per_minute=2))


def test_two_gateways_divide_a_limit_until_one_is_lost() -> None:
    async def test(world: World) -> None:
        first, second = await world.gateway(), await world.gateway()
        await world.work()
        await anyio.sleep(4)
        for gateway in (first, second):
            answers = [await whole(ask(world, gateway, world.key)) for _ in range(3)]
            assert [status for status, _ in answers] == [200, 200, 429]
        second.kill()
        await anyio.sleep(15)
        answers = [await whole(ask(world, first, world.key)) for _ in range(3)]
        assert [status for status, _ in answers] == [200, 200, 429]

    live(test, LimitsSet(id="l", account=ACCOUNT, requests_per_minute=4))


# --- a flood ---------------------------------------------------------------------------------------------

CLIENTS = 4 * SLOTS
ROUNDS = 6
FLOOD = 40


def p99_ms(time: str, *limits: AnyEvent, flooded: bool, clients: int = CLIENTS) -> float:
    """Return a time of the requests of one account, with or without a flood by another."""
    took: list[float] = []

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        flood = key_of(world, OTHER)
        await anyio.sleep(0.1)

        async def client() -> None:
            for _ in range(ROUNDS):
                status, shown = await whole(ask(world, gateway, world.key))
                assert status == 200, shown
                took.append(shown["timing"][time])

        async def flooding() -> None:
            while True:
                await whole(ask(world, gateway, flood.text))
                await anyio.sleep(0.1)

        async with anyio.create_task_group() as floods:
            for _ in range(FLOOD if flooded else 0):
                floods.start_soon(flooding)
            await anyio.sleep(2)
            async with anyio.create_task_group() as waiting:
                for _ in range(clients):
                    waiting.start_soon(client)
            floods.cancel_scope.cancel()

    live(test, *limits)
    # The first round meets an empty queue, or one that only the flood has filled.
    steady = sorted(took[clients:])
    return steady[int(0.99 * len(steady))]


# Let the account keep its own queue of waiting requests.
BUSY = LimitsSet(id="busy", account=ACCOUNT, queue_share_percent=100)


def test_a_flood_at_most_doubles_the_wait_of_another_account() -> None:
    alone, flooded = p99_ms("queue_ms", BUSY, flooded=False), p99_ms("queue_ms", BUSY, flooded=True)
    assert 1.2 * alone < flooded <= 2 * alone, (alone, flooded)


def test_a_flood_at_most_doubles_the_total_time_of_requests_that_did_not_wait() -> None:
    alone = p99_ms("total_ms", BUSY, flooded=False, clients=SLOTS)
    flooded = p99_ms("total_ms", BUSY, flooded=True, clients=SLOTS)
    # The flood asks again every 100 ms, so the longest of these few waits comes in such steps.
    assert 1.2 * alone < flooded <= 2 * alone + 100, (alone, flooded)


def test_without_a_share_a_flood_starves_the_others() -> None:
    free = LimitsSet(id="free", account=OTHER, queue_share_percent=100)
    alone = p99_ms("queue_ms", BUSY, free, flooded=False)
    assert p99_ms("queue_ms", BUSY, free, flooded=True) > 4 * alone


def test_a_single_account_may_fill_the_queue_and_one_of_several_its_share() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        calls = [ask(world, gateway, world.key, background=True) for _ in range(50)]
        assert {(await whole(call))[0] for call in calls} == {202}
        flood = key_of(world, OTHER)
        await anyio.sleep(0.1)
        calls = [ask(world, gateway, flood.text, background=True) for _ in range(50)]
        answers = [await whole(call) for call in calls]
        assert 1 <= sum(status == 202 for status, _ in answers) < 50
        assert {code for status, code in answers if status == 429} == {"queue_share"}

    live(test)


def test_the_share_holds_while_a_model_starts() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        flood = key_of(world, OTHER)
        await anyio.sleep(0.1)
        calls = [ask(world, gateway, flood.text, background=True) for _ in range(30)]
        assert [(await whole(call))[0] for call in calls].count(202) == queue_share.FREE_COLD
        # The next account waits for these requests only.
        assert (await whole(ask(world, gateway, world.key, background=True)))[0] == 202

    live(test)


# --- the book ----------------------------------------------------------------------------------------------


def test_a_gateway_rejects_everything_ten_seconds_after_it_lost_the_book() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        gateway.disconnect(9.0)
        await anyio.sleep(8)
        assert (await whole(get(gateway, "/v1/models", world.key)))[0] == 200
        gateway.disconnect(30.0)
        await anyio.sleep(13)
        assert await whole(get(gateway, "/v1/models", world.key)) == (503, "book_unavailable")
        assert await whole(get(gateway, "/v1/inference/req_1", world.key)) == (503, "book_unavailable")
        await anyio.sleep(30)
        assert (await whole(ask(world, gateway, world.key)))[0] == 200

    live(test)


# --- keys --------------------------------------------------------------------------------------------------


def test_a_key_is_limited_to_its_scopes_models_and_lifetime() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        usage = key_of(world, OTHER, scopes=("usage",))
        admin = key_of(world, OTHER, scopes=("admin",))
        elsewhere = key_of(world, OTHER, models=("model-b",))
        short = key_of(world, OTHER, expires_at_ns=world.start_ns + 20 * 10**9)
        await anyio.sleep(0.1)
        assert await whole(ask(world, gateway, usage.text)) == (403, "insufficient_scope")
        assert await whole(get(gateway, "/v1/inference/req_1", usage.text)) == (403, "insufficient_scope")
        assert (await whole(ask(world, gateway, admin.text)))[0] == 200
        assert await whole(ask(world, gateway, elsewhere.text)) == (403, "model_not_allowed")
        assert (await whole(get(gateway, "/v1/models", elsewhere.text)))[1]["data"] == []
        assert await whole(get(gateway, f"/v1/models/{MODEL}", elsewhere.text)) == (403, "model_not_allowed")
        status, listed = await whole(get(gateway, "/v1/models", usage.text))
        assert (status, [model["id"] for model in listed["data"]]) == (200, [MODEL])
        assert (await whole(ask(world, gateway, short.text)))[0] == 200
        await anyio.sleep(25)
        assert await whole(ask(world, gateway, short.text)) == (401, "expired_api_key")

    live(test)


def test_usage_and_invoices_need_their_scope() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        inference = key_of(world, OTHER, scopes=("inference",))
        await anyio.sleep(0.1)
        for path in ("/v1/usage", "/v1/invoices/2026-11"):
            assert await whole(get(gateway, path, inference.text)) == (403, "insufficient_scope")
            # The key was accepted; no control process answers in this test.
            assert await whole(get(gateway, path, world.key)) == (503, "control_unavailable")

    live(test)


async def first_frame(call: Call) -> None:
    while not call.data:
        assert await call.more(), call.data


def reasons(world: World) -> list[str | None]:
    world.ledger.catch_up()
    return [entry.life.reason for entry in world.ledger.entries.values()]


def test_a_revoked_key_is_rejected_and_its_streams_end() -> None:
    async def test(world: World) -> None:
        first, second = await world.gateway(), await world.gateway()
        await world.work()
        key = key_of(world, OTHER)
        await anyio.sleep(0.1)
        tell(world, LimitsSet(id="share", account=OTHER, queue_share_percent=100))
        await anyio.sleep(0.1)
        streams = [ask(world, at, key.text, tokens=400, stream=True) for at in (first, second)]
        waits = [ask(world, first, key.text, tokens=400, background=True) for _ in range(4)]
        kept = ask(world, second, world.key, tokens=20)
        for call in streams:
            await first_frame(call)
        await anyio.sleep(0.5)
        revoke(world, key)
        await anyio.sleep(0.2)
        for at in (first, second):
            assert await whole(ask(world, at, key.text)) == (401, "revoked_api_key")
            assert await whole(get(at, "/v1/models", key.text)) == (401, "revoked_api_key")
        with anyio.fail_after(3):
            for call in streams:
                while await call.more():
                    pass
        for call in streams:
            assert call.take()[-1].data["error"]["code"] == "revoked"
        assert (await whole(kept))[0] == 200
        assert [(await whole(call))[0] for call in waits] == [202] * 4
        await anyio.sleep(1)
        assert sorted(filter(None, reasons(world))) == ["length"] + ["revoked"] * 6
        # Requests that had tokens are charged up to their end, and no others.
        assert world.charged > 0

    live(test)


def test_requests_that_a_lost_gateway_left_under_a_revoked_key_end() -> None:
    """No gateway follows a background request, and the key is revoked while no gateway runs."""

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        key = key_of(world, OTHER)
        await anyio.sleep(0.1)
        assert (await whole(ask(world, gateway, key.text, tokens=400, background=True)))[0] == 202
        await anyio.sleep(1)
        gateway.kill()
        revoke(world, key)
        await anyio.sleep(2)
        assert reasons(world) == ["revoked"]

    live(test)


def test_a_stream_read_with_a_revoked_key_ends_and_the_request_continues() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        key = key_of(world, ACCOUNT)
        await anyio.sleep(0.1)
        asked = ask(world, gateway, world.key, tokens=60, background=True)
        request = (await whole(asked))[1]["id"]
        read = get(gateway, f"/v1/inference/{request}/events", key.text)
        await first_frame(read)
        revoke(world, key, ACCOUNT)
        with anyio.fail_after(2):
            while await read.more():
                pass
        assert read.take()[-1].data["error"]["code"] == "revoked_api_key"
        await anyio.sleep(5)
        assert reasons(world) == ["length"]

    live(test)


@pytest.mark.parametrize(
    "absent",
    [(Supervision, "fold_book"), (Cancellation, "revoke")],
    ids=["the gateway ends it", "the janitor ends it"],
)
def test_a_key_that_is_revoked_while_its_acceptance_is_appended_gets_nothing(
    monkeypatch: pytest.MonkeyPatch, absent: tuple[type, str]
) -> None:
    """A cancellation that is stored before the acceptance would have no effect."""
    monkeypatch.setattr(*absent, lambda *_: None)

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        key = key_of(world, OTHER)
        await anyio.sleep(0.1)
        append = gateway.log.append

        async def slow(stream: str, subject: str, data: bytes, **more: Any) -> int:
            if ".request." in subject:
                revoke(world, key)
                await anyio.sleep(0.5)
            return await append(stream, subject, data, **more)

        monkeypatch.setattr(gateway.log, "append", slow)
        assert (await whole(ask(world, gateway, key.text)))[0] == 401
        assert reasons(world) == ["revoked"]
        assert world.charged == 0

    live(test)
