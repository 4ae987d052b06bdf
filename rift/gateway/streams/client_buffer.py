"""Frames that a client has not received yet, and the wake-up of the task that sends them."""

from typing import Any

import msgspec

from events.clock import now_s
from events.schema import Problem
from events.wakeup import Wakeup
from rift.gateway.asgi.request import WriteChunk
from rift.gateway.completion import Completion
from rift.gateway.dialects.dialect import StreamFormat


class BufferedBytes(msgspec.Struct):
    """The bytes that all clients of one lane have not taken yet. Only `ClientBuffer` changes them."""

    total: int = 0


class ClientBuffer:
    """The frames of one client.

    Without a format the client waits for the whole answer and has no frames. `after` is the number of counted
    events that the client has: those it had before, and those taken since. `sent_at_s` is the loop time at
    which it was last sent something.
    """

    def __init__(self, format: StreamFormat | None, buffered: BufferedBytes, *, after: int = 0) -> None:
        self.format = format
        self.after = after
        self.size = 0
        self.sent_at_s = 0.0
        self._skip = after
        self._pushed = after
        self._buffered = buffered
        self._frames: list[bytes] = []
        self._write: WriteChunk | None = None
        self._wakeup = Wakeup()
        self._is_woken = False

    @property
    def has_frames(self) -> bool:
        return bool(self._frames)

    def push(self, event: Any, answer: Completion) -> None:
        """Append the frame of an event that the answer has just counted, unless the client has it."""
        counted = answer.life.counted
        if self.format is None or counted <= self._skip:
            return
        self._pushed = counted
        if frame := self.format.event(event, answer):
            self._frames.append(frame)
            self.size += len(frame)
            self._buffered.total += len(frame)
            if self._write is None:
                self._wakeup.set()

    def flush(self) -> None:
        """Write the frames without waking the task that sends them, if it waits and the client keeps up."""
        if self._write is None or not self._frames:
            return
        if self._write(b"".join(self._frames)):
            self._clear()
        else:
            self.wake()

    def take(self) -> bytes:
        """Return all frames, which then count as sent."""
        data = b"".join(self._frames)
        self._clear()
        return data

    def _clear(self) -> None:
        self.discard()
        self.after = self._pushed
        self.note_sent()

    def discard(self) -> None:
        """Drop all frames."""
        self._frames.clear()
        self._buffered.total -= self.size
        self.size = 0

    def note_sent(self) -> None:
        """Note that the client is being sent something."""
        self.sent_at_s = now_s()

    def break_off(self, problem: Problem) -> None:
        """Replace all frames by one that reports the problem and where to resume."""
        self.discard()
        if self.format is not None:
            self._frames.append(self.format.broken_off(problem, self.after))

    def wake(self) -> None:
        """Make `wait` return; `flush` leaves the frames to the task that waits."""
        self._write = None
        self._is_woken = True
        self._wakeup.set()

    async def wait(self, write: WriteChunk | None) -> None:
        """Return once there are frames to take or `wake` was called. Meanwhile `flush` may `write` them."""
        try:
            while not (self._frames or self._is_woken):
                self._write = write
                await self._wakeup.wait()
        finally:
            self._write = None
            self._is_woken = False
