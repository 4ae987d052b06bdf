"""Large bodies, of one account and of all, leave most of the event loop's time to others."""

import itertools
import time

import anyio
import pytest

from rift.gateway.asgi.errors import ClientGone, HTTPError
from rift.gateway.asgi.parse_turns import ACCOUNT_REST, REST, REST_S_MIN, SMALL_BYTES, ParseTurns

pytestmark = pytest.mark.anyio

PARSED_S = 0.02
LARGE = SMALL_BYTES + 1


async def parse(
    turns: ParseTurns, account: str, size: int, began: list[tuple[str, float]], refusal: str | None = None
) -> None:
    async with turns.turn(account, size, anyio.sleep_forever):
        began.append((account, time.perf_counter()))
        time.sleep(PARSED_S)  # noqa: ASYNC251  # a parser does not wait
        if refusal is not None:
            raise ValueError(refusal)


def pauses_s(began: list[tuple[str, float]]) -> list[float]:
    return [later - earlier for (_, earlier), (_, later) in itertools.pairwise(began)]


def pause_s(rest: int) -> float:
    """Return the least time from one begin to the next."""
    return (1 + rest) * PARSED_S - REST_S_MIN - 0.001


async def test_large_bodies_of_an_account_are_parsed_with_rests() -> None:
    turns = ParseTurns(100)
    large: list[tuple[str, float]] = []
    others: list[tuple[str, float]] = []
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(parse, turns, "one", LARGE, large)
        tasks.start_soon(parse, turns, "one", SMALL_BYTES, others)
        tasks.start_soon(parse, turns, "two", LARGE, others)
    assert min(pauses_s(large)) > pause_s(ACCOUNT_REST)
    assert others[-1][1] < large[1][1], "small bodies and other accounts do not wait for an account's rest"


async def test_all_accounts_together_rest_and_take_turns() -> None:
    turns = ParseTurns(100)
    began: list[tuple[str, float]] = []
    accounts = [f"account-{number}" for number in range(2 + ACCOUNT_REST)]
    async with anyio.create_task_group() as tasks:
        for account in accounts:
            for _ in range(2):
                tasks.start_soon(parse, turns, account, LARGE, began)
    assert min(pauses_s(began)) > pause_s(REST)
    assert [account for account, _ in began] == accounts * 2


async def test_few_bodies_of_an_account_wait_so_that_connections_are_left_for_others() -> None:
    turns = ParseTurns(8)
    began: list[tuple[str, float]] = []
    async with anyio.create_task_group() as tasks, turns.turn("one", LARGE, anyio.sleep_forever):
        for account in ("one", "one", "two"):
            tasks.start_soon(parse, turns, account, LARGE, began)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(HTTPError) as refused:
            await parse(turns, "one", LARGE, began)
        await parse(turns, "one", SMALL_BYTES, began)
    assert (refused.value.status, refused.value.code) == (429, "concurrent_bodies")
    assert sorted(account for account, _ in began) == ["one", "one", "one", "two"]


async def test_a_refused_body_counts_too() -> None:
    turns = ParseTurns(100)
    began: list[tuple[str, float]] = []
    with pytest.raises(ValueError, match="too deep"):
        await parse(turns, "one", LARGE, began, refusal="too deep")
    await parse(turns, "one", LARGE, began)
    assert min(pauses_s(began)) > pause_s(ACCOUNT_REST)


async def test_a_client_that_leaves_gives_up_its_place() -> None:
    turns = ParseTurns(100)
    began: list[tuple[str, float]] = []
    left = anyio.Event()

    async def leave() -> None:
        with pytest.raises(ClientGone):
            async with turns.turn("one", LARGE, left.wait):
                raise AssertionError("the body of a client that left was parsed")

    with anyio.fail_after(5):
        async with turns.turn("one", LARGE, anyio.sleep_forever), anyio.create_task_group() as tasks:
            tasks.start_soon(leave)
            await anyio.wait_all_tasks_blocked()
            left.set()
    await parse(turns, "one", LARGE, began)
    assert began
