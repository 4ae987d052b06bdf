"""Readers of one lane share a scan, and if it fails, later ones can still read."""

import contextlib
import math
from collections.abc import AsyncGenerator, Sequence
from functools import partial

import anyio
import anyio.lowlevel
import pytest

from events import codec, ids, request_history, subjects
from events.encryption import ContentUndecipherable
from events.log import LogError, Stored
from events.request_history import HistoryReader, HistoryTooLong, RequestHistory
from events.schema import AttemptStarted, CancelRequested, Parameters, RequestAccepted, TokensGenerated

pytestmark = pytest.mark.anyio

AT = subjects.Address(0, "lane1234", "m")


class Scans:
    """The log that a `HistoryReader` needs: one stored acceptance a request, and slow scans, counted."""

    def __init__(self, requests: Sequence[str]) -> None:
        self.count = 0
        self.failing = 0
        self.error: type[LogError] = LogError
        self.stored = [
            Stored(subjects.request(AT), at, at, codec.encode("w", [acceptance(request)]))
            for at, request in enumerate(requests, 1)
        ]

    async def last_sequence(self, stream: str, subject: str | None = None) -> int:
        await anyio.lowlevel.checkpoint()
        return len(self.stored)

    async def scan(
        self, stream: str, names: Sequence[str], *, first: int, target: int
    ) -> AsyncGenerator[Sequence[Stored], None]:
        self.count += 1
        await anyio.sleep(0.02)
        if self.count <= self.failing:
            raise self.error("the broker is away")
        yield [stored for stored in self.stored if first <= stored.sequence <= target]


def acceptance(request: str) -> RequestAccepted:
    return RequestAccepted(
        request=request,
        account="dev",
        key="k",
        model="m",
        kind="inference",
        input="x",
        parameters=Parameters(),
        stream=True,
        prompt_tokens_max=1,
        deadline_ms=1,
        price_version=1,
    )


def request_ids(count: int, *, floor: int = 0) -> list[str]:
    return [
        ids.new_request_id(secret=b"s", account="dev", at=AT, floor=floor, entropy=number.to_bytes(10, "big"))
        for number in range(count)
    ]


async def test_a_hundred_readers_share_two_scans() -> None:
    requests = request_ids(100)
    log = Scans(requests)
    histories = HistoryReader(log)  # type: ignore[arg-type]
    found: dict[str, RequestHistory] = {}

    async def read(text: str) -> None:
        request = ids.parse_request_id(text)
        assert request is not None
        found[text] = await histories.read(request)

    async with anyio.create_task_group() as tasks:
        for text in requests:
            tasks.start_soon(partial(read, text))
    assert log.count <= 2
    assert all(found[text].accepted is not None for text in requests)
    assert all(found[text].accepted.request == text for text in requests)


async def test_readers_beyond_what_one_scan_keeps_wait_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = request_ids(10)
    log = Scans(requests)
    monkeypatch.setattr(request_history, "SCAN_BYTES_MAX", 4 * len(log.stored[0].data))
    histories = HistoryReader(log)  # type: ignore[arg-type]
    found: list[str] = []

    async def read(text: str) -> None:
        past = await histories.read(ids.parsed(text))
        assert past.accepted is not None
        found.append(past.accepted.request)

    async with anyio.create_task_group() as tasks:
        for text in requests:
            tasks.start_soon(read, text)
    assert sorted(found) == sorted(requests)
    # The one that scans goes on last.
    assert set(found[:4]) == set(requests[:4])
    assert log.count == 3


async def test_readers_of_one_scan_go_on_one_after_the_other() -> None:
    (request,) = request_ids(1)
    histories = HistoryReader(Scans([request]))  # type: ignore[arg-type]
    times: list[int] = []
    turns = 0

    async def read() -> None:
        await histories.read(ids.parsed(request))
        times.append(turns)

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(read)
        while len(times) < 20:
            turns += 1
            await anyio.lowlevel.checkpoint()
    assert max(times.count(turn) for turn in times) <= 2


class Long(Scans):
    """The log of a request that has ended and of a later one, with many records between them."""

    def __init__(self, old: str, young: str) -> None:
        super().__init__([old])
        self.firsts: list[int] = []
        self.goes_on = anyio.Event()
        cancelled = CancelRequested(request=old, why="client")
        # Ended, because no attempt has begun.
        self.stored.append(Stored(subjects.cancel(AT), 2, 2, codec.encode("w", [cancelled])))
        self.stored.append(Stored(subjects.request(AT), 100_001, 3, codec.encode("w", [acceptance(young)])))

    async def last_sequence(self, stream: str, subject: str | None = None) -> int:
        return 100_001

    async def scan(
        self, stream: str, names: Sequence[str], *, first: int, target: int
    ) -> AsyncGenerator[Sequence[Stored], None]:
        self.firsts.append(first)
        if first < 50_000:
            await self.goes_on.wait()
        for stored in self.stored:
            if first <= stored.sequence <= target:
                yield [stored]


async def test_a_young_request_is_read_while_the_scan_of_an_old_one_goes_on() -> None:
    (old,), (young,) = request_ids(1), request_ids(1, floor=100_000)
    log = Long(old, young)
    histories = HistoryReader(log)  # type: ignore[arg-type]
    await histories.read(ids.parsed(young))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(histories.read, ids.parsed(old))
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(1):
            assert (await histories.read(ids.parsed(young))).accepted is not None
        log.goes_on.set()


