"""Ops questions: asked on `rift.ask.*` by any command, answered by the control process.

A question and its answer are JSON; an answer that cannot be given is `{"error": …}`, never silence.
"""

import json
from collections.abc import Awaitable, Callable

import msgspec
from anyio import to_thread

from events.log import Log, LogError
from replay.answer import Answer, QueryRefused
from replay.warehouse import Warehouse

SQL_SUBJECT = "rift.ask.sql"
# Longer than an answer may take (10 s, `replay/warehouse.py`) and than one before it in the queue.
TIMEOUT_S = 25.0
# Below the broker's max_payload of 8 MB.
REPLY_BYTES_MAX = 8_000_000


class SqlQuestion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sql: str


class _Reply(msgspec.Struct, frozen=True):
    columns: list[str] = []
    rows: list[list[object]] = []
    error: str | None = None


def answer_sql(
    warehouse: Warehouse, catch_up: Callable[[], Awaitable[None]]
) -> Callable[[bytes], Awaitable[bytes]]:
    """Return the handler of `SQL_SUBJECT`: question bytes to answer bytes, whatever is asked.

    It waits for `catch_up`, so that who has seen a thing finds it in the answer.
    """

    async def handler(data: bytes) -> bytes:
        try:
            question = msgspec.json.decode(data, type=SqlQuestion)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return _error(f'a question is {{"sql": "select …"}}: {error}')
        await catch_up()
        return await to_thread.run_sync(_answer, warehouse, question.sql)

    return handler


async def ask_sql(log: Log, sql: str, *, timeout_s: float = TIMEOUT_S) -> Answer:
    """Ask the control process. Raises QueryRefused with its reason, LogError where nobody answers."""
    data = await log.ask(SQL_SUBJECT, msgspec.json.encode(SqlQuestion(sql)), timeout_s=timeout_s)
    try:
        # Not msgspec: sums of money may pass 64 bits.
        reply = msgspec.convert(json.loads(data), _Reply)
    except (ValueError, msgspec.ValidationError) as error:
        raise LogError(f"{SQL_SUBJECT} answered with something else: {error}") from error
    if reply.error is not None:
        raise QueryRefused(reply.error)
    return Answer(reply.columns, reply.rows)


def _answer(warehouse: Warehouse, sql: str) -> bytes:
    try:
        answer = warehouse.query(sql)
    except QueryRefused as error:
        return _error(str(error))
    reply = json.dumps({"columns": answer.columns, "rows": answer.rows}, ensure_ascii=False).encode()
    if len(reply) > REPLY_BYTES_MAX:
        return _error(
            f"the answer is {len(reply)} bytes, more than {REPLY_BYTES_MAX}; use LIMIT or name fewer columns"
        )
    return reply


def _error(message: str) -> bytes:
    return json.dumps({"error": message}, ensure_ascii=False).encode()
