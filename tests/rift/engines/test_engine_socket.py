"""The engine's output, received without the asyncio layer of zmq."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from rift.engines.engine_socket import receive_directly

zmq = pytest.importorskip("zmq")
zmq_asyncio = pytest.importorskip("zmq.asyncio")

pytestmark = pytest.mark.anyio

# zmq's thread passes a message on within microseconds.
SIGNALLED_S = 0.05


@pytest.fixture(params=[False, True])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": request.param}


@asynccontextmanager
async def sockets(tmp_path: Path) -> AsyncIterator[tuple[Any, Any]]:
    """Return a sender and a receiver."""
    context = zmq_asyncio.Context()
    address = f"ipc://{tmp_path}/socket"
    receiver = context.socket(zmq.PULL)
    receiver.bind(address)
    receive_directly(receiver)
    sender = zmq.Context.shadow(context).socket(zmq.PUSH)
    sender.connect(address)
    try:
        yield sender, receiver
    finally:
        sender.close(0)
        receiver.close(0)
        context.term()


def content(frames: Any) -> bytes:
    return b"".join(bytes(frame) for frame in frames)


async def test_every_message_arrives_in_order_however_they_are_sent(tmp_path: Path) -> None:
    sent = [os.urandom(8) + b"x" * size for size in range(300)]
    received: list[bytes] = []
    async with sockets(tmp_path) as (sender, receiver), anyio.create_task_group() as tasks:

        async def read() -> None:
            while len(received) < len(sent):
                received.append(content(await receiver.recv_multipart(copy=False)))
                if len(received) % 50 == 0:
                    # What arrives now finds no reader.
                    await anyio.sleep(0.02)

        tasks.start_soon(read)
        for number, message in enumerate(sent):
            await asyncio.to_thread(sender.send_multipart, [message[:8], message[8:]])
            if number % 7 == 0:
                await anyio.sleep(0.002)
        with anyio.fail_after(5):
            while len(received) < len(sent):  # noqa: ASYNC110
                await anyio.sleep(0.005)
    assert received == sent


async def test_a_busy_reader_does_not_make_the_loop_spin(tmp_path: Path) -> None:
    async with sockets(tmp_path) as (sender, receiver):
        waiting = asyncio.ensure_future(receiver.recv_multipart(copy=False))
        await anyio.sleep(0.02)
        sender.send_multipart([b"1"])
        assert content(await waiting) == b"1"
        # A change that no reader waits for.
        with zmq.Context.shadow(receiver.context).socket(zmq.PUSH) as another:
            another.connect(receiver.last_endpoint)
            another.send(b"2")
            await anyio.sleep(0.02)
        began = os.times().user + os.times().system
        await anyio.sleep(0.2)
        assert os.times().user + os.times().system - began < 0.1
        assert content(await receiver.recv_multipart(copy=False)) == b"2"


async def test_a_reader_that_is_cancelled_after_the_socket_was_closed_ends(tmp_path: Path) -> None:
    errors: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.append(context))
    async with sockets(tmp_path) as (sender, receiver):
        waiting = asyncio.ensure_future(receiver.recv_multipart(copy=False))
        await anyio.sleep(0.01)
        # Signalled, but not read yet.
        sender.send(b"late")
        time.sleep(SIGNALLED_S)  # noqa: ASYNC251
        receiver.close(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await anyio.sleep(0.01)
    assert errors == []
