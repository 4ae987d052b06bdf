"""The default scaling policy, Knative's autoscaler, fixed fleets and a policy that knows the future, on the
same traces. The policy was not tuned on `gusts`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from replay.backtest import run as backtest
from replay.backtest import traces
from replay.backtest.run import Result, Setup
from replay.backtest.simulator import TraceRequest
from replay.scaling.hardware import profile
from tests.bench import figures, workloads

PROFILE = "mi300x-deepseek-r1"
TTFT_MS = 2000
# Measure after this time of a trace, unless a case says otherwise: at first nothing is known.
AFTER_S = 900.0
# The largest fixed fleet that is tried.
FIXED_MAX = 256


class Case(NamedTuple):
    """A trace, the share that the policy is to keep, and the share that the fixed fleet must reach."""

    name: str
    trace: str
    share: int
    fixed_share: float
    starts: tuple[int, ...] = (60,)
    after_s: float = AFTER_S
    has_oracle: bool = True


# Rates that need two, four and nine replicas.
STATIONARY = {"stationary, 2": 3.0, "stationary, 4": 6.3, "stationary, 9": 14.8}
FILES = {"chat": "azure_llm_2023_conv.csv", "day": "servegen_deepseekr1_day.csv.gz"}
ALL_STARTS = (15, 60, 150)
CASES = (
    *(Case(name, name, 99, 0.99) for name in STATIONARY),
    Case("bursty", "bursty", 99, 0.985, ALL_STARTS),
    Case("bursty, share 95", "bursty", 95, 0.95),
    Case("gusts", "gusts", 99, 0.985, ALL_STARTS),
    Case("gusts, share 95", "gusts", 95, 0.95),
    Case("gusts, first hour", "gusts, hour", 99, 0.97),
    Case("gusts, from the first request", "gusts, hour", 99, 0.94, after_s=0.0),
    Case("chat", "chat", 99, 0.99, ALL_STARTS),
    # Eight runs of the oracle would take as long as all the rest.
    Case("day", "day", 99, 0.99, ALL_STARTS, has_oracle=False),
)
NAMES = tuple(dict.fromkeys(case.trace for case in CASES))


class Options(NamedTuple):
    trace_folder: Path | None
    starts: tuple[int, ...] = ALL_STARTS
    hours: float = 12.0
    only: tuple[str, ...] = ()
    seed: int = 1


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    measured = []
    absent: list[str] = []
    for name in options.only or NAMES:
        if (asked := _trace(name, options)) is None:
            say(f"{name}: skipped, {FILES[name]} does not exist; set its folder with --trace-folder")
            absent.append(FILES[name])
            continue
        say(f"{name}: {len(asked)} requests")
        for case in (case for case in CASES if case.trace == name):
            measured += _case(case, asked, options, say)
    return {
        "ratios": [
            {key: value for key, value in row.items() if not isinstance(value, dict)} for row in measured
        ],
        "measured": measured,
        "absent": absent,
        "machine": figures.machine(),
    }


def _trace(name: str, options: Options) -> list[TraceRequest] | None:
    seed, hours = options.seed, options.hours
    if name in STATIONARY:
        return list(workloads.poisson(seed, hours / 4, STATIONARY[name]))
    if name == "bursty":
        return list(workloads.bursty(seed, hours))
    if name in ("gusts", "gusts, hour"):
        return list(workloads.gusts(seed, 1.0 if name == "gusts, hour" else hours))
    path = (options.trace_folder or Path()) / FILES[name]
    if options.trace_folder is None or not path.exists():
        return None
    return traces.read(path, traces.guessed(path))


def _case(
    case: Case, asked: Sequence[TraceRequest], options: Options, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    fixed, replicas = _fixed(case, asked)
    say(f"  {case.name}: {replicas} fixed replicas: {_line(fixed)}")
    rows = []
    for start_s in (start_s for start_s in case.starts if start_s in options.starts):
        results = {"fixed": fixed}
        for policy in ("default", "knative", "oracle")[: 2 + case.has_oracle]:
            results[policy] = _measured(case, asked, policy, start_s)
            say(f"  {case.name}, {start_s} s, {policy}: {_line(results[policy])}")
        rows.append(_row(case, start_s, results))
    return rows


def _fixed(case: Case, asked: Sequence[TraceRequest]) -> tuple[Result, int]:
    """Return the smallest fixed fleet with the share, or the largest one that is tried."""
    low, high = 0, 1
    found: dict[int, Result] = {}

    def suffices(replicas: int) -> bool:
        found[replicas] = _measured(case, asked, f"static:{replicas}", case.starts[0])
        return found[replicas].slo_attainment >= case.fixed_share

    while high < FIXED_MAX and not suffices(high):
        low, high = high, high * 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    suffices(high)
    return found[high], high


def _measured(case: Case, asked: Sequence[TraceRequest], policy: str, start_s: int) -> Result:
    setup = Setup(start_s, ttft_ms=TTFT_MS, share=case.share, after_s=case.after_s)
    result, _ = backtest.run(asked, profile(PROFILE), policy, setup)
    return result


def _row(case: Case, start_s: int, results: dict[str, Result]) -> dict[str, Any]:
    ours, knative, fixed = results["default"], results["knative"], results["fixed"]
    oracle = results.get("oracle")
    return {
        "trace": case.name,
        "start_s": start_s,
        "attainment": round(ours.slo_attainment, 4),
        "attainment_not_at_zero": round(ours.slo_attainment_not_at_zero, 4),
        "at_zero": round(ours.requests_at_zero / ours.requests, 4),
        "attainment_fixed": round(fixed.slo_attainment, 4),
        "attainment_knative": round(knative.slo_attainment, 4),
        "gpu_seconds_per_fixed": round(ours.gpu_seconds / fixed.gpu_seconds, 3),
        "gpu_seconds_per_knative": round(ours.gpu_seconds / knative.gpu_seconds, 3),
        "actions_per_knative": _ratio(ours.scale_actions, knative.scale_actions),
        "attainment_oracle": round(oracle.slo_attainment, 4) if oracle else figures.NAN,
        "gpu_seconds_per_oracle": round(ours.gpu_seconds / oracle.gpu_seconds, 3) if oracle else figures.NAN,
        **{policy: msgspec.structs.asdict(result) for policy, result in results.items()},
    }


def _ratio(ours: int, theirs: int) -> float:
    return round(ours / theirs, 3) if theirs else figures.NAN


def _line(result: Result) -> str:
    return (
        f"{result.slo_attainment:.2%} in time, {result.slo_attainment_not_at_zero:.2%} without zero, "
        f"{result.gpu_seconds / 3600:,.1f} GPU-hours, {result.scale_actions} actions"
    )
