"""The folds of a history over three shards equal those over one, up to ids and positions, and in every
interleaving of the streams' batches."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import subjects
from events.schema import AccountOpened
from replay.warehouse.warehouse import DIGESTED, Warehouse
from tests.replay.months import ACCOUNTS, Months
from tests.replay.sharded import Split, in_order
from tests.replay.test_three_ways import folded

# These name a place in the log, or are computed from places. Where requests have equal remainders, their
# places decide which one's share is larger by one nano-USD, so shares are compared by their sums.
PLACES = {
    *("accepted_position", "finished_position", "started_position", "first_position", "last_position"),
    *("position", "positions", "roots", "digest", "sequence", "event_index"),
    # Of a request without a trace context, a hash of its id, which names its shard.
    "trace_id",
}


def history_of(seed: int, steps: int) -> dict[str, list[Any]]:
    history = Months(random.Random(seed))
    for account in ACCOUNTS:
        history.scribe.book(AccountOpened(id=f"account.{account}", account=account))
    return in_order(history.write(steps))


def contents(warehouse: Warehouse, ids: dict[str, str]) -> dict[str, Counter[str]]:
    """Return the rows of each digested relation without places, under the requests' old ids."""
    found = {}
    for relation in DIGESTED:
        answer = warehouse.query(f"from {relation}")
        rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
        found[relation] = Counter(repr(without_places(relation, row, ids)) for row in rows)
    return found


def without_places(relation: str, row: dict[str, Any], ids: dict[str, str]) -> dict[str, Any]:
    hidden = set(PLACES)
    if relation == "charges":
        hidden.add("stream")
    elif relation == "shares":
        hidden.add("nanousd")
    elif relation == "usage" and row["plan"] == "per_second":
        hidden.add("charge_nanousd")
    named = row | {name: ids.get(row[name], row[name]) for name in ("request_id",) if name in row}
    return {name: value for name, value in named.items() if name not in hidden}


def shares(warehouse: Warehouse, ids: dict[str, str]) -> dict[str, int]:
    rows = warehouse.query("select request_id, nanousd from shares").rows
    return {ids.get(request, request): nanousd for request, nanousd in rows}


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_three_shards_fold_as_one(seed: int) -> None:
    streams = history_of(seed, 300)
    split = Split(streams)
    one, three = folded(Path(":memory:"), streams), folded(Path(":memory:"), split.streams)
    assert contents(three, split.ids) == contents(one, {})
    before, after = shares(one, {}), shares(three, split.ids)
    assert before.keys() == after.keys()
    assert sum(before.values()) == sum(after.values())
    assert all(abs(before[request] - after[request]) <= 1 for request in before)
    one.close()
    three.close()


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_interleaving_of_three_shards_gives_the_same_digests(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    streams = Split(history_of(seed, 80)).streams
    whole = folded(Path(":memory:"), streams)
    cut = folded(tmp_path_factory.mktemp("cut") / "db", streams, random.Random(seed))
    assert cut.digests()[0] == whole.digests()[0]
    whole.close()
    cut.close()


def test_the_histories_use_every_shard_and_bill_in_each() -> None:
    streams = Split(history_of(1, 400)).streams
    warehouse = folded(Path(":memory:"), streams)
    charged = {stream for (stream,) in warehouse.query("select distinct stream from charges").rows}
    assert charged >= {subjects.shard_stream(shard) for shard in range(3)}
    assert warehouse.query("from periods").rows
    assert warehouse.query("from shares").rows
    warehouse.close()
