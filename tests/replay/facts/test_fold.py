"""Random histories, with arbitrary batches and restarts, against a second, simple fold."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import codec, schema, subjects
from events.ids import parse_request_id, trace_id
from events.lifecycle import NEW, Life, advance
from events.log import Stored
from events.pricing import charge_nanousd
from replay.facts.fold import BookBehind
from replay.facts.request_rows import STATES
from replay.sql_files import checks, sql
from replay.warehouse.warehouse import ProjectionStopped, Warehouse

Streams = dict[str, list[Stored]]


def rows(warehouse: Warehouse, relation: str) -> list[dict[str, Any]]:
    answer = warehouse.query(f"from {relation}")
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]


def everything(warehouse: Warehouse) -> dict[str, list[Any]]:
    """Return the contents of all tables, including the lives, independent of the order of rows."""
    tables = warehouse.query("select schema_name || '.' || table_name from duckdb_tables()").rows
    return {table: sorted(map(repr, warehouse.query(f"from {table}").rows)) for (table,) in tables}


def apply_all(warehouse: Warehouse, streams: Streams) -> None:
    for stream in sorted(streams, key=lambda name: name != subjects.BOOK):
        warehouse.apply(stream, streams[stream])


def reference(streams: Streams) -> Iterator[tuple[Life, dict[str, Any]]]:
    """Yield each request's life and its expected row, following one request at a time."""
    prices: dict[int, schema.Price] = {}
    for stored in streams[subjects.BOOK]:
        for event in codec.decode(stored.data)[1]:
            if isinstance(event, schema.PricePublished):
                prices.setdefault(event.version, event.prices[0])
    now_ns, log = 0, []
    for stored in streams.get("RIFT_0", []):
        now_ns = max(now_ns, stored.stored_at_ns)
        at = subjects.parse(stored.subject)
        for index, event in enumerate(codec.decode(stored.data)[1]):
            log.append((at, now_ns, f"RIFT_0:{stored.sequence}.{index}", event))
    accepted = {e.request: e for _, _, _, e in log if isinstance(e, schema.RequestAccepted)}
    for request, acceptance in accepted.items():
        life, counted, own = NEW, [], set()
        for at, at_ns, position, event in log:
            if at != parse_request_id(request).at:
                continue
            if isinstance(event, schema.AttemptStarted) and event.request == request and life.phase == "open":
                own.add(event.attempt)
            if getattr(event, "request", request) != request or (
                not hasattr(event, "request") and event.attempt not in own
            ):
                continue
            after = advance(life, event)
            if after.counted != life.counted:
                counted.append((at_ns, position, event))
            life = after
        if counted:
            yield life, reference_row(acceptance, life, counted, prices)


