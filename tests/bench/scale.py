"""The default scaling policy, Knative's autoscaler, fixed fleets and a policy that knows the future, on the
same traces, beside the aims. The policy was not tuned on `gusts`.

Each run of a policy is a job of its own, for as many processes as there are cores.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
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
# The start that costs are compared at. At another start the aim of the share holds where this fixed fleet
# meets it.
START_S = 60
FLEET = "static:16"
# The policy of the search for the cheapest fixed fleet.
FIXED = "fixed"
ACTIONS_PER_KNATIVE = 0.6


class Aims(NamedTuple):
    """What a case is to reach: the share in time of the requests that do not arrive at zero, and at most so
    many of the GPU-seconds of the cheapest fixed fleet, and of Knative's at no smaller share."""

    attainment: float
    per_fixed: float | None = None
    per_knative: float | None = None


class Case(NamedTuple):
    """A trace, the share that the policy is to keep, and the share that the fixed fleet must reach."""

    name: str
    trace: str
    share: int
    fixed_share: float
    aims: Aims
    starts: tuple[int, ...] = (START_S,)
    after_s: float = AFTER_S
    # It needs far more than 16 replicas, and its oracle would take as long as all the rest.
    is_large: bool = False

    def policies(self, start_s: int) -> Iterator[str]:
        yield from ("default", "knative")
        if not self.is_large:
            yield "oracle" if start_s == START_S else FLEET


class _Job(NamedTuple):
    """A run of a policy at a start."""

    case: Case
    policy: str
    start_s: int


# Rates that need two, four and nine replicas.
STATIONARY = {"stationary, 2": 3.0, "stationary, 4": 6.3, "stationary, 9": 14.8}
FILES = {"chat": "azure_llm_2023_conv.csv", "day": "servegen_deepseekr1_day.csv.gz"}
ALL_STARTS = (15, START_S, 150)
CASES = (
    *(Case(name, name, 99, 0.99, Aims(0.99, 1.1)) for name in STATIONARY),
    Case("bursty", "bursty", 99, 0.985, Aims(0.985, 1.0), ALL_STARTS),
    Case("bursty, share 95", "bursty", 95, 0.95, Aims(0.95, 1.1)),
    Case("gusts", "gusts", 99, 0.985, Aims(0.985, 1.0), ALL_STARTS),
    Case("gusts, share 95", "gusts", 95, 0.95, Aims(0.95, 1.1)),
    Case("gusts, first hour", "gusts, hour", 99, 0.97, Aims(0.97)),
    Case("gusts, from the first request", "gusts, hour", 99, 0.94, Aims(0.94), after_s=0.0),
    Case("chat", "chat", 99, 0.99, Aims(0.99, per_knative=0.75), ALL_STARTS),
    # No aim holds at 15 s: the work alone fills 28 replicas.
    Case("day", "day", 99, 0.99, Aims(0.985, 0.7, 1.0), (START_S, 150), is_large=True),
)
# Aims at other starts, whatever a fixed fleet does.
START_AIMS = {("day", 150): 0.96}
NAMES = tuple(dict.fromkeys(case.trace for case in CASES))


class Options(NamedTuple):
    trace_folder: Path | None
    starts: tuple[int, ...] = ALL_STARTS
    hours: float = 12.0
    only: tuple[str, ...] = ()
    seed: int = 1


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    began = time.monotonic()
    absent: list[str] = []
    cases: list[Case] = []
    for name in options.only or NAMES:
        if (asked := _trace(name, options.trace_folder, options.hours, options.seed)) is None:
            say(f"{name}: skipped, {FILES[name]} does not exist; set its folder with --trace-folder")
            absent.append(FILES[name])
            continue
        say(f"{name}: {len(asked)} requests")
        cases += [case for case in CASES if case.trace == name]
    starts = [(case, start_s) for case in cases for start_s in case.starts if start_s in options.starts]
    jobs = [_Job(case, policy, start_s) for case, start_s in starts for policy in case.policies(start_s)]
    results = _results([*(_Job(case, FIXED, START_S) for case in cases), *jobs], options, say)
    measured = [_row(case, start_s, results) for case, start_s in starts]
    say(f"{time.monotonic() - began:.0f} s")
    return {
        "ratios": [
            {key: value for key, value in row.items() if not isinstance(value, dict)} for row in measured
        ],
        "measured": measured,
        "absent": absent,
        "seconds": round(time.monotonic() - began),
        "machine": figures.machine(),
    }


@cache
def _trace(name: str, folder: Path | None, hours: float, seed: int) -> Sequence[TraceRequest] | None:
    if name in STATIONARY:
        return list(workloads.poisson(seed, hours / 4, STATIONARY[name]))
    if name == "bursty":
        return list(workloads.bursty(seed, hours))
    if name in ("gusts", "gusts, hour"):
        return list(workloads.gusts(seed, 1.0 if name == "gusts, hour" else hours))
    path = (folder or Path()) / FILES[name]
    if folder is None or not path.exists():
        return None
    return traces.read(path, traces.guessed(path))


