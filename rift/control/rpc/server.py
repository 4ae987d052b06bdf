"""Receive the questions of `rift/rpc.py` and reply, in the process that has the warehouse open."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from events.log import Log
from replay.billing.invoice import BillingRefused
from replay.warehouse.result import QueryRefused
from rift.control.rpc import replies
from rift.rpc import ProjectionBlocked, Question, QuestionRefused, Sql

logger = logging.getLogger(__name__)

Handler = Callable[[Any], Awaitable[object]]
"""Returns an answer, or the bytes of a whole reply."""

# Handlers that bound and queue their questions themselves. All others get one at a time.
CONCURRENT = (Sql,)


@asynccontextmanager
async def serving(log: Log, handlers: Mapping[type[Question], Handler]) -> AsyncIterator[None]:
    """Answer each kind of question by its handler while the context is open."""
    async with AsyncExitStack() as stack:
        for kind, handler in handlers.items():
            reply = partial(_reply, kind, handler)
            await stack.enter_async_context(log.answer(kind.topic, reply, concurrent=kind in CONCURRENT))
        yield


async def _reply(kind: type[Question], handler: Handler, data: bytes) -> bytes:
    """Return the reply to a question, an error if anything fails: the client waits for one."""
    try:
        question = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        fields = ", ".join(kind.__struct_fields__)
        return replies.error(f"{kind.topic} takes JSON with {fields or 'no fields'}: {error}")
    try:
        answer = await handler(question)
        # Another process encoded it: control must not spend its time on the rows of an answer.
        return answer if isinstance(answer, bytes) else replies.answered(answer, failed=kind is not Sql)
    except ProjectionBlocked as blocked:
        return replies.error(str(blocked), failed=True, blocked=True)
    except (BillingRefused, QuestionRefused) as refused:
        return replies.error(str(refused))
    except QueryRefused as refused:
        return replies.error(str(refused), failed=kind is not Sql)
    except Exception as error:  # a defect of one handler must not end control
        logger.exception("%s could not be answered", kind.topic)
        return replies.error(f"control failed to answer: {type(error).__name__}: {error}", failed=True)
