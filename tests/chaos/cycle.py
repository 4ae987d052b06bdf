"""Run cycles in one installation: many streams, a fault, and then every check.

plans → clients and fault → log → each stream, its fetched object, its replay → now and then the bill
"""

import random
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import httpx

from events.log import LogError
from tests.chaos import checks, expected
from tests.chaos.checks import Counts, Expected, LoggedRequest
from tests.chaos.client import Client, ClientPlan, Progress, Transport, replay
from tests.chaos.faults import ABORTED_S, KINDS, SECOND_NS, Cycle, taken_over
from tests.chaos.ledger import Ignored, Ledger
from tests.chaos.rig import Rig, RigBroken

STREAMS = 16
# Reading the bill starts a process, so it is done after this many cycles and at the end.
BILL_EVERY = 10
# The largest lag of the projection.
BILL_S = 30.0
# Covers the detection of a lost gateway, its clients' grace period and the end of its requests.
ORPHAN_S = 60.0
# Streams begin spread over this time, so that a fault also meets waiting requests.
SPREAD_S = 0.5
# The number of streams in each cycle that are replayed from the first token.
REPLAYS = 2
FATAL_TOKENS = 200
# The share of streams that are cancelled, and, if gateways die, the share with an idempotency key.
CANCELLED = 0.1
KEYED = 0.75
CLIENT_SILENCE_S = 60.0

ALPHABET = "abcdefgh ijklmnop qrstuvw xyz .,?é水🌊"


class Options(NamedTuple):
    kind: str
    cycles: int
    seed: str = ""
    engine: str = "sim"
    streams: int = STREAMS
    workers: int | None = None
    shards: int = 1
    brokers: int = 1
    folder: Path | None = None


@dataclass
class Report:
    """The result of a run: its cycles, the violations, and the waiting times of clients."""

    cycles: int = 0
    stopped: bool = False
    counts: Counts = field(default_factory=Counts)
    streams: int = 0
    tokens: int = 0
    taken_over: int = 0
    refusals: int = 0
    breaks: int = 0
    orphans: int = 0
    ignored: Ignored = field(default_factory=Ignored)
    requests_by_shard: dict[str, int] = field(default_factory=dict)
    waits_s: dict[str, list[float]] = field(default_factory=dict)

    def line(self) -> str:
        return self.counts.line(self.cycles)


class Bill(NamedTuple):
    """A checked stream whose row in the bill is still to be checked."""

    request: str
    logged: LoggedRequest
    charge: int


