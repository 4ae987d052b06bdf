"""The benchmark's figures from observations, and the client's observations from bytes."""

import asyncio
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.bench import figures, paced, serve, syscalls
from tests.bench.client import BenchRequest, Observation, Window, closed_loop, native_frame, openai_frame

WISH = BenchRequest("/v1/completions", {}, 4, openai_frame)


def seen(sent_at_s: float, tokens_at_s: Sequence[float], wrong: str | None = None) -> Observation:
    return Observation(WISH, sent_at_s, list(tokens_at_s), max(tokens_at_s, default=0.0), 3, wrong)


def test_a_window_counts_only_its_own_tokens_and_requests() -> None:
    before = seen(9.0, [9.5, 10.5])  # 2 tokens a frame, one frame inside
    inside = seen(10.0, [10.1, 10.2, 10.4, 10.8])
    after = seen(10.9, [11.1, 11.2, 11.3, 11.4])
    result = figures.of_window(Window(10.0, 11.0, [before, inside, after, seen(10.0, [], "refused")]))
    assert result["tokens_per_s"] == pytest.approx(2 + 4)
    assert result["tokens_per_frame"] == pytest.approx(6 / 5)
    assert result["requests"] == 2
    assert result["errors"] == 1
    assert result["ttft_p50_ms"] == pytest.approx(200)
    assert result["itl_p50_ms"] == pytest.approx(400)
    assert result["itl_p99_ms"] == pytest.approx(1000)
    assert result["e2e_p50_ms"] == pytest.approx(800)


def test_a_paced_engine_writes_words_only() -> None:
    vocabulary = {"<|im_end|>": 2, "Ġthe": 276, "Ġ": 220, "the": 300, "ĠdÃ³": 301, "Ġis": 277}
    assert paced.words(vocabulary) == [276, 277]


def test_streams_of_a_paced_engine_prefill_together() -> None:
    one = paced.answer_s("mi300x-llama4-maverick", streams=1, prompt_tokens=40, output_tokens=100)
    assert one == pytest.approx(0.001 + 100 * 0.00945)
    all_64 = paced.answer_s("mi300x-llama4-maverick", streams=64, prompt_tokens=40, output_tokens=100)
    assert all_64 == pytest.approx(0.064 + 100 * (0.009 + 64 * 0.00045))


def test_system_calls_of_a_table() -> None:
    table = "    calls syscall\n--------- -----------\n      30 epoll_pwait\n       5 futex\n      35 total\n"
    calls = syscalls.parse(table)
    assert calls == {"epoll_pwait": 30, "futex": 5}
    assert syscalls.turns(calls) == 30


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_system_calls_of_a_process(tmp_path: Path) -> None:
    loop = "import os, time\nprint(flush=True)\nwhile True:\n    os.getppid()\n    time.sleep(0.01)"
    with subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        trace = syscalls.Trace(process.pid, tmp_path / "calls")
        try:
            trace.mark()
            time.sleep(0.3)
            trace.mark()
        finally:
            process.kill()
    assert trace.calls["getppid"] > 0


def test_percentiles_without_values_are_nan() -> None:
    assert math.isnan(figures.percentile([], 0.5))
    assert figures.percentile([3, 1, 2], 0.5) == 2
    assert figures.percentile(range(100), 0.99) == 99


def cell(
    side: str, number: int, tokens_per_s: float, ttft: float, route: str = "completions"
) -> dict[str, Any]:
    names = ["ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "e2e_p50_ms"]
    same = dict.fromkeys([*names, "front_cpu_per_million", "front_cpu_us_per_request"], 1.0)
    named = {"side": side, "round": number, "route": route, "streams": 8, "output_tokens": 4, "errors": 0}
    return {**named, **same, "tokens_per_s": tokens_per_s, "ttft_p50_ms": ttft}


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    cells = [cell("rift", 1, 100, 5), cell("rift", 2, 300, 6), cell("rift", 3, 90, 9)]
    cells += [cell("rift", number, 50, 5, "inference") for number in (1, 2, 3)]
    cells += [cell("peer", 1, 100, 4), cell("peer", 2, 100, 5), cell("peer", 3, 100, 5)]
    cells += [cell("not durable", number, 200, 5) for number in (1, 2, 3)]
    longer = [each | {"output_tokens": 16, "tokens_per_s": 70} for each in cells]
    options = serve.Options((8,), 3, 1.0, 1, (4, 16), None, True)
    report = serve.report([*longer, *cells], {"cores": 2}, options)
    ratios, of_longer = report["ratios"]
    assert (ratios["output_tokens"], of_longer["output_tokens"]) == (4, 16)
    assert of_longer["native_tokens_per_s"] == 1.0
    assert (ratios["streams"], ratios["tokens_per_s"], ratios["native_tokens_per_s"]) == (8, 1.0, 0.5)
    assert ratios["ttft_p50"] == 1.25
    assert ratios["durable_tokens_per_s"] == 0.5
    assert ratios["ttft_p50_difference_ms"] == 1.0
    assert {"rift", "peer", "machine", "settings"} <= set(report)
    assert json.loads(json.dumps(figures.plain({"a": [1.0, float("nan")]}))) == {"a": [1.0, None]}
    json.dumps(report)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
NATIVE = [
    b'id: 1\nevent: status\ndata: {"status":"running"}\n\n',
    b'id: 2\nevent: token\ndata: {"index":0,"delta":"a"}\n\n',
    b'id: 3\nevent: token\ndata: {"index":1,"delta":"bcd"}\n\n',
    b'id: 4\nevent: done\ndata: {"usage":{"prompt_tokens":3,"output_tokens":4}}\n\n',
]
OPENAI = [
    b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n',
    b'data: {"choices":[{"text":"","finish_reason":null}]}\n\n',
    b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n',
    b"data: [DONE]\n\n",
]


@pytest.mark.parametrize(("frames", "reads"), [(NATIVE, native_frame), (OPENAI, openai_frame)])
@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_the_client_reads_frames_in_chunks_of_any_size(frames: list[bytes], reads: Any, size: int) -> None:
    answer = HEAD + b"".join(map(chunk, frames)) + b"0\r\n\r\n"

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):  # the client is done
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"Authorization: Bearer key" in head
                await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split(b"\r")[0]))
                for at in range(0, len(answer), size):
                    writer.write(answer[at : at + size])
                    await asyncio.sleep(0)
        writer.close()

    async def main() -> Window:
        server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        request = BenchRequest("/x", {"a": 1}, 4, reads)
        window = await closed_loop(
            f"http://127.0.0.1:{port}",
            "key",
            iter(lambda: request, None),
            streams=2,
            warm_s=0.05,
            measured_s=0.1,
            mark=lambda: None,
        )
        server.close()
        await server.wait_closed()
        return window

    window = asyncio.run(main())
    assert [seen.wrong for seen in window.seen] == [None] * len(window.seen)
    assert {(len(seen.tokens_at_s), seen.prompt_tokens) for seen in window.seen} == {(2, 3)}