def _results(jobs: Sequence[_Job], options: Options, say: Callable[[str], None]) -> dict[_Job, Result]:
    """Run all jobs in as many processes as there are cores, those of the longest trace first."""

    def requests(job: _Job) -> int:
        return len(_asked(job, options))

    found = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = {pool.submit(_run, job, options): job for job in sorted(jobs, key=requests, reverse=True)}
        for done in as_completed(running):
            job = running[done]
            found[job], seconds = done.result()
            say(f"{job.case.name}, {job.start_s} s, {job.policy}: {_line(found[job])}, took {seconds:.0f} s")
    return found


def _asked(job: _Job, options: Options) -> Sequence[TraceRequest]:
    return _trace(job.case.trace, options.trace_folder, options.hours, options.seed) or ()


def _run(job: _Job, options: Options) -> tuple[Result, float]:
    """Return the result, and the seconds of processor time that it took."""
    began = time.process_time()
    asked = _asked(job, options)
    result = _fixed(job.case, asked) if job.policy == FIXED else _measured(job, asked)
    return result, time.process_time() - began


def _fixed(case: Case, asked: Sequence[TraceRequest]) -> Result:
    """Return the result of the smallest fixed fleet with the share, or of the largest one that is tried."""
    low, high = 0, _busy(asked)
    found: dict[int, Result] = {}

    def suffices(replicas: int) -> bool:
        found[replicas] = _measured(_Job(case, f"static:{replicas}", START_S), asked)
        return found[replicas].slo_attainment >= case.fixed_share

    while not suffices(high) and high < FIXED_MAX:
        low, high = high, high * 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return found[high]


def _busy(asked: Sequence[TraceRequest]) -> int:
    """Return about how many full replicas would make the output in the time of the trace, at least 1."""
    hardware = profile(PROFILE)
    output = sum(one.output_tokens for one in asked)
    slots = hardware.running_of((output + sum(one.prompt_tokens for one in asked)) // len(asked))
    busy_s = output * hardware.step_us_at(slots) / slots / 1e6
    return max(1, int(busy_s / max(1.0, asked[-1].at_s)))


def _measured(job: _Job, asked: Sequence[TraceRequest]) -> Result:
    setup = Setup(job.start_s, ttft_ms=TTFT_MS, share=job.case.share, after_s=job.case.after_s)
    result, _ = backtest.run(asked, profile(PROFILE), job.policy, setup)
    return result


def _row(case: Case, start_s: int, results: Mapping[_Job, Result]) -> dict[str, Any]:
    fixed = results[_Job(case, FIXED, START_S)]
    of = {policy: results[_Job(case, policy, start_s)] for policy in case.policies(start_s)}
    ours, knative = of["default"], of["knative"]
    oracle, fleet = of.get("oracle"), of.get(FLEET)
    row = {
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
        "attainment_fixed_16": round(fleet.slo_attainment, 4) if fleet else figures.NAN,
        **{policy: msgspec.structs.asdict(result) for policy, result in (*of.items(), (FIXED, fixed))},
    }
    return {**row, "missed": missed_aims(case, row)}


def missed_aims(case: Case, row: Mapping[str, Any]) -> list[str]:
    """Return the aims that a row misses."""
    aims, start_s = case.aims, row["start_s"]
    least = aims.attainment
    if start_s != START_S:
        is_met = row["attainment_fixed_16"] >= least
        aims = Aims(START_AIMS.get((case.name, start_s), least if is_met else 0.0))
    missed = []
    if row["attainment_not_at_zero"] < aims.attainment:
        missed.append(f"attainment_not_at_zero >= {aims.attainment}")
    if aims.per_knative is not None and row["attainment"] < row["attainment_knative"]:
        missed.append(f"attainment >= {row['attainment_knative']}")
    for name, most in (
        ("gpu_seconds_per_fixed", aims.per_fixed),
        ("gpu_seconds_per_knative", aims.per_knative),
        ("actions_per_knative", ACTIONS_PER_KNATIVE),
    ):
        if most is not None and row[name] > most:
            missed.append(f"{name} <= {most}")
    return missed


def _ratio(ours: int, theirs: int) -> float:
    return round(ours / theirs, 3) if theirs else figures.NAN


def _line(result: Result) -> str:
    return (
        f"{result.policy}, {result.slo_attainment:.2%} in time, "
        f"{result.slo_attainment_not_at_zero:.2%} without zero, "
        f"{result.gpu_seconds / 3600:,.1f} GPU-hours, {result.scale_actions} actions"
    )
