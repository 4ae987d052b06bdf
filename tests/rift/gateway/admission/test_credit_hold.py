"""The life of a credit hold: how long it is kept, its records in the book, and spending from it."""

from datetime import UTC, datetime
from itertools import pairwise

import anyio
from hypothesis import given
from hypothesis import strategies as st

from events import codec, subjects
from events import intervals as spans
from events.schema import CreditHeld, CreditSettled, LimitsSet
from rift.gateway.admission import lane_credit
from tests.rift.gateway.admission.test_credit import World, granted, live
from tests.simulation.prepaid import ACCOUNT, standing_of

SECOND = 1_000_000_000


def hold_events(world: World) -> list[str]:
    """Return the types of the book's events about holds, in order."""
    messages = world.broker.stream(subjects.BOOK).messages
    events = [event for stored in messages for event in codec.decode(stored.data)[1]]
    return [type(event).__name__ for event in events if isinstance(event, CreditHeld | CreditSettled)]


def test_an_account_with_rare_requests_keeps_one_hold() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        for _ in range(20):
            assert (await world.answer(gateway, tokens=1))[0] == 200
            await anyio.sleep(60)
        assert hold_events(world) == ["CreditHeld"]
        await anyio.sleep(lane_credit.IDLE_S)
        assert hold_events(world) == ["CreditHeld", "CreditSettled"]
        world.check_all_is_settled()

    live(test, granted(10**9), until_s=2 * lane_credit.IDLE_S)


def test_idle_holds_are_settled_soon_if_more_is_held_than_free() -> None:
    """Other gateways may need the credit for requests that are larger than the room left."""

    async def test(world: World) -> None:
        gateways = [await world.gateway() for _ in range(8)]
        await world.work()
        for gateway in gateways:
            assert (await world.answer(gateway, tokens=1))[0] == 200
        standing = standing_of(world.broker)
        assert len(standing.holds) == 8
        assert standing.held_nanousd > (standing.room("2026-11") or 0)
        await anyio.sleep(lane_credit.SCARCE_IDLE_S + 2)
        standing = standing_of(world.broker)
        assert 0 < standing.held_nanousd <= (standing.room("2026-11") or 0)

    live(test, granted(10**6))


def test_a_large_request_gets_the_idle_holds_of_its_own_gateway() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        assert (await world.answer(gateway, tokens=1))[0] == 200
        standing = standing_of(world.broker)
        left = (standing.room("2026-11") or 0) + standing.held_nanousd
        # More than the room left, and no more than the room and the hold together.
        assert (await world.answer(gateway, tokens=left // 1000 - 5))[0] == 200
        assert hold_events(world)[:3] == ["CreditHeld", "CreditSettled", "CreditHeld"]

    live(test, granted(400_000))


def test_holds_of_a_past_month_are_settled() -> None:
    async def test(world: World) -> None:
        world.start_ns = int(datetime(2026, 11, 30, 23, 59, 40, tzinfo=UTC).timestamp()) * 10**9
        gateway = await world.gateway()
        await world.work()
        assert (await world.answer(gateway, tokens=1))[0] == 200
        await anyio.sleep(10)
        assert hold_events(world) == ["CreditHeld"]
        await anyio.sleep(20)
        world.check_all_is_settled()

    live(test, granted(10**9))


def test_concurrent_requests_share_the_seconds_that_they_spend() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(lambda: world.answer(gateway, tokens=50))
        # Three requests fill the three slots: 50 tokens at 20 a second take 2.5 s.
        assert hold_events(world) == ["CreditHeld"]
        await anyio.sleep(5)
        assert (await world.answer(gateway, tokens=10))[0] == 200
        gateway.stop.set()
        await gateway.ended.wait()
        assert standing_of(world.broker).spent_nanousd == (3 + 1) * 5000

    live(test, granted(10**9), LimitsSet(id="limits", account=ACCOUNT, plan="per_second"))


def test_a_repeat_of_a_trimmed_request_is_not_run_again() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        headers = {"idempotency-key": "key"}
        assert (await world.answer(gateway, headers=headers))[0] == 200
        await anyio.sleep(1200)
        stream = world.broker.stream("RIFT_0")
        charged = world.charged
        stream.trim(stream.last_sequence)
        accepted = len(world.ledger.entries)
        status, shown = await world.answer(gateway, headers=headers)
        assert (status, shown["error"]["code"]) == (410, "answer_removed")
        assert shown["error"]["message"] == (
            "the request of this Idempotency-Key is no longer kept; to run it again, use a new key"
        )
        await anyio.sleep(10)
        world.ledger.catch_up()
        assert len(world.ledger.entries) == accepted
        gateway.stop.set()
        await gateway.ended.wait()
        assert standing_of(world.broker).spent_nanousd == charged > 0
        other = await world.gateway()
        assert (await world.answer(other, headers={"idempotency-key": "new"}))[0] == 200

    live(test, granted(10**6))


# --- seconds ---------------------------------------------------------------------------------------------


intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted).map(tuple))


@given(intervals, intervals)
def test_intervals_that_overlap_or_touch_are_united_in_any_order(
    some: list[spans.Span], more: list[spans.Span]
) -> None:
    united = spans.unite([*some, *more])
    assert united == spans.unite([*spans.unite(more), *some])
    assert all(one[1] < next[0] for one, next in pairwise(united))
    inside = {at for start, end in [*some, *more] for at in range(start, end)}
    assert inside == {at for start, end in united for at in range(start, end)}


def test_each_union_is_rounded_up() -> None:
    assert spans.whole_seconds([]) == 0
    assert spans.whole_seconds([(5, 5)]) == 0
    assert spans.whole_seconds([(0, 1), (2, 2 + SECOND), (3 * SECOND, 4 * SECOND + 1)]) == 1 + 1 + 2
