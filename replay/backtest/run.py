"""A trace through a policy: its cost, and the share of requests that meet the target.

This module resolves policies by name and computes the figures of a run. `traces.py` reads the traces.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from replay.backtest import oracle
from replay.backtest.policies import Knative, KnativeSettings, Ours, Static
from replay.backtest.simulator import TTFT_MS, Scaling, SimulatedFleet, TraceRequest
from replay.errors import ReplayError
from replay.scaling.hardware import Hardware, concurrency_max
from replay.scaling.policy import Policy

# Knative fills a replica to 70 % of its capacity (its default target-utilization-percentage).
KNATIVE_PERCENT = 70
KNATIVE = re.compile(r"knative(?::([0-9]{1,3}))?")
# No cluster size limits a backtest, so this is simply more than any of the traces needs.
REPLICAS_MAX = 1000
STATIC = re.compile(r"static:([0-9]{1,4})")


class InvalidPolicy(ReplayError):
    """The policy is unknown or its file is invalid; the message lists the valid choices."""


class Setup(msgspec.Struct, frozen=True):
    """How a trace is served and measured: the time of a start, the target and the share of the requests that
    are to meet it, the most replicas that our policy may have, and the time from which on is measured."""

    start_s: float
    ttft_ms: int = TTFT_MS
    share: int = 99
    replicas_max: int = REPLICAS_MAX
    after_s: float = 0.0


class Result(msgspec.Struct, frozen=True):
    """The figures of a run.

    slo_attainment              share of requests whose time to first token is at most the target
    ttft_p50_ms, ttft_p99_ms    time to first token, including queueing, cold start and prefill
    gpu_seconds                 seconds of each replica from order to stop, times its GPUs; a replica without
                                GPUs counts as one GPU; the run ends with its last request
    cost_usd                    cost of the GPU seconds at the profile's price
    cold_starts                 replicas that were ordered
    requests_hit_by_cold_start  requests served by a replica that was not ready when they arrived
    scale_actions               changes of the desired number of replicas
    requests_at_zero            requests that arrived while no replica was ready
    slo_attainment_not_at_zero  share of the others whose time to first token is at most the target
    """

    policy: str
    requests: int
    slo_attainment: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    gpu_seconds: float
    cost_usd: float
    cold_starts: int
    requests_hit_by_cold_start: int
    scale_actions: int
    requests_at_zero: int
    slo_attainment_not_at_zero: float


def run(
    asked: Sequence[TraceRequest],
    hardware: Hardware,
    policy: str,
    setup: Setup,
    *,
    progress: Callable[[float], None] | None = None,
) -> tuple[Result, SimulatedFleet]:
    """Serve a trace with the named policy. Raises InvalidPolicy, NothingStarts, OSError."""
    if policy == "oracle":
        fleet = oracle.best(
            asked,
            hardware,
            start_s=setup.start_s,
            ttft_ms=setup.ttft_ms,
            after_s=setup.after_s,
            progress=progress,
        )
    else:
        scaling = _scaling(policy, asked, hardware, setup)
        fleet = SimulatedFleet(asked, hardware, start_s=setup.start_s, scaling=scaling, ttft_ms=setup.ttft_ms)
        fleet.replicas.after_s = setup.after_s
        fleet.run(progress)
    return result(policy, fleet, setup), fleet


def _scaling(policy: str, asked: Sequence[TraceRequest], hardware: Hardware, setup: Setup) -> Scaling:
    ttft_ms, start_s = setup.ttft_ms, setup.start_s
    if policy == "default":
        ours = Policy(replicas_max=setup.replicas_max, ttft_ms=ttft_ms, share=setup.share)
        return Ours(ours, hardware, start_s=start_s)
    if (knative := KNATIVE.fullmatch(policy)) and (percent := int(knative[1] or KNATIVE_PERCENT)):
        most = concurrency_max(
            hardware,
            ttft_ms=ttft_ms,
            prompt_tokens=sum(one.prompt_tokens for one in asked) // len(asked),
            output_tokens=sum(one.output_tokens for one in asked) // len(asked),
        )
        return Knative(KnativeSettings(target=percent / 100 * most))
    if number := STATIC.fullmatch(policy):
        return Static(int(number[1]))
    if policy.endswith(".toml"):
        return Ours(_of_file(Path(policy)), hardware, start_s=start_s)
    raise InvalidPolicy(
        f"the policy {policy!r} is unknown; use default, knative[:PERCENT], static:N, oracle and FILE.toml"
    )


def _of_file(path: Path) -> Policy:
    try:
        return msgspec.toml.decode(path.read_bytes().removeprefix(BOM_UTF8), type=Policy)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidPolicy(
            f"{path}: {error}; its fields are {', '.join(Policy.__struct_fields__)}"
        ) from error


def result(policy: str, fleet: SimulatedFleet, setup: Setup) -> Result:
    """Return the figures of a fleet that has served its trace, of what came after `after_s`."""
    statistics = fleet.statistics
    asked = [
        (number, ttft_s)
        for number, (one, ttft_s) in enumerate(zip(fleet.trace, statistics.ttft_s, strict=True))
        if one.at_s >= setup.after_s
    ]
    waits = sorted(ttft_s for _, ttft_s in asked)
    others = [ttft_s for number, ttft_s in asked if number not in statistics.at_zero]
    count = len(waits)
    hardware = fleet.hardware
    return Result(
        policy=policy,
        requests=count,
        slo_attainment=_in_time(waits, setup),
        ttft_p50_ms=round(waits[count // 2] * 1000, 3),
        ttft_p99_ms=round(waits[min(count - 1, count * 99 // 100)] * 1000, 3),
        gpu_seconds=round(fleet.replicas.stopped_s * max(1, hardware.gpus), 3),
        cost_usd=round(fleet.replicas.stopped_s * hardware.hour_nanousd / 3600 / 1e9, 6),
        cold_starts=fleet.replicas.ordered,
        requests_hit_by_cold_start=statistics.waited_for_start,
        scale_actions=statistics.scale_actions,
        requests_at_zero=count - len(others),
        slo_attainment_not_at_zero=_in_time(others, setup),
    )


def _in_time(waits: Sequence[float], setup: Setup) -> float:
    return sum(wait_s * 1000 <= setup.ttft_ms for wait_s in waits) / len(waits) if waits else 1.0
