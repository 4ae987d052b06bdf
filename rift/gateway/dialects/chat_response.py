"""Objects and chunks of `/v1/completions` and `/v1/chat/completions`: pure, from events to bytes.

Frames have `data:` lines only: an `id:` line breaks these APIs' clients. Only visible content makes a chunk,
so none comes before the first token.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import msgspec

from events.lifecycle import Life
from events.pricing import is_chargeable
from events.schema import Logprob, Problem, TokensGenerated, ToolCallDelta
from rift.gateway import choices as groups
from rift.gateway.asgi.errors import error_body
from rift.gateway.completion import Completion
from rift.gateway.dialects import openai_errors
from rift.gateway.dialects.native import KEEP_ALIVE
from rift.gateway.dialects.sampling import ParsedRequest

DONE = b"data: [DONE]\n\n"

# The tokens of a vocabulary that most answers use.
TOKENS_KEPT = 2**15

_encode = msgspec.json.Encoder().encode


class TextLayout:
    """Where `/v1/completions` puts a choice's text."""

    whole_object = "text_completion"
    chunk_object = "text_completion"
    # The bytes around the text in a chunk that has only text.
    opening = b'"text":'
    closing = b""
    # Whether the first chunk names the role.
    has_role = False
    # The content of a chunk that adds no text.
    empty: ClassVar[dict[str, Any]] = {"text": ""}
    # The API's names of fields, where they differ from the log's.
    params: ClassVar[dict[str, str]] = {}

    def whole(self, answer: Completion) -> dict[str, Any]:
        return {"text": answer.text}

    def chunk(self, event: TokensGenerated) -> dict[str, Any] | None:
        """Return what an event adds, or None if a client cannot see it."""
        return {"text": event.text}

    def logprobs(self, logprobs: Sequence[Logprob], offset: int) -> dict[str, Any]:
        """As OpenAI does, list the sampled token among the alternatives. `offset` is that of the first token
        in the text, in characters."""
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


class ChatLayout:
    """As `TextLayout`, for `/v1/chat/completions`."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    opening = b'"delta":{"content":'
    closing = b"}"
    has_role = True
    empty: ClassVar[dict[str, Any]] = {"delta": {}}
    params: ClassVar[dict[str, str]] = {"logprobs": "top_logprobs", "template": "chat_template_kwargs"}

    def whole(self, answer: Completion) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning:
            message["reasoning"] = message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
                for call in answer.calls
            ]
        return {"message": message}

    def chunk(self, event: TokensGenerated) -> dict[str, Any] | None:
        delta: dict[str, Any] = {}
        if event.reasoning:
            delta["reasoning"] = delta["reasoning_content"] = event.reasoning
        if event.text:
            delta["content"] = event.text
        if event.tool_calls:
            delta["tool_calls"] = [_call_delta(call) for call in event.tool_calls]
        return {"delta": delta} if delta else None

    def logprobs(self, logprobs: Sequence[Logprob], offset: int) -> dict[str, Any]:
        return chat_logprobs(logprobs)


Layout = TextLayout | ChatLayout


def whole(layout: Layout, answers: Sequence[Completion]) -> dict[str, Any]:
    """Return the object of an answer with all its choices, which come in the order of their ends."""
    counted = usage(answers)
    answers = sorted(answers, key=lambda answer: answer.accepted.choice)
    choices = []
    for answer in answers:
        has_logprobs = answer.accepted.parameters.logprobs is not None
        logprobs = layout.logprobs(answer.logprobs, 0) if has_logprobs else None
        ending = {"logprobs": logprobs, "finish_reason": finish_reason(answer.life)}
        choices.append({"index": answer.accepted.choice, **layout.whole(answer), **ending})
    return _head(answers[0], layout.whole_object, answers[0].id) | {
        "choices": choices,
        "usage": counted,
    }


def stream(layout: Layout, answers: Sequence[Completion], parsed: ParsedRequest) -> "ChunkStream":
    return ChunkStream(
        layout, answers, include_usage=parsed.include_usage, continuous_usage=parsed.continuous_usage
    )


def finish_reason(life: Life) -> str:
    """OpenAI has no reason for a cancelled answer: an early end by the client's will is a `stop`."""
    return str(life.reason) if life.reason in ("length", "tool_calls") else "stop"


def usage(answers: Iterable[Completion]) -> dict[str, Any]:
    """Sum over the choices, in the order of their ends; each prompt once, as the choice that pays for it."""
    answers = sorted(answers, key=lambda answer: not is_chargeable(answer.life))
    prompt = groups.sum_over_prompts(answers, lambda answer: answer.life.prompt_tokens)
    cached: dict[str, int] = {}
    for answer in answers:
        cached.setdefault(groups.prompt_id(answer.accepted), answer.cached_tokens)
    output = sum(answer.life.next_index for answer in answers)
    return _counted(prompt, output) | {
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        "completion_tokens_details": {"reasoning_tokens": sum(answer.reasoning_tokens for answer in answers)},
    }


