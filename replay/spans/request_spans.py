"""The spans of one request, from its row of `sql/cli/spans.sql`: the same at every time, with the same ids.

    request              from its arrival to its end
      admission          until it is accepted
      queue              until an attempt starts; after a lost attempt again
        start            the part in which the replica of the next attempt started
      prefill, decode    of each attempt, before and after its first token
      delivery           of a streamed answer, from its first token to its end

The attributes are those of OpenTelemetry's conventions for generative AI where they have one, else `rift.`.
None has a prompt, an answer or the message of an error.
"""

from collections.abc import Iterator

import msgspec

from events import ids
from events.contracts import SECOND_NS

Value = str | bool | int | float | list[str]
Attributes = dict[str, Value]

OPERATIONS = {"completion": "text_completion"}
# The states whose cause is not the client: only these are errors of the server.
SERVER_ERRORS = ("failed", "poison", "expired")
# Why a model stops. Other ends are not in the conventions' `finish_reasons`.
STOPPED = ("stop", "length", "tool_calls")
# How an attempt ends: by a fault of its host or its process, or with the request.
LOST = ("host", "lost", "stalled", "superseded")
FINAL = ("finished", "ended")


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One span. `parent` is None in a trace that the request begins.

    `error` is set if the server is to blame. `is_server` marks a request's own span. `state` is a tracestate.
    """

    trace: str
    id: str
    parent: str | None
    name: str
    began_at_ns: int
    ended_at_ns: int
    attributes: dict[str, Value]
    error: str | None = None
    is_server: bool = False
    sampled: bool = True
    state: str | None = None


class EndedAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt. `first_seen_at_ns` and `ready_at_ns` are its replica's."""

    number: int
    attempt_id: str
    worker: str
    engine: str
    outcome: str
    resume_index: int
    output_tokens: int
    cached_tokens: int
    started_at_ns: int
    first_token_at_ns: int | None
    last_event_at_ns: int
    ended_at_ns: int | None
    first_seen_at_ns: int | None
    ready_at_ns: int | None


class EndedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `sql/cli/spans.sql`."""

    request_id: str
    account: str
    model: str
    kind: str
    plan: str
    stream: bool
    group_id: str | None
    choice: int
    client_request_id: str | None
    traceparent: str | None
    tracestate: str | None
    state: str
    finish_reason: str | None
    ended_by: str | None
    cancel_reason: str | None
    error_code: str | None
    simulated: bool
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    charge_nanousd: int | None
    admission_ns: int | None
    accepted_at_ns: int
    first_token_at_ns: int | None
    finished_at_ns: int
    attempts: tuple[EndedAttempt, ...]

    @property
    def arrived_at_ns(self) -> int:
        return self.accepted_at_ns - (self.admission_ns or 0)


def spans_of(request: EndedRequest) -> Iterator[Span]:
    """Yield the request's own span, then its parts."""
    own = _own(request)
    yield own
    if request.admission_ns is not None:
        yield _part(own, "admission", 0, (own.began_at_ns, request.accepted_at_ns))
    free_at_ns = request.accepted_at_ns
    for run in request.attempts:
        queue = _part(own, "queue", run.number, (free_at_ns, run.started_at_ns))
        yield queue
        yield from _start(queue, run)
        yield from _attempt(own, run)
        free_at_ns = run.last_event_at_ns
    if not request.attempts or request.attempts[-1].outcome not in FINAL:
        yield _part(own, "queue", len(request.attempts) + 1, (free_at_ns, request.finished_at_ns))
    if request.stream and request.first_token_at_ns is not None:
        yield _part(own, "delivery", 0, (request.first_token_at_ns, request.finished_at_ns))


def _own(request: EndedRequest) -> Span:
    given = request.traceparent
    operation = OPERATIONS.get(request.kind, "chat")
    return Span(
        trace=ids.trace_id(request.request_id, group=request.group_id, traceparent=given),
        id=ids.span_id(request.request_id),
        parent=given[36:52] if given else None,
        name=f"{operation} {request.model}",
        began_at_ns=request.arrived_at_ns,
        ended_at_ns=request.finished_at_ns,
        attributes={"gen_ai.operation.name": operation, **_usage(request), **_facts(request)},
        error=request.state if request.state in SERVER_ERRORS else None,
        is_server=True,
        sampled=given is None or int(given[53:], 16) & 1 == 1,
        state=request.tracestate,
    )


