"""Receive the questions of `rift/rpc.py` and reply, in the process that has the warehouse open."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from events.contracts import REPLY_BYTES_MAX
from events.log import Log
from replay.billing.invoice import BillingRefused
from replay.warehouse.result import QueryRefused
from rift.rpc import Question, QuestionRefused, Sql

logger = logging.getLogger(__name__)

Handler = Callable[[Any], Awaitable[object]]


@asynccontextmanager
async def serving(log: Log, handlers: Mapping[type[Question], Handler]) -> AsyncIterator[None]:
    """Answer each kind of question by its handler while the context is open."""
    async with AsyncExitStack() as stack:
        for kind, handler in handlers.items():
            await stack.enter_async_context(log.answer(kind.topic, partial(_reply, kind, handler)))
        yield


async def _reply(kind: type[Question], handler: Handler, data: bytes) -> bytes:
    """Return the reply to a question, an error if anything fails: the client waits for one."""
    try:
        question = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        fields = ", ".join(kind.__struct_fields__)
        return _error(f"{kind.topic} takes JSON with {fields or 'no fields'}: {error}")
    try:
        answer = msgspec.to_builtins(await handler(question))
    except (BillingRefused, QuestionRefused) as refused:
        return _error(str(refused))
    except QueryRefused as refused:
        return _error(str(refused), failed=kind is not Sql)
    except Exception as error:  # a defect of one handler must not end control
        logger.exception("%s could not be answered", kind.topic)
        return _error(f"control failed to answer: {type(error).__name__}: {error}", failed=True)
    reply = json.dumps({"answer": answer}, ensure_ascii=False).encode()
    if len(reply) > REPLY_BYTES_MAX:
        why = f"the answer is {len(reply)} bytes, more than {REPLY_BYTES_MAX}"
        return _error(f"{why}; use LIMIT or name fewer columns", failed=kind is not Sql)
    return reply


def _error(message: str, *, failed: bool = False) -> bytes:
    """`failed`: the question was valid, but control could not answer it."""
    return json.dumps({"error": message, "failed": failed}, ensure_ascii=False).encode()
