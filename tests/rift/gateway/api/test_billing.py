"""Billing queries: scopes, and the limit of concurrent queries."""

import anyio
import pytest

from events.memory import MemoryLog
from rift.rpc import AskRequests, AskUsage
from tests.rift.gateway.admission.test_credit import World, live
from tests.rift.gateway.admission.test_rate_limits import OTHER, get, key_of, whole

LIST, USAGE, INVOICE = "/v1/inference", "/v1/usage", "/v1/invoices/2026-11"
ANSWER_S = 1.0


async def slowly(data: bytes) -> bytes:
    await anyio.sleep(ANSWER_S)
    return b'{"answer": "told"}'


def test_one_accounts_queries_leave_room_for_anothers() -> None:
    async def test(world: World) -> None:
        gateway, other = await world.gateway(), key_of(world, OTHER)
        await anyio.sleep(0.1)
        log = MemoryLog(world.broker)
        async with log.answer(AskUsage.topic, slowly), log.answer(AskRequests.topic, slowly):
            flood = [get(gateway, path, world.key) for path in (USAGE, LIST, USAGE, INVOICE, LIST)]
            await anyio.sleep(0.1)
            assert (await whole(get(gateway, USAGE, other.text)))[0] == 200
            assert [await whole(call) for call in flood[:2]] == [(200, "told")] * 2
            for call in flood[2:]:
                assert await whole(call) == (429, "concurrent_questions")
                assert call.headers[b"retry-after"] == b"1"
            # A query that ends, even without an answer, makes room.
            for _ in range(3):
                assert await whole(get(gateway, INVOICE, world.key)) == (503, "control_unavailable")
            assert (await whole(get(gateway, USAGE, world.key)))[0] == 200

    live(test)


@pytest.mark.parametrize("scope", ["inference", "usage", "admin"])
def test_requests_are_listed_for_a_key_of_any_scope(scope: str) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        key, none = key_of(world, OTHER, scopes=(scope,)), key_of(world, OTHER, scopes=("elsewhere",))
        await anyio.sleep(0.1)
        # No control process answers, but the request was allowed.
        assert await whole(get(gateway, LIST, key.text)) == (503, "control_unavailable")
        assert await whole(get(gateway, LIST, none.text)) == (403, "insufficient_scope")

    live(test)


def test_a_full_disk_of_control_has_a_code_and_shows_no_path() -> None:
    async def blocked(data: bytes) -> bytes:
        return b'{"error": "no space left on /data (0 MB free)", "failed": true, "blocked": true}'

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await anyio.sleep(0.1)
        log = MemoryLog(world.broker)
        async with log.answer(AskUsage.topic, blocked):
            call = get(gateway, USAGE, world.key)
            assert await whole(call) == (503, "projection_blocked")
            assert call.headers[b"retry-after"] == b"5"

    live(test)