def _usage(request: EndedRequest) -> Attributes:
    """Return the attributes that the conventions define."""
    first_ns = request.first_token_at_ns
    id = request.request_id
    found: Attributes = {
        "gen_ai.provider.name": "rift",
        "gen_ai.request.model": request.model,
        "gen_ai.request.stream": request.stream,
        "gen_ai.response.id": f"resp_{id.removeprefix('req_')}" if request.kind == "response" else id,
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.output_tokens": request.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": request.cached_tokens,
    }
    if request.finish_reason in STOPPED:
        found["gen_ai.response.finish_reasons"] = [request.finish_reason]
    if first_ns is not None:
        found["gen_ai.response.time_to_first_chunk"] = (first_ns - request.arrived_at_ns) / SECOND_NS
    if request.error_code or request.state in SERVER_ERRORS:
        found["error.type"] = request.error_code or request.state
    return found


def _facts(request: EndedRequest) -> Attributes:
    """Return the attributes that only Rift has."""
    found: dict[str, Value | None] = {
        "rift.request.id": request.request_id,
        "rift.request.client_id": request.client_request_id,
        "rift.request.kind": request.kind,
        "rift.request.state": request.state,
        "rift.request.ended_by": request.ended_by,
        "rift.request.cancel_reason": request.cancel_reason,
        "rift.request.attempts": len(request.attempts),
        "rift.request.group": request.group_id,
        "rift.request.choice": request.choice,
        "rift.request.simulated": request.simulated,
        "rift.account": request.account,
        "rift.plan": request.plan,
        "rift.cost.nanousd": request.charge_nanousd,
    }
    return {name: value for name, value in found.items() if value is not None}


def _start(queue: Span, run: EndedAttempt) -> Iterator[Span]:
    """Yield the start of an attempt's replica if the attempt had to wait for it."""
    if run.ready_at_ns is None or run.first_seen_at_ns is None:
        return
    if queue.began_at_ns < run.ready_at_ns <= queue.ended_at_ns:
        times = (max(queue.began_at_ns, run.first_seen_at_ns), run.ready_at_ns)
        yield _part(queue, "start", run.number, times, {"rift.replica.id": run.worker})


def _attempt(own: Span, run: EndedAttempt) -> Iterator[Span]:
    """Yield the prefill of an attempt, and its decode if it had a token.

    A lost attempt ends with its own last event: nothing is known of it after that.
    """
    attributes: Attributes = {
        "rift.attempt.id": run.attempt_id,
        "rift.attempt.outcome": run.outcome,
        "rift.attempt.resume_index": run.resume_index,
        "rift.replica.id": run.worker,
        "rift.engine": run.engine,
    }
    error = run.outcome if run.outcome in LOST else None
    failed: Attributes = attributes if error is None else {**attributes, "error.type": error}
    ended_at_ns = run.last_event_at_ns
    if run.outcome == "ended" and run.ended_at_ns is not None:
        ended_at_ns = run.ended_at_ns
    if run.first_token_at_ns is None:
        yield _part(own, "prefill", run.number, (run.started_at_ns, ended_at_ns), failed, error)
        return
    cached: Attributes = {"gen_ai.usage.cache_read.input_tokens": run.cached_tokens}
    yield _part(own, "prefill", run.number, (run.started_at_ns, run.first_token_at_ns), attributes | cached)
    output: Attributes = {"gen_ai.usage.output_tokens": run.output_tokens}
    yield _part(own, "decode", run.number, (run.first_token_at_ns, ended_at_ns), failed | output, error)


def _part(
    of: Span,
    name: str,
    number: int,
    times: tuple[int, int],
    attributes: Attributes | None = None,
    error: str | None = None,
) -> Span:
    """Return a part of a span. `number` is that of its attempt, 0 if it has none."""
    began_at_ns, ended_at_ns = times
    return Span(
        trace=of.trace,
        id=ids.span_id(of.id, f"{name} {number}"),
        parent=of.id,
        name=name,
        began_at_ns=began_at_ns,
        ended_at_ns=ended_at_ns,
        attributes={**({"rift.attempt.number": number} if number else {}), **(attributes or {})},
        error=error,
        sampled=of.sampled,
        state=of.state,
    )
