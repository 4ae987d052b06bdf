"""Spans as OTLP/JSON: the message `ExportTraceServiceRequest`, with ids in hex and 64-bit numbers as text."""

from collections.abc import Iterable
from typing import Any

from replay.spans.request_spans import Attributes, Span, Value

# Numbers of enumerations, which OTLP/JSON does not write as names.
INTERNAL, SERVER = 1, 2
ERROR = 2
SAMPLED = 1
# The flags that say whether a span's parent belongs to another process.
IS_REMOTE_KNOWN, IS_REMOTE = 0x100, 0x200


def export(spans: Iterable[Span], version: str) -> dict[str, Any]:
    """Return one message. `version` is that of Rift."""
    source = {"name": "rift", "version": version}
    resource: Attributes = {"service.name": "rift", "service.version": version}
    scope = {"scope": source, "spans": [_span(span) for span in spans]}
    return {"resourceSpans": [{"resource": {"attributes": _attributes(resource)}, "scopeSpans": [scope]}]}


def _span(span: Span) -> dict[str, Any]:
    remote = IS_REMOTE if span.is_server and span.parent else 0
    found: dict[str, Any] = {
        "traceId": span.trace,
        "spanId": span.id,
        "flags": (SAMPLED if span.sampled else 0) | IS_REMOTE_KNOWN | remote,
        "name": span.name,
        "kind": SERVER if span.is_server else INTERNAL,
        "startTimeUnixNano": str(span.began_at_ns),
        "endTimeUnixNano": str(span.ended_at_ns),
        "attributes": _attributes(span.attributes),
    }
    if span.parent is not None:
        found["parentSpanId"] = span.parent
    if span.state is not None:
        found["traceState"] = span.state
    if span.error is not None:
        found["status"] = {"code": ERROR, "message": span.error}
    return found


def _attributes(attributes: Attributes) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Value) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case str():
            return {"stringValue": value}
    return {"arrayValue": {"values": [_value(item) for item in value]}}
