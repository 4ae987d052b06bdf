"""Long answers are read one at a time for each account, and other tasks run meanwhile."""

import anyio
import anyio.lowlevel
import pytest

from rift.gateway import histories
from rift.gateway.asgi import parse_turns
from rift.gateway.histories import Histories
from tests.rift.gateway.admission.test_credit import World, live
from tests.rift.gateway.admission.test_rate_limits import OTHER, get, key_of, whole
from tests.simulation.client import Call
from tests.simulation.processes import MODEL, GatewayProcess

PATHS = ("/v1/inference/req_{}", "/v1/inference/req_{}/events", "/v1/responses/resp_{}")


async def answered(world: World, gateway: GatewayProcess, key: str) -> str:
    headers = {"authorization": f"Bearer {key}", "idempotency-key": "one"}
    call = world.ask(gateway, "/v1/responses", headers=headers, input="hello", max_output_tokens=10)
    status, shown = await whole(call)
    assert status == 200
    return str(shown["id"]).removeprefix("resp_")


def reads(world: World, gateway: GatewayProcess, id: str) -> list[Call]:
    again = {"authorization": f"Bearer {world.key}", "idempotency-key": "one"}
    return [
        *(get(gateway, path.format(id), world.key) for path in PATHS),
        get(gateway, PATHS[2].format(id) + "?stream=true", world.key),
        world.ask(gateway, "/v1/responses", headers=again, input="hello", max_output_tokens=10),
    ]


@pytest.mark.parametrize("is_long", [True, False])
def test_long_answers_of_an_account_are_read_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    reading: set[object] = set()
    most = 0

    async def read(self: Histories, *given: object, bytes_max: float, **more: object) -> object:
        nonlocal most
        call = object()
        if bytes_max > histories.SHORT_BYTES:
            reading.add(call)
            most = max(most, len(reading))
            await anyio.sleep(1)
        try:
            return await HISTORY_READ(self, *given, bytes_max=bytes_max, **more)  # type: ignore[arg-type]
        finally:
            reading.discard(call)

    monkeypatch.setattr(Histories, "read", read)
    if is_long:
        monkeypatch.setattr(histories, "SHORT_BYTES", 100)

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        id = await answered(world, gateway, world.key)
        began_at_s = anyio.current_time()
        for call in reads(world, gateway, id):
            while await call.more():
                pass
            assert call.status == 200
        assert most == is_long
        # The repeat of a key reads twice.
        assert (anyio.current_time() - began_at_s > 5.5) is is_long

    live(test)


def test_few_clients_wait_for_long_answers_of_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histories, "SHORT_BYTES", 100)
    monkeypatch.setattr(parse_turns, "HISTORIES_WAITING", 2)

    async def slow(self: Histories, *given: object, bytes_max: float, **more: object) -> object:
        if bytes_max > histories.SHORT_BYTES:
            await anyio.sleep(1)
        return await HISTORY_READ(self, *given, bytes_max=bytes_max, **more)  # type: ignore[arg-type]

    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        await world.work()
        other = key_of(world, OTHER)
        await anyio.sleep(0.1)
        id = await answered(world, gateway, world.key)
        theirs = await answered(world, gateway, other.text)
        monkeypatch.setattr(Histories, "read", slow)
        calls = [get(gateway, PATHS[0].format(id), world.key) for _ in range(4)]
        await anyio.sleep(0.5)
        assert [call.status for call in calls].count(429) == 1
        calls[1].leave()
        await anyio.lowlevel.checkpoint()
        began_at_s = anyio.current_time()
        assert (await whole(get(gateway, PATHS[0].format(theirs), other.text)))[0] == 200
        assert anyio.current_time() - began_at_s < 1.5, "another account does not wait"
        refused = next(call for call in calls if call.status == 429)
        assert await whole(refused) == (429, "concurrent_readers")
        assert refused.headers[b"retry-after"] == b"1"
        await anyio.sleep(10)
        assert [call.status for call in calls].count(200) >= 2

    live(test)


HISTORY_READ = Histories.read
