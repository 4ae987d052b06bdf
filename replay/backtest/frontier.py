"""Cost against the share of requests in time, for several policies on one trace."""

from collections.abc import Callable, Iterator, Sequence

import msgspec

from replay.backtest.run import Result, Setup, run
from replay.backtest.simulator import TraceRequest
from replay.scaling.hardware import Hardware

# The shares that our policy is asked to keep; 0: without its floor.
SHARES = (0, 90, 95, 98, 99, 100)
# Per cent of its capacity to which Knative fills a replica; 70 is its default.
UTILIZATIONS = (40, 55, 70, 85, 100)
# Fixed fleets, as multiples of the mean of our policy at the given share.
FIXED = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)


def frontier(
    asked: Sequence[TraceRequest],
    hardware: Hardware,
    setup: Setup,
    *,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Result]:
    """Yield the results of our policy at several shares, of Knative's, of fixed fleets, and of the oracle."""

    def of(policy: str, setup: Setup) -> Result:
        return run(asked, hardware, policy, setup, progress=progress)[0]

    mean = 1.0
    for share in SHARES:
        result = of("default", msgspec.structs.replace(setup, share=share))
        if share <= setup.share:
            seconds = max(1.0, asked[-1].at_s - setup.after_s)
            mean = result.gpu_seconds / max(1, hardware.gpus) / seconds
        yield msgspec.structs.replace(result, policy=f"default, share {share}")
    for percent in UTILIZATIONS:
        yield of(f"knative:{percent}", setup)
    for replicas in sorted({max(1, round(mean * factor)) for factor in FIXED}):
        yield of(f"static:{replicas}", setup)
    yield of("oracle", setup)


def family(result: Result) -> str:
    """Return the policy of a result without its setting."""
    return result.policy.partition(",")[0].partition(":")[0]
