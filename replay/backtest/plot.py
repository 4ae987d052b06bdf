"""Pictures: of a run, with arrivals, replicas and late requests; and of the cost of several policies.

This is the only module that imports matplotlib, which is optional. It must not compute figures of its own:
`run.py` does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from replay.backtest.frontier import family
from replay.backtest.run import Result
from replay.backtest.simulator import SimulatedFleet
from replay.disk import replacing
from replay.errors import ReplayError

# Number of bars that a trace is divided into: more would be too thin to see.
BARS = 240


class PlotMissing(ReplayError):
    """matplotlib is not installed; the message names the extra that installs it."""


def plot(fleet: SimulatedFleet, path: Path, *, title: str, ttft_ms: int) -> None:
    """Draw a run to `path`, whose suffix selects the file format.

    Raises PlotMissing, DiskRefused, OSError, ValueError.
    """
    figure = _figure(title)
    first_s = fleet.trace[0].at_s
    width_s = max(1.0, (fleet.trace[-1].at_s - first_s) / BARS)
    came = [0] * (BARS + 1)
    missed = [0] * (BARS + 1)
    for one, ttft_s in zip(fleet.trace, fleet.statistics.ttft_s, strict=True):
        bar = int((one.at_s - first_s) / width_s)
        came[bar] += 1
        missed[bar] += ttft_s * 1000 > ttft_ms
    hours = [bar * width_s / 3600 for bar in range(BARS + 1)]
    history = fleet.statistics.history
    changes = [(at_s - first_s) / 3600 for at_s, _, _ in history]

    demand, replicas, late = figure.subplots(3, 1, sharex=True)
    demand.fill_between(hours, [count / width_s for count in came], step="post", color="tab:blue")
    demand.set_ylabel("requests/s")
    replicas.step(changes, [wanted for _, wanted, _ in history], where="post", label="wanted")
    replicas.step(changes, [ready for _, _, ready in history], where="post", label="ready")
    replicas.set_ylabel("replicas")
    replicas.legend(loc="upper right")
    late.fill_between(hours, [count / width_s for count in missed], step="post", color="tab:red")
    late.set_ylabel(f"requests/s later than {ttft_ms} ms")
    late.set_xlabel("hours")
    with replacing(path) as beside:
        figure.savefig(beside)


def plot_frontier(results: Sequence[Result], path: Path, *, title: str) -> None:
    """Draw cost against the share in time, a line for each policy, to `path`.

    Raises PlotMissing, DiskRefused, OSError, ValueError.
    """
    figure = _figure(title)
    axes = figure.subplots()
    for name in dict.fromkeys(map(family, results)):
        own = sorted((one.gpu_seconds, one.slo_attainment) for one in results if family(one) == name)
        axes.plot(
            [seconds / 3600 for seconds, _ in own], [share * 100 for _, share in own], marker="o", label=name
        )
    axes.set_xlabel("GPU-hours")
    axes.set_ylabel("% of the requests in time")
    axes.legend(loc="lower right")
    with replacing(path) as beside:
        figure.savefig(beside)


def _figure(title: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise PlotMissing(f"--plot: {missing}; the extra `plot` has it: pip install '.[plot]'") from missing
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    return figure
