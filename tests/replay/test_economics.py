"""The relations of the fleet: elections, decisions, replicas and unit economics."""

import random
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import schema, subjects
from events.fleet import Fleet
from events.schema import RequestFinished
from replay.archive.archive import Archive
from replay.sql_files import sql
from replay.warehouse.rebuild import rebuild
from replay.warehouse.warehouse import Warehouse
from tests.replay.conftest import START_NS, Scribe, started, tokens_of
from tests.replay.facts.test_fold import apply_all, everything, rows
from tests.replay.test_three_ways import folded, sealed

SECOND, HOUR_NS = 1_000_000_000, 3_600_000_000_000
MODELS = ("tiny:1", "other:2")
PRICES = (0, 1, 7_200_000_000_001, 16 * 1_990_000_000)
RELATIONS = ("elections", "decisions", "replicas", "unit_economics")


class Shift:
    """Some hours of a small fleet: mostly valid events of workers and leaders, and often invalid ones."""

    def __init__(self, dice: random.Random) -> None:
        self.dice, self.scribe = dice, Scribe()
        for model in MODELS:
            self.scribe.book(
                schema.PricePublished(
                    id=f"price.{model}",
                    version=MODELS.index(model) + 1,
                    prices=(schema.Price(model=model, prompt_nanousd=3, output_nanousd=11),),
                )
            )
        self.models: dict[str, str] = {}
        self.running: list[tuple[str, str]] = []
        self.epoch = 0
        self.wanted: Counter[str] = Counter()

    def write(self, steps: int) -> None:
        acts = (self.start, self.speak, self.speak, self.speak, self.begin, self.begin, self.end, self.end)
        for _ in range(steps):
            self.scribe.now_ns += self.dice.choice((1, SECOND, 400 * SECOND, HOUR_NS + 5))
            self.dice.choice((*acts, self.elect, self.decide))()

    def start(self) -> None:
        replica = self.scribe.unique("r")
        self.models[replica] = self.dice.choice(MODELS)
        if self.dice.random() < 0.9:
            self.scribe.fleet(
                schema.ReplicaStarting(
                    replica=replica,
                    model=self.models[replica],
                    engine="sim",
                    gpus=self.dice.choice((0, 1, 8)),
                    hour_nanousd=self.dice.choice(PRICES),
                )
            )

    def speak(self) -> None:
        if not self.models:
            return
        replica, model = self.dice.choice(list(self.models.items()))
        event: Any = self.dice.choice(
            (
                schema.ReplicaReady(replica=replica, model=model, slots=2, start_ns=1),
                schema.ReplicaReady(replica=replica, model=model, slots=2, start_ns=1),
                schema.ReplicaReported(replica=replica, model=model, running=1, waiting=0),
                schema.ReplicaDraining(replica=replica, model=model),
                schema.ReplicaStopped(replica=replica, model=model, why="idle", lived_ns=9),
                schema.ReplicaLost(replica=replica, model=model, why="silent", cause="host"),
            )
        )
        self.scribe.fleet(event)

    def begin(self) -> None:
        model = self.dice.choice(MODELS)
        request = self.scribe.accept(model=model, price_version=MODELS.index(model) + 1, book=2)
        attempt = self.scribe.unique("att")
        worker = self.dice.choice((*self.models, "nobody"))
        self.scribe.tell(started(request, attempt, worker=worker))
        self.scribe.tell(tokens_of(attempt, 0, 2))
        self.running.append((request, attempt))

    def end(self) -> None:
        if self.running:
            request, attempt = self.running.pop(self.dice.randrange(len(self.running)))
            reason = self.dice.choice(("stop", "failed"))
            problem = schema.Problem(code="x", message="x") if reason == "failed" else None
            self.scribe.tell(
                RequestFinished(
                    request=request, attempt=attempt, reason=reason, output_tokens=2, error=problem
                )
            )

    def elect(self) -> None:
        stale = self.dice.random() < 0.3
        self.epoch += not stale
        self.scribe.fleet(
            schema.ControlElected(epoch=max(self.epoch, 1), control=self.dice.choice(("a", "b")))
        )

    def decide(self) -> None:
        model = self.dice.choice(MODELS)
        before = self.wanted[model] if self.dice.random() < 0.8 else self.dice.randint(0, 3)
        now = self.dice.choice([number for number in range(4) if number != before])
        epoch = max(0, self.epoch - (self.dice.random() < 0.2))
        self.wanted[model] = now
        self.scribe.fleet(decided(model, before, now, epoch=epoch, at_ns=self.scribe.now_ns))


def decided(model: str, before: int, now: int, *, epoch: int, at_ns: int) -> schema.ScaleDecided:
    return schema.ScaleDecided(
        model=model,
        from_replicas=before,
        to_replicas=now,
        reason="as diced",
        policy="dice",
        positions={},
        decided_at_ns=at_ns,
        inputs={"arrivals": now},
        epoch=epoch,
    )


def shift(seed: int, steps: int = 60) -> Shift:
    history = Shift(random.Random(seed))
    history.write(steps)
    return history


