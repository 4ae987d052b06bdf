"""The default scaling policy, Knative's autoscaler and a policy that knows the future, on the same traces.

The default policy's parameters were chosen on other traces, which were generated.
"""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from replay.backtest import run as backtest
from replay.backtest import traces
from replay.backtest.run import Result
from replay.backtest.simulator import TraceRequest
from replay.scaling.hardware import profile
from tests.bench import figures

PROFILE = "mi300x-deepseek-r1"
POLICIES = ("default", "knative", "oracle")
TTFT_MS = 2000
# Name, file, and n to keep every n-th client.
TRACES = (
    ("chat", "azure_llm_2023_conv.csv", 1),
    ("day", "servegen_deepseekr1_day.csv.gz", 1),
    ("day, a quarter of the clients", "servegen_deepseekr1_day.csv.gz", 4),
)


class Options(NamedTuple):
    trace_folder: Path | None
    starts: tuple[int, ...] = (15, 60, 150)
    hours: float = 12.0
    seed: int = 1


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    measured = []
    absent = []
    for name, requests in _traces(options, absent, say):
        say(f"{name}: {len(requests)} requests")
        for start_s in options.starts:
            results = {}
            for policy in POLICIES:
                results[policy], _ = backtest.run(
                    requests, profile(PROFILE), policy, backtest.Setup(start_s, ttft_ms=TTFT_MS)
                )
                say(f"  {start_s} s, {policy}: {_line(results[policy])}")
            measured.append(_row(name, start_s, results))
    return {
        "ratios": [{name: row[name] for name in row if name not in POLICIES} for row in measured],
        "measured": measured,
        "absent": absent,
        "machine": figures.machine(),
    }


def bursty(seed: int, hours: float) -> Iterator[TraceRequest]:
    """Yield bursts of 1 to 10 minutes at 1 to 8 requests/s, with 2 to 20 idle minutes in between."""
    chance = random.Random(seed)
    now_s = 0.0
    while now_s < hours * 3600:
        per_s = math.exp(chance.uniform(0, math.log(8)))
        until_s = now_s + chance.uniform(60, 600)
        while now_s < until_s:
            prompt, output = chance.lognormvariate(6.5, 0.9), chance.lognormvariate(5.8, 0.8)
            yield TraceRequest(now_s, 1 + int(prompt), 1 + int(output))
            now_s += chance.expovariate(per_s)
        now_s += math.exp(chance.uniform(math.log(120), math.log(1200)))


def _traces(
    options: Options, absent: list[str], say: Callable[[str], None]
) -> Iterator[tuple[str, list[TraceRequest]]]:
    yield "bursty", list(bursty(options.seed, options.hours))
    for name, file, thin in TRACES:
        path = (options.trace_folder or Path()) / file
        if options.trace_folder is None or not path.exists():
            say(f"{name}: skipped, {file} does not exist; set its folder with --trace-folder")
            absent.append(file)
            continue
        yield name, traces.read(path, traces.guessed(path), thin=thin)


def _row(name: str, start_s: int, results: dict[str, Result]) -> dict[str, Any]:
    ours, knative, oracle = (results[policy] for policy in POLICIES)
    return {
        "trace": name,
        "start_s": start_s,
        "attainment": round(ours.slo_attainment, 4),
        "attainment_knative": round(knative.slo_attainment, 4),
        "attainment_oracle": round(oracle.slo_attainment, 4),
        "gpu_seconds_per_knative": round(ours.gpu_seconds / knative.gpu_seconds, 3),
        "gpu_seconds_per_oracle": round(ours.gpu_seconds / oracle.gpu_seconds, 3),
        "hit_per_knative": _ratio(ours.requests_hit_by_cold_start, knative.requests_hit_by_cold_start),
        "actions_per_knative": _ratio(ours.scale_actions, knative.scale_actions),
        **{policy: msgspec.structs.asdict(result) for policy, result in results.items()},
    }


def _ratio(ours: int, theirs: int) -> float:
    return round(ours / theirs, 3) if theirs else figures.NAN


def _line(result: Result) -> str:
    return (
        f"{result.slo_attainment:.2%} in time, {result.gpu_seconds / 3600:,.1f} GPU-hours, "
        f"{result.requests_hit_by_cold_start} hit by a start, {result.scale_actions} actions"
    )
