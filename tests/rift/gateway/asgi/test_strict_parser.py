"""HTTP/1.1 only: other protocols, and what two parsers could read differently, are refused."""

import re
from pathlib import Path

import anyio
import pytest

from rift import gateway
from rift.gateway.asgi import strict_parser
from rift.gateway.asgi.strict_parser import HEAD_BYTES, HEAD_LINES
from tests.rift.gateway.asgi.serving import BODY, HEAD, Paths, error, is_answered, read, serving, until

pytestmark = pytest.mark.anyio


WEBSOCKET = (
    b"GET /v1/inference HTTP/1.1\r\nHost: rift\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 505, "http_version"),
        (b"GET / HTTP/9.9\r\nHost: rift\r\n\r\n", 505, "http_version"),
        (WEBSOCKET, 400, "websocket_unsupported"),
        (WEBSOCKET.replace(b"websocket\r\n", b"WebSocket\r\n"), 400, "websocket_unsupported"),
        (b"GET / HTTP/1.1\r\nHost: rift\r\nA: " + b"x" * 2 * HEAD_BYTES, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nHost: rift\r\n" + b"a: b\r\n" * HEAD_BYTES, 431, "headers_too_large"),
        (HEAD[:-2] + b"A: " + b"x" * HEAD_BYTES + b"\r\n\r\n", 431, "headers_too_large"),
        (HEAD[:-2] + b"a:\r\n" * HEAD_LINES + b"\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nHost: rift\r\nTransfer-Encoding: gzip\r\n\r\n", 501, "encoding_unsupported"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "malformed_http"),
        (b"POST /body HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", 400, "malformed_http"),
    ],
)
async def test_other_protocols_are_refused_in_the_form_of_errors(
    request_: bytes, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = Paths()
    async with serving(app) as running:
        assert error(await running.ask(request_)) == (status, code)
        await until(lambda: running.connections.open == 0)
    assert app.gone == app.begun
    assert not caplog.records


POST = b"POST /body HTTP/1.1\r\nHost: rift\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n", "not both"),
        (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "not both"),
        (POST + b"Content-Length: 5, 5\r\n\r\nhello", "one number"),
        (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", "one header content-length"),
        (POST + b"Content-Length: +5\r\n\r\nhello", "one number"),
        (
            HEAD[:-2] + b"Authorization: Bearer a\r\nauthorization: Bearer b\r\n\r\n",
            "one header authorization",
        ),
        (HEAD[:-2] + b"Host: other\r\n\r\n", "one header host"),
        (HEAD[:-2] + b"Idempotency-Key: a\r\nIdempotency-Key: a\r\n\r\n", "one header idempotency-key"),
        (HEAD.replace(b"\r\n", b"\n"), "CR LF"),
        (b"GET / HTTP/1.1\r\nHost: rift\nA: b\r\n\r\n", "CR LF"),
        (b"GET / HTTP/1.1\r\nHost: rift\r\nA: b\rC: d\r\n\r\n", "CR LF"),
        (b"GET / HTTP/1.1\r\nHost: rift\r\nA: b\r\n c\r\n\r\n", "continue another"),
        (b"GET / HTTP/1.1\r\nHost : rift\r\n\r\n", "before its colon"),
        (HEAD[:-2] + b"Idempotency-Key: \xc3\xa4\r\n\r\n", "ASCII"),
        (HEAD[:-2] + b"Connection: upgrade\r\nUpgrade: \xa0websocket\r\n\r\n", "ASCII"),
        (HEAD.replace(b" / ", b" /\xc3\xa4 "), "ASCII"),
        (HEAD[:-2] + b"A: b\x00\r\n\r\n", "control characters"),
        (b"GET http://rift/ HTTP/1.1\r\nHost: rift\r\n\r\n", "begins with /"),
        (b"OPTIONS * HTTP/1.1\r\nHost: rift\r\n\r\n", "begins with /"),
        (b"CONNECT rift:80 HTTP/1.1\r\nHost: rift\r\n\r\n", "begins with /"),
        (b"get / HTTP/1.1\r\nHost: rift\r\n\r\n", "upper case"),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "HTTP/1.0"),
        (CHUNKED + b"\r\n5;a=b\r\nhello\r\n0\r\n\r\n", "first line"),
        (CHUNKED + b"\r\n5 \r\nhello\r\n0\r\n\r\n", "first line"),
        (CHUNKED + b"\r\n5\nhello\r\n0\r\n\r\n", "first line"),
        (CHUNKED + b"\r\n5\r\nhello\r\n0\r\nA: b\n\r\n", "CR LF"),
    ],
)
async def test_what_two_parsers_could_read_differently_is_refused(request_: bytes, problem: str) -> None:
    app = Paths()
    async with serving(app) as running:
        found = await running.ask(request_ + HEAD)
        assert error(found) == (400, "malformed_http")
        assert problem in found.decode()
        await until(lambda: app.begun == app.gone)
    assert not app.bodies


async def test_a_header_that_is_not_read_may_have_bytes_beyond_ascii() -> None:
    async with serving(Paths()) as running:
        assert await is_answered(await running.connect(HEAD[:-2] + b"Cookie: name=J\xc3\xbcrgen\r\n\r\n"))


@pytest.mark.parametrize(("between", "answers"), [(b"\r\n", 3), (b"\r\n\r\n", 1), (b"\n", 1), (b"\r", 1)])
async def test_one_empty_line_before_a_request_is_ignored(between: bytes, answers: int) -> None:
    last = HEAD[:-2] + b"Connection: close\r\n\r\n"
    async with serving(Paths()) as running:
        found = await running.ask(b"\r\n" + HEAD + between + BODY + b"abc" + between + last)
    assert found.count(b"HTTP/1.1 200") == answers
    assert (b"malformed_http" in found) == (answers < 3)


def test_every_header_that_is_read_may_occur_once() -> None:
    source = "".join(path.read_text() for path in Path(next(iter(gateway.__path__))).rglob("*.py"))
    read_ = set(re.findall(r"\.header\(b\"([\w-]+)\"\)", source))
    assert len(read_) > 5
    assert not read_ - {name.decode() for name in strict_parser.SINGLE}


async def test_an_offer_of_http2_is_ignored() -> None:
    async with serving(Paths()) as running:
        head = b"GET / HTTP/1.1\r\nHost: rift\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        async with await running.connect(head + b"HTTP2-Settings: AAMAAABk\r\n\r\n" + HEAD) as stream:
            found = await read(stream, 2)
            with anyio.fail_after(5):
                while found.count(b"ok") < 2:
                    found += await stream.receive()
    assert found.count(b"HTTP/1.1 200") == 2
    assert b"101" not in found
