"""The check of the broker's settings, against real nats-servers and against ports that are none."""

import logging
import shutil
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import anyio
import anyio.abc
import pytest

from events.jetstream import BrokerCheck, BrokerUnreadable, InvalidBroker, JetStream, broker_check, connect
from events.jetstream.broker_check import MonitorSilent, read_server
from events.log import LogError
from tests.chaos.rig import free_port
from tests.conftest import Server

pytestmark = pytest.mark.anyio

WITHIN_S = 10.0
STREAMS = {"shards": 1, "replicas": 1, "max_bytes": 64 << 20}


def reconfigure(server: Server, old: str, new: str) -> None:
    configuration = server.folder / "nats.conf"
    assert old in configuration.read_text()
    configuration.write_text(configuration.read_text().replace(old, new))


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A broker that the test may configure and restart."""
    server = Server(tmp_path)
    yield server
    if server.process is not None:
        server.kill()


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[JetStream]:
    log = await connect(server.address.url, server.address.access("admin"), name="test")
    try:
        yield log
    finally:
        await log.close()


def check_of(log: JetStream, *monitors: str | None, unchecked: bool = False) -> BrokerCheck:
    urls = [url for url in monitors if url is not None]
    return BrokerCheck(log, urls, partial(log.compare_streams, **STREAMS), unchecked=unchecked)


async def test_a_broker_as_rift_configures_it_passes(server: Server) -> None:
    async with connected(server) as log:
        await check_of(log, server.address.monitor).check_servers()


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("  sync_interval: always\n", "", "sync_interval is not always"),
        ("sync_interval: always", "sync_interval: 1s", "sync_interval is not always"),
        (
            "max_payload: 8388608",
            "max_payload: 1048576",
            "max_payload is 1048576, Rift needs at least 8388608",
        ),
    ],
)
async def test_a_broker_with_other_settings_is_refused(
    own: Server, old: str, new: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    reconfigure(own, old, new)
    own.start()
    async with connected(own) as log:
        with pytest.raises(InvalidBroker, match=why):
            await check_of(log, own.address.monitor).check_servers()
        with caplog.at_level(logging.WARNING):
            await check_of(log, own.address.monitor, unchecked=True).check_servers()
        assert "broker_unchecked is set" in caplog.text
        assert why in caplog.text


async def test_a_broker_that_shows_no_settings_is_refused(server: Server, own: Server) -> None:
    own.start()
    silent = f"http://127.0.0.1:{free_port()}"
    async with connected(server) as log:
        for monitors, why in (
            ((), "cannot be checked"),
            ((silent,), f"{silent} cannot be reached"),
            ((own.address.monitor,), "belongs to another nats-server"),
        ):
            with pytest.raises(BrokerUnreadable, match=why) as refused:
                await check_of(log, *monitors).check_servers()
            for name in ("sync_interval: always", "nats_monitor", "broker_unchecked = true"):
                assert name in str(refused.value)
            await check_of(log, *monitors, unchecked=True).check_servers()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1/varz\r\n\r\n", "'HTTP/1.0 302 Found'"),
        (b"HTTP/1.0 200 OK\r\n\r\n<html>", "does not show the settings of a nats-server"),
        (b"HTTP/1.0 200 OK\r\n\r\n\xff\xfe", "does not show the settings of a nats-server"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"x": ' + b"[" * 100_000, "does not show the settings of a nats-server"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"server_id": 1}', "does not show the settings of a nats-server"),
        (b"SSH-2.0-OpenSSH\r\n", "'SSH-2.0-OpenSSH' to GET /varz"),
        (b"", "'' to GET /varz"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b" " * (2 << 20), "more than 1048576 bytes"),
        (None, "does not answer within"),
        ("reset", "cannot be reached: BrokenResourceError"),
    ],
)
async def test_a_port_that_is_not_a_monitor_is_named(
    answer: bytes | str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if answer is None:
        monkeypatch.setattr(broker_check, "MONITOR_S", 0.1)

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            if answer is None:
                await anyio.sleep_forever()
            if isinstance(answer, str):
                raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            with suppress(anyio.BrokenResourceError):
                await stream.send(answer)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, serve)
            with pytest.raises(MonitorSilent, match=why):
                await read_server(f"http://127.0.0.1:{port}")
            tasks.cancel_scope.cancel()


async def test_a_host_that_is_no_name_is_named() -> None:
    for host in ("no-such-host.invalid", "a..b", "a" * 64):
        with pytest.raises(MonitorSilent, match=f"http://{host}:8222 cannot be reached"):
            await read_server(f"http://{host}:8222")


async def test_a_broker_that_comes_back_with_other_settings_ends_the_watch(own: Server) -> None:
    own.start()

    async def come_back() -> None:
        for old, new in (("max_pending: 536870912", "max_pending: 536870911"), ("sync_interval: always", "")):
            epoch = log.epoch
            own.kill()
            reconfigure(own, old, new)
            reconnected = log.reconnected.pending
            own.start()
            await reconnected.wait()
            assert log.epoch == epoch + 1

    async with connected(own) as log:
        await log.ensure_streams(**STREAMS)
        with anyio.fail_after(WITHIN_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(come_back)
                with pytest.raises(InvalidBroker, match="sync_interval is not always"):
                    await check_of(log, own.address.monitor).watch()


async def test_a_broker_that_comes_back_unreadable_ends_the_watch(
    own: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_check, "RETRY_S", 0.01)
    own.start()
    async with connected(own) as log:
        await log.ensure_streams(**STREAMS)
        check = check_of(log, own.address.monitor)
        await check.check_servers()
        own.kill()
        monitor = str(own.address.monitor).removeprefix("http://")
        reconfigure(own, f'http: "{monitor}"\n', "")
        own.start()
        with anyio.fail_after(WITHIN_S), pytest.raises(BrokerUnreadable, match="cannot be reached"):
            await check.watch()


async def test_a_stream_that_changed_or_went_is_noticed(
    own: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own.start()
    async with connected(own) as log:
        await log.ensure_streams(**STREAMS)
        await log.compare_streams(**STREAMS)
        config = await log._stream("RIFT_FLEET")
        assert config is not None
        await log._api("STREAM.UPDATE.RIFT_FLEET", config | {"discard": "old"})
        with pytest.raises(InvalidBroker, match="stream RIFT_FLEET: discard is 'old', Rift needs 'new'"):
            await log.compare_streams(**STREAMS)
        await log._remove("STREAM.DELETE.RIFT_FLEET")
        with pytest.raises(LogError, match="stream RIFT_FLEET is gone"):
            await log.compare_streams(**STREAMS)
        # The watch goes on, because a restart of this process would create an empty stream.
        monkeypatch.setattr(broker_check, "RETRY_S", 0.01)
        with anyio.move_on_after(0.5), caplog.at_level(logging.WARNING):
            await check_of(log, own.address.monitor).watch()
        assert caplog.text.count("stream RIFT_FLEET is gone") == 1


CLUSTER = """
cluster {{
  name: check
  listen: "127.0.0.1:{route}"
  routes: [{routes}]
}}
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Server]]:
    servers = [Server(tmp_path / f"{number}") for number in range(3)]
    routes = [free_port() for _ in servers]
    for number, (server, route) in enumerate(zip(servers, routes, strict=True)):
        reconfigure(server, 'server_name: "rift"', f'server_name: "rift-{number}"')
        others = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
        with (server.folder / "nats.conf").open("a") as configuration:
            configuration.write(CLUSTER.format(route=route, routes=others))
        if number:
            shutil.copy(servers[0].folder / "authorization.conf", server.folder)
        server.start()
    yield servers
    for server in servers:
        server.kill()


