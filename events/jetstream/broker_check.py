"""Checks of the broker's settings, on which the log's durability rests.

Only its monitoring port shows whether a nats-server syncs each record to its disk before it acknowledges it
(`sync_interval: always`), so every server of the broker is asked there. Must not live here: what a process
does after a failed check.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated
from urllib.parse import urlsplit

import anyio
import msgspec

from events.contracts import MESSAGE_BYTES_MAX
from events.errors import reason
from events.jetstream.connection import SERVER_VERSION_MIN, JetStream
from events.jetstream.streams import InvalidBroker
from events.log import LogError

logger = logging.getLogger(__name__)

# A monitoring port answers within milliseconds, with about 10 kB.
MONITOR_S = 5.0
MONITOR_BYTES_MAX = 1 << 20

# A server of a cluster can return with other settings while our connection stays with another server.
RECHECK_S = 60.0
RETRY_S = 1.0
# How often a connection's new server may fail to show its settings before the process ends.
UNREADABLE_CHECKS_MAX = 30

REMEDY = (
    "set nats_monitor to the monitoring URL of each nats-server, like http://127.0.0.1:8222, or set "
    "broker_unchecked = true to run without this check"
)


class BrokerUnreadable(LogError):
    """The broker's settings cannot be read; the message gives the reason and the remedy."""


class MonitorSilent(LogError):
    """A monitoring URL does not answer as a nats-server does."""


class _JetStreamSettings(msgspec.Struct, frozen=True):
    sync_always: bool = False
    max_storage: int = 0


class _JetStreamLoad(msgspec.Struct, frozen=True):
    reserved_storage: int = 0


class _Cluster(msgspec.Struct, frozen=True):
    cluster_size: int = 1


class _JetStreamState(msgspec.Struct, frozen=True):
    config: _JetStreamSettings = _JetStreamSettings()
    stats: _JetStreamLoad = _JetStreamLoad()
    meta: _Cluster = _Cluster()


class MonitoredServer(msgspec.Struct, frozen=True):
    """The part of a server's `/varz` that the protocol depends on."""

    server_id: str
    server_name: str
    version: Annotated[str, msgspec.Meta(max_length=64)]
    max_payload: int
    jetstream: _JetStreamState = _JetStreamState()

    @property
    def unreserved_bytes(self) -> int | None:
        """Return the space that no stream of this server has reserved, None if it shows no limit."""
        limit = self.jetstream.config.max_storage
        return max(0, limit - self.jetstream.stats.reserved_storage) if limit > 0 else None

    def check(self, url: str) -> None:
        """Raise InvalidBroker naming the first setting that the protocol cannot work with."""
        where = f"nats-server {self.server_name} ({url})"
        numbers = self.version.partition("-")[0].split(".")[:2]
        if not all(map(str.isdecimal, numbers)) or tuple(map(int, numbers)) < SERVER_VERSION_MIN:
            raise InvalidBroker(f"{where}: version {self.version} is too old; install 2.15 or newer")
        if not self.jetstream.config.sync_always:
            raise InvalidBroker(
                f"{where}: sync_interval is not always, so it acknowledges records before they are on disk; "
                "write `sync_interval: always` into the jetstream block of its configuration and restart it, "
                "or set broker_unchecked = true to run without this check"
            )
        if self.max_payload < MESSAGE_BYTES_MAX:
            raise InvalidBroker(
                f"{where}: max_payload is {self.max_payload}, Rift needs at least {MESSAGE_BYTES_MAX}; raise "
                "it in the server's configuration and restart it"
            )


