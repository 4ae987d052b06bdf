"""Objects and events of `/v1/responses`: pure, from the log's events to bytes.

The log determines everything, including the event numbers. So a replayed stream is the same from every
gateway, and can start after any number. Nothing is sent before an attempt has started.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from events.request_history import sliced
from events.schema import Parameters, Problem, ResponseFormat, TokensGenerated
from rift.gateway.completion import Completion, Segment
from rift.gateway.dialects import openai_errors
from rift.gateway.dialects.chat_response import json_list, token_logprob
from rift.gateway.dialects.native import KEEP_ALIVE

REQUEST = "req_"
RESPONSE = "resp_"

# By kind of segment: the prefix of an item's id, the type of its part, and the prefix of its text events.
PREFIX = {"reasoning": "rs", "text": "msg", "call": "fc"}
PART = {"reasoning": "reasoning_text", "text": "output_text"}
TEXT_EVENT = {
    "reasoning": "response.reasoning_text",
    "text": "response.output_text",
    "call": "response.function_call_arguments",
}

# The API's names of fields, where they differ from the log's.
PARAMS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "top_logprobs",
    "template": "chat_template_kwargs",
}

_encode = msgspec.json.Encoder().encode


def request_id(response: str) -> str:
    """Return the id of the request that a response's id names, or an empty text for any other text."""
    return REQUEST + response.removeprefix(RESPONSE) if response.startswith(RESPONSE) else ""


def response_id(request: str) -> str:
    return RESPONSE + request.removeprefix(REQUEST)


def response(answer: Completion) -> dict[str, Any]:
    """Return the object of a response, whether it has ended or not."""
    parameters = answer.accepted.parameters
    accepted = answer.accepted
    status = _status(answer)
    ended = answer.life.phase == "ended"
    items = [
        _item(answer, at, segment, _item_status(answer, at)) for at, segment in enumerate(answer.segments)
    ]
    return {
        "id": response_id(accepted.request),
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "background": accepted.detached and accepted.idempotency_hash is None,
        "error": _error(answer),
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "max_output_tokens": parameters.max_tokens,
        "metadata": accepted.metadata,
        "model": accepted.model,
        "output": items,
        "parallel_tool_calls": parameters.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": parameters.reasoning_effort, "summary": None},
        "temperature": parameters.temperature,
        "text": {"format": _format(parameters.response_format)},
        "tool_choice": _choice(parameters),
        "tools": [_tool(tool) for tool in parameters.tools],
        "top_logprobs": parameters.logprobs,
        "top_p": parameters.top_p,
        "truncation": "disabled",
        "usage": _usage(answer) if ended else None,
    } | ({"simulated": True} if answer.simulated else {})


class ResponsesStream:
    """The events of one response after number `after`. The answer must keep its text."""

    keep_alive = KEEP_ALIVE
    tells_status = False

    def __init__(self, answer: Completion, *, after: int = -1) -> None:
        self._answer = answer
        self._after = after
        self._number = 0
        self._begun = False
        self._open: int | None = None
        # For each segment, how many pieces and logprobs were sent.
        self._sent: list[tuple[int, int]] = []

    def waiting(self, name: str, estimate_ms: int | None) -> bytes:
        return KEEP_ALIVE

    def event(self, event: Any, answer: Completion) -> bytes:
        ended = answer.life.phase == "ended"
        if not (answer.life.attempt or ended):
            return b""
        frames = b"".join(self._numbered(self._frames(event, ended=ended)))
        return frames + self._past_the_end() if ended and self._after >= self._number else frames

    def broken_off(self, problem: Problem, after: int) -> bytes:
        return self._problem(problem)

    def _past_the_end(self) -> bytes:
        """Return an error that names the last event, for a client that resumes past the end.

        Without it, the client could not distinguish the end from a broken connection.
        """
        message = f"this response has no event {self._after}; the last one is {self._number - 1}"
        return self._problem(Problem(code="invalid_event_id", message=message, param="starting_after"))

    def _problem(self, problem: Problem) -> bytes:
        """Return an event that is not in the log. It repeats the number of the event before it, so a client
        that resumes after it misses nothing."""
        shown = {
            "type": "error",
            "code": problem.code,
            "message": problem.message,
            "param": problem.param,
            "sequence_number": max(0, self._number - 1),
        }
        return b"event: error\ndata: %b\n\n" % _encode(shown)

    def _numbered(self, events: "Iterator[dict[str, Any]]") -> Iterator[bytes]:
        for shown in events:
            if self._number > self._after:
                data = _encode(shown | {"sequence_number": self._number})
                yield b"event: %b\ndata: %b\n\n" % (shown["type"].encode(), data)
            self._number += 1

    def _frames(self, event: Any, *, ended: bool) -> Iterator[dict[str, Any]]:
        if not self._begun:
            self._begun = True
            begun = response(self._answer) | {"status": "in_progress", "output": [], "usage": None}
            begun |= {"error": None, "incomplete_details": None}
            yield {"type": "response.created", "response": begun}
            yield {"type": "response.in_progress", "response": begun}
        if isinstance(event, TokensGenerated):
            for at, segment in enumerate(self._answer.segments):
                yield from self._segment_events(at, segment)
        elif ended:
            if self._open is not None:
                yield from self._close(self._open, _item_status(self._answer, self._open))
            shown = response(self._answer)
            name = shown["status"] if shown["status"] in ("completed", "failed") else "incomplete"
            yield {"type": f"response.{name}", "response": shown}

    def _segment_events(self, at: int, segment: Segment) -> Iterator[dict[str, Any]]:
        """Yield events for the part of a segment that was not sent yet."""
        if at == len(self._sent):
            if self._open is not None:
                yield from self._close(self._open, "completed")
            self._open = at
            self._sent.append((0, 0))
            empty = Segment(segment.kind, id=segment.id, name=segment.name)
            item = _item(self._answer, at, empty, "in_progress")
            yield {
                "type": "response.output_item.added",
                "output_index": at,
                "item": item | _no_parts(item),
            }
            if segment.kind != "call":
                yield self._part("added", at, empty)
        pieces, logprobs = self._sent[at]
        self._sent[at] = len(segment.pieces), len(segment.logprobs)
        if delta := "".join(segment.pieces[pieces:]):
            yield self._text(at, segment, "delta", {"delta": delta}, logprobs)

    def _close(self, at: int, status: str) -> Iterator[dict[str, Any]]:
        segment = self._answer.segments[at]
        self._open = None
        if segment.kind == "call":
            done = {"arguments": segment.text, "name": segment.name}
            yield self._text(at, segment, "done", done)
        else:
            yield self._text(at, segment, "done", {"text": segment.text})
            yield self._part("done", at, segment)
        item = _item(self._answer, at, segment, status)
        yield {"type": "response.output_item.done", "output_index": at, "item": item}

    def _text(
        self, at: int, segment: Segment, what: str, content: dict[str, str], logprobs_from: int = 0
    ) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "type": f"{TEXT_EVENT[segment.kind]}.{what}",
            "item_id": _item_id(self._answer, at, segment),
            "output_index": at,
        }
        if segment.kind != "call":
            shown["content_index"] = 0
        if segment.kind == "text":
            shown["logprobs"] = _logprobs(segment, logprobs_from)
        return shown | content

    def _part(self, what: str, at: int, segment: Segment) -> dict[str, Any]:
        return {
            "type": f"response.content_part.{what}",
            "item_id": _item_id(self._answer, at, segment),
            "output_index": at,
            "content_index": 0,
            "part": _part(segment),
        }


