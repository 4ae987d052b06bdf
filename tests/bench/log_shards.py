"""Appends to one, two and more shards, on one broker and on a cluster of three.

Writers are connections with one append at a time, as a worker's to a lane, divided evenly over the shards and
over a process for each core. They share the machine with the brokers, so `broker_cores` and `writer_cores`
say how much of it each side used.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import anyio

from events import subjects
from events.jetstream import JetStream
from rift.supervisor import Guard
from tests.bench import figures
from tests.bench.servers import cpu_s_of
from tests.chaos.brokers import Brokers
from tests.service import ROOT, environment

LOG_BYTES_MAX = 1 << 28
SERVERS = (1, 3)
ANSWER_S = 60.0
# The first appends of a connection wait for its subscriptions and the broker's caches.
WARM_UP_S = 0.5


def run(
    shards: Sequence[int], writers: Sequence[int], seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure every combination. Raises RigBroken."""
    rows: list[dict[str, Any]] = []
    for servers in SERVERS:
        with tempfile.TemporaryDirectory(prefix="rift-bench-") as folder:
            guard = Guard()
            brokers = Brokers(Path(folder), servers, guard)
            brokers.start_all()
            measure = partial(_measure, brokers, shards, writers, seconds)
            try:
                for row in anyio.run(measure, backend_options={"use_uvloop": True}):
                    say(", ".join(f"{name} {value:g}" for name, value in row.items()))
                    rows.append(row)
            finally:
                brokers.kill_all()
                guard.dismiss()
    return {"ratios": [row | {"per_first": _per_first(row, rows)} for row in rows]}


async def _measure(
    brokers: Brokers, shards: Sequence[int], writers: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    log = await brokers.connected("bench")
    await brokers.ensure_streams(log, shards=max(shards), max_bytes=LOG_BYTES_MAX)
    rows = []
    for count in writers:
        for open_shards in shards:
            targets = [number % open_shards for number in range(count)]
            figure = await anyio.to_thread.run_sync(_appends, brokers, targets, seconds)
            rows.append({"servers": len(brokers.ports), "shards": open_shards, "writers": count} | figure)
            await _trim(log, open_shards)
    await log.close()
    return rows


async def _trim(log: JetStream, shards: int) -> None:
    for shard in range(shards):
        stream = subjects.shard_stream(shard)
        await log.trim(stream, await log.last_sequence(stream))


def _appends(brokers: Brokers, targets: Sequence[int], seconds: float) -> dict[str, float]:
    """Let one writer for each target append for some seconds, and return the figures."""
    cores = len(os.sched_getaffinity(0))
    shares = [targets[core::cores] for core in range(min(cores, len(targets)))]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_appender(brokers, share, seconds)) for share in shares]
        for process in processes:
            assert _pipe(process.stdout).readline() == "ready\n"
        pids = [process.pid for process in processes]
        broker_s, writer_s = _cpu_s(brokers.pids), _cpu_s(pids)
        for process in processes:
            _pipe(process.stdin).write("go\n")
            _pipe(process.stdin).flush()
        answers = [_pipe(process.stdout).readline() for process in processes]
        broker_s, writer_s = _cpu_s(brokers.pids) - broker_s, _cpu_s(pids) - writer_s
    latencies_ms = sorted(latency / 1000 for answer in answers for latency in json.loads(answer))
    return {
        "appends_per_s": round(len(latencies_ms) / seconds),
        "p50_ms": round(figures.percentile(latencies_ms, 0.5), 2),
        "p99_ms": round(figures.percentile(latencies_ms, 0.99), 2),
        "broker_cores": round(broker_s / (seconds + WARM_UP_S), 2),
        "writer_cores": round(writer_s / (seconds + WARM_UP_S), 2),
    }


@contextlib.contextmanager
def _appender(brokers: Brokers, targets: Sequence[int], seconds: float) -> Iterator["subprocess.Popen[str]"]:
    """Run a process with a writer for each target. It is connected once it has printed a line."""
    command = [sys.executable, "-m", "tests.bench.appender", str(seconds), ",".join(map(str, targets))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    ) as process:
        try:
            password = brokers.address.access("admin").password
            _pipe(process.stdin).write(f"{brokers.urls}\n{password}\n")
            _pipe(process.stdin).flush()
            yield process
            process.wait(ANSWER_S)
        finally:
            process.kill()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _cpu_s(pids: Sequence[int]) -> float:
    return sum(map(cpu_s_of, pids))


def _per_first(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float:
    """Return the row's appends per second, divided by those with the first number of shards."""
    alike = next(one for one in rows if all(one[name] == row[name] for name in ("servers", "writers")))
    return round(row["appends_per_s"] / alike["appends_per_s"], 2)