class Run:
    def __init__(self, options: Options, rig: Rig, say: Callable[[str], None], report: Report) -> None:
        self.report = report
        self.ledger = Ledger()
        self._options, self._rig, self._say = options, rig, say
        self._kind = KINDS[options.kind]
        self._due: list[Bill] = []
        self._known: set[str] = set()
        self._resumes = False

    async def cycles(self) -> None:
        """Run all cycles. Raises RigBroken."""
        headers = {"Authorization": f"Bearer {self._rig.key}"}
        timeout = httpx.Timeout(CLIENT_SILENCE_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._options.streams)
        transport = Transport(limits=limits)
        async with httpx.AsyncClient(headers=headers, timeout=timeout, transport=transport) as http:
            self._resumes = await can_resume(http, self._rig.urls[0])
            if self._kind.keys and not self._resumes:
                raise RigBroken("this gateway has no GET /v1/inference/{id}/events to resume from")
            for number in range(self._options.cycles):
                await self._cycle(number, http)
                self.report.cycles += 1
                if number == 0:
                    await self._check_installation()
                if self.report.cycles % BILL_EVERY == 0:
                    await self._check_bill()
        await self._check_bill()
        await self._check_unknown_requests()
        await self._check_installation()

    # --- one cycle -----------------------------------------------------------------------------------

    async def _cycle(self, number: int, http: httpx.AsyncClient) -> None:
        chance = random.Random(f"{self._options.seed}/{self._options.kind}/{number}")
        progress = Progress()
        clients = []
        for stream in range(self._options.streams):
            fatal = self._kind.fatal and not stream
            plan = await self._plan(chance, f"{self._options.seed}-{number}-{stream}", fatal=fatal)
            clients.append(
                Client(http, self._rig.urls, plan, model=expected.MODEL, progress=progress, chance=chance)
            )
        tokens = sum(client.plan.max_tokens for client in clients)
        cycle = Cycle(self._rig, clients, progress, chance, tokens)
        began_at = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._kind.fault, cycle)
            async with anyio.create_task_group() as streams:
                for client in clients:
                    streams.start_soon(_later, chance.uniform(0, SPREAD_S), client.run)
            cycle.ended.set()
        await self._rig.settled()
        if self._options.engine == "vllm":
            await self._rig.workers_ready()
        counts = await self._check(cycle, http)
        self._note(number, cycle, counts, anyio.current_time() - began_at)

    async def _plan(self, chance: random.Random, name: str, *, fatal: bool) -> ClientPlan:
        prompt = f"{name} " + "".join(chance.choices(ALPHABET, k=chance.randrange(1, 300)))
        keyed = self._kind.keys and chance.random() < KEYED
        seed, key = chance.randrange(1 << 30), f"chaos-{name}" if keyed else None
        cancel_at = chance.randrange(1, 100) if chance.random() < CANCELLED else None
        if self._options.engine != "sim":
            return ClientPlan(prompt, seed, chance.randrange(8, 65), key, None, cancel_at)
        if fatal:
            # Long enough for every engine that starts it to die in the middle.
            answer = await expected.answer(prompt, seed=seed, max_tokens=FATAL_TOKENS)
            return ClientPlan(prompt, seed, FATAL_TOKENS, None, answer, fatal=True)
        tokens = chance.choice((1, chance.randrange(2, 40), *(chance.randrange(40, 121) for _ in range(3))))
        answer = await expected.answer(prompt, seed=seed, max_tokens=tokens)
        return ClientPlan(prompt, seed, tokens, key, answer, cancel_at)

    # --- checks --------------------------------------------------------------------------------------

    async def _check(self, cycle: Cycle, http: httpx.AsyncClient) -> Counts:
        await self.ledger.read_on(self._rig.log)
        self.report.ignored = self.ledger.ignored
        self.report.requests_by_shard = self.ledger.requests_by_shard
        counts = Counts(unexplained=list(cycle.problems))
        if not cycle.done:
            counts.unexplained.append("the fault did not happen")
        for client in cycle.clients:
            own = await self._check_client(client, http)
            own.unexplained = [f"{client.request}: {problem}" for problem in own.unexplained]
            counts += own
        if self._resumes:
            for client in cycle.chance.sample(cycle.clients, min(REPLAYS, len(cycle.clients))):
                counts += await self._check_replay(client, http)
        ignored_ns = self.ledger.ignored.last_ns
        if cycle.woken_ns is not None and ignored_ns > cycle.woken_ns + ABORTED_S * SECOND_NS:
            late_s = (ignored_ns - cycle.woken_ns) / SECOND_NS
            counts.unexplained.append(f"a superseded attempt still wrote {late_s:.1f} s after it woke")
        return counts

    async def _check_client(self, client: Client, http: httpx.AsyncClient) -> Counts:
        counts = Counts(unexplained=list(client.anomalies))
        if not self._kind.healed:
            counts.unexplained += client.refusals
            if client.breaks or client.orphans:
                counts.unexplained.append(f"the stream broke off {client.breaks} times")
        if not client.request:
            counts.unexplained.append("the request was never accepted")
            return counts
        self._known.add(client.request)
        story = self.ledger.stories.get(client.request)
        logged = story.logged() if story else None
        counts += checks.check_log(client.frames, logged)
        if logged is None:
            return counts
        answer: Expected = client.plan.expected or checks.from_log(logged)
        if client.plan.fatal:
            answer = answer.poisoned(logged)
        elif client.plan.cancel_at is not None:
            answer = answer.cut(logged)
        counts += checks.check_stream(client.frames, answer)
        response = await http.get(f"{self._rig.urls[-1]}/v1/inference/{client.request}")
        if response.status_code == 200:
            counts += checks.check_retrieved(client.frames, response.json())
        else:
            counts.unexplained.append(f"fetching it: HTTP {response.status_code} {response.text[:300]}")
        received = set(checks.arrivals(client.frames, answer.pieces, lambda problem: None))
        self._due.append(Bill(client.request, logged, answer.charge_nanousd(len(received))))
        if logged.reason is not None:
            self.ledger.forget(client.request)
        return counts

    async def _check_replay(self, client: Client, http: httpx.AsyncClient) -> Counts:
        url = self._rig.urls[self._rig.urls.index(client.url) - 1]
        frames, status = await replay(http, url, client.request)
        counts = checks.check_replay(client.frames, frames)
        if status != 204:
            counts.unexplained.append(f"{client.request}: {status} after the last id, not 204")
        return counts

    async def _check_bill(self) -> None:
        """Compare the rows of recently checked streams with the log and the clients."""
        due, self._due = self._due, []
        rows: dict[str, dict[str, Any]] = {}
        names = ", ".join(f"'{bill.request}'" for bill in due)
        with anyio.move_on_after(BILL_S):
            while due:
                answer = await self._rig.sql(
                    "select request_id, finish_reason, prompt_tokens, output_tokens, attempts, "
                    f"charge_nanousd from requests where request_id in ({names})"
                )
                rows = {row["request_id"]: row for row in answer}
                if len(rows) == len(due) and all(row["finish_reason"] for row in answer):
                    break
                await anyio.sleep(0.1)
        counts = Counts()
        for bill in due:
            counts += checks.check_row(bill.request, rows.get(bill.request), bill.logged, charge=bill.charge)
        self.add(counts)

    async def _check_installation(self) -> None:
        """Run the installation's own checks: after the first cycle, and after the last."""
        self.add(Counts(unexplained=await self._rig.problems()))

    async def _check_unknown_requests(self) -> None:
        """Check that requests which no client knows have ended and are free.

        Orphans may be charged: their client had no idempotency key, and the gateway died before it answered.
        """
        rows: list[dict[str, Any]] = []
        with anyio.move_on_after(ORPHAN_S):
            while True:
                answer = await self._rig.sql("select request_id, finish_reason, charge_nanousd from requests")
                rows = [row for row in answer if row["request_id"] not in self._known]
                if all(row["finish_reason"] for row in rows):
                    break
                await anyio.sleep(1)
        counts = Counts(
            unexplained=[f"{row['request_id']} has not ended" for row in rows if not row["finish_reason"]]
        )
        charged = [f"{row['request_id']}: no client knows it" for row in rows if row["charge_nanousd"]]
        if rows:
            self._say(f"{len(rows)} requests have no client, {len(charged)} of them charged")
        counts.differing += charged[self.report.orphans :]
        self.add(counts)

    # --- reporting ----------------------------------------------------------------------------------

    def _note(self, number: int, cycle: Cycle, counts: Counts, seconds: float) -> None:
        report = self.report
        report.streams += len(cycle.clients)
        report.tokens += cycle.progress.tokens
        report.taken_over += taken_over(cycle.clients)
        report.refusals += sum(len(client.refusals) for client in cycle.clients)
        report.breaks += sum(client.breaks for client in cycle.clients)
        report.orphans += sum(client.orphans for client in cycle.clients)
        gaps_s = [client.gap_s() for client in cycle.clients]
        for name, waits_s in (
            ("first token", [client.first_s() for client in cycle.clients]),
            ("longest gap between two tokens", gaps_s),
            ("the same, taken over", [client.gap_s() for client in cycle.clients if client.attempts > 1]),
        ):
            report.waits_s.setdefault(name, []).extend(waits_s)
        self._say(
            f"cycle {number + 1}/{self._options.cycles}: {cycle.progress.tokens} tokens in {seconds:.1f} s, "
            f"{', '.join(cycle.done)}; {taken_over(cycle.clients)} taken over, "
            f"longest gap {max(gaps_s):.2f} s"
        )
        self.add(counts)

    def add(self, counts: Counts) -> None:
        self.report.counts += counts
        for problem in (*counts.unexplained, *counts.differing):
            self._say(f"  ! {problem}")
        if counts.lost or counts.duplicated or counts.reordered:
            self._say(f"  ! {counts.line(self.report.cycles)}")


