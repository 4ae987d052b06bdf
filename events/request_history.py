"""Read everything that the log holds of a request.

A read ends at the last sequence that the request's subjects have when it begins, as the stream's leader
states it, so it includes every earlier append. Readers that wait for the same lane and model share one scan,
and go on one after the other, because each takes milliseconds to show a long answer. While a scan decodes
records, other tasks run now and then. The scan of a request that still runs costs as much as everyone's
traffic since it came, so readers of young and of old requests share none, and a scan skips what lies between
requests that have ended and those that came later.
"""

import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar

import anyio
import anyio.lowlevel
import msgspec
from msgspec.structs import replace

from events import codec, subjects
from events.encryption import Cipher, ContentUndecipherable, opened
from events.errors import EventsError
from events.ids import RequestId
from events.lifecycle import NEW, Life
from events.log import Log, LogError, Stored
from events.request_states import RequestStates
from events.schema import RequestAccepted
from events.subjects import Address

# What one scan keeps, in bytes of the log: read, they take about three times as much. Readers beyond it wait
# for another scan.
SCAN_BYTES_MAX = 64 * 1024 * 1024

# After this many bytes, which take 1 to 3 ms to decode, other tasks run.
SLICE_BYTES = 64 * 1024
# The same for tokens, which take up to 0.15 ms each to show, with many log probabilities.
SLICE = 32

# Reads of up to this many records share a scan, and so do those of up to 16 times as many, and so on.
SHORT = 2**11
AGE_BITS = 4

# Records between two requests that a scan reads rather than skips: to begin again takes as long.
GAP = 500


Item = TypeVar("Item")


class HistoryTooLong(EventsError):
    """The history has more bytes than the reader accepts."""


class CountedEvent(msgspec.Struct, frozen=True, gc=False):
    """An event that counted, the life after it, and its position: sequence and index."""

    event: Any
    life: Life
    stored_at_ns: int
    position: tuple[int, int] = (0, 0)


class RequestHistory(msgspec.Struct):
    """A request up to `position`. `accepted` is None if the log does not hold the request. `size` is in bytes
    of the log; beyond what its readers accept, no further event is kept."""

    position: int = 0
    size: int = 0
    life: Life = NEW
    accepted: RequestAccepted | None = None
    counted: list[CountedEvent] = []
    # A sealed request's cipher; its events are decrypted. None: never sealed, or the key is erased.
    seal: Cipher | None = None


class _Reader(msgspec.Struct):
    request: RequestId
    done: anyio.Event
    bytes_max: float
    past: RequestHistory | None = None
    failure: LogError | None = None


class _Scan(NamedTuple):
    """What readers have in common that share scans: lane and model, and about the number of records."""

    at: Address
    age: int


