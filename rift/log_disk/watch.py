"""Notice that the embedded broker cannot write, and heal it. `rift up` runs this beside its children.

    the broker reports a write error: release the reserve, restart the broker; gateways refuse new requests
    the reserve fits again: restart the broker if it still cannot write; gateways accept new requests

The sign is nats-server's `/healthz`, which names the first stream with a write error, whichever append met it
and for whatever reason. A probe append would prove one stream only. Free space does not show a quota or a
read-only disk, and may be used up between two polls. A line in the broker's log may not fit on the full disk.

If the disk is read-only, a restart does not help, and the broker continues to serve what it has.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

import anyio
import anyio.to_thread
import msgspec

from events.jetstream import MonitorSilent, ask_monitor
from rift.log_disk.reserve import Reserve

# Far below the time after which a gateway doubts the log. A question costs the broker some 0.5 ms.
POLL_S = 0.5
ANSWER_S = 2.0

# What `/healthz` says if the disk refuses a write. Without a permission, nats-server turns JetStream off.
WRITE_ERRORS = ("write error", "JetStream not enabled")

# The reserve is restored after this pause. If the disk is full again within RELAPSE_S, the next pause is
# longer, so that a disk that is filled and freed in turn does not restart the broker all the time.
PAUSE_S = (0.5, 1.0, 2.0, 4.0)
RELAPSE_S = 60.0

# After a restart, the broker's health is asked again this much later.
RESTART_S = 1.0


class BrokerHealth(NamedTuple):
    """`answers` is False for a broker that does not run or still reads its store."""

    answers: bool
    problem: str = ""

    @property
    def cannot_write(self) -> bool:
        return any(words in self.problem for words in WRITE_ERRORS)


async def ask_health(monitor: str) -> BrokerHealth:
    """Ask nats-server's monitoring URL once."""
    try:
        _, body = await ask_monitor(monitor, "/healthz", within_s=ANSWER_S)
        health = msgspec.json.decode(body, type=_Healthz)
    except (MonitorSilent, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return BrokerHealth(answers=False)
    # A broker that still reads its store answers with the status "error".
    return BrokerHealth(health.status != "error", health.error)


class _Healthz(msgspec.Struct):
    status: str
    error: str = ""


class Broker(NamedTuple):
    """The supervised broker. `hurry` ends the back-off of every child."""

    health: Callable[[], Awaitable[BrokerHealth]]
    restart: Callable[[], None]
    hurry: Callable[[], None]


class LogDisk:
    def __init__(self, reserve: Reserve, broker: Broker, notify: Callable[[str], None]) -> None:
        self._reserve = reserve
        self._broker = broker
        self._notify = notify

    async def watch(self) -> None:
        """Release the reserve when the broker cannot write, and restore it as soon as it fits."""
        relapses = 0
        restored_at_s = anyio.current_time() - RELAPSE_S
        while True:
            health = await self._broker.health()
            if health.cannot_write or not (health.answers or await self._is_writable()):
                relapses = relapses + 1 if anyio.current_time() - restored_at_s < RELAPSE_S else 0
                self._release(health.problem or "the broker does not answer")
                await anyio.sleep(PAUSE_S[min(relapses, len(PAUSE_S) - 1)])
                await self._restore()
                restored_at_s = anyio.current_time()
            await anyio.sleep(POLL_S)

    def _release(self, problem: str) -> None:
        try:
            self._reserve.release()
            self._broker.restart()
        except OSError as error:
            problem = f"{error.strerror}; {problem}"
        self._notify(f"{self._reserve.trouble()} ({problem})")

    async def _restore(self) -> None:
        """Return once the broker can write and the reserve is whole."""
        while not await self._restored():  # noqa: ASYNC110  # the disk
            await anyio.sleep(POLL_S)
        self._broker.hurry()
        folder = self._reserve.file.parent
        self._notify(f"the disk of {folder} can be written to again: new requests are accepted")

    async def _restored(self) -> bool:
        if not await self._is_writable():
            return False
        health = await self._broker.health()
        if health.answers and not health.cannot_write:
            try:
                await anyio.to_thread.run_sync(self._reserve.restore)
            except OSError:
                return False
            return True
        if health.cannot_write:
            self._broker.restart()
        self._broker.hurry()
        await anyio.sleep(RESTART_S)
        return False

    async def _is_writable(self) -> bool:
        """Return whether the disk has room for the reserve and its margin, and takes a write."""
        try:
            await anyio.to_thread.run_sync(partial(self._reserve.restore, only_try=True))
        except OSError:
            return False
        return True
