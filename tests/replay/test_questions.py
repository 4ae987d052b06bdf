"""The named questions and the tokens of intervals, on a small log whose answers are computed by hand."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from events import codec, schema
from replay.questions import _KINDS, NamedQuestion, WrongQuestion, named, questions
from replay.sql_files import sql
from replay.warehouse.warehouse import Warehouse
from tests.replay.conftest import Scribe, started, tokens_of
from tests.replay.facts.test_fold import apply_all

MS = 1_000_000
# The start of an hour, and the time of the questions.
START_NS = 1_700_002_800_000 * MS
NOW_NS = START_NS + 3_660_000 * MS
MODEL = "tiny:1"


class Story:
    """An hour of one model; every step names its time in milliseconds."""

    def __init__(self) -> None:
        self.scribe = Scribe()
        self.ids: dict[str, str] = {}
        self.scribe.prices(second_nanousd=1000)
        for write in (self.first_replica, self.answers, self.loss, self.queue, self.refused):
            write()

    def at(self, ms: int) -> Scribe:
        self.scribe.now_ns = START_NS + (ms - 1) * MS
        return self.scribe

    def accept(self, ms: int, name: str, **fields: Any) -> None:
        self.ids[name] = self.at(ms).accept(**{"account": "dev", "book": 1, **fields})

    def start(self, ms: int, name: str, worker: str, **fields: Any) -> None:
        number = len([one for one in self.ids if one.startswith(f"{name}.")]) + 1
        attempt = self.ids[f"{name}.{number}"] = f"{name}.{number}"
        self.at(ms).tell(started(self.ids[name], attempt, worker=worker, **fields))

    def tokens(self, ms: int, attempt: str, index: int, count: int = 1) -> None:
        self.at(ms).tell(tokens_of(attempt, index, count))

    def finish(self, ms: int, name: str, attempt: str | None, tokens: int, **fields: Any) -> None:
        event = schema.RequestFinished(
            request=self.ids[name], attempt=attempt, output_tokens=tokens, **{"reason": "stop", **fields}
        )
        self.at(ms).tell(event)

    def decide(self, ms: int, before: int, after: int, epoch: int = 1) -> None:
        decision = schema.ScaleDecided(
            model=MODEL,
            from_replicas=before,
            to_replicas=after,
            reason=f"{after} are needed",
            policy="default-1",
            positions={},
            decided_at_ns=START_NS + ms * MS,
            inputs={"demand.waiting": after},
            epoch=epoch,
        )
        self.at(ms).fleet(decision)

    def replica(self, ms: int, event: type[Any], replica: str, **fields: Any) -> None:
        self.at(ms).fleet(event(replica=replica, model=MODEL, **fields))

    def first_replica(self) -> None:
        self.at(0).fleet(schema.ControlElected(epoch=1, control="a"))
        self.decide(0, 0, 1)
        self.replica(10, schema.ReplicaStarting, "r1", engine="sim", gpus=1, hour_nanousd=3_600 * 10**9)
        self.replica(4_010, schema.ReplicaReady, "r1", slots=4, start_ns=1)

    def answers(self) -> None:
        # It waits for the first replica, and has gaps of 1,000 and 10 ms.
        self.accept(0, "waited")
        self.start(5_000, "waited", "r1")
        for index, ms in enumerate((6_000, 7_000, 7_010)):
            self.tokens(ms, "waited.1", index)
        self.finish(7_020, "waited", "waited.1", 3)
        self.accept(10_000, "failed", account="acme")
        self.start(10_100, "failed", "r1")
        self.tokens(10_200, "failed.1", 0)
        problem = schema.Problem(code="engine_error", message="x")
        self.finish(10_300, "failed", "failed.1", 1, reason="failed", error=problem)
        self.accept(12_000, "timed", account="seconds", plan="per_second")
        self.start(12_100, "timed", "r1")
        self.tokens(12_200, "timed.1", 0)
        self.finish(14_000, "timed", "timed.1", 1)
        self.accept(15_000, "expired")
        self.finish(16_000, "expired", None, 0, reason="expired")

    def loss(self) -> None:
        self.decide(3_580_000, 1, 2)
        self.decide(3_580_001, 2, 9, epoch=0)
        self.replica(3_590_000, schema.ReplicaStarting, "r2", engine="sim", hardware="gpu")
        self.replica(3_599_000, schema.ReplicaReady, "r2", slots=4, start_ns=1)
        self.accept(3_600_000, "hit", account="acme")
        self.start(3_600_500, "hit", "r2")
        self.tokens(3_601_000, "hit.1", 0, 2)
        # It ends before the loss, so the loss does not interrupt it.
        self.accept(3_602_000, "lucky", account="acme")
        self.start(3_602_100, "lucky", "r2")
        self.at(3_602_200).tell(
            schema.CancelRequested(request=self.ids["lucky"], why="client"), kind="cancel"
        )
        self.finish(3_602_300, "lucky", None, 0, reason="cancelled")
        self.replica(3_640_000, schema.ReplicaLost, "r2", why="silent for 35 s", cause="host")
        self.at(3_640_100).tell(schema.AttemptReleased(attempt="hit.1", why="lost"))
        self.start(3_641_000, "hit", "r1", after="hit.1", resume_index=2)
        self.tokens(3_642_000, "hit.2", 2)
        self.finish(3_642_500, "hit", "hit.2", 3)

    def queue(self) -> None:
        self.accept(3_650_000, "new")
        self.accept(3_651_000, "again", account="acme")
        self.start(3_651_500, "again", "r1")
        self.at(3_655_000).tell(schema.AttemptReleased(attempt="again.1", why="draining"))

    def refuse(self, from_ms: int, lane: str, other: int = 0, **counts: int) -> None:
        """Report a minute of refusals; a keyword is an account and a reason, or a reason."""
        refused = [
            schema.RefusalCount(account=account or None, reason=reason, count=count)
            for name, count in counts.items()
            for account, _, reason in [name.rpartition("__")]
        ]
        event = schema.RequestsRefused(
            lane=lane,
            shard=0,
            from_at_ns=ns(from_ms),
            to_at_ns=ns(from_ms + 60_000),
            counts=tuple(refused),
            other=other,
        )
        self.at(from_ms + 60_010).put("RIFT_0", f"rift.0.lane.{lane}", codec.encode("g", [event]))

    def refused(self) -> None:
        self.refuse(3_480_000, "laneaaaa", missing_api_key=9)
        self.refuse(3_540_000, "laneaaaa", acme__queue_full=2, invalid_api_key=5)
        # Stored again.
        self.refuse(3_540_000, "laneaaaa", acme__queue_full=2, invalid_api_key=5)
        self.refuse(3_590_000, "lanebbbb", 3, acme__queue_full=1)


@pytest.fixture(scope="module")
def story() -> Story:
    return Story()


@pytest.fixture(scope="module")
def told(story: Story) -> Iterator[Warehouse]:
    opened = Warehouse.open(Path(":memory:"))
    apply_all(opened, story.scribe.streams)
    yield opened
    opened.close()


def ns(ms: int) -> int:
    return START_NS + ms * MS


HOUR_MS = 3_600_000
ANSWERS: dict[str, list[list[Any]]] = {
    "slowest-requests limit=2": [
        ["@hit", "acme", MODEL, "finished", ns(3_600_000), 500, 1_000, 20_500, 42_500, 7, 3, 2],
        ["@waited", "dev", MODEL, "finished", ns(0), 5_000, 6_000, 505, 7_020, 7, 3, 1],
    ],
    "slowest-requests account=dev since=2023-11-14T23:00:01Z": [
        ["@expired", "dev", MODEL, "expired", ns(15_000), None, None, None, 1_000, 0, 0, 0]
    ],
    "ttft": [
        [MODEL, ns(0), 4, 3, 200, 6_000, 6_000, 100, 5_000, 12, 1_024],
        [MODEL, ns(HOUR_MS), 4, 1, 1_000, 1_000, 1_000, 500, 500, 8_192, 8_192],
    ],
    "ttft account=seconds": [[MODEL, ns(0), 1, 1, 200, 200, 200, 100, 100, None, None]],
    "cost-per-account": [
        ["seconds", MODEL, 1, 1, 7, 0, 1, 2_000],
        ["acme", MODEL, 3, 1, 21, 0, 4, 130],
        ["dev", MODEL, 2, 1, 7, 0, 3, 130],
    ],
    "cost-per-account since=60s account=acme": [["acme", MODEL, 2, 1, 14, 0, 3, 130]],
    "cold-starts": [
        ["r2", MODEL, "gpu", "lost", ns(3_580_000), 19_000, 1, 0, None, "silent for 35 s"],
        ["r1", MODEL, "cpu", "ready", ns(0), 4_010, 0, 1, 5_000, None],
    ],
    "failures": [
        [MODEL, "expired", "expired", 1, 1, "dev", ns(16_000), "@expired"],
        [MODEL, "failed", "engine_error", 1, 1, "acme", ns(10_300), "@failed"],
    ],
    "failures account=acme": [[MODEL, "failed", "engine_error", 1, 1, "acme", ns(10_300), "@failed"]],
    "queue-age": [[MODEL, 2, 2, 5_000, 10_000, "dev", "@new"]],
    # After the loss, and before the request runs again.
    "queue-age at=2023-11-15T00:00:40.500": [[MODEL, 1, 1, 400, 400, "acme", "@hit"]],
    "queue-age at=2023-11-14T23:00:02": [[MODEL, 1, 1, 2_000, 2_000, "dev", "@waited"]],
    "tokens-per-second interval=10s since=2h account=dev": [[MODEL, ns(0), 3, 0.3]],
    "tokens-per-second interval=1s since=2h account=dev": [
        [MODEL, ns(6_000), 2, 2.0],
        [MODEL, ns(7_000), 1, 1.0],
    ],
    "tokens-per-second interval=1h since=2h": [[MODEL, ns(0), 5, 0.0], [MODEL, ns(HOUR_MS), 3, 0.0]],
    "tokens-per-second": [[MODEL, ns(HOUR_MS), 3, 0.1]],
    "unit-economics since=30s": [
        [MODEL, 95, 0, 46, 53, 2, 14, 3, 55 * 10**9, 50 * 10**9, 130, 130 - 55 * 10**9, 55 * 10**15 // 3]
    ],
    "lost-replicas": [
        ["r2", ns(3_640_000), "silent for 35 s", "acme", "@hit", 1, "lost", 2, "r1", 41_000, "finished"]
    ],
    "refusals since=90s": [
        [None, "invalid_api_key", 5, 1, ns(3_540_000), ns(3_600_000)],
        ["acme", "queue_full", 3, 2, ns(3_540_000), ns(3_650_000)],
        [None, "other", 3, 1, ns(3_590_000), ns(3_650_000)],
    ],
    "refusals account=acme": [["acme", "queue_full", 3, 2, ns(3_540_000), ns(3_650_000)]],
    "last-decision model=tiny:1": [
        [MODEL, ns(3_580_000), 1, 2, "2 are needed", "default-1", 1, "RIFT_FLEET:5.0", '{"demand.waiting":2}']
    ],
}


def ask(told: Warehouse, words: str) -> list[list[Any]]:
    name, *given = words.split()
    return told.query(named(name).select(dict(one.split("=", 1) for one in given), NOW_NS)).rows


@pytest.mark.parametrize("words", ANSWERS)
def test_answer(words: str, told: Warehouse, story: Story) -> None:
    names = {request: f"@{name}" for name, request in story.ids.items()}
    assert [
        [names.get(value, value) if isinstance(value, str) else value for value in row]
        for row in ask(told, words)
    ] == ANSWERS[words]


def test_every_question_has_an_answer_here_and_every_filter_an_effect(told: Warehouse) -> None:
    assert {words.split()[0] for words in ANSWERS} == {question.name for question in questions()}
    for question in questions():
        required = {one.name: MODEL for one in question.parameters if one.is_required}
        for name in {"model", "account", "replica"} & {one.name for one in question.parameters}:
            assert told.query(question.select({**required, name: "it's none"}, NOW_NS)).rows == [], name
        if "since" in [one.name for one in question.parameters]:
            assert ask(told, f"{question.name} since=2023-11-15T02:00") == []


@pytest.mark.parametrize("question", questions(), ids=lambda question: question.name)
def test_the_comments_document_each_parameter(question: NamedQuestion) -> None:
    comments, _, code = re.sub("^--", "", sql(f"ask/{question.name.replace('-', '_')}")).partition("\n")
    assert comments.startswith(" Show ")
    lines = re.findall(r"^-- .*$", code.partition("\nselect")[0].partition("\nwith")[0], re.MULTILINE)
    assert len(lines) == len(question.parameters), "a line that is not a parameter"
    code = re.sub(r"--[^\n]*", "", code)
    assert set(re.findall(r"\$(\w+)", code)) == {one.name for one in question.parameters}
    for one in question.parameters:
        assert one.default is None or _KINDS[one.kind][1](one.default, NOW_NS) is not None


WRONG = {
    "slow": r"no question is named 'slow'; choose from cold-starts, .*unit-economics$",
    "last-decision": r"parameter model is missing; add model=TEXT \(the model that is scaled\)",
    "ttft x=1": r"ttft has no parameter 'x'; it has \[since=24h\] \(requests accepted since then\), \[model",
    "ttft model=": r"model \(only this model\) must be a text that is not empty, got ''",
    "slowest-requests limit=0": r"limit \(largest number of rows\) must be a positive integer, got '0'",
    "tokens-per-second interval=0s": r"interval \(length of an interval\) must be a duration .* got '0s'",
    "failures since=soon": r"since \(requests that ended since then\) must be now, a time ago .* got 'soon'",
    "failures since=9999-01-01": "got '9999-01-01'",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_question_names_the_remedy(words: str, told: Warehouse) -> None:
    with pytest.raises(WrongQuestion, match=WRONG[words]):
        ask(told, words)


def test_times() -> None:
    select = named("failures").select
    for text, ms in {
        "now": 3_660_000,
        "90s": 3_570_000,
        "1h": 60_000,
        "2023-11-15T01:00+01:00": 3_600_000,
    }.items():
        assert f">= {ns(ms)}\n" in select({"since": text}, NOW_NS)


# --- tokens by interval ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1, 7, 60, 86_400])
def test_tokens_by_interval_add_up(seconds: int, told: Warehouse) -> None:
    rows = told.query(f"from tokens_by_interval({seconds}000000000)").rows
    assert sum(tokens for *_, tokens in rows) == 8
    assert all(start % (seconds * 10**9) == 0 and tokens >= 0 for _, _, start, tokens in rows)
    later = told.query(f"from tokens_by_interval({seconds}000000000, since_ns := {ns(3_630_000)})").rows
    floor = ns(3_630_000) // (seconds * 10**9) * seconds * 10**9
    assert sorted(later) == sorted(row for row in rows if row[2] >= floor)
