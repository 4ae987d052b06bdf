"""Frames of one client: byte accounting, wake-ups, and writes without a wake-up."""

from typing import Any

import anyio
import pytest

from events.lifecycle import Life
from events.schema import Parameters, Price, Problem, RequestAccepted
from rift.gateway.completion import Completion
from rift.gateway.streams.client_buffer import BufferedBytes, ClientBuffer

pytestmark = pytest.mark.anyio


class Format:
    keep_alive = b":"
    tells_status = True

    def waiting(self, name: str, estimate_ms: int | None) -> bytes:
        return name.encode()

    def event(self, event: Any, answer: Completion) -> bytes:
        return bytes(event)

    def broken_off(self, problem: Problem, after: int) -> bytes:
        return f"{problem.code} after {after}".encode()


class Buffer:
    def __init__(self, *, after: int = 0) -> None:
        self.buffered = BufferedBytes()
        self.client = ClientBuffer(Format(), self.buffered, after=after)
        accepted = RequestAccepted(
            request="req", account="a", key="k", model="m", kind="inference", input="hi", stream=True,
            parameters=Parameters(), prompt_tokens_max=8, deadline_ms=1000, price_version=1,
        )  # fmt: skip
        price = Price(model="m", prompt_nanousd=1, output_nanousd=1)
        self._answer = Completion(accepted, price, keep_text=False)

    def push(self, frame: bytes) -> None:
        self._answer.life = Life(counted=self._answer.life.counted + 1)
        self.client.push(frame, self._answer)


async def test_taken_discarded_and_replaced_frames_free_their_bytes() -> None:
    buffer = Buffer()
    buffer.push(b"one")
    buffer.push(b"two")
    assert buffer.buffered.total == buffer.client.size == 6
    assert (buffer.client.take(), buffer.client.after) == (b"onetwo", 2)
    assert buffer.buffered.total == 0
    buffer.push(b"three")
    buffer.client.break_off(Problem(code="slow", message=""))
    assert buffer.buffered.total == 0
    assert buffer.client.take() == b"slow after 2", "the frame that was dropped was not received"
    buffer.push(b"four")
    buffer.client.discard()
    assert (buffer.buffered.total, buffer.client.take()) == (0, b"")


async def test_frames_that_the_client_has_are_skipped() -> None:
    buffer = Buffer(after=1)
    buffer.push(b"one")
    assert (buffer.client.has_frames, buffer.client.after) == (False, 1)
    buffer.push(b"two")
    assert (buffer.client.take(), buffer.client.after) == (b"two", 2)


@pytest.mark.parametrize("keeps_up", [True, False])
async def test_flush_writes_for_a_waiting_task_unless_the_client_is_behind(keeps_up: bool) -> None:
    buffer = Buffer()
    written: list[bytes] = []

    def write(data: bytes) -> bool:
        if keeps_up:
            written.append(data)
        return keeps_up

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(buffer.client.wait, write)
        await anyio.wait_all_tasks_blocked()
        buffer.push(b"one")
        buffer.push(b"two")
        buffer.client.flush()
        await anyio.wait_all_tasks_blocked()
        assert written == ([b"onetwo"] if keeps_up else [])
        assert buffer.buffered.total == (0 if keeps_up else 6)
        buffer.client.wake()
    assert buffer.client.take() == (b"" if keeps_up else b"onetwo")


async def test_a_frame_or_a_wake_before_the_wait_is_not_missed() -> None:
    buffer = Buffer()
    with anyio.fail_after(1):
        buffer.client.wake()
        await buffer.client.wait(None)
        buffer.push(b"one")
        await buffer.client.wait(None)
    buffer.client.take()
    with anyio.move_on_after(0.01) as waited:
        await buffer.client.wait(None)
    assert waited.cancelled_caught, "neither counts twice"
