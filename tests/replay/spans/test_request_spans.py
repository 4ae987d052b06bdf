"""The spans of requests whose times are known, as text and as the messages of OTLP."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from events import ids
from replay.spans.request_spans import EndedRequest, Span, spans_of
from replay.warehouse.warehouse import Warehouse
from rift.cli.log import spans as command
from rift.cli.log.spans import SpanBatch, Window, batches
from rift.rpc import Sql
from tests.replay.conftest import CANARY
from tests.replay.facts.test_fold import apply_all
from tests.replay.test_questions import MS, START_NS, Story

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
WHOLE = Window(0, 2**62, None)


class Told:
    """The story of the questions, and a request with a trace that a client began."""

    def __init__(self) -> None:
        self.story = Story()
        self.story.accept(
            3_720_000,
            "traced",
            admission_ns=30 * MS,
            stream=False,
            kind="response",
            traceparent=CLIENT,
            tracestate="a=1",
            group="g",
        )
        self.story.start(3_720_100, "traced", "r1", prompt_tokens=7)
        self.story.tokens(3_720_200, "traced.1", 0, 2)
        self.story.finish(3_720_300, "traced", "traced.1", 2)
        self.warehouse = Warehouse.open(Path(":memory:"))
        apply_all(self.warehouse, self.story.scribe.streams)

    def batches(self, window: Window = WHOLE) -> list[SpanBatch]:
        async def ask(question: Sql) -> Any:
            return msgspec.to_builtins(self.warehouse.query(question.sql))

        async def run() -> list[SpanBatch]:
            return [batch async for batch in batches(ask, window)]

        return anyio.run(run)

    def spans(self, name: str) -> list[Span]:
        return list(spans_of(self.request(name)))

    def request(self, name: str) -> EndedRequest:
        answer = self.warehouse.query(command.page(WHOLE, 0, "").sql)
        rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
        requests = msgspec.convert(rows, list[EndedRequest])
        [request] = [one for one in requests if one.request_id == self.story.ids[name]]
        return request


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    made = Told()
    yield made
    made.warehouse.close()


def shown(spans: list[Span]) -> list[tuple[str, int, int]]:
    """Return the parts with their times in ms."""
    return [
        (span.name, (span.began_at_ns - START_NS) // MS, (span.ended_at_ns - START_NS) // MS)
        for span in spans
    ]


def test_a_request_that_waited_for_a_replica_shows_its_start(told: Told) -> None:
    own, *parts = told.spans("waited")
    assert shown([own, *parts]) == [
        ("chat tiny:1", 0, 7_020),
        ("queue", 0, 5_000),
        ("start", 10, 4_010),
        ("prefill", 5_000, 6_000),
        ("decode", 6_000, 7_020),
        ("delivery", 6_000, 7_020),
    ]
    assert own.parent is None
    assert {one.name: one.parent for one in parts} == {one.name: own.id for one in parts} | {
        "start": parts[0].id
    }
    assert {one.trace for one in parts} == {own.trace}
    assert own.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert own.attributes["gen_ai.response.time_to_first_chunk"] == 6.0
    assert own.attributes["gen_ai.usage.output_tokens"] == 3
    assert own.attributes["rift.cost.nanousd"] == 3 * 20 + own.attributes["gen_ai.usage.input_tokens"] * 10
    assert not [one for one in (own, *parts) if one.error or "error.type" in one.attributes]


def test_a_lost_replica_shows_two_attempts_with_a_wait_between_them(told: Told) -> None:
    own, *parts = told.spans("hit")
    assert shown(parts) == [
        ("queue", 3_600_000, 3_600_500),
        ("prefill", 3_600_500, 3_601_000),
        ("decode", 3_601_000, 3_601_000),
        ("queue", 3_601_000, 3_641_000),
        ("prefill", 3_641_000, 3_642_000),
        ("decode", 3_642_000, 3_642_500),
        ("delivery", 3_601_000, 3_642_500),
    ]
    assert [one.error for one in parts] == [None, None, "lost", None, None, None, None]
    assert [one.attributes.get("rift.replica.id") for one in parts if one.name == "decode"] == ["r2", "r1"]
    assert [one.attributes.get("rift.attempt.number") for one in parts if one.name == "decode"] == [1, 2]
    assert (own.error, own.attributes["rift.request.attempts"]) == (None, 2)


def test_an_attempt_that_ended_with_its_host_is_an_error_too(told: Told) -> None:
    hit = told.request("hit")
    first, second = hit.attempts
    killed = msgspec.structs.replace(hit, attempts=(msgspec.structs.replace(first, outcome="host"), second))
    assert [one.error for one in spans_of(killed) if one.name == "decode"] == ["host", None]


def test_failures_are_errors_of_the_server_or_of_nobody(told: Told) -> None:
    failed, *_ = told.spans("failed")
    assert (failed.error, failed.attributes["error.type"]) == ("failed", "engine_error")
    expired, queue = told.spans("expired")
    assert (expired.error, expired.attributes["error.type"], queue.name) == ("expired", "expired", "queue")
    cancelled, *parts = told.spans("lucky")
    assert (cancelled.error, cancelled.attributes["rift.request.cancel_reason"]) == (None, "client")
    assert "gen_ai.response.finish_reasons" not in cancelled.attributes
    assert [one.name for one in parts] == ["queue", "prefill"]
    by_second, *_ = told.spans("timed")
    assert "rift.cost.nanousd" not in by_second.attributes


def test_a_trace_continues_the_clients(told: Told) -> None:
    own, *parts = told.spans("traced")
    assert (own.trace, own.parent) == (CLIENT[3:35], CLIENT[36:52])
    assert own.id == ids.span_id(told.story.ids["traced"])
    assert {(one.sampled, one.state) for one in (own, *parts)} == {(False, "a=1")}
    assert [one.name for one in parts] == ["admission", "queue", "prefill", "decode"]
    assert shown([own, parts[0]]) == [
        ("chat tiny:1", 3_719_970, 3_720_300),
        ("admission", 3_719_970, 3_720_000),
    ]
    assert own.attributes["gen_ai.response.time_to_first_chunk"] == 0.23
    assert own.attributes["gen_ai.response.id"] == told.story.ids["traced"].replace("req_", "resp_")


def test_pages_have_each_ended_request_once_in_order(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    [whole] = told.batches()
    monkeypatch.setattr(command, "BATCH_REQUESTS", 2)
    several = told.batches()
    assert [batch.requests for batch in several] == [2, 2, 2, 1]
    spans = [span for batch in several for span in exported(batch)]
    assert spans == exported(whole)
    assert len({span["spanId"] for span in spans}) == len(spans) == whole.spans
    ends = [int(span["endTimeUnixNano"]) for span in spans if span["kind"] == 2]
    assert ends == sorted(ends)
    first, last = ends[0], ends[-1]
    assert sum(batch.requests for batch in told.batches(Window(first, last, None))) == 6
    acme = told.batches(WHOLE._replace(account="acme"))
    assert sum(batch.requests for batch in acme) == 3
    assert not told.batches(WHOLE._replace(account="nobody"))


def test_messages_are_otlp_without_any_content(told: Told) -> None:
    trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    json_format = pytest.importorskip("google.protobuf.json_format")
    [batch] = told.batches()
    text = json.dumps(batch.message)
    assert CANARY not in text
    message = json_format.ParseDict(as_protobuf(json.loads(text)), trace_service.ExportTraceServiceRequest())
    [scope] = message.resource_spans[0].scope_spans
    assert len(scope.spans) == batch.spans
    by_id = {span.span_id.hex(): span for span in scope.spans}
    own = by_id[ids.span_id(told.story.ids["traced"])]
    assert (own.trace_id.hex(), own.parent_span_id.hex()) == (CLIENT[3:35], CLIENT[36:52])
    assert (own.flags, own.kind, own.trace_state) == (0x300, own.SPAN_KIND_SERVER, "a=1")
    values = {one.key: one.value for one in own.attributes}
    assert values["gen_ai.usage.input_tokens"].int_value == 7
    assert values["gen_ai.response.finish_reasons"].array_value.values[0].string_value == "stop"
    failed = by_id[ids.span_id(told.story.ids["failed"])]
    assert (failed.status.code, failed.flags) == (failed.status.STATUS_CODE_ERROR, 0x101)


def exported(batch: SpanBatch) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = batch.message["resourceSpans"][0]["scopeSpans"][0]["spans"]
    return spans


def as_protobuf(node: Any) -> Any:
    """Return OTLP/JSON as protobuf's own JSON, which has ids in base64."""
    if isinstance(node, list):
        return [as_protobuf(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: base64.b64encode(bytes.fromhex(item)).decode()
        if key in ("traceId", "spanId", "parentSpanId")
        else as_protobuf(item)
        for key, item in node.items()
    }
