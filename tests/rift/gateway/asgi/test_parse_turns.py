"""One account's large bodies leave most of the event loop's time to others."""

import itertools
import time

import anyio
import pytest

from rift.gateway.asgi.parse_turns import REST, SMALL_BYTES, ParseTurns

pytestmark = pytest.mark.anyio

PARSED_S = 0.02
LARGE = SMALL_BYTES + 1


async def parse(
    turns: ParseTurns, account: str, size: int, began_at_s: list[float], refusal: Exception | None = None
) -> None:
    async with turns.turn(account, size):
        began_at_s.append(time.perf_counter())
        time.sleep(PARSED_S)  # noqa: ASYNC251  # a parser does not wait
        if refusal is not None:
            raise refusal


async def test_large_bodies_of_an_account_are_parsed_with_rests() -> None:
    turns = ParseTurns()
    large: list[float] = []
    others: list[float] = []
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(parse, turns, "one", LARGE, large)
        tasks.start_soon(parse, turns, "one", SMALL_BYTES, others)
        tasks.start_soon(parse, turns, "two", LARGE, others)
    assert all(later - earlier > (1 + REST) * PARSED_S * 0.9 for earlier, later in itertools.pairwise(large))
    assert max(others) < large[1], "small bodies and other accounts wait for no rest"


async def test_a_refused_body_counts_too() -> None:
    turns = ParseTurns()
    began_at_s: list[float] = []
    with pytest.raises(ValueError, match="the parser"):
        await parse(turns, "one", LARGE, began_at_s, refusal=ValueError("the parser"))
    await parse(turns, "one", LARGE, began_at_s)
    assert began_at_s[1] - began_at_s[0] > (1 + REST) * PARSED_S * 0.9