async def test_more_replicas_than_the_settings_say_end_no_process(cluster: list[Server]) -> None:
    async with connected(cluster[0]) as log:
        with anyio.fail_after(2 * WITHIN_S):
            # Until the cluster has a leader, no stream can be created.
            for replicas in (1, 3):
                while True:
                    try:
                        await log.ensure_streams(**STREAMS | {"replicas": replicas})
                        break
                    except LogError:
                        await anyio.sleep(0.1)
        await log.compare_streams(**STREAMS)
        config = await log._stream("RIFT_FLEET")
        assert config is not None
        assert config["num_replicas"] == 3
        await log._api("STREAM.UPDATE.RIFT_FLEET", config | {"num_replicas": 1})
        with pytest.raises(
            InvalidBroker, match=r"num_replicas is 1, Rift needs 3.*nats stream edit RIFT_FLEET"
        ):
            await log.compare_streams(**STREAMS | {"replicas": 3})


async def test_every_server_of_a_cluster_is_checked(
    cluster: list[Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, _, third = cluster
    monitors = [server.address.monitor for server in cluster]
    async with connected(first) as log:
        with anyio.fail_after(WITHIN_S):
            while (await read_server(monitors[0] or "")).jetstream.meta.cluster_size < 3:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        await check_of(log, *monitors).check_servers()
        with pytest.raises(BrokerUnreadable, match="nats_monitor names 2 of the cluster's 3 servers"):
            await check_of(log, *monitors[:2]).check_servers()
        # A server that is added later ends no process.
        grown = check_of(log, *monitors)
        await grown.check_servers()
        grown._monitors = monitors[:2]
        with caplog.at_level(logging.WARNING):
            await grown.check_servers()
        assert "nats_monitor names 2 of the cluster's 3 servers" in caplog.text
        # A cluster serves without one of its servers, so a process can start then.
        third.kill()
        check = check_of(log, *monitors)
        with caplog.at_level(logging.WARNING):
            await check.check_servers()
        assert f"{monitors[2]} cannot be reached" in caplog.text
        monkeypatch.setattr(broker_check, "RECHECK_S", 0.05)
        monkeypatch.setattr(broker_check, "RETRY_S", 0.05)
        reconfigure(third, "max_payload: 8388608", "max_payload: 8388607")
        third.start()
        with (
            anyio.fail_after(WITHIN_S),
            pytest.raises(InvalidBroker, match=r"rift-2 .*max_payload is 8388607"),
        ):
            await check.watch()
