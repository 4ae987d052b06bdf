"""Output token ids to content, reasoning and tool calls: a detokenizer, and a parser of its text.

The parser gets one id at a time, however they arrived. So its output, like the text, is a pure function of
the ids, and an attempt that replays the log continues identically. Must not live here: finish reasons, token
budgets, and how any model writes a tool call.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Literal

import msgspec

from events.schema import ToolCallDelta
from rift.engines import Delta, End, Parser
from rift.worker.detokenizer import Detokenizer

CALL_ID_BYTES = 12


class OutputParser:
    """One answer in its parts. `has_called` is set once a tool call has begun."""

    def __init__(self, text: Detokenizer, parser: Parser, *, request: str) -> None:
        self._text = text
        self._parser = parser
        self._request = request
        self._ids: list[int] = []
        self._fed = 0
        self._piece = ""
        self.has_called = False

    def feed(self, token_ids: Sequence[int], finish: Literal["stop", "length"] | None) -> tuple[int, Delta]:
        """Return the number of ids that belong to the answer, and their delta. `finish` marks the last."""
        deltas = []
        for used, token_id in enumerate(token_ids, 1):
            is_last = finish is not None and used == len(token_ids)
            # The id that ends an answer is not part of its text, even if the parser reads special tokens.
            if not (is_last and finish == "stop"):
                self._piece += self._text.feed((token_id,))[1]
            if is_last and not self._text.stopped:
                self._piece += self._text.flush()
            self._ids.append(token_id)
            is_over = is_last or self._text.stopped
            # A parser compares ids with text, so it gets neither while a part of the text is withheld.
            if is_over or not self._text.is_withholding:
                is_complete = finish == "stop" and not self._text.stopped
                deltas.append(self._parse(("complete" if is_complete else "cut") if is_over else None))
            if self._text.stopped:
                break
        return used, joined(deltas)

    @property
    def reasoning_tokens(self) -> int:
        return self._parser.reasoning_tokens(self._ids)

    def _parse(self, end: End | None) -> Delta:
        delta = self._parser.feed(self._piece, self._ids[self._fed :], end)
        self._piece = ""
        self._fed = len(self._ids)
        if not delta.tool_calls:
            return delta
        self.has_called = True
        calls = [
            call if call.id is None else msgspec.structs.replace(call, id=_call_id(self._request, call.index))
            for call in delta.tool_calls
        ]
        return msgspec.structs.replace(delta, tool_calls=tuple(calls))


def joined(deltas: Iterable[Delta]) -> Delta:
    """Return the sum of the deltas, with each tool call once, in the order in which they began."""
    text = []
    reasoning = []
    calls: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        text.append(delta.text)
        reasoning.append(delta.reasoning)
        for call in delta.tool_calls:
            known = calls.setdefault(call.index, call)
            if known is not call:
                calls[call.index] = msgspec.structs.replace(
                    known,
                    id=known.id or call.id,
                    name=known.name or call.name,
                    arguments=known.arguments + call.arguments,
                )
    return Delta("".join(text), "".join(reasoning), tuple(calls.values()))


def rest(whole: Delta, logged: Delta) -> Delta | None:
    """Return the part of `whole` after `logged`; None if `whole` does not begin with it. Both are joined."""
    if not (whole.text.startswith(logged.text) and whole.reasoning.startswith(logged.reasoning)):
        return None
    known = {call.index: call for call in logged.tool_calls}
    calls = []
    for call in whole.tool_calls:
        if (begun := known.pop(call.index, None)) is None:
            calls.append(call)
        elif (begun.id, begun.name) != (call.id, call.name) or not call.arguments.startswith(begun.arguments):
            return None
        elif arguments := call.arguments.removeprefix(begun.arguments):
            calls.append(ToolCallDelta(index=call.index, arguments=arguments))
    if known:
        return None
    return Delta(
        whole.text.removeprefix(logged.text), whole.reasoning.removeprefix(logged.reasoning), tuple(calls)
    )


def _call_id(request: str, index: int) -> str:
    """Return an id that is the same in every attempt at the request."""
    return "call_" + blake2b(f"{request}/{index}".encode(), digest_size=CALL_ID_BYTES).hexdigest()