class BrokerCheck:
    """Compares the settings of every server at `monitors`, and the streams with `compare_streams`.

    `servers` are those that answered at the last check. `unchecked`: a server whose settings differ or cannot
    be read is a warning in the log.
    """

    def __init__(
        self,
        log: JetStream,
        monitors: Sequence[str],
        compare_streams: Callable[[], Awaitable[None]],
        *,
        unchecked: bool = False,
    ) -> None:
        self._log = log
        self._monitors = monitors
        self._compare_streams = compare_streams
        self._unchecked = unchecked
        self.servers: Sequence[MonitoredServer] = ()
        self._checked: set[str] = set()
        self._warnings: dict[str, str] = {}

    async def check_servers(self) -> None:
        """Check every server that answers. The one that we are connected to must be among them, or have been.

        Raises InvalidBroker, BrokerUnreadable.
        """
        try:
            await self._check_servers()
        except (InvalidBroker, BrokerUnreadable) as error:
            if not self._unchecked:
                raise
            self._warn("servers", f"broker_unchecked is set: {error}")

    async def watch(self) -> None:
        """Check servers and streams at each reconnect and every RECHECK_S.

        Raises InvalidBroker, and BrokerUnreadable if the settings of a new server stay unreadable.
        """
        unreadable = 0
        while True:
            reconnected = self._log.reconnected.pending
            pause_s = RETRY_S
            try:
                await self.check_servers()
                unreadable = 0
                await self._compare_streams()
                self._warn("streams", "")
                pause_s = RECHECK_S
            except InvalidBroker:
                raise
            except BrokerUnreadable:
                # While there is no connection, nothing can be acknowledged.
                unreadable += self._log.is_connected
                if unreadable >= UNREADABLE_CHECKS_MAX:
                    raise
            except LogError as error:
                self._warn("streams", f"the streams cannot be compared: {error}")
            with anyio.move_on_after(pause_s):
                await reconnected.wait()

    async def _check_servers(self) -> None:
        if not self._monitors:
            raise BrokerUnreadable(
                f"whether the broker has `sync_interval: always` cannot be checked: {REMEDY}"
            )
        servers: dict[str, MonitoredServer] = {}
        failures: list[str] = []
        async with anyio.create_task_group() as tasks:
            for url in self._monitors:
                tasks.start_soon(_read, url, servers, failures)
        self.servers = [*servers.values()]
        for url, server in servers.items():
            server.check(url)
        ids = {server.server_id for server in servers.values()}
        size = max((server.jetstream.meta.cluster_size for server in servers.values()), default=0)
        if size > (named := len(ids) + len(failures)):
            failures.append(f"nats_monitor names {named} of the cluster's {size} servers")
            # A cluster that grows must not end the processes that it serves.
            ids &= self._checked
        self._checked |= ids
        if self._log.server_id not in self._checked:
            failures = failures or [f"{', '.join(self._monitors)} belongs to another nats-server"]
            raise BrokerUnreadable(
                f"whether the broker at {self._log.server_address} has `sync_interval: always` cannot be "
                f"checked: {'; '.join(failures)}: {REMEDY}"
            )
        self._warn("servers", f"not every nats-server is checked: {'; '.join(failures)}" if failures else "")

    def _warn(self, about: str, warning: str) -> None:
        """Log a warning when it first appears."""
        if warning and warning != self._warnings.get(about):
            logger.warning("%s", warning)
        self._warnings[about] = warning


async def _read(url: str, servers: dict[str, MonitoredServer], failures: list[str]) -> None:
    """Add the server at a monitoring URL, or the reason why it cannot be read."""
    try:
        servers[url] = await read_server(url)
    except MonitorSilent as silent:
        failures.append(str(silent))


async def read_server(url: str) -> MonitoredServer:
    """Return what the monitoring port at an `http:` URL shows. Raises MonitorSilent."""
    status, body = await ask_monitor(url, "/varz", within_s=MONITOR_S)
    if status.split()[1:2] != ["200"]:
        raise MonitorSilent(f"{url} answers {status[:80]!r} to GET /varz instead of 200")
    try:
        return msgspec.json.decode(body, type=MonitoredServer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MonitorSilent(f"{url} does not show the settings of a nats-server: {error}") from error


async def ask_monitor(url: str, path: str, *, within_s: float, key: str | None = None) -> tuple[str, bytes]:
    """Return the status line and the body of a monitoring port's answer. Raises MonitorSilent."""
    parts = urlsplit(url)
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    request = f"GET {parts.path.rstrip('/')}{path} HTTP/1.0\r\nHost: {parts.netloc}\r\n{authorization}\r\n"
    answer = bytearray()
    try:
        with anyio.fail_after(within_s):
            async with await anyio.connect_tcp(parts.hostname or "", parts.port or 80) as stream:
                await stream.send(request.encode())
                async for piece in stream:
                    answer += piece
                    if len(answer) > MONITOR_BYTES_MAX:
                        raise MonitorSilent(f"{url} answers with more than {MONITOR_BYTES_MAX} bytes")
    except TimeoutError as error:
        raise MonitorSilent(f"{url} does not answer within {within_s:.0f} s") from error
    except (OSError, UnicodeError, anyio.BrokenResourceError) as error:
        raise MonitorSilent(f"{url} cannot be reached: {reason(error)}") from error
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    return head.partition(b"\r\n")[0].decode("latin-1"), body
