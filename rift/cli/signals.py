"""How a process of the command line runs until a signal stops it."""

import signal
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TypeVar

import anyio

Result = TypeVar("Result")


def run(main: Callable[[], Awaitable[Result]]) -> Result:
    return anyio.run(main, backend_options={"use_uvloop": True})


def run_until_stopped(serve: Callable[[anyio.Event], Awaitable[None]]) -> None:
    """Run `serve`. SIGTERM and SIGINT set the event that it receives."""

    async def main() -> None:
        stop = anyio.Event()
        await with_signals({signal.SIGTERM: stop.set, signal.SIGINT: stop.set}, partial(serve, stop))

    run(main)


async def with_signals(
    handlers: Mapping[signal.Signals, Callable[[], None]], serve: Callable[[], Awaitable[None]]
) -> None:
    """Run `serve`, and call the handler of each signal that arrives."""

    async def listen() -> None:
        with anyio.open_signal_receiver(*handlers) as received:
            async for number in received:
                handlers[number]()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        await serve()
        tasks.cancel_scope.cancel()
