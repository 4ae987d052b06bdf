"""Frames and objects of OpenAI's text routes. `data:` lines only: an `id:` line breaks their clients."""

from typing import Any

import msgspec

from events.schema import TokensGenerated
from rift.gateway.answer import Answer
from rift.gateway.native import KEEP_ALIVE, error_body

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def completion(answer: Answer) -> dict[str, Any]:
    """The whole answer, as `/v1/completions` or `/v1/chat/completions` show it."""
    text = "".join(answer.text)
    if answer.accepted.kind == "chat":
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    else:
        content = {"text": text}
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason(answer)}
    return _head(answer, chunk=False) | {"choices": [choice], "usage": usage(answer)}


def finish_reason(answer: Answer) -> str:
    """OpenAI knows no cancelled answer: what ended early by its client's will is a stop."""
    return str(answer.life.reason) if answer.life.reason in ("length", "tool_calls") else "stop"


def usage(answer: Answer) -> dict[str, Any]:
    cached = (
        {"prompt_tokens_details": {"cached_tokens": answer.cached_tokens}} if answer.cached_tokens else {}
    )
    return answer.usage("completion_tokens") | cached


class OpenAIStream:
    """Chunks of a streamed completion. The first token's chunk carries the role; none comes before."""

    keep_alive = KEEP_ALIVE
    tells_status = False

    def __init__(self, answer: Answer, *, include_usage: bool) -> None:
        self._answer, self._include_usage = answer, include_usage
        self._chat = answer.accepted.kind == "chat"
        self._open = self._between = b""

    def waiting(self, name: str, estimate_ms: int | None) -> bytes:
        return KEEP_ALIVE

    def event(self, event: Any) -> bytes:
        answer = self._answer
        if isinstance(event, TokensGenerated):
            return self._text(event.text)
        if failure := answer.failure():
            return b"data: " + _encode(error_body(*failure)) + b"\n\n" + DONE
        if answer.life.phase == "ended":
            return self._end()
        return b""

    def broken_off(self, problem: Any, after: int) -> bytes:
        return b"data: " + _encode(error_body(503, problem)) + b"\n\n" + DONE

    def _text(self, text: str) -> bytes:
        if not self._open:
            head = _encode(_head(self._answer, chunk=True))[:-1]
            nothing = b',"usage":null' if self._include_usage else b""
            field = b'"delta":{"content":' if self._chat else b'"text":'
            self._open = b'data: %b,"choices":[{"index":0,%b' % (head, field)
            end = b"}" if self._chat else b""
            self._between = b'%b,"logprobs":null,"finish_reason":null}]%b}\n\n' % (end, nothing)
            if self._chat:
                first = self._open.replace(b'"delta":{', b'"delta":{"role":"assistant",', 1)
                return first + _encode(text) + self._between
        return self._open + _encode(text) + self._between

    def _end(self) -> bytes:
        answer = self._answer
        content: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason(answer)}
        head = _head(answer, chunk=True)
        last = head | {"choices": [choice]} | ({"usage": None} if self._include_usage else {})
        frames = b"data: " + _encode(last) + b"\n\n"
        if self._include_usage:
            frames += b"data: " + _encode(head | {"choices": [], "usage": usage(answer)}) + b"\n\n"
        return frames + DONE


def _head(answer: Answer, *, chunk: bool) -> dict[str, Any]:
    name = "text_completion"
    if answer.accepted.kind == "chat":
        name = "chat.completion.chunk" if chunk else "chat.completion"
    head = {"id": answer.id, "object": name, "created": answer.created, "model": answer.accepted.model}
    return head | ({"simulated": True} if answer.simulated else {})