def reference_row(
    acceptance: schema.RequestAccepted, life: Life, counted: list[Any], prices: dict[int, schema.Price]
) -> dict[str, Any]:
    starts = [(at, e) for at, _, e in counted if isinstance(e, schema.AttemptStarted)]
    tokens = [(at, e) for at, _, e in counted if isinstance(e, schema.TokensGenerated)]
    is_over = life.phase == "ended"
    charge = charge_nanousd(life, prices[acceptance.price_version])
    return {
        "request_id": acceptance.request,
        "account": acceptance.account,
        "state": STATES[life.reason] if is_over else "running" if life.live else "queued",
        "finish_reason": life.reason,
        "ended_by": life.ender,
        "cancel_reason": life.wanted,
        "error_code": life.error.code if life.error else None,
        "prompt_tokens": starts[0][1].prompt_tokens if starts else 0,
        "output_tokens": sum(len(e.token_ids) for _, e in tokens),
        "cached_tokens": tokens[0][1].cached_tokens if tokens else 0,
        "attempts": len(starts),
        "deaths": life.deaths,
        "events": len(counted),
        "charge_nanousd": charge if acceptance.plan == "per_token" else 0,
        "simulated": any(e.simulated for _, e in starts),
        "accepted_at_ns": counted[0][0],
        "started_at_ns": starts[0][0] if starts else None,
        "first_token_at_ns": tokens[0][0] if tokens else None,
        "last_token_at_ns": tokens[-1][0] if tokens else None,
        "finished_at_ns": counted[-1][0] if is_over else None,
        "accepted_position": counted[0][1],
        "finished_position": counted[-1][1] if is_over else None,
    }


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_fold_equals_a_plain_one(chaos: Any, seed: int) -> None:
    streams = chaos(random.Random(seed)).write(60)
    warehouse = Warehouse.open(Path(":memory:"))
    apply_all(warehouse, streams)
    expected = {row["request_id"]: row for _, row in reference(streams)}
    actual = {row["request_id"]: row for row in rows(warehouse, "requests")}
    assert actual.keys() == expected.keys()
    for request, row in expected.items():
        assert {column: actual[request][column] for column in row} == row
    for check in checks():
        assert warehouse.query(sql(check)).rows == [], check
    warehouse.close()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_cut_and_any_restart_give_the_same_rows(
    chaos: Any, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    dice = random.Random(seed)
    streams = chaos(dice).write(40)
    folder = tmp_path_factory.mktemp("cuts")
    whole = Warehouse.open(folder / "whole")
    apply_all(whole, streams)
    cut = Warehouse.open(folder / "cut")
    while unapplied := [s for s in streams if cut.positions().get(s, 0) < len(streams[s])]:
        stream = dice.choice(unapplied)
        done = cut.positions().get(stream, 0)
        # Start one record early: records that are already applied are skipped.
        batch = streams[stream][max(0, done - 1) : done + dice.randint(1, 7)]
        try:
            cut.apply(stream, batch)
        except BookBehind:
            assert cut.positions().get(subjects.BOOK, 0) < len(streams[subjects.BOOK])
        if dice.random() < 0.3:
            cut.close()
            cut = Warehouse.open(folder / "cut")
    assert everything(cut) == everything(whole)
    whole.close()
    cut.close()


def test_a_restart_after_every_record_gives_the_same_rows(chaos: Any, tmp_path: Path) -> None:
    streams = chaos(random.Random(11)).write(70)
    whole = Warehouse.open(tmp_path / "whole")
    apply_all(whole, streams)
    states = {row["state"] for row in rows(whole, "requests")}
    assert len(states) > 2, f"this history shows too little: {states}"
    for stream in sorted(streams, key=lambda name: name != subjects.BOOK):
        for stored in streams[stream]:
            again = Warehouse.open(tmp_path / "again")
            again.apply(stream, [stored])
            again.close()
    again = Warehouse.open(tmp_path / "again")
    assert everything(again) == everything(whole)
    again.close()
    whole.close()


def test_every_finish_reason_has_a_state() -> None:
    assert STATES.keys() == set(get_args(schema.FinishReason))


def test_an_acceptance_stored_again_after_the_end_is_no_request(scribe: Any, tmp_path: Path) -> None:
    scribe.prices()
    request = scribe.finished_request()
    scribe.finished_request()
    acceptance = scribe.accepted(request)
    scribe.tell(acceptance, kind="request")
    warehouse = Warehouse.open(tmp_path / "db")
    apply_all(warehouse, scribe.streams)
    scribe.tell(acceptance, acceptance, kind="request")
    warehouse.close()
    warehouse = Warehouse.open(tmp_path / "db")
    warehouse.apply("RIFT_0", scribe.streams["RIFT_0"][-1:])
    assert len(rows(warehouse, "requests")) == 2
    assert {row["state"] for row in rows(warehouse, "requests")} == {"finished"}
    warehouse.close()


def test_money_and_times_of_an_ordinary_request(scribe: Any, warehouse: Warehouse) -> None:
    scribe.prices(prompt=150, output=400)
    request = scribe.finished_request(tokens=4)
    apply_all(warehouse, scribe.streams)
    [row] = rows(warehouse, "requests")
    assert row["trace_id"] == trace_id(request, group=None, traceparent=None)
    assert row["charge_nanousd"] == 7 * 150 + 4 * 400
    assert (row["request_id"], row["state"], row["finish_reason"]) == (request, "finished", "stop")
    [latency] = rows(warehouse, "latency")
    assert (latency["queue_ns"], latency["ttft_ns"]) == (1_000_000, 2_000_000)
    assert (latency["tpot_ns"], latency["e2e_ns"]) == (1_000_000, 6_000_000)
    [usage] = rows(warehouse, "usage")
    assert (usage["account"], usage["day"], usage["requests"]) == ("dev", "2023-11-14", 1)
    assert usage["charge_nanousd"] == row["charge_nanousd"]


def test_a_failover_shows_both_attempts(scribe: Any, warehouse: Warehouse) -> None:
    scribe.prices()
    request = scribe.accept()
    start = {"request": request, "worker": "w", "prompt_tokens": 7, "accepted_at_ns": 1, "engine": "sim"}
    start |= {"model_digest": "d", "delivery": "x"}
    scribe.tell(schema.AttemptStarted(attempt="a1", after=None, resume_index=0, **start))
    scribe.tell(schema.TokensGenerated(attempt="a1", index=0, token_ids=(1, 2), text="x"))
    scribe.tell(schema.AttemptStarted(attempt="a2", after="a1", resume_index=2, **start))
    apply_all(warehouse, scribe.streams)
    first, second = sorted(rows(warehouse, "attempts"), key=lambda row: row["number"])
    assert (first["outcome"], first["output_tokens"]) == ("superseded", 2)
    assert first["last_event_at_ns"] == first["ended_at_ns"] - 1_000_000, "the dead time is ours"
    assert (second["outcome"], second["resume_index"], second["ended_at_ns"]) == ("running", 2, None)


def test_open_requests_show_and_are_not_charged(scribe: Any, warehouse: Warehouse) -> None:
    scribe.prices()
    scribe.accept()
    apply_all(warehouse, scribe.streams)
    [row] = rows(warehouse, "requests")
    assert row["state"] == "queued"
    counts = ("prompt_tokens", "output_tokens", "cached_tokens", "attempts", "charge_nanousd")
    assert [row[count] for count in counts] == [0] * len(counts)


def test_the_book_and_the_fleet(scribe: Any, warehouse: Warehouse) -> None:
    scribe.book(schema.AccountOpened(id="1", account="dev"))
    scribe.book(schema.AccountOpened(id="2", account="dev"))
    scribe.book(schema.KeyIssued(id="3", key="k1", account="dev", sha256="ab" * 32))
    scribe.book(schema.KeyIssued(id="3", key="k2", account="dev", sha256="ab" * 32))
    scribe.book(schema.KeyRevoked(id="4", key="k1", account="dev"))
    scribe.fleet(schema.ReplicaStarting(replica="r1", model="tiny:1", engine="sim"))
    scribe.fleet(schema.ReplicaReady(replica="r1", model="tiny:1", slots=4, start_ns=5))
    scribe.fleet(schema.ReplicaReported(replica="r1", model="tiny:1", running=3, waiting=1))
    scribe.fleet(schema.ReplicaReported(replica="r1", model="tiny:1", running=2, waiting=0))
    decided: dict[str, Any] = {"model": "tiny:1", "from_replicas": 0, "to_replicas": 1, "reason": "asked"}
    decided |= {"policy": "p1", "positions": {"RIFT_0": 5}, "decided_at_ns": 6, "inputs": {"waiting": 1}}
    scribe.fleet(schema.ScaleDecided(**decided))
    apply_all(warehouse, scribe.streams)
    assert [row["account"] for row in rows(warehouse, "accounts")] == ["dev"]
    [key] = rows(warehouse, "keys")
    assert (key["key"], key["state"], key["scopes"]) == ("k1", "revoked", ["inference", "usage"])
    [replica] = rows(warehouse, "replicas")
    assert (replica["state"], replica["slots"], replica["running"], replica["waiting"]) == ("ready", 4, 2, 0)
    [decision] = rows(warehouse, "facts.scale_decisions")
    assert (decision["inputs"], decision["positions"]) == ('{"waiting":1}', '{"RIFT_0":5}')


UNREADABLE = {
    "no record": (b"\xff{", "not a record"),
    "a later version": (b'{"version":2,"writer":"w","events":[]}', "record version 2"),
    "an unknown event": (
        b'{"version":1,"writer":"w","events":[{"type":"AttemptPraised","attempt":"a"}]}',
        "AttemptPraised",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("stream", ["RIFT_0", "RIFT_BOOK", "RIFT_FLEET"])
def test_what_cannot_be_read_stops_visibly(case: str, stream: str, scribe: Any, warehouse: Warehouse) -> None:
    data, why = UNREADABLE[case]
    scribe.prices()
    request = scribe.accept()
    scribe.fleet(schema.ReplicaDraining(replica="r", model="tiny:1"))
    good = len(scribe.streams[stream])
    scribe.put(stream, scribe.streams[stream][0].subject, data)
    scribe.put(stream, scribe.streams[stream][0].subject, scribe.streams[stream][0].data)
    with pytest.raises(ProjectionStopped, match=f"{stream}:{good + 1}: .*{why}"):
        apply_all(warehouse, {subjects.BOOK: scribe.streams[subjects.BOOK][:1]} | scribe.streams)
    [lag] = [row for row in rows(warehouse, "lag") if row["stream"] == stream]
    assert (lag["sequence"], lag["stopped_sequence"]) == (good, good + 1)
    assert why in lag["stopped_why"]
    if stream == "RIFT_0":
        assert [row["request_id"] for row in rows(warehouse, "requests")] == [request]


def test_a_stop_is_over_once_the_record_can_be_folded(scribe: Any, warehouse: Warehouse) -> None:
    scribe.prices()
    scribe.finished_request()
    scribe.accept(price_version=2)
    scribe.finished_request()
    with pytest.raises(ProjectionStopped, match="price version 2, which the book does not hold"):
        apply_all(warehouse, scribe.streams)
    assert len(rows(warehouse, "requests")) == 1
    scribe.prices(2, model="other")
    with pytest.raises(ProjectionStopped, match="price version 2 has no price for 'tiny:1'"):
        apply_all(warehouse, scribe.streams)
    scribe.prices(3)
    scribe.streams["RIFT_0"][6] = scribe.streams["RIFT_0"][0]  # as if it had never been written
    scribe.streams["RIFT_0"][6] = Stored("rift.0.lane.x", 7, 1, codec.encode("w", []))
    apply_all(warehouse, scribe.streams)
    assert len(rows(warehouse, "requests")) == 2
    assert [row["stopped_why"] for row in rows(warehouse, "lag")] == [None, None]


def test_a_request_admitted_under_a_later_book_waits_for_it(scribe: Any, warehouse: Warehouse) -> None:
    scribe.prices()
    scribe.accept(book=2, price_version=2)
    scribe.prices(2)
    warehouse.apply(subjects.BOOK, scribe.streams[subjects.BOOK][:1])
    with pytest.raises(BookBehind):
        warehouse.apply("RIFT_0", scribe.streams["RIFT_0"])
    assert "RIFT_0" not in warehouse.positions()
    warehouse.apply(subjects.BOOK, scribe.streams[subjects.BOOK])
    warehouse.apply("RIFT_0", scribe.streams["RIFT_0"])
    assert [row["price_version"] for row in rows(warehouse, "requests")] == [2]


def test_a_terminal_event_that_repeats_other_facts_is_found_by_the_check(
    scribe: Any, warehouse: Warehouse
) -> None:
    scribe.prices()
    request = scribe.accept()
    scribe.tell(
        schema.RequestFinished(
            request=request, attempt=None, reason="failed", output_tokens=0, account="other"
        )
    )
    apply_all(warehouse, scribe.streams)
    assert warehouse.query(sql("requests.check")).rows == [
        ["terminal event and acceptance differ in billing facts", request]
    ]


def test_what_was_applied_is_passed_over(scribe: Any, warehouse: Warehouse) -> None:
    scribe.fleet(schema.ReplicaDraining(replica="r", model="tiny:1"))
    scribe.fleet(schema.ReplicaStopped(replica="r", model="tiny:1"))
    for batch in (scribe.streams[subjects.FLEET][:1], scribe.streams[subjects.FLEET]):
        warehouse.apply(subjects.FLEET, batch)
    warehouse.apply(subjects.FLEET, scribe.streams[subjects.FLEET][:1])
    assert len(rows(warehouse, "facts.replica_events")) == 2
    assert warehouse.positions() == {subjects.FLEET: 2}


def test_a_version_is_published_once(scribe: Any, warehouse: Warehouse) -> None:
    scribe.prices(prompt=1)
    scribe.prices(prompt=2)
    scribe.prices(model="other")
    apply_all(warehouse, scribe.streams)
    assert [(row["model"], row["prompt_nanousd"]) for row in rows(warehouse, "prices")] == [("tiny:1", 1)]
    assert len(rows(warehouse, "facts.book_entries")) == 3


def test_a_record_that_is_missing_stops_the_projection(scribe: Any, warehouse: Warehouse) -> None:
    """A damaged broker passes over a record: requests must not go unbilled without a word."""
    scribe.prices(prompt=1, output=1)
    scribe.finished_request()
    scribe.finished_request()
    warehouse.apply(subjects.BOOK, scribe.streams[subjects.BOOK])
    records = scribe.streams["RIFT_0"]
    for messages in (records[:2] + records[3:], records[3:]):
        with pytest.raises(ProjectionStopped, match="stopped at RIFT_0:3: the log has lost this record"):
            warehouse.apply("RIFT_0", messages)
        assert warehouse.positions()["RIFT_0"] == 2
    warehouse.apply("RIFT_0", records[1:])
    assert warehouse.positions()["RIFT_0"] == len(records)
