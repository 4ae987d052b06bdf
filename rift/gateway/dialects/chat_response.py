"""Chunks and objects of `/v1/completions` and `/v1/chat/completions`: pure, from events to bytes.

`data:` lines only: an `id:` line breaks their clients. A chunk comes for what a client can see, none before
the first token, and the answer of a group's choice carries its index.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from events.lifecycle import Life
from events.schema import Logprob, RequestAccepted, TokensGenerated, ToolCallDelta
from rift.gateway.completion import Completion
from rift.gateway.dialects.native import KEEP_ALIVE, error_body

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def completion(answers: Sequence[Completion]) -> dict[str, Any]:
    """The whole answer with all its choices, as `/v1/completions` or `/v1/chat/completions` show it."""
    choices = [
        {"index": answer.accepted.choice, **_content(answer), "finish_reason": finish_reason(answer.life)}
        for answer in answers
    ]
    return _head(answers[0], chunk=False) | {"choices": choices, "usage": usage(answers)}


def finish_reason(life: Life) -> str:
    """OpenAI knows no cancelled answer: what ended early by its client's will is a stop."""
    return str(life.reason) if life.reason in ("length", "tool_calls") else "stop"


def usage(answers: Iterable[Completion]) -> dict[str, Any]:
    """Sums over the choices; the prompt of a group is one."""
    answers = list(answers)
    prompt = max(answer.life.prompt_tokens for answer in answers)
    output = sum(answer.life.next_index for answer in answers)
    return _counted(prompt, output) | {
        "prompt_tokens_details": {"cached_tokens": max(answer.cached_tokens for answer in answers)},
        "completion_tokens_details": {"reasoning_tokens": sum(answer.reasoning_tokens for answer in answers)},
    }


class OpenAIStream:
    """Chunks of a streamed completion, of one choice or of several."""

    keep_alive = KEEP_ALIVE
    tells_status = False

    def __init__(
        self, answers: Sequence[Completion], *, include_usage: bool, continuous_usage: bool = False
    ) -> None:
        self._answers = answers
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._choices = {answer.id: _Choice(answer, include_usage=include_usage) for answer in answers}
        self._left = len(answers)

    def waiting(self, name: str, estimate_ms: int | None) -> bytes:
        return KEEP_ALIVE

    def event(self, event: Any, answer: Completion) -> bytes:
        choice = self._choices[answer.id]
        if isinstance(event, TokensGenerated):
            frames = choice.tokens(event)
            return self._with_usage(choice, frames) if self._continuous_usage and frames else frames
        if failure := answer.failure():
            return b"data: " + _encode(error_body(*failure)) + b"\n\n" + DONE
        if answer.life.phase == "ended":
            self._left -= 1
            frames = choice.end()
            if self._continuous_usage:
                frames = self._with_usage(choice, frames)
            return frames if self._left else frames + self._end()
        return b""

    def broken_off(self, problem: Any, after: int) -> bytes:
        return b"data: " + _encode(error_body(503, problem)) + b"\n\n" + DONE

    def _with_usage(self, choice: "_Choice", frames: bytes) -> bytes:
        life = choice.answer.life
        counted = _encode(_counted(life.prompt_tokens, life.next_index))
        return frames.removesuffix(choice.tail) + b',"usage":%b}\n\n' % counted

    def _end(self) -> bytes:
        if not self._include_usage:
            return DONE
        last = _head(self._answers[0], chunk=True) | {"choices": [], "usage": usage(self._answers)}
        return b"data: " + _encode(last) + b"\n\n" + DONE


