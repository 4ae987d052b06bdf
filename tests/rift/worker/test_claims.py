"""The reader of a worker's claims, which reads its own records at a pace."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from events import codec, ids, subjects
from events.log import Job, Log
from events.memory import MemoryBroker, connect
from events.schema import AttemptStarted, CancelRequested, Parameters, RequestAccepted
from rift.worker import claims as module
from rift.worker.claims import Claims, open_claims

pytestmark = pytest.mark.anyio

AT = subjects.Address(0, "lane1234", "model-a")
STREAM = subjects.shard_stream(0)
NOW_NS = 1_800_000_000_000_000_000
REQUEST = ids.new_request_id(secret=b"s" * 32, account="dev", at=AT, floor=0, entropy=bytes(ids.RANDOM_BYTES))
ACCEPTED = RequestAccepted(
    request=REQUEST,
    account="dev",
    key="k",
    model="model-a",
    kind="inference",
    input="x",
    parameters=Parameters(),
    stream=True,
    prompt_tokens_max=1,
    deadline_ms=60_000,
    price_version=1,
)


class Stopped:
    """The part of an attempt that the claims use."""

    def __init__(self, attempt: str) -> None:
        self.id = attempt
        self.finished = False
        self.reasons: list[Any] = []

    def stop(self, reason: Any) -> None:
        self.reasons.append(reason)


def started(attempt: str) -> AttemptStarted:
    return AttemptStarted(
        request=REQUEST,
        attempt=attempt,
        after=None,
        resume_index=0,
        worker="w",
        prompt_tokens=1,
        accepted_at_ns=NOW_NS,
        engine="sim",
        model_digest="d",
        delivery="x",
    )


@asynccontextmanager
async def waiting_reader(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Log, Claims, Job]]:
    """Return the log, the claims and a first delivery, right after the reader has begun its long pause."""
    monkeypatch.setattr(module, "READ_PACE_S", 1000.0)
    async with anyio.create_task_group() as tasks:
        log = connect(MemoryBroker(tasks, lambda: NOW_NS))
        async with open_claims(log, 0, "model-a") as claims:
            claims.jobs.want(1)
            await log.append(STREAM, subjects.request(AT), codec.encode("g", [ACCEPTED]))
            job = await anext(aiter(claims.jobs))
            await log.append(STREAM, subjects.work(AT), codec.encode("w", []))
            await claims.advanced.wait()
            yield log, claims, job
        tasks.cancel_scope.cancel()


async def test_a_cancel_is_noticed_before_the_reader_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    async with waiting_reader(monkeypatch) as (log, claims, job):
        claim = claims.take(job)
        assert claim is not None
        assert await claims.catch_up(claim)
        claim.attempt = attempt = Stopped("a")  # type: ignore[assignment]
        await log.append(STREAM, subjects.work(AT), codec.encode("w", [started("a")]))
        cancel = CancelRequested(request=REQUEST, why="client")
        await log.append(STREAM, subjects.cancel(AT), codec.encode("g", [cancel]))
        with anyio.fail_after(5):
            await claims.advanced.wait()
        assert attempt.reasons == ["cancelled"]


@pytest.mark.parametrize("deliveries", [1, 2])
async def test_a_job_that_was_delivered_before_is_not_taken_for_fresh(
    deliveries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with waiting_reader(monkeypatch) as (log, claims, job):
        await log.append(STREAM, subjects.work(AT), codec.encode("v", [started("of another worker")]))
        claim = claims.take(Job(job.stored, job.ack, deliveries, job.epoch))
        assert claim is not None
        assert await claims.catch_up(claim) is (deliveries == 1), "another worker's attempt is alive"


async def test_a_start_that_must_count_does_not_wait_for_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with waiting_reader(monkeypatch) as (log, claims, job):
        claim = claims.take(job)
        assert claim is not None
        assert await claims.catch_up(claim)
        claim.attempt = Stopped("a")  # type: ignore[assignment]
        sequence = await log.append(STREAM, subjects.work(AT), codec.encode("w", [started("a")]))
        with anyio.fail_after(5):
            assert await claims.has_counted(claim, sequence)


async def test_a_dead_attempt_does_not_look_alive_to_a_reader_that_has_read_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ATTEMPT_ALIVE_S", 0.05)
    async with anyio.create_task_group() as tasks:
        log = connect(MemoryBroker(tasks, lambda: NOW_NS))
        await log.append(STREAM, subjects.request(AT), codec.encode("g", [ACCEPTED]))
        await log.append(STREAM, subjects.work(AT), codec.encode("v", [started("dead")]))
        async with open_claims(log, 0, "model-a") as claims:
            claims.jobs.want(1)
            job = await anext(aiter(claims.jobs))
            await anyio.sleep(0.1)
            claim = claims.take(Job(job.stored, job.ack, 2, job.epoch))
            assert claim is not None
            assert await claims.catch_up(claim)
        tasks.cancel_scope.cancel()
