"""A scribe that writes histories, random histories, and an in-memory log that holds them in lists."""

import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from events import codec, ids, subjects
from events.log import Conflict, LogError, NoResponders, Stored
from events.publisher import destination
from events.schema import (
    AccountOpened,
    AttemptReleased,
    AttemptStarted,
    CancelRequested,
    Message,
    Parameters,
    Price,
    PricePublished,
    Problem,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from events.subjects import BOOK, LEADER, Address
from replay.warehouse.warehouse import Warehouse

CANARY = "canary-in-the-prompt-7f3a"
AT = Address(0, "laneaaaa", "tiny-1")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
START_NS = 1_700_000_000_000_000_000


class Scribe:
    """Writes records to streams that are lists; each `tell` writes one record."""

    def __init__(self) -> None:
        self.streams: dict[str, list[Stored]] = {}
        self.now_ns = START_NS
        self._ids = 0

    def put(self, stream: str, subject: str, data: bytes, *, step_ns: int = 1_000_000) -> int:
        self.now_ns += step_ns
        messages = self.streams.setdefault(stream, [])
        messages.append(Stored(subject, len(messages) + 1, self.now_ns, data))
        return len(messages)

    def tell(self, *events: Any, at: Address = AT, kind: str = "work", step_ns: int = 1_000_000) -> int:
        subject = {"request": subjects.request, "work": subjects.work, "cancel": subjects.cancel}[kind](at)
        return self.put(
            subjects.shard_stream(at.shard), subject, codec.encode("test", events), step_ns=step_ns
        )

    def book(self, *events: Any) -> int:
        return self.put(BOOK, subjects.book("test", "x"), codec.encode("test", events))

    def fleet(self, *events: Any) -> int:
        return self.put(subjects.FLEET, destination(events[0]).subject, codec.encode("test", events))

    def unique(self, prefix: str = "b") -> str:
        self._ids += 1
        return f"{prefix}-{self._ids}"

    def prices(
        self, version: int = 1, *, model: str = "tiny:1", prompt: int = 10, output: int = 20, **more: int
    ) -> int:
        price = Price(model=model, prompt_nanousd=prompt, output_nanousd=output, **more)
        return self.book(PricePublished(id=self.unique(), version=version, prices=(price,)))

    def request_id(self, *, at: Address = AT, account: str = "dev") -> str:
        self._ids += 1
        floor = len(self.streams.get(subjects.shard_stream(at.shard), ()))
        entropy = self._ids.to_bytes(ids.RANDOM_BYTES, "big")
        return ids.new_request_id(secret=b"s" * 32, account=account, at=at, floor=floor, entropy=entropy)

    def accepted(self, request: str, **fields: Any) -> RequestAccepted:
        defaults: dict[str, Any] = {
            "account": "dev",
            "key": "k1",
            "model": "tiny:1",
            "kind": "inference",
            "input": (Message(role="user", content=CANARY),),
            "parameters": Parameters(stop=(CANARY,)),
            "stream": True,
            "prompt_tokens_max": 100,
            "deadline_ms": 60_000,
            "price_version": 1,
            "book": len(self.streams.get(BOOK, ())),
        }
        return RequestAccepted(request=request, **(defaults | fields))

    def accept(self, **fields: Any) -> str:
        request = self.request_id()
        self.tell(self.accepted(request, **fields), kind="request")
        return request

    def started(self, request: str, attempt: str, **fields: Any) -> AttemptStarted:
        return started(request, attempt, **fields)

    def tokens_of(self, attempt: str, index: int, count: int = 1, **fields: Any) -> TokensGenerated:
        return tokens_of(attempt, index, count, **fields)

    def finished_request(self, *, tokens: int = 3, **fields: Any) -> str:
        """Write a complete, ordinary request and return its id."""
        request = self.accept(**fields)
        attempt = self.unique("att")
        self.tell(started(request, attempt))
        for index in range(tokens):
            self.tell(tokens_of(attempt, index))
        self.tell(RequestFinished(request=request, attempt=attempt, reason="stop", output_tokens=tokens))
        return request


def started(request: str, attempt: str, **fields: Any) -> AttemptStarted:
    defaults: dict[str, Any] = {
        "after": None,
        "resume_index": 0,
        "worker": "w1",
        "prompt_tokens": 7,
        "accepted_at_ns": START_NS,
        "engine": "sim",
        "model_digest": "d",
        "delivery": "x",
        "simulated": True,
    }
    return AttemptStarted(request=request, attempt=attempt, **(defaults | fields))


def tokens_of(attempt: str, index: int, count: int = 1, **fields: Any) -> TokensGenerated:
    return TokensGenerated(attempt=attempt, index=index, token_ids=tuple(range(count)), text=CANARY, **fields)


REASONS = ("stop", "length", "tool_calls", "cancelled", "revoked", "expired", "invalid", "failed", "poison")


class Chaos:
    """Writes a random history of a few requests: mostly valid events, and often invalid ones."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.scribe = Scribe()
        # By request: the attempts and the tokens written for it, whether or not they count.
        self.attempts: dict[str, list[str]] = {}
        self.tokens: dict[str, int] = {}
        self.acceptances: dict[str, RequestAccepted] = {}
        self.versions = 0

    def write(self, steps: int) -> dict[str, list[Stored]]:
        self.publish()
        for _ in range(steps):
            events = self.some_events()
            if events:
                step_ns = self.dice.choice((1, 1_000, 5_000_000, -3_000_000))
                self.scribe.tell(
                    *events, kind=self.dice.choice(("request", "work", "cancel")), step_ns=step_ns
                )
        return self.scribe.streams

    def publish(self) -> None:
        self.versions += 1
        prompt, output = self.dice.choice((0, 1, 150, 10**12)), self.dice.choice((0, 1, 400, 10**12))
        self.scribe.prices(self.versions, prompt=prompt, output=output, second_nanousd=3)
        # The same version under another id is ignored.
        self.scribe.prices(self.versions, prompt=9, output=9)
        self.scribe.book(AccountOpened(id="same", account="dev"))

    def some_events(self) -> list[Any]:
        if self.dice.random() < 0.05:
            self.publish()
        events = (self.event() for _ in range(self.dice.choice((1, 1, 1, 2, 5))))
        return [event for event in events if event is not None]

    def event(self) -> Any:
        requests = list(self.attempts)
        if not requests or (len(requests) < 6 and self.dice.random() < 0.12):
            return self.acceptance()
        request = self.dice.choice(requests[-3:] if self.dice.random() < 0.9 else requests)
        if self.dice.random() < 0.06:
            return self.acceptances[request]
        attempts = self.attempts[request]
        if not attempts or self.dice.random() < 0.12:
            return self.start(request)
        attempt = attempts[-1] if self.dice.random() < 0.85 else self.dice.choice(attempts)
        roll = self.dice.random()
        if roll < 0.55:
            return self.more_tokens(request, attempt)
        if roll < 0.67:
            why = self.dice.choice(("draining", "host", "lost", "stalled"))
            return AttemptReleased(attempt=attempt, why=why)
        if roll < 0.77:
            why = self.dice.choice(("client", "disconnect", "revoked", "unanswered"))
            return CancelRequested(request=request, why=why, attempt=self.dice.choice((None, None, attempt)))
        return self.finish(request, attempt)

    def acceptance(self) -> RequestAccepted:
        request = self.scribe.request_id(at=AT if self.dice.random() < 0.95 else Address(0, "laneother", "b"))
        self.attempts[request] = []
        accepted = self.acceptances[request] = self.scribe.accepted(
            request,
            account=self.dice.choice(("dev", "acme")),
            price_version=self.dice.randint(1, self.versions),
            plan=self.dice.choice(("per_token", "per_token", "per_token", "per_second")),
            client_request_id=self.dice.choice((None, "c-1", '"\\')),
            traceparent=self.dice.choice((None, TRACEPARENT)),
            tracestate=self.dice.choice((None, "a=1")),
            admission_ns=self.dice.choice((None, 0, 1_500_000)),
        )
        return accepted

    def start(self, request: str) -> AttemptStarted:
        attempts = self.attempts[request]
        again = bool(attempts) and self.dice.random() < 0.1
        attempt = self.dice.choice(attempts) if again else self.scribe.unique("att")
        after = attempts[-1] if attempts and self.dice.random() < 0.9 else None
        resume = self.tokens.get(request, 0) if self.dice.random() < 0.9 else self.dice.randint(0, 5)
        if not again:
            attempts.append(attempt)
        return started(
            request,
            attempt,
            after=after,
            resume_index=resume,
            prompt_tokens=self.dice.randint(0, 9),
            simulated=self.dice.random() < 0.5,
        )

    def more_tokens(self, request: str, attempt: str) -> TokensGenerated:
        index = self.tokens.get(request, 0) if self.dice.random() < 0.9 else self.dice.randint(0, 5)
        count = self.dice.randint(1, 3)
        if index == self.tokens.get(request, 0):
            self.tokens[request] = index + count
        return tokens_of(attempt, index, count, cached_tokens=self.dice.choice((0, 0, 4)))

    def finish(self, request: str, attempt: str) -> RequestFinished:
        reason = self.dice.choice(REASONS)
        problem = Problem(code="code", message=CANARY) if reason in ("invalid", "failed", "poison") else None
        return RequestFinished(
            request=request,
            attempt=attempt if self.dice.random() < 0.8 else None,
            reason=reason,
            output_tokens=self.tokens.get(request, 0)
            if self.dice.random() < 0.9
            else self.dice.randint(0, 5),
            error=problem,
        )


class ListFollower:
    """Yields the messages of its list after `position`, and waits for more."""

    def __init__(self, log: "ListLog", stream: str, subject: str, after: int) -> None:
        self.position = after
        self._log, self._stream, self._start = log, stream, subject.removesuffix(">")

    def hurry(self) -> None:
        """Do nothing: this follower is not paced."""

    def __aiter__(self) -> "ListFollower":
        return self

    async def __anext__(self) -> Sequence[Stored]:
        while True:
            grown = self._log.grown
            messages = self._log.streams.get(self._stream, [])
            batch = [m for m in messages if m.sequence > self.position and m.subject.startswith(self._start)]
            if batch:
                self.position = batch[-1].sequence
                return batch
            await grown.wait()


class ListLog:
    """The parts of `events.log.Log` that the control process uses, over lists. It takes elections only."""

    epoch = 0
    is_connected = True

    def __init__(self, streams: dict[str, list[Stored]]) -> None:
        self.streams = streams
        self.grown = anyio.Event()
        self.handlers: dict[str, Callable[[bytes], Awaitable[bytes]]] = {}

    def grow(self) -> None:
        """Wake the followers after messages were added to the lists."""
        self.grown.set()
        self.grown = anyio.Event()

    async def last_sequence(self, stream: str, subject: str | None = None) -> int:
        messages = self.streams.get(stream, [])
        if subject is not None:
            messages = [m for m in messages if m.subject == subject]
        return messages[-1].sequence if messages else 0

    async def last(self, stream: str, subject: str) -> Stored | None:
        start = subject.removesuffix(">")
        messages = [m for m in self.streams.get(stream, []) if m.subject.startswith(start)]
        return messages[-1] if messages else None

    async def room_bytes(self, stream: str) -> int:
        return 1 << 40

    capacity_bytes = room_bytes

    async def stream_servers(self, stream: str) -> Mapping[str, str]:
        return {}

    async def scan(
        self, stream: str, subjects: Sequence[str], *, first: int, target: int
    ) -> AsyncIterator[Sequence[Stored]]:
        assert len(subjects) == 1
        yield [m for m in self.streams.get(stream, []) if first <= m.sequence <= target]

    async def first_sequence(self, stream: str) -> int:
        messages = self.streams.get(stream, [])
        return messages[0].sequence if messages else 1

    @asynccontextmanager
    async def follow(
        self, stream: str, subjects: Sequence[str], *, after: int, pace_s: float = 0.0
    ) -> AsyncIterator[ListFollower]:
        assert len(subjects) == 1
        yield ListFollower(self, stream, subjects[0], after)

    async def append(self, stream: str, subject: str, data: bytes, *, expect_last: int | None = None) -> int:
        if subject != LEADER:
            raise LogError(f"{stream} takes nothing here")
        if await self.last_sequence(stream, subject) != expect_last:
            raise Conflict(subject)
        messages = self.streams.setdefault(stream, [])
        sequence = messages[-1].sequence + 1 if messages else 1
        messages.append(Stored(subject, sequence, START_NS, data))
        self.grow()
        return sequence

    @asynccontextmanager
    async def answer(
        self, subject: str, handler: Callable[[bytes], Awaitable[bytes]], *, concurrent: bool = False
    ) -> AsyncIterator[None]:
        self.handlers[subject] = handler
        try:
            yield
        finally:
            del self.handlers[subject]

    async def ask(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        if subject not in self.handlers:
            raise NoResponders(f"no process answers {subject}")
        with anyio.fail_after(timeout_s):
            return await self.handlers[subject](data)


@pytest.fixture
def scribe() -> Scribe:
    return Scribe()


@pytest.fixture
def canary() -> str:
    return CANARY


@pytest.fixture(scope="session")
def chaos() -> type[Chaos]:
    return Chaos


@pytest.fixture(scope="session")
def list_log() -> type[ListLog]:
    return ListLog


@pytest.fixture(scope="session")
def empty_warehouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to copy: to make one takes three times as long as to open it."""
    path = tmp_path_factory.mktemp("empty") / "rift.duckdb"
    Warehouse.open(path).close()
    return path


@pytest.fixture
def warehouse(empty_warehouse: Path, tmp_path: Path) -> Iterator[Warehouse]:
    opened = Warehouse.open(Path(shutil.copy(empty_warehouse, tmp_path / "rift.duckdb")))
    yield opened
    opened.close()
