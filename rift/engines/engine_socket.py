"""Receives the engine's output with fewer calls than the asyncio layer of zmq.

That layer asks the socket for its events five times for each message. zmq signals a change of the socket on a
file descriptor, once. So receive until there is nothing more, and only then wait for the descriptor.
"""

import asyncio
from typing import Any


def receive_directly(socket: Any) -> None:
    """Replace `recv_multipart` of a `zmq.asyncio.Socket` that one task reads, before it has begun."""
    socket.recv_multipart = _Receiver(socket).recv_multipart


class _Receiver:
    def __init__(self, socket: Any) -> None:
        import zmq

        self._nothing = zmq.Again
        self._flags = zmq.NOBLOCK
        self._events = zmq.EVENTS
        # The same socket without the asyncio layer.
        self._socket: Any = zmq.Socket.shadow(socket)
        self._changes: int = self._socket.fileno()
        self._waiter: asyncio.Future[None] | None = None

    async def recv_multipart(self, *, copy: bool) -> Any:
        while True:
            try:
                return self._socket.recv_multipart(self._flags, copy=copy)
            except self._nothing:
                await self._changed()

    async def _changed(self) -> None:
        loop = asyncio.get_running_loop()
        if self._waiter is None:
            loop.add_reader(self._changes, self._wake)
        self._waiter = loop.create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            loop.remove_reader(self._changes)
            raise

    def _wake(self) -> None:
        assert self._waiter is not None, "the descriptor is watched from the first wait on"
        if not self._waiter.done():
            self._waiter.set_result(None)
        elif not self._socket.closed:
            # The reader is busy, and tries again anyway. This makes the descriptor quiet.
            self._socket.get(self._events)