class HistoryReader:
    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: dict[_Scan, list[_Reader]] = {}
        self._reading: set[_Scan] = set()
        # The last sequence of each shard as the latest scan found it.
        self._last: dict[int, int] = {}

    async def read(self, request: RequestId, *, bytes_max: float = math.inf) -> RequestHistory:
        """Return one request's history. Raises HistoryTooLong, and LogError, also if a shared scan fails: a
        silent log would otherwise answer its readers one by one."""
        while True:
            reader = _Reader(request, anyio.Event(), bytes_max)
            records = self._last.get(request.at.shard, 0) - request.floor
            scan = _Scan(request.at, max(records, SHORT - 1).bit_length() // AGE_BITS)
            self._waiting.setdefault(scan, []).append(reader)
            if scan in self._reading:
                await reader.done.wait()
            else:
                await self._lead(scan)
            if reader.past is not None:
                if reader.past.size > bytes_max:
                    raise HistoryTooLong(f"the history has more than {bytes_max} bytes")
                return reader.past
            if reader.failure is not None:
                raise LogError(f"a shared scan failed: {reader.failure}")

    async def read_all(
        self, requests: Sequence[RequestId], *, bytes_max: float = math.inf
    ) -> list[RequestHistory]:
        """Return the history of each, with shared scans. Raises HistoryTooLong, LogError."""
        pasts: dict[str, RequestHistory] = {}

        async def read(request: RequestId) -> None:
            pasts[request.text] = await self.read(request, bytes_max=bytes_max)

        try:
            async with anyio.create_task_group() as tasks:
                for request in requests:
                    tasks.start_soon(read, request)
        except* HistoryTooLong as failed:
            raise HistoryTooLong(str(failed.exceptions[0])) from failed
        except* LogError as failed:
            raise LogError(f"could not read the history: {failed.exceptions[0]}") from failed
        return [pasts[request.text] for request in requests]

    async def _lead(self, scan: _Scan) -> None:
        """Scan for every reader that waits by then, including this one."""
        self._reading.add(scan)
        readers: list[_Reader] = []
        try:
            # Readers that were woken together ask again now, and one scan serves them all.
            await anyio.lowlevel.checkpoint()
            readers = self._waiting.pop(scan)
            pasts = await self._scan(scan.at, readers)
            for reader in readers:
                reader.past = pasts.get(reader.request.text)
            for reader in readers:
                if reader.past is not None:
                    reader.done.set()
                    await anyio.lowlevel.checkpoint()
        except ContentUndecipherable:
            # One request's content: the others are read again.
            raise
        except LogError as error:
            for reader in readers:
                reader.failure = error
            raise
        finally:
            self._reading.discard(scan)
            for reader in readers + self._waiting.pop(scan, []):
                reader.done.set()

    async def _scan(self, at: Address, readers: list[_Reader]) -> dict[str, RequestHistory]:
        """Return the history of the first request, and of as many others as fit into SCAN_BYTES_MAX."""
        requests = [reader.request for reader in readers]
        most: dict[str, float] = {}
        for reader in readers:
            most[reader.request.text] = max(most.get(reader.request.text, 0), reader.bytes_max)
        stream = subjects.shard_stream(at.shard)
        target = max([await self._log.last_sequence(stream, subject) for subject in subjects.history(at)])
        self._last[at.shard] = max(self._last.get(at.shard, 0), target)
        pasts = {request.text: RequestHistory(position=target) for request in requests}
        decoded = 0
        lives = RequestStates()
        for request in requests:
            lives.follow(request.text)
        later = requests
        while later:
            first = min(request.floor for request in later)
            later = []
            async with aclosing(
                self._log.scan(stream, subjects.history(at), first=first, target=target)
            ) as batches:
                async for batch in batches:
                    for stored in batch:
                        _fold(stored, lives, pasts)
                        decoded += len(stored.data)
                        if decoded >= SLICE_BYTES:
                            decoded = 0
                            await anyio.lowlevel.checkpoint()
                            if all(past.size > most[text] for text, past in pasts.items()):
                                break
                    too_long = {text for text, past in pasts.items() if past.size > most[text]}
                    for text in too_long:
                        pasts[text].counted.clear()
                        lives.forget(text)
                    kept = pasts.keys() - too_long
                    while len(kept) > 1 and sum(pasts[text].size for text in kept) > SCAN_BYTES_MAX:
                        left_out = next(text for text in reversed(pasts) if text in kept)
                        kept.discard(left_out)
                        lives.forget(left_out)
                        del pasts[left_out]
                    going_on = [one for one in requests if one.text in kept and not _ended(pasts[one.text])]
                    begun_by = batch[-1].sequence + GAP if batch else target
                    if all(request.floor > begun_by for request in going_on):
                        later = going_on
                        break
        for text, past in pasts.items():
            if past.size <= most[text]:
                await self._open(past)
        return pasts

    async def _open(self, past: RequestHistory) -> None:
        if past.accepted is None:
            return
        past.accepted, past.seal = await opened(self._log, past.accepted)
        if (seal := past.seal) is not None:
            async for index, counted in sliced(list(enumerate(past.counted))):
                past.counted[index] = replace(counted, event=seal.opened(counted.event))


async def sliced(items: Iterable[Item]) -> AsyncIterator[Item]:
    """Yield items, and let other tasks run after every SLICE of them."""
    for index, item in enumerate(items, 1):
        yield item
        if index % SLICE == 0:
            await anyio.lowlevel.checkpoint()


def in_order(pasts: Sequence[RequestHistory]) -> list[tuple[str, CountedEvent]]:
    """Return the counted events of all requests, each with its request, in log order."""
    every = [(past.accepted.request, counted) for past in pasts if past.accepted for counted in past.counted]
    return sorted(every, key=lambda item: item[1].position) if len(pasts) > 1 else every


def _ended(past: RequestHistory) -> bool:
    return past.life.phase == "ended"


def _fold(stored: Stored, lives: RequestStates, pasts: dict[str, RequestHistory]) -> None:
    at = subjects.parse(stored.subject)
    assert at is not None, "a history's subjects are those of requests"
    events = codec.decode(stored.data, stored.subject)[1]
    for index, event in enumerate(events):
        if (counted := lives.fold(event, at)) is None:
            continue
        past = pasts[counted[0]]
        past.size += len(stored.data) // len(events)
        past.life = counted[1]
        past.counted.append(CountedEvent(event, counted[1], stored.stored_at_ns, (stored.sequence, index)))
        if isinstance(event, RequestAccepted):
            past.accepted = event