def _status(answer: Completion) -> str:
    life = answer.life
    if life.phase != "ended":
        return "in_progress" if life.attempt else "queued"
    if answer.failure():
        return "failed"
    return {"length": "incomplete", "cancelled": "cancelled"}.get(str(life.reason), "completed")


def _item_status(answer: Completion, at: int) -> str:
    """Return an item's status: only the last item can be unfinished."""
    if at < len(answer.segments) - 1:
        return "completed"
    return {"completed": "completed", "in_progress": "in_progress"}.get(_status(answer), "incomplete")


def _item_id(answer: Completion, at: int, segment: Segment) -> str:
    *_, random, mac = answer.id.split("_")
    return f"{PREFIX[segment.kind]}_{random}{mac}_{at}"


def _item(answer: Completion, at: int, segment: Segment, status: str) -> dict[str, Any]:
    item: dict[str, Any] = {"id": _item_id(answer, at, segment), "status": status}
    if segment.kind == "call":
        call = {"call_id": segment.id, "name": segment.name, "arguments": segment.text}
        return item | {"type": "function_call", **call}
    if segment.kind == "reasoning":
        return item | {"type": "reasoning", "summary": [], "content": [_part(segment)]}
    return item | {"type": "message", "role": "assistant", "content": [_part(segment)]}


def _no_parts(item: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an item that has just been added: it has no parts yet."""
    return {"content": []} if "content" in item else {}


def _part(segment: Segment) -> dict[str, Any]:
    part: dict[str, Any] = {"type": PART[segment.kind], "text": segment.text}
    if segment.kind == "text":
        part |= {"annotations": [], "logprobs": _logprobs(segment)}
    return part


def _logprobs(segment: Segment, first: int = 0) -> msgspec.Raw:
    """Return the log probabilities of a text from number `first` on. Each is encoded once."""
    segment.encoded += map(token_logprob, segment.logprobs[len(segment.encoded) :])
    return json_list(segment.encoded[first:])


async def encode_logprobs(answer: Completion) -> None:
    """Encode the log probabilities of an answer that takes no more events, while other tasks run."""
    for segment in answer.segments:
        async for each in sliced(segment.logprobs[len(segment.encoded) :]):
            segment.encoded.append(token_logprob(each))


def _error(answer: Completion) -> dict[str, Any] | None:
    if (failure := answer.failure()) is None:
        return None
    status, problem = failure[0], openai_errors.translate(failure[1], PARAMS)
    code = "invalid_prompt" if status == 400 else "server_error"
    if problem.code == openai_errors.CONTEXT_LENGTH:
        code = problem.code
    return {"code": code, "message": problem.message, "param": problem.param, "type": problem.code}


def _usage(answer: Completion) -> dict[str, Any]:
    prompt = answer.life.prompt_tokens
    output = answer.life.next_index
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        "total_tokens": prompt + output,
    }


def _choice(parameters: Parameters) -> Any:
    if parameters.tool_name:
        return {"type": "function", "name": parameters.tool_name}
    return parameters.tool_choice or "auto"


def _format(format: ResponseFormat | None) -> dict[str, Any]:
    if format is None:
        return {"type": "text"}
    shown: dict[str, Any] = {"type": format.type}
    if format.type == "json_schema":
        shown |= {"name": format.name, "schema": _raw(format.schema), "strict": format.strict}
    return shown


def _tool(tool: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": _raw(tool.parameters),
        "strict": tool.strict,
    }


def _raw(text: str | None) -> Any:
    """Return JSON on one line: a line break in the client's text would end the event's `data:` line."""
    return msgspec.Raw(msgspec.json.format((text or "null").encode(), indent=-1))
