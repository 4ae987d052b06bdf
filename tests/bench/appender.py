"""A process of writers for `ops/bench log --shards`: each has a connection, and one append at a time.

    python -m tests.bench.appender SECONDS SHARD,SHARD,…  < URLs and token, a line each

One writer for each number of a shard. Standard output has "ready", then, after a line of input, the latency
of each append in microseconds as one JSON list.
"""

import json
import sys
import time

import anyio

from events import subjects
from events.jetstream import Access, JetStream, connect
from tests.bench.log import DATA
from tests.bench.log_shards import WARM_UP_S


async def append(log: JetStream, shard: int, seconds: float, latencies_us: list[int]) -> None:
    stream, subject = subjects.shard_stream(shard), f"rift.{shard}.work.lane.bench"
    counts_from_s = time.perf_counter() + WARM_UP_S
    while (began_s := time.perf_counter()) < counts_from_s + seconds:
        await log.append(stream, subject, DATA)
        ended_s = time.perf_counter()
        if began_s >= counts_from_s and ended_s < counts_from_s + seconds:
            latencies_us.append(round((ended_s - began_s) * 1_000_000))


async def run(seconds: float, shards: list[int]) -> None:
    urls, password = sys.stdin.readline().strip(), sys.stdin.readline().strip()
    access = Access(user="admin", password=password)
    logs = [await connect(urls, access, name=f"bench-{number}") for number, _ in enumerate(shards)]
    print("ready", flush=True)
    await anyio.to_thread.run_sync(sys.stdin.readline)
    latencies_us: list[int] = []
    async with anyio.create_task_group() as tasks:
        for log, shard in zip(logs, shards, strict=True):
            tasks.start_soon(append, log, shard, seconds, latencies_us)
    for log in logs:
        await log.close()
    print(json.dumps(latencies_us), flush=True)


if __name__ == "__main__":
    numbers = [int(number) for number in sys.argv[2].split(",")]
    anyio.run(run, float(sys.argv[1]), numbers, backend_options={"use_uvloop": True})