async def can_resume(http: httpx.AsyncClient, url: str) -> bool:
    """Whether the gateway has the route to resume a stream."""
    response = await http.get(f"{url}/v1/inference/unknown/events")
    return response.status_code == 404 and response.json()["error"]["code"] == "request_not_found"


async def _later(seconds: float, run: Callable[[], Any]) -> None:
    await anyio.sleep(seconds)
    await run()


async def run(options: Options, say: Callable[[str], None], report: Report | None = None) -> Report:
    """Run the cycles in a fresh installation, whose folder is kept if a check failed.

    On cancellation it stops its processes, and `report` holds the results so far.
    """
    options = options._replace(seed=options.seed or secrets.token_hex(4))
    folder = options.folder or Path(tempfile.mkdtemp(prefix=f"rift-chaos-{options.kind}-"))
    kind = KINDS[options.kind]
    # A real engine takes 3 GB: two of them are enough for one to take over.
    workers = options.workers or (kind.workers if options.engine == "sim" else 2)
    rig_type = kind.rig if options.brokers == 1 else kind.cluster
    assert rig_type is not None, "this kind has no cluster"
    rig = rig_type(folder, engine=options.engine, workers=workers, shards=options.shards)
    whole = Run(options, rig, say, report or Report())
    say(f"kind {options.kind}, seed {options.seed}, {options.cycles} cycles of {options.streams} streams")
    began_at = anyio.current_time()
    try:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(_stop, rig, whole.report)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            try:
                await rig.start(tasks)
                began_at = anyio.current_time()
                await whole.cycles()
            except* (RigBroken, LogError, httpx.TransportError) as broken:
                for error in leaves(broken):
                    whole.add(Counts(unexplained=[f"{type(error).__name__}: {error}"]))
            tasks.cancel_scope.cancel()
    finally:
        summary(whole, anyio.current_time() - began_at, say)
        complete = whole.report.stopped or whole.report.cycles == options.cycles
        if whole.report.counts.clean and complete:
            shutil.rmtree(folder)
        else:
            say(f"everything is kept in {folder}")
    return whole.report


