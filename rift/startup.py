"""What `rift up` does with the log: connect, prepare book and fleet, and wait until a model is ready."""

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import anyio

from events import book as books
from events import fleet as fleets
from events import shards, subjects
from events.jetstream import BrokerCheck, JetStream, MonitorSilent, ask_monitor, connect
from events.log import Log, LogError, OutcomeUnknown
from rift import book_admin, nats_server, price_lists
from rift.broker import roles
from rift.data_dir import RESTORE, DataDir, DataDirError
from rift.settings import InvalidSettings, Settings

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WRITER = "up"
FIRST_ACCOUNT = "dev"

# A broker with a large store first reads its index. An empty one answers in 0.1 s.
BROKER_START_S = 60.0

# Gateways and workers may start together with the first control process, which creates the streams. A cluster
# that has lost a server answers nothing until it has elected leaders: 4 to 6 s, at times in two rounds.
STREAMS_S = 30.0
STREAMS_POLL_S = 0.2

# How often the operator hears that the model is still being loaded.
MODEL_WAIT_S = 10.0

# A gateway that runs is ready within a few seconds, unless it has a long book to read or the log is silent.
GATEWAY_WAIT_S = 30.0
GATEWAY_ANSWER_S = 5.0


async def connected(installation: DataDir, role: str = roles.SUPERVISOR) -> JetStream:
    """Connect to the embedded broker as soon as it answers. Raises DataDirError after BROKER_START_S."""
    address = nats_server.address(installation.nats)
    assert address is not None, "configure the broker first"
    with anyio.move_on_after(BROKER_START_S):
        while True:
            try:
                return await connect(address.url, address.access(role), name=WRITER)
            except LogError:
                await anyio.sleep(0.05)
    raise DataDirError(f"nats-server does not answer; see {installation.logs / 'nats.log'}")


async def once_answered(step: Callable[[], Awaitable[Result]]) -> Result:
    """Return what a step returns, and repeat it while the log does not answer. Raises OutcomeUnknown after
    STREAMS_S, and what the step raises."""
    deadline_s = anyio.current_time() + STREAMS_S
    while True:
        try:
            return await step()
        except OutcomeUnknown as error:
            if anyio.current_time() > deadline_s:
                raise
            logger.warning("the start waits for the log: %s", error)
        await anyio.sleep(STREAMS_POLL_S)


async def prepared(
    log: JetStream, settings: Settings, monitor: str | None, *, changes: bool = True
) -> BrokerCheck:
    """Check the broker's settings, and create or adjust the log's streams if `changes`, else compare them.

    `monitor` is the embedded broker's monitoring URL. The caller runs the returned check's `watch`. Raises
    LogError, InvalidSettings.
    """
    wanted = {
        "replicas": settings.log_replicas,
        "max_bytes": settings.log_bytes_max,
        "retention_days": settings.retention_days,
    }

    async def compare() -> None:
        await log.compare_streams(shards=await shards.count(log), **wanted)

    monitors = [monitor] if monitor else settings.monitors()
    check = BrokerCheck(log, monitors, compare, unchecked=settings.broker_unchecked)
    await check.check_servers()
    if not changes:
        await _streams_made(log, wanted, compare)
        return check
    opened = await shards.count(log) if subjects.BOOK in await log.streams() else 1
    if settings.shards is not None and settings.shards < opened:
        raise InvalidSettings(
            f"shards = {settings.shards}, but the log has {opened}: a shard is never closed, because the ids "
            f"of its requests name it; set shards = {opened}, or remove the setting"
        )
    wanted_shards = settings.shards or opened
    if wanted_shards > opened:
        _check_room(check, await log.missing_bytes(shards=wanted_shards, **wanted), settings)
    await log.ensure_streams(shards=wanted_shards, **wanted)
    await shards.open_up_to(log, wanted_shards, writer=WRITER)
    return check


async def _streams_made(
    log: JetStream, wanted: Mapping[str, int], compare: Callable[[], Awaitable[None]]
) -> None:
    """Return once control has created all streams as they should be. Raises LogError after STREAMS_S."""
    problem = "it lacks streams, which a control process creates at its start: start one first"
    with anyio.move_on_after(STREAMS_S):
        while True:
            try:
                if subjects.BOOK in await log.streams():
                    opened = await shards.count(log)
                    if not await log.missing_bytes(shards=opened, **wanted):
                        await compare()
                        return
            except LogError as error:
                # A cluster elects a leader for each new stream, and control makes streams larger if the
                # settings say so.
                problem = str(error)
            await anyio.sleep(STREAMS_POLL_S)
    raise LogError(f"the log is not ready after {STREAMS_S:g} s: {problem}")