# --- unit economics -----------------------------------------------------------------------------------


def reckoned(warehouse: Warehouse) -> list[dict[str, Any]]:
    """Compute the relation interval by interval, from attempts, requests and replica events."""
    [[now_ns]] = warehouse.query("select max(stored_at_ns) from facts.applied").rows
    events_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows(warehouse, "facts.replica_events"):
        events_of[row["replica"]].append(row)
    totals: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    attempts = rows(warehouse, "attempts")
    for replica, events in events_of.items():
        ends = [row["at_ns"] for row in events if row["event"] in ("stopped", "lost")]
        readies = [row["at_ns"] for row in events if row["event"] == "ready"]
        ordered = [row["ordered_at_ns"] for row in events if row["ordered_at_ns"] is not None]
        first, last = min([*ordered, events[0]["at_ns"]]), min(ends, default=now_ns)
        ready = min([*readies, last])
        work = [
            (max(ready, a["started_at_ns"]), min(last, a["ended_at_ns"] or last))
            for a in attempts
            if a["worker"] == replica
        ]
        edges = {first, ready, last, *(at for span in work for at in span)}
        edges |= {hour * HOUR_NS for hour in range(first // HOUR_NS + 1, last // HOUR_NS + 1)}
        within = sorted(at for at in edges if first <= at <= last)
        gpus = max(row["gpus"] or 0 for row in events)
        price = max(row["hour_nanousd"] or 0 for row in events)
        for begins, ends_ns in pairwise(within):
            is_busy = any(a <= begins and ends_ns <= b for a, b in work)
            doing = "starting" if begins < ready else "busy" if is_busy else "idle"
            total = totals[events[0]["model"], begins // HOUR_NS]
            for name, weight in (("replica", 1), ("gpu", gpus), ("cost", price)):
                total[f"{name} {doing}"] += (ends_ns - begins) * weight
    for row in rows(warehouse, "requests"):
        if row["finished_at_ns"] is not None:
            total = totals[row["model"], row["finished_at_ns"] // HOUR_NS]
            total["requests"] += 1
            for name in ("prompt_tokens", "output_tokens"):
                total[name] += row[name]
            total["revenue"] += row["charge_nanousd"]
    return [relation_row(*key, total) for key, total in totals.items()]


def relation_row(model: str, hour: int, total: Counter[str]) -> dict[str, Any]:
    def parts(name: str, divisor: int) -> list[int]:
        sums = [total[f"{name} {doing}"] for doing in ("starting", "busy", "idle")]
        whole, starting, busy = sum(sums) // divisor, sums[0] // divisor, sums[1] // divisor
        return [whole, starting, busy, whole - starting - busy]

    doing = ("", "starting_", "busy_", "idle_")
    row: dict[str, Any] = {"model": model, "hour": hour}
    for kind in ("replica", "gpu"):
        row |= {f"{d}{kind}_seconds": n for d, n in zip(doing, parts(kind, SECOND), strict=True)}
    costs = parts("cost", HOUR_NS)
    row |= {f"{d or 'cost_'}nanousd": n for d, n in zip(doing, costs, strict=True)}
    row |= {name: total[name] for name in ("requests", "prompt_tokens", "output_tokens")}
    return row | {"revenue_nanousd": total["revenue"], "margin_nanousd": total["revenue"] - costs[0]}


def unit_economics(warehouse: Warehouse) -> list[dict[str, Any]]:
    answer = warehouse.query(
        "select epoch_us(hour) // 3600000000 as hour, * exclude (hour) from unit_economics"
    )
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]


def in_order(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(table, key=lambda row: (row["model"], row["hour"]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_unit_economics_are_what_a_plain_reckoning_says(seed: int) -> None:
    warehouse = folded(Path(":memory:"), shift(seed).scribe.streams)
    actual = in_order(unit_economics(warehouse))
    assert actual == in_order(reckoned(warehouse))
    for row in actual:
        for kind in ("replica_seconds", "gpu_seconds", "nanousd"):
            parts = [row[f"{doing}_{kind}"] for doing in ("starting", "busy", "idle")]
            assert min(parts) >= 0
            assert sum(parts) == row["cost_nanousd" if kind == "nanousd" else kind]
    for check in ("decisions.check", "replicas.check"):
        assert warehouse.query(sql(check)).rows == []
    warehouse.close()


def test_a_replica_that_starts_works_and_idles_is_priced(scribe: Scribe, warehouse: Warehouse) -> None:
    """Two GPUs at 7.20 USD an hour: 60 s from decision to ready, 30 s busy with two requests, 10 s idle."""
    scribe.prices(prompt=100, output=350)
    hour_nanousd = 7_200_000_000
    beginning = (START_NS // HOUR_NS + 1) * HOUR_NS
    scribe.now_ns = beginning

    def at(second: int) -> int:
        return beginning + second * SECOND - scribe.now_ns

    def fleet(second: int, event: Any) -> None:
        scribe.now_ns += at(second) - 1_000_000
        scribe.fleet(event)

    fleet(-1, schema.ControlElected(epoch=1, control="c"))
    fleet(0, decided("tiny:1", 0, 1, epoch=1, at_ns=beginning))
    fleet(
        20,
        schema.ReplicaStarting(replica="r", model="tiny:1", engine="sim", gpus=2, hour_nanousd=hour_nanousd),
    )
    fleet(60, schema.ReplicaReady(replica="r", model="tiny:1", slots=2, start_ns=1))
    one, two = scribe.accept(), scribe.accept()
    scribe.tell(started(one, "a1", worker="r"), step_ns=at(61))
    scribe.tell(started(two, "a2", worker="r"), step_ns=at(71))
    for request, attempt, second in ((one, "a1", 81), (two, "a2", 91)):
        scribe.tell(tokens_of(attempt, 0))
        finished = RequestFinished(request=request, attempt=attempt, reason="stop", output_tokens=1)
        scribe.tell(finished, step_ns=at(second))
    fleet(100, schema.ReplicaStopped(replica="r", model="tiny:1", why="idle", lived_ns=99))
    apply_all(warehouse, scribe.streams)
    [row] = unit_economics(warehouse)
    for kind, seconds in (("gpu", [200, 120, 60, 20]), ("replica", [100, 60, 30, 10])):
        assert [row[f"{doing}{kind}_seconds"] for doing in ("", "starting_", "busy_", "idle_")] == seconds
    assert row["cost_nanousd"] == 200_000_000, "100 s of 3,600 at 7.20 USD"
    assert (row["starting_nanousd"], row["busy_nanousd"]) == (120_000_000, 60_000_000)
    assert row["revenue_nanousd"] == 2 * (7 * 100 + 350)
    assert row["margin_nanousd"] == row["revenue_nanousd"] - 200_000_000
    [replica] = rows(warehouse, "replicas")
    assert (replica["lifetime_ns"], replica["lived_ns"], replica["hour_nanousd"]) == (
        80 * SECOND,
        99,
        hour_nanousd,
    )
    assert (replica["state"], replica["why"]) == ("stopped", "idle")


# --- every way gives the same -------------------------------------------------------------------------


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_way_gives_the_same_relations(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, dice = tmp_path_factory.mktemp("ways"), random.Random(seed)
    streams = shift(seed).scribe.streams
    whole, cut = folded(Path(":memory:"), streams), folded(folder / "cut", streams, dice)
    archive: Archive = sealed(folder / "archive", streams, dice)
    rebuild(archive, folder / "rebuilt")
    archived = Warehouse.open(folder / "rebuilt")
    for relation in RELATIONS:
        contents = [sorted(map(repr, rows(one, relation))) for one in (whole, cut, archived)]
        assert contents[0] == contents[1] == contents[2], relation
    assert everything(whole) == everything(cut)
    for one in (whole, cut, archived):
        one.close()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_counts_is_what_the_fleets_readers_count(seed: int) -> None:
    streams = shift(seed).scribe.streams
    warehouse, fleet = folded(Path(":memory:"), streams), Fleet()
    counted: list[object] = []
    began = set()
    for stored in streams.get(subjects.FLEET, []):
        counted += fleet.fold(stored)
        live = [one for replicas in fleet.replicas.values() for one in replicas.items()]
        began |= {(name, one.began_at_ns) for name, one in live if one.is_ordered}
    ordered = warehouse.query(
        "select replica, ordered_at_ns from facts.replica_events where ordered_at_ns is not null"
    )
    assert set(map(tuple, ordered.rows)) == began
    for relation, kind, name in (
        ("elections", schema.ControlElected, "control"),
        ("decisions", schema.ScaleDecided, "model"),
    ):
        counting = warehouse.query(f"select epoch, {name} from {relation} where counts").rows
        assert counting == [
            [event.epoch, getattr(event, name)] for event in counted if isinstance(event, kind)
        ]
    warehouse.close()


BROKEN = {
    "decided from a number other than the latest decision": [("m", 0, 1, 1), ("m", 2, 3, 1)],
    "decided twice": [("m", 1, 1, 1), ("m", 1, 1, 1)],
    "decided in an old epoch": [("m", 0, 1, 2), ("n", 0, 1, 1)],
    "decided in an epoch without a leader": [("m", 0, 1, 3)],
}


@pytest.mark.parametrize("wrong", BROKEN)
def test_the_check_finds_what_must_not_count(wrong: str, warehouse: Warehouse) -> None:
    for epoch in (1, 2):
        warehouse._reopened().writer.execute(
            "insert into facts.held_elections values (?, 'a', true, 'x', 1)", [epoch]
        )
    for number, (model, before, now, epoch) in enumerate(BROKEN[wrong]):
        values = [model, before, now, epoch, f"RIFT_FLEET:{number + 9}.0"]
        warehouse._reopened().writer.execute(
            "insert into facts.scale_decisions values (?, ?, ?, '', '', '{}', '{}', ?, true, 1, 0, ?, 1)",
            values,
        )
    [[problem, position]] = warehouse.query(sql("decisions.check")).rows
    assert (problem, position) == (wrong, f"RIFT_FLEET:{len(BROKEN[wrong]) + 8}.0")