def leaves(group: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


async def _stop(rig: Rig, report: Report) -> None:
    with anyio.CancelScope(shield=True):
        left = await rig.stop()
        report.counts.unexplained += [f"still running: {command}" for command in left]
        rig.guard.dismiss()


def summary(whole: Run, seconds: float, say: Callable[[str], None]) -> None:
    report, ignored = whole.report, whole.report.ignored
    say(
        f"{report.cycles} cycles in {seconds:.0f} s ({report.cycles / max(seconds, 1) * 60:.1f} a minute): "
        f"{report.streams} streams, {report.tokens} tokens, {report.taken_over} taken over, "
        f"{report.breaks} connections broken and {report.refusals} refusals, all healed or listed above"
    )
    say(
        f"did not count in the log: {ignored.tokens} tokens, {ignored.starts} starts, {ignored.ends} ends, "
        f"{ignored.acceptances} acceptances"
    )
    say(f"requests by shard: {report.requests_by_shard}")
    for name, waits_s in report.waits_s.items():
        say(f"{name}: {spread(waits_s)}")


def spread(values_s: Sequence[float]) -> str:
    if not values_s:
        return "none"
    ordered = sorted(values_s)
    at = partial(_quantile, ordered)
    return f"p50 {at(50):.2f} s, p99 {at(99):.2f} s, max {ordered[-1]:.2f} s ({len(ordered)} streams)"


def _quantile(ordered: Sequence[float], percent: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
