"""Answers to the questions of `rift/questions.py`, by the process that has the warehouse open."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from events.log import Log
from replay.answer import QueryRefused
from replay.invoice import BillingRefused
from rift.questions import Question, QuestionRefused

# Below the broker's max_payload of 8 MB.
REPLY_BYTES_MAX = 8_000_000

Answering = Callable[[Any], Awaitable[object]]


@asynccontextmanager
async def answering(log: Log, answers: Mapping[type[Question], Answering]) -> AsyncIterator[None]:
    """Answer each kind of question by its function while the context is open."""
    async with AsyncExitStack() as stack:
        for kind, answer in answers.items():
            await stack.enter_async_context(log.answer(kind.topic, partial(_reply, kind, answer)))
        yield


async def _reply(kind: type[Question], answer: Answering, data: bytes) -> bytes:
    """Question bytes to answer bytes, whatever is asked."""
    try:
        question = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        fields = ", ".join(kind.__struct_fields__)
        return _error(f"{kind.topic} takes JSON with {fields or 'no fields'}: {error}")
    try:
        found = msgspec.to_builtins(await answer(question))
    except (QueryRefused, BillingRefused, QuestionRefused) as refused:
        return _error(str(refused))
    reply = json.dumps({"answer": found}, ensure_ascii=False).encode()
    if len(reply) > REPLY_BYTES_MAX:
        return _error(
            f"the answer is {len(reply)} bytes, more than {REPLY_BYTES_MAX}; use LIMIT or name fewer columns"
        )
    return reply


def _error(message: str) -> bytes:
    return json.dumps({"error": message}, ensure_ascii=False).encode()