class ChunkStream:
    """The chunks of a streamed answer with one or several choices."""

    keep_alive = KEEP_ALIVE
    tells_status = False

    def __init__(
        self,
        layout: Layout,
        answers: Sequence[Completion],
        *,
        include_usage: bool,
        continuous_usage: bool = False,
    ) -> None:
        self._layout = layout
        self._answers = answers
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._choices = {
            answer.id: _ChoiceChunks(layout, answer, id=answers[0].id, include_usage=include_usage)
            for answer in answers
        }
        self._ended: list[Completion] = []

    def waiting(self, name: str, estimate_ms: int | None) -> bytes:
        return KEEP_ALIVE

    def event(self, event: Any, answer: Completion) -> bytes:
        choice = self._choices[answer.id]
        if isinstance(event, TokensGenerated):
            frames = choice.tokens(event)
            return self._with_usage(choice, frames) if self._continuous_usage and frames else frames
        if failure := groups.failure(answer, self._answers):
            status, problem = failure
            shown = openai_errors.translate(problem, self._layout.params)
            return b"data: " + _encode(error_body(status, shown)) + b"\n\n" + DONE
        if answer.life.phase == "ended":
            self._ended.append(answer)
            frames = choice.end()
            if self._continuous_usage:
                frames = self._with_usage(choice, frames)
            return frames if len(self._ended) < len(self._answers) else frames + self._end()
        return b""

    def broken_off(self, problem: Problem, after: int) -> bytes:
        return b"data: " + _encode(error_body(503, problem)) + b"\n\n" + DONE

    def _with_usage(self, choice: "_ChoiceChunks", frames: bytes) -> bytes:
        life = choice.answer.life
        counted = _encode(_counted(life.prompt_tokens, life.next_index))
        return frames.removesuffix(choice.tail) + b',"usage":%b}\n\n' % counted

    def _end(self) -> bytes:
        if not self._include_usage:
            return DONE
        head = _head(self._answers[0], self._layout.chunk_object, self._answers[0].id)
        return b"data: " + _encode(head | {"choices": [], "usage": usage(self._ended)}) + b"\n\n" + DONE


class _ChoiceChunks:
    """The chunks of one choice. Most have only text, so what surrounds the text is encoded once."""

    def __init__(self, layout: Layout, answer: Completion, *, id: str, include_usage: bool) -> None:
        self.answer = answer
        self.tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._layout = layout
        self._id = id
        self._head = b""
        self._before_text = b""
        self._after_text = b""
        self._needs_role = layout.has_role
        self._offset = 0

    def tokens(self, event: TokensGenerated) -> bytes:
        if not self._head:
            self._begin()
        if not (self._needs_role or event.logprobs or event.reasoning or event.tool_calls):
            return self._before_text + _encode(event.text) + self._after_text if event.text else b""
        logprobs = None
        if self.answer.accepted.parameters.logprobs is not None:
            logprobs = self._layout.logprobs(event.logprobs, self._offset)
            self._offset += sum(len(each.token) for each in event.logprobs)
        content = self._layout.chunk(event)
        if content is None and logprobs is None:
            return b""
        return self._chunk(content or self._layout.empty, logprobs, None)

    def end(self) -> bytes:
        if not self._head:
            self._begin()
        return self._chunk(self._layout.empty, None, finish_reason(self.answer.life))

    def _begin(self) -> None:
        head = _encode(_head(self.answer, self._layout.chunk_object, self._id))[:-1]
        self._head = b'data: %b,"choices":[{"index":%d,' % (head, self.answer.accepted.choice)
        self._before_text = self._head + self._layout.opening
        self._after_text = self._layout.closing + b',"logprobs":null,"finish_reason":null}]' + self.tail

    def _chunk(self, content: dict[str, Any], logprobs: Any, reason: str | None) -> bytes:
        if self._needs_role:
            role = {"role": "assistant", "content": "" if reason else None}
            content = {"delta": role | content["delta"]}
            self._needs_role = False
        shown = content | {"logprobs": logprobs, "finish_reason": reason}
        return self._head + _encode(shown)[1:] + b"]" + self.tail


def chat_logprobs(logprobs: Iterable[Logprob]) -> dict[str, Any]:
    return {"content": json_list(map(token_logprob, logprobs)), "refusal": None}


def json_list(items: Iterable[bytes]) -> msgspec.Raw:
    return msgspec.Raw(b"[%b]" % b",".join(items))


def token_logprob(each: Logprob) -> bytes:
    """Return a token as JSON. An answer has up to 21 texts for each of its tokens, and while they are shown
    nobody else is served: a dict for each took seven times as long."""
    top = [_Top(one.token, one.logprob, _bytes(one.token)) for one in each.top]
    return _encode(_Sampled(each.token, each.logprob, _bytes(each.token), top))


class _Top(msgspec.Struct, gc=False):
    token: str
    logprob: float
    bytes: msgspec.Raw


class _Sampled(_Top, gc=False):
    top_logprobs: list[_Top]


@lru_cache(maxsize=TOKENS_KEPT)
def _bytes(token: str) -> msgspec.Raw:
    return msgspec.Raw(_encode(list(token.encode(errors="replace"))))


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _counted(prompt: int, output: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def _head(answer: Completion, name: str, id: str) -> dict[str, Any]:
    head = {
        "id": id,
        "object": name,
        "created": answer.created,
        "model": answer.accepted.model,
    }
    return head | ({"simulated": True} if answer.simulated else {})
