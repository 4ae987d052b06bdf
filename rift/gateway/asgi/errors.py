"""Errors as HTTP answers, in OpenAI's form, and the headers that say when to try again."""

from collections.abc import Iterable
from typing import Any, Protocol

from rift.errors import RiftError

Headers = Iterable[tuple[bytes, bytes]]

# Repeating the same request would fail in the same way.
FINAL: Headers = ((b"x-should-retry", b"false"),)

# A message that names all models of a large installation fits.
CHARACTERS_MAX = 4096


class Refusal(Protocol):
    """The fields of an error answer; `events.schema.Problem` has them."""

    @property
    def message(self) -> str: ...
    @property
    def code(self) -> str: ...
    @property
    def param(self) -> str | None: ...


class HTTPError(RiftError):
    """The request is answered with an error: a status, a message with its remedy, and a code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Headers = (),
    ) -> None:
        self.message = _shortened(message)
        super().__init__(self.message)
        self.status = status
        self.code = code
        self.param = param and _shortened(param)
        self.headers = list(headers)

    def body(self) -> dict[str, Any]:
        return error_body(self.status, self)


def _shortened(text: str) -> str:
    """Return a text without its middle if it quotes a value as large as a body."""
    if len(text) <= CHARACTERS_MAX:
        return text
    return f"{text[: CHARACTERS_MAX // 2]}…{text[-CHARACTERS_MAX // 2 :]}"


CRASH = HTTPError(500, "this gateway failed to answer; its log says why", code="internal_error")


class ClientGone(RiftError):
    """The client closed the connection before it had its answer."""


def error_body(status: int, refusal: Refusal) -> dict[str, Any]:
    """Return the object that OpenAI's clients expect of an error."""
    return {
        "error": {
            "message": refusal.message,
            "type": error_type(status),
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def error_type(status: int) -> str:
    """Return OpenAI's name for the kind of error of a status."""
    named = {
        401: "authentication_error",
        402: "insufficient_quota",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")


def retry_after(seconds: int) -> list[tuple[bytes, bytes]]:
    return retry_after_ms(seconds * 1000)


def retry_after_ms(wait_ms: int) -> list[tuple[bytes, bytes]]:
    """Return both headers that clients read. Seconds are rounded up, so that no client comes too early."""
    return [(b"retry-after", b"%d" % -(-wait_ms // 1000)), (b"retry-after-ms", b"%d" % wait_ms)]
