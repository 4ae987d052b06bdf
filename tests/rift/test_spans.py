"""`rift spans`: its options, and how it sends to a collector that is busy, wrong or away."""

import contextlib
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Iterator

import anyio
import pytest

from replay.questions import WrongQuestion
from rift.cli.log import collector as module
from rift.cli.log.collector import TRIES_MAX, Collector
from rift.cli.log.spans import _window
from rift.cli.output import CommandFailed
from tests.collectors import Collecting, collecting

MESSAGE = {"resourceSpans": []}
# Again at once.
BUSY = [(status, {"retry-after": "0"}, b"") for status in (429, 502, 503, 504)]


@pytest.fixture
def served() -> Iterator[Collecting]:
    with collecting() as running:
        yield running


def send(url: str) -> Collector:
    collector = Collector.at(url)
    anyio.run(collector.send, MESSAGE)
    return collector


def test_a_busy_collector_gets_the_message_again(served: Collecting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%20b, x-tenant=1")
    served.answers = [
        *BUSY,
        (200, {}, b'{"partialSuccess": {"rejectedSpans": "3", "errorMessage": "too old"}}'),
    ]
    collector = send(served.url)
    assert collector.complaint == ", which rejected 3 of the spans: too old"
    assert [one.path for one in served.received] == ["/v1/traces"] * 5
    assert [one.message for one in served.received] == [MESSAGE] * 5
    headers = served.received[-1].headers
    assert (headers["api-key"], headers["x-tenant"]) == ("a b", "1")
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{}",
        b"null",
        b'{"partialSuccess": {}}',
        b'{"partialSuccess": {"rejectedSpans": 1e999}}',
        b"\x0a\x00",
        b"[1]",
        b"[" * 60_000,
    ],
)
def test_a_collector_that_rejects_nothing_is_no_complaint(served: Collecting, answer: bytes) -> None:
    served.answers = [(200, {}, answer)]
    assert send(f"{served.url}/other/path").complaint == ""
    assert served.received[0].path == "/other/path"


def test_a_collector_that_stays_busy_is_given_up(served: Collecting) -> None:
    served.answers = BUSY * TRIES_MAX
    with pytest.raises(CommandFailed, match=f"answered 429: no reason, after {TRIES_MAX} tries"):
        send(served.url)
    assert len(served.received) == TRIES_MAX


def test_a_wrong_address_is_not_tried_again(served: Collecting) -> None:
    served.answers = [(404, {}, b"404 \x1b[31mpage not found")]
    with pytest.raises(CommandFailed, match=r"answered 404: 404 \\x1b\[31mpage not found; --otlp needs"):
        send(served.url)
    assert len(served.received) == 1


def test_a_collector_that_is_away_is_named(served: Collecting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_MAX_S", 0.0)
    with pytest.raises(CommandFailed, match=r"http://127\.0\.0\.1:1/v1/traces does not answer"):
        send("http://user:password@127.0.0.1:1")


def test_a_collector_whose_answer_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEND_S", 0.2)
    monkeypatch.setattr(module, "TRIES_MAX", 1)

    def trickle(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):
            client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n")
            while True:
                client.sendall(b"x")
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener,), daemon=True)
        thread.start()
        with pytest.raises(CommandFailed, match="does not answer"):
            send(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(5)


@pytest.mark.parametrize(
    "url", ["", "localhost:4318", "grpc://collector:4317", "http://", "http://a:b", "/v1"]
)
def test_an_address_is_http(url: str) -> None:
    with pytest.raises(CommandFailed, match="--otlp: must be an address like"):
        Collector.at(url)


def test_times_are_checked() -> None:
    def window(since: str, until: str) -> int:
        found = _window(Namespace(since=since, until=until, account=None))
        return found.until_ns - found.since_ns

    assert window("2h", "1h") == window("2026-11-28T09:00", "2026-11-28T10:00") == 3600 * 10**9
    with pytest.raises(WrongQuestion, match=r"--since must be now, a time ago like 15m, .* got '1 hour'"):
        window("1 hour", "now")
    with pytest.raises(CommandFailed, match="--since 1h must be before --until 2h"):
        window("1h", "2h")
