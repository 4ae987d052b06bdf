"""The bytes of a reply: an answer or an error, as JSON."""

import json

import msgspec

from events.contracts import REPLY_BYTES_MAX


def answered(answer: object, *, failed: bool) -> bytes:
    """Return the reply with an answer, or the error that it is too large. `failed` as in `error`."""
    reply = json.dumps({"answer": msgspec.to_builtins(answer)}, ensure_ascii=False).encode()
    if len(reply) > REPLY_BYTES_MAX:
        why = f"the answer is {len(reply)} bytes, more than {REPLY_BYTES_MAX}"
        return error(f"{why}; use LIMIT or name fewer columns", failed=failed)
    return reply


def error(message: str, *, failed: bool = False, blocked: bool = False) -> bytes:
    """Return the reply with an error. `failed`: the question was valid, but could not be answered. `blocked`:
    as `failed`, because the answer would lack stored records."""
    reply = {"error": message, "failed": failed, "blocked": blocked}
    return json.dumps(reply, ensure_ascii=False).encode()