def _check_room(check: BrokerCheck, missing_bytes: int, settings: Settings) -> None:
    """Raise InvalidSettings if a server has no room for its part of further shards.

    The broker itself would refuse the first stream that does not fit, and keep those before it. In a cluster
    with more servers than copies, only the broker knows where the streams will be.
    """
    if len(check.servers) != settings.log_replicas:
        return
    for server in check.servers:
        room_bytes = server.unreserved_bytes
        if room_bytes is not None and missing_bytes > room_bytes:
            raise InvalidSettings(
                f"no shard was opened: {settings.shards} shards need {missing_bytes} bytes more "
                f"(log_bytes_max = {settings.log_bytes_max} for each), and nats-server {server.server_name} "
                f"has room for {room_bytes}; lower log_bytes_max or the number of shards, or raise "
                "max_file_store of the server (`rift up` sets it at its start, to three quarters of the free "
                "disk space)"
            )


async def write_book(
    log: Log, installation: DataDir, settings: Settings, notify: Callable[[str], None]
) -> str:
    """Open the first account and price the catalogue's models, unless that is done; return a valid key.

    A key's file is never overwritten. Raises DataDirError.
    """
    book = await books.read(log)
    file = installation.first_key
    text = _key_text(file)
    entry = None if text is None else book.authenticate(text)
    if text is not None and entry is None:
        raise DataDirError(
            f"{file} does not hold a key of the log in {installation.nats}: {RESTORE}; if only this file is "
            "wrong, move it away, and the next start issues another key"
        )
    await book_admin.open_account(log, book, FIRST_ACCOUNT)
    if (signing_key := installation.signing_key()) is not None:
        await book_admin.publish_signing_key(log, book, signing_key.public)
    if (published := price_lists.default(settings.catalogue(), book)) is not None:
        await book_admin.publish_prices(log, book, published)
    if text is not None and entry is not None:
        if (state := entry.state(book.at_ns)) == "valid":
            return text
        kept = file.with_name(f"{file.name}.{entry.event.key}")
        file.rename(kept)
        notify(f"the key in {file} is {state}: it is now in {kept}, and another key is issued")
    elif any(held.event.account == FIRST_ACCOUNT for held in book.keys.values()):
        notify(f"{file} is missing, so another key is issued; `rift keys list` shows those that stay valid")
    key = await book_admin.issue_key(log, FIRST_ACCOUNT)
    installation.keep_first_key(key.text)
    return key.text


def _key_text(file: Path) -> str | None:
    """Return the text of a key's file, None if there is none. Raises DataDirError."""
    if not os.path.lexists(file):
        return None
    try:
        return file.read_text(errors="replace").strip()
    except OSError as error:
        raise DataDirError(f"{file} cannot be read: {error.strerror}") from error


async def model_ready(log: Log, model: str, notify: Callable[[str], None]) -> None:
    """Return once a replica is ready; say every MODEL_WAIT_S that it is being loaded. Raises LogError."""

    async def tell() -> None:
        began_s = anyio.current_time()
        while True:
            await anyio.sleep(MODEL_WAIT_S)
            waited_s = anyio.current_time() - began_s
            failure = fleet.failed_start(model)
            if failure and not fleet.count(model, "starting"):
                notify(f"  {failure}; correct that, or press Ctrl-C")
            elif not fleet.count(model, "starting"):
                notify(f"  no worker of {model} has begun after {waited_s:.0f} s; see `rift status`")
            else:
                notify(f"  loading {model}, {waited_s:.0f} s so far; a CPU takes up to two minutes")

    fleet = await fleets.read(log)
    async with (
        log.follow(subjects.FLEET, ["rift.fleet.>"], after=fleet.position) as reader,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(tell)
        while not fleet.is_ready(model):
            for stored in await anext(aiter(reader)):
                fleet.fold(stored)
        tasks.cancel_scope.cancel()


async def gateway_ready(url: str, key: str, notify: Callable[[str], None]) -> None:
    """Return once the gateway is ready. Say what it waits for every GATEWAY_WAIT_S.

    One that does not know the key is another installation's, which took the port meanwhile.
    """
    waits = 0
    while True:
        answer = "no answer"
        with anyio.move_on_after(GATEWAY_WAIT_S):
            while True:
                with suppress(MonitorSilent):
                    status, body = await ask_monitor(url, "/readyz", within_s=GATEWAY_ANSWER_S)
                    answer = body.decode(errors="replace").strip() or status
                    if status.split()[1:2] == ["200"]:
                        status, _ = await ask_monitor(url, "/v1/models", within_s=GATEWAY_ANSWER_S, key=key)
                        if status.split()[1:2] != ["401"]:
                            return
                        answer = "another installation's gateway answers"
                await anyio.sleep(0.05)
        waits += 1
        notify(f"the gateway is not ready after {waits * GATEWAY_WAIT_S:.0f} s; {url}/readyz: {answer}")
