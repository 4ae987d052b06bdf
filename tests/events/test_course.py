"""Which decisions count, for every reader alike: the order of the fleet's stream is the fence."""

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from events import codec
from events.fleet import Fleet
from events.log import Stored
from events.publisher import destination
from events.schema import ControlElected, ScaleDecided
from events.subjects import FLEET
from replay.warehouse.warehouse import Warehouse

MODEL = "tiny:1"


def decided(before: int, now: int, *, read: int, epoch: int = 1) -> ScaleDecided:
    return ScaleDecided(
        model=MODEL,
        from_replicas=before,
        to_replicas=now,
        reason="",
        policy="",
        positions={FLEET: read},
        decided_at_ns=0,
        inputs={},
        epoch=epoch,
    )


def stored(events: list[Any]) -> list[Stored]:
    return [
        Stored(destination(event).subject, number, number, codec.encode("w", [event]))
        for number, event in enumerate(events, start=1)
    ]


def counted(events: list[Any]) -> list[bool]:
    fleet = Fleet()
    return [bool(fleet.fold(message)) for message in stored(events)]


ELECTED = ControlElected(epoch=1, control="one")
UP = decided(0, 1, read=1)


def test_a_repeated_decision_counts_once() -> None:
    assert counted([ELECTED, UP, UP]) == [True, True, False]


def test_a_repeat_that_lands_when_the_number_has_come_back_counts_for_nobody() -> None:
    assert counted([ELECTED, UP, decided(1, 0, read=2), UP]) == [True, True, True, False]
    assert counted([ELECTED, UP, decided(1, 0, read=2), decided(0, 1, read=3)]) == [True] * 4


def test_a_leader_that_is_over_decides_nothing() -> None:
    second = ControlElected(epoch=2, control="two")
    assert counted([ELECTED, second, UP]) == [True, True, False]
    assert counted([ELECTED, UP, second, decided(1, 2, read=2, epoch=2)]) == [True] * 4


EVENTS = st.one_of(
    st.builds(ControlElected, epoch=st.integers(1, 4), control=st.sampled_from(("one", "two"))),
    st.builds(decided, st.integers(0, 2), st.integers(0, 2), read=st.integers(0, 8), epoch=st.integers(0, 3)),
)


@settings(max_examples=15)
@given(st.lists(EVENTS, max_size=12), st.integers(0, 12))
def test_the_warehouse_counts_alike_also_when_it_starts_again(events: list[Any], cut: int) -> None:
    fleet = Fleet()
    messages = stored(events)
    counts = [bool(fleet.fold(message)) for message in messages]
    with tempfile.TemporaryDirectory() as folder:
        rows: list[Any] = []
        for batch in (messages[:cut], messages[cut:]):
            warehouse = Warehouse.open(Path(folder) / "db")
            try:
                if batch:
                    warehouse.apply(FLEET, batch)
                rows = warehouse.query(
                    "select counts from (select counts, position from decisions union all"
                    " select counts, position from elections)"
                    " order by split_part(split_part(position, ':', 2), '.', 1)::bigint"
                ).rows
            finally:
                warehouse.close()
    assert [row[0] for row in rows] == counts