async def test_a_scan_skips_what_lies_between_its_requests() -> None:
    (old,), (young,) = request_ids(1), request_ids(1, floor=100_000)
    log = Long(old, young)
    log.goes_on.set()
    # Nothing is known of the log yet, so both share a scan.
    pasts = await HistoryReader(log).read_all([ids.parsed(old), ids.parsed(young)])  # type: ignore[arg-type]
    assert [past.accepted is not None for past in pasts] == [True, True]
    assert pasts[0].life.phase == "ended"
    assert log.firsts == [0, 100_000]


async def test_who_waited_for_a_scan_that_failed_scans_itself() -> None:
    requests = request_ids(3)
    log = Scans(requests)
    log.failing = 1
    histories = HistoryReader(log)  # type: ignore[arg-type]
    outcomes: list[object] = []

    async def read(text: str) -> None:
        request = ids.parse_request_id(text)
        assert request is not None
        try:
            outcomes.append((await histories.read(request)).accepted)
        except LogError:
            outcomes.append("failed")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read, requests[0])
        await anyio.sleep(0.01)
        tasks.start_soon(read, requests[1])
        tasks.start_soon(read, requests[2])
    assert outcomes.count("failed") == 1
    assert len(outcomes) == 3


async def test_a_log_that_fails_answers_all_readers_of_a_scan_at_once() -> None:
    requests = request_ids(50)
    log = Scans(requests)
    log.failing = 50
    histories = HistoryReader(log)  # type: ignore[arg-type]
    failed: list[str] = []

    async def read(text: str) -> None:
        with pytest.raises(LogError):
            await histories.read(ids.parsed(text))
        failed.append(text)

    async with anyio.create_task_group() as tasks:
        for text in requests:
            tasks.start_soon(read, text)
    assert len(failed) == 50
    assert log.count <= 2


async def test_a_content_that_cannot_be_decrypted_fails_no_other_reader() -> None:
    requests = request_ids(3)
    log = Scans(requests)
    log.failing, log.error = 1, ContentUndecipherable
    histories = HistoryReader(log)  # type: ignore[arg-type]
    found: list[str] = []

    async def read(text: str) -> None:
        with contextlib.suppress(ContentUndecipherable):
            await histories.read(ids.parsed(text))
            found.append(text)

    async with anyio.create_task_group() as tasks:
        for text in requests:
            tasks.start_soon(read, text)
    assert len(found) == 2


async def test_nothing_is_read_behind_the_end() -> None:
    (request,) = request_ids(1)
    log = Scans([request])
    ended = codec.encode("w", [CancelRequested(request=request, why="client")])
    log.stored.append(Stored(subjects.cancel(AT), 2, 2, ended))
    parsed = ids.parse_request_id(request)
    assert parsed is not None
    past = await HistoryReader(log).read(parsed)  # type: ignore[arg-type]
    assert (past.life.phase, past.life.reason) == ("ended", "cancelled")


async def test_a_reader_that_accepts_less_keeps_nothing_and_spoils_nothing_for_others() -> None:
    short, long = request_ids(2)
    log = Scans([short, long])
    words = TokensGenerated(attempt="a", index=0, token_ids=(1,), text="word" * 500)
    started = AttemptStarted(
        request=long, attempt="a", after=None, resume_index=0, worker="w", prompt_tokens=1, accepted_at_ns=1,
        engine="sim", model_digest="", delivery="",
    )  # fmt: skip
    log.stored.append(Stored(subjects.work(AT), 3, 3, codec.encode("w", [started, words])))
    histories = HistoryReader(log)  # type: ignore[arg-type]
    kept: dict[tuple[str, float], RequestHistory | None] = {}

    async def read(text: str, bytes_max: float) -> None:
        try:
            kept[text, bytes_max] = await histories.read(ids.parsed(text), bytes_max=bytes_max)
        except HistoryTooLong:
            kept[text, bytes_max] = None

    for readers in ([(short, 1500), (long, 1500)], [(long, 1500), (long, math.inf), (short, 1500)]):
        kept.clear()
        async with anyio.create_task_group() as tasks:
            for one in readers:
                tasks.start_soon(read, *one)
        past = kept[short, 1500]
        assert past is not None
        assert past.accepted is not None
        assert kept[long, 1500] is None
    whole = kept[long, math.inf]
    assert whole is not None
    assert len(whole.counted) == 3


class Instant(Scans):
    async def scan(
        self, stream: str, names: Sequence[str], *, first: int, target: int
    ) -> AsyncGenerator[Sequence[Stored], None]:
        yield self.stored


async def test_other_tasks_run_while_records_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_history, "SLICE_BYTES", 1)
    requests = request_ids(200)
    histories = HistoryReader(Instant(requests))  # type: ignore[arg-type]
    turns = 0
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(histories.read, ids.parsed(requests[0]))
        await anyio.lowlevel.checkpoint()
        while histories._reading:
            turns += 1
            await anyio.lowlevel.checkpoint()
    assert turns > 100
