"""The listener of `/metrics`: one page, few connections, and no way to harm the process."""

import logging
from collections.abc import Iterable

import anyio
import pytest

from rift.metrics import listener
from rift.metrics.address import Address, InvalidAddress, gateway_port, parsed
from rift.metrics.families import SERIES_MAX, Counts, Figure, Histogram
from rift.metrics.listener import MetricsRefused, serving

pytestmark = pytest.mark.anyio

GET = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"
LOOPBACK = Address("127.0.0.1", 0)


async def ask(address: Address | None, request: bytes = GET) -> bytes:
    """Return everything until the listener closes."""
    assert address is not None
    answer = b""
    async with await anyio.connect_tcp(*address) as stream:
        await stream.send(request)
        try:
            while True:
                answer += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return answer


class Failing:
    def collect(self) -> Iterable[object]:
        yield object()
        raise KeyError("gone")


async def test_a_failing_collector_is_left_out_and_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "PAGE_S", 0.0)
    async with serving(LOOPBACK, [Failing(), Figure("a_b", "B.", lambda: 7)]) as address:  # type: ignore[list-item]
        for _ in range(2):
            head, _, body = (await ask(address)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4")
            assert body == b"# HELP a_b B.\n# TYPE a_b gauge\na_b 7.0\n"
        assert b"404 Not Found" in await ask(address, b"GET / HTTP/1.1\r\n\r\n")
        assert b"404 Not Found" in await ask(address, b"POST /metrics HTTP/1.1\r\n\r\n")
        with anyio.fail_after(5):
            assert await ask(address, b"G" * (listener.HEAD_BYTES_MAX + 1)) == b""
    assert len([each for each in caplog.records if "left out" in each.getMessage()]) == 1


async def test_scrapes_of_one_second_share_a_page() -> None:
    scrapes = 0

    def read() -> float:
        nonlocal scrapes
        scrapes += 1
        return scrapes

    async with serving(LOOPBACK, [Figure("scrapes", "", read)]) as address:
        pages = [await ask(address) for _ in range(5)]
    assert len(set(pages)) == scrapes == 1


async def test_slow_clients_can_neither_stay_nor_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "CONNECTIONS_MAX", 2)
    monkeypatch.setattr(listener, "SCRAPE_S", 0.2)
    async with serving(LOOPBACK, []) as address:
        assert address is not None
        slow = [await anyio.connect_tcp(*address) for _ in range(2)]
        await anyio.sleep(0.05)
        assert await ask(address) == b""
        with anyio.fail_after(5):
            for stream in slow:
                with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                    await stream.receive()
                await stream.aclose()
        assert await ask(address) != b""


async def test_an_error_of_the_process_is_raised_as_it_is() -> None:
    for address in (LOOPBACK, None):
        with pytest.raises(KeyError, match="own"):
            async with serving(address, []):
                raise KeyError("own")
    with anyio.move_on_after(0.01) as scope:
        async with serving(LOOPBACK, []):
            await anyio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_scrape_that_fails_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(LOOPBACK, []) as address:
        with monkeypatch.context() as patch:
            patch.setattr(listener, "ANSWER", None)
            assert await ask(address) == b""
        assert b"200 OK" in await ask(address)


async def test_a_port_that_is_taken_costs_nothing_but_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving(LOOPBACK, []) as first, serving(first, []) as second:
        assert second is not None
        assert second != first
        assert await ask(second) != b""
    async with serving(Address("192.0.2.1", 0), []) as nowhere, serving(None, []) as off:
        assert nowhere is off is None
    assert [each.levelname for each in caplog.records] == ["INFO", "WARNING", "INFO", "ERROR"]


async def test_a_port_that_the_operator_named_must_be_free() -> None:
    async with serving(LOOPBACK, []) as first:
        with pytest.raises(MetricsRefused, match=f"cannot listen on {first} .*free the port"):
            async with serving(parsed(str(first), 1), []):
                raise AssertionError("it must not serve")
    async with serving(parsed(str(first), 1), []) as again:
        assert again == first


def test_addresses() -> None:
    assert parsed("", 1) is None
    assert parsed("0.0.0.0", 9471) == ("0.0.0.0", 9471)
    assert str(parsed("[::1]:80", 9471)) == "[::1]:80"
    assert [gateway_port(port) for port in (0, 8000, 65_535)] == [0, 8001, 0]
    for wrong in ("host:", "host:65536", "http://host", "::1", ":80"):
        with pytest.raises(InvalidAddress, match="must be HOST"):
            parsed(wrong, 1)


def test_a_bucket_holds_what_is_at_most_its_bound() -> None:
    took = Histogram("t_seconds", "", (0.1, 1))
    for ms in (0, 100, 101, 1000, 1001):
        took.series().observe(ms * 1_000_000)
    (family,) = took.collect()
    assert [(each.labels.get("le"), each.value) for each in family.samples] == [
        ("0.1", 2),
        ("1.0", 4),
        ("+Inf", 5),
        (None, 5),
        (None, 2.202),
    ]


def test_label_sets_beyond_the_limit_count_together() -> None:
    counts = Counts("n_total", "", ("name",))
    for number in range(SERIES_MAX + 5):
        counts.add(str(number))
    (family,) = counts.collect()
    assert len(family.samples) == SERIES_MAX + 1
    assert family.samples[-1].labels == {"name": "other"}
    assert family.samples[-1].value == 5