class _Choice:
    """The chunks of one choice. What of them never changes is encoded once; most chunks are only text."""

    def __init__(self, answer: Completion, *, include_usage: bool) -> None:
        self.answer = answer
        self.tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._chat = answer.accepted.kind == "chat"
        self._head = self._open = self._between = b""
        self._has_role = False
        self._offset = 0

    def tokens(self, event: TokensGenerated) -> bytes:
        if not self._head:
            self._begin()
        if (self._has_role or not self._chat) and not (event.logprobs or event.reasoning or event.tool_calls):
            return self._open + _encode(event.text) + self._between if event.text else b""
        logprobs = self._logprobs(event)
        if not self._chat:
            return self._chunk({"text": event.text}, logprobs, None)
        delta = _delta(event)
        return self._chunk({"delta": delta}, logprobs, None) if delta or logprobs else b""

    def end(self) -> bytes:
        if not self._head:
            self._begin()
        content: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._chunk(content, None, finish_reason(self.answer.life))

    def _begin(self) -> None:
        head = _encode(_head(self.answer, chunk=True))[:-1]
        self._head = b'data: %b,"choices":[{"index":%d,' % (head, self.answer.accepted.choice)
        self._open = self._head + (b'"delta":{"content":' if self._chat else b'"text":')
        close = b"}" if self._chat else b""
        self._between = close + b',"logprobs":null,"finish_reason":null}]' + self.tail

    def _chunk(self, content: dict[str, Any], logprobs: Any, finish_reason: str | None) -> bytes:
        if self._chat and not self._has_role:
            nothing = "" if finish_reason else None
            content["delta"] = {"role": "assistant", "content": nothing, **content["delta"]}
            self._has_role = True
        shown = content | {"logprobs": logprobs, "finish_reason": finish_reason}
        return self._head + _encode(shown)[1:] + b"]" + self.tail

    def _logprobs(self, event: TokensGenerated) -> Any:
        if self.answer.accepted.parameters.logprobs is None:
            return None
        if self._chat:
            return chat_logprobs(event.logprobs)
        shown = _completion_logprobs(event.logprobs, self._offset)
        self._offset += sum(len(each.token) for each in event.logprobs)
        return shown


def chat_logprobs(logprobs: Iterable[Logprob]) -> dict[str, Any]:
    content = [_token(each) | {"top_logprobs": [_token(top) for top in each.top]} for each in logprobs]
    return {"content": content, "refusal": None}


def _token(each: Logprob) -> dict[str, Any]:
    return {
        "token": each.token,
        "logprob": each.logprob,
        "bytes": list(each.token.encode(errors="replace")),
    }


def _completion_logprobs(logprobs: Sequence[Logprob], offset: int) -> dict[str, Any]:
    """The sampled token is always among the alternatives, as OpenAI has it."""
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += len(each.token)
    return {
        "tokens": [each.token for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [
            {each.token: each.logprob} | {top.token: top.logprob for top in each.top} for each in logprobs
        ],
        "text_offset": offsets,
    }


def _delta(event: TokensGenerated) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if event.reasoning:
        delta["reasoning"] = delta["reasoning_content"] = event.reasoning
    if event.text:
        delta["content"] = event.text
    if event.tool_calls:
        delta["tool_calls"] = [_call_delta(call) for call in event.tool_calls]
    return delta


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _content(answer: Completion) -> dict[str, Any]:
    text = answer.text
    wanted = answer.accepted.parameters.logprobs is not None
    if answer.accepted.kind != "chat":
        return {
            "text": text,
            "logprobs": _completion_logprobs(answer.logprobs, 0) if wanted else None,
        }
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if answer.reasoning:
        message["reasoning"] = message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["content"] = text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
            for call in answer.calls
        ]
    return {"message": message, "logprobs": chat_logprobs(answer.logprobs) if wanted else None}


def _counted(prompt: int, output: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def _head(answer: Completion, *, chunk: bool) -> dict[str, Any]:
    accepted: RequestAccepted = answer.accepted
    name = "text_completion"
    if accepted.kind == "chat":
        name = "chat.completion.chunk" if chunk else "chat.completion"
    head = {
        "id": accepted.group or accepted.request,
        "object": name,
        "created": answer.created,
        "model": accepted.model,
    }
    return head | ({"simulated": True} if answer.simulated else {})
