"""One pool of slots for all shards of a replica."""

from hypothesis import given
from hypothesis import strategies as st

from rift.engines import LONG_BYTES
from rift.worker.shutdown import Shutdown
from rift.worker.slots import Place, Slots


class Queue:
    """A shard's jobs: `waiting` of them, handed out as far as they are wanted."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self.wanted = 0
        self.taken = 0

    def want(self, slots: int) -> None:
        self.wanted = slots

    def hand_out(self) -> bool:
        if not (self.wanted and self.waiting):
            return False
        self.wanted -= 1
        self.waiting -= 1
        self.taken += 1
        return True


def filled(total: int, *waiting: int) -> tuple[Slots, list[Queue]]:
    """Return a pool that takes jobs from each shard in turn until none is handed out."""
    slots = Slots(total, Shutdown())
    queues = [Queue(each) for each in waiting]
    for queue in queues:
        slots.add(queue)  # type: ignore[arg-type]
    while round_trip(slots, queues):
        pass
    return slots, queues


def round_trip(slots: Slots, queues: list[Queue]) -> int:
    """Let each shard hand out one job; return how many did."""
    busy = [queue for queue in queues if queue.hand_out()]
    for _ in busy:
        slots.take(0)
    return len(busy)


@given(st.integers(1, 300), st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_all_slots_are_filled_and_hardly_more(total: int, waiting: list[int]) -> None:
    _, queues = filled(total, *waiting)
    taken = sum(queue.taken for queue in queues)
    assert min(total, sum(waiting)) <= taken <= total + len(queues) - 1


def test_one_busy_shard_uses_the_whole_replica() -> None:
    _, (busy, idle) = filled(256, 1000, 0)
    assert (busy.taken, idle.taken) == (256, 0)


def test_busy_shards_take_equal_parts_of_the_slots_that_become_free() -> None:
    slots, queues = filled(64, 1000, 1000, 1000)
    before = [queue.taken for queue in queues]
    for _ in range(300):
        slots.give_back(Place(0))
        round_trip(slots, queues)
    taken = [queue.taken - was for queue, was in zip(queues, before, strict=True)]
    assert max(taken) - min(taken) <= 2
    assert 300 - 2 * len(queues) <= sum(taken) <= 300 + len(queues)


def test_a_suspect_or_a_shutdown_stops_all_shards() -> None:
    slots, queues = filled(8, 2, 2)
    assert all(queue.wanted for queue in queues)
    slots.isolation.request()
    slots.ask()
    assert not any(queue.wanted for queue in queues)
    slots, queues = filled(8, 2, 2)
    slots.shutdown.retire()
    slots.ask()
    assert not any(queue.wanted for queue in queues)


class Begun:
    """An attempt with a prompt of 50 tokens and no output yet."""

    prompt_tokens = 50
    new_tokens = 0

    def __init__(self, *, fills_at_once: bool = True) -> None:
        self.fills_at_once = fills_at_once


def test_what_the_engine_does_not_fill_yet_holds_no_other_request_back() -> None:
    slots, queue = Slots(64, Shutdown(), unfilled_max=100), Queue(0)
    slots.add(queue)  # type: ignore[arg-type]
    places = [slots.take(LONG_BYTES + 1) for _ in range(16)]
    assert queue.wanted > 0, "they wait to be encoded"
    for place in places:
        slots.begin(place, Begun(fills_at_once=False))  # type: ignore[arg-type]
    assert queue.wanted > 0, "their grammars are compiled"
    for place in [slots.take(200) for _ in range(2)]:
        slots.begin(place, Begun())  # type: ignore[arg-type]
    assert queue.wanted == 0
