"""Answers to the questions of `rift/rpc.py`, by the process that has the warehouse open."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from events.log import Log
from replay.billing.invoice import BillingRefused
from replay.warehouse.result import QueryRefused
from rift.rpc import Question, QuestionRefused, Sql

logger = logging.getLogger(__name__)

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
    except (BillingRefused, QuestionRefused) as refused:
        return _error(str(refused))
    except QueryRefused as refused:
        return _error(str(refused), failed=kind is not Sql)
    except Exception as error:  # who asks must not wait for an answer that will not come
        logger.exception("%s could not be answered", kind.topic)
        return _error(f"control failed to answer: {type(error).__name__}: {error}", failed=True)
    reply = json.dumps({"answer": found}, ensure_ascii=False).encode()
    if len(reply) > REPLY_BYTES_MAX:
        why = f"the answer is {len(reply)} bytes, more than {REPLY_BYTES_MAX}"
        return _error(f"{why}; use LIMIT or name fewer columns", failed=kind is not Sql)
    return reply


def _error(message: str, *, failed: bool = False) -> bytes:
    """`failed`: the question was a good one."""
    return json.dumps({"error": message, "failed": failed}, ensure_ascii=False).encode()
