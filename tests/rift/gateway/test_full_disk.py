"""A gateway on a real broker whose disk fills up: nats-server then answers questions, and no append."""

import json
import secrets
from pathlib import Path

import anyio
import pytest

from events import book, ids
from events.jetstream import JetStream, connect
from events.schema import PricePublished
from rift import book_admin
from rift.gateway import process
from rift.gateway.process import Opened
from rift.gateway.state import GatewayConfig
from rift.gateway.streams.log_health import UNWRITABLE_S
from tests.conftest import Server
from tests.simulation.client import Call
from tests.simulation.processes import MODEL, MODELS, SECRET
from tests.simulation.service import ACCOUNT, PRICE
from tests.small_disk import SmallDisk, small_disk

MIB = 1024 * 1024
# More than the room that a gateway keeps for running requests; all streams take 1.6 times as much.
LOG_BYTES = 80 * MIB
DISK_BYTES = 192 * MIB

PAGE_REQUESTS = 6
BODY = {"model": MODEL, "prompt": "x" * 1000, "background": True}


async def issue_key(log: JetStream) -> str:
    """Write an account, a price and a key to the book; return the key."""
    empty = await book.read(log)
    await book_admin.open_account(log, empty, ACCOUNT)
    await book_admin.publish_prices(log, empty, PricePublished(id="price", version=1, prices=(PRICE,)))
    return (await book_admin.issue_key(log, ACCOUNT)).text


async def answered(opened: Opened, method: str, path: str, key: str, body: object = None) -> tuple[int, str]:
    """Return the status of an answer, and the code of an error."""
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    call = Call(method, path, headers=headers, body=body)
    await opened.app(call.scope, call.receive, call.send)
    return call.status, json.loads(call.data).get("error", {}).get("code", "")


@pytest.mark.anyio
async def test_a_gateway_refuses_at_once_and_is_back_after_a_restart_of_the_broker(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk:
        server = Server(disk.path)
        server.start()
        try:
            await refuse_and_serve_again(server, disk)
        finally:
            server.kill()


async def refuse_and_serve_again(server: Server, disk: SmallDisk) -> None:
    url, access = server.address.url, server.address.access("admin")
    log = await connect(url, access, name="gateway")
    second = await connect(url, access, name="history")
    await log.ensure_streams(shards=1, replicas=1, max_bytes=LOG_BYTES)
    key = await issue_key(log)
    lane = ids.new_lane_id(secrets.token_bytes(ids.RANDOM_BYTES))
    config = GatewayConfig(
        lane=lane, secret=SECRET, models=MODELS, served={MODEL}, entropy=secrets.token_bytes
    )
    async with anyio.create_task_group() as tasks:
        opened = await process.open_gateway(log, second, config, tasks)

        async def post() -> tuple[int, str]:
            return await answered(opened, "POST", "/v1/inference", key, BODY)

        async def ready() -> tuple[int, str]:
            return await answered(opened, "GET", "/readyz", key)

        assert await ready() == (200, "")
        disk.fill()
        # The page at the end of the stream's file has room for a few.
        for _ in range(PAGE_REQUESTS):
            began_at_s = anyio.current_time()
            if (await post()) == (503, "log_unavailable"):
                break
        assert UNWRITABLE_S / 2 < anyio.current_time() - began_at_s < UNWRITABLE_S + 2.0
        assert await ready() == (503, "log_unavailable")
        asked_at_s = anyio.current_time()
        assert await post() == (503, "log_unavailable")
        assert anyio.current_time() - asked_at_s < 1.0
        disk.free()
        # The server keeps its first write error until it is started again.
        server.kill()
        server.start()
        with anyio.fail_after(10):
            while (await ready())[0] != 200:  # noqa: ASYNC110
                await anyio.sleep(0.1)
            assert (await post())[0] == 202
        tasks.cancel_scope.cancel()
    await log.close()
    await second.close()
