"""One account cannot take every connection by reading stored requests."""

import anyio
import pytest

from rift.gateway import process
from rift.gateway.api import account_turns
from rift.gateway.submission.idempotency import IdempotencyKeys
from tests.rift.gateway.admission.test_credit import World, live
from tests.rift.gateway.admission.test_rate_limits import OTHER, ask, get, key_of, whole
from tests.simulation.processes import MODEL


def test_readers_of_one_account_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "connections_max", lambda: 3 * account_turns.READERS_SHARE)

    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        other = key_of(world, OTHER)
        await anyio.sleep(0.1)
        request = (await whole(ask(world, gateway, world.key, background=True)))[1]["id"]
        events = f"/v1/inference/{request}/events"
        readers = [get(gateway, events, world.key) for _ in range(3)]
        await anyio.sleep(0.5)
        assert all(reader.status == 200 for reader in readers)
        for path in (events, f"/v1/inference/{request}"):
            refused = get(gateway, path, world.key)
            assert await whole(refused) == (429, "concurrent_readers")
            assert refused.headers[b"retry-after"] == b"1"
        theirs = (await whole(ask(world, gateway, other.text, background=True)))[1]["id"]
        assert (await whole(get(gateway, f"/v1/inference/{theirs}", other.text)))[0] == 200
        readers[0].leave()
        await anyio.sleep(0.1)
        assert (await whole(get(gateway, f"/v1/inference/{request}", world.key)))[0] == 200

    live(test)


def test_clients_that_repeat_an_idempotency_key_are_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "connections_max", lambda: 3 * account_turns.READERS_SHARE)

    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        await anyio.sleep(0.1)
        headers = {"authorization": f"Bearer {world.key}", "idempotency-key": "one"}
        calls = []
        for _ in range(4):
            calls.append(world.ask(gateway, headers=headers, prompt="a", stream=True))
            await anyio.sleep(1.5)
        assert [call.status for call in calls] == [200] * 4
        assert await whole(world.ask(gateway, headers=headers, prompt="a", stream=True)) == (
            429,
            "concurrent_readers",
        )
        calls[-1].leave()
        await anyio.sleep(0.1)
        again = world.ask(gateway, headers=headers, prompt="a", stream=True)
        await anyio.sleep(1.5)
        assert again.status == 200

    live(test)


def test_clients_of_a_key_are_readers_before_its_request_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "connections_max", lambda: 3 * account_turns.READERS_SHARE)

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        headers = {"authorization": f"Bearer {world.key}", "idempotency-key": "one"}
        await whole(world.ask(gateway, headers=headers, prompt="hello"))

        async def failed_by_us(*given: object) -> bool:
            await anyio.sleep(2)
            return False

        monkeypatch.setattr(IdempotencyKeys, "failed_by_us", failed_by_us)
        calls = [world.ask(gateway, headers=headers, prompt="hello") for _ in range(8)]
        await anyio.sleep(1)
        assert [call.status for call in calls].count(429) == 8 - 3
        assert [(await whole(call))[0] for call in calls].count(200) == 3

    live(test)
