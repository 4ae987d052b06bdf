"""Scaling policies on traces: `rift backtest`."""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from events.jetstream import JetStream
from replay.backtest import plot, traces
from replay.backtest.frontier import frontier
from replay.backtest.run import REPLICAS_MAX, InvalidPolicy, Result, Setup, run
from replay.backtest.simulator import NothingStarts, TraceRequest
from replay.backtest.traces import InvalidTrace
from replay.scaling.hardware import Hardware, HardwareUnknown, profile
from rift.cli.arguments import Commands, add_command
from rift.cli.connection import ask_control, select, with_log
from rift.cli.output import CommandFailed, table

TTFT_MS = 2000
# The most rows that one question may return.
ROWS_MAX = 100_000
# The longest start of a replica that may be simulated.
DAY_S = 86_400
BAR_CELLS = 24


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    parser = add_command(
        commands, "backtest", backtest, "simulate a scaling policy on a trace, with its cost"
    )
    parser.add_argument("--trace", type=Path, metavar="PATH", help="trace file (default: Rift's own log)")
    parser.add_argument(
        "--trace-format", choices=traces.FORMATS, help="format of the file (default: by its name, else log)"
    )
    parser.add_argument(
        "--profile", required=True, metavar="NAME", help="profile in replay/scaling/hardware.toml"
    )
    parser.add_argument(
        "--policy",
        default="default",
        metavar="P",
        help="default, knative[:PERCENT], static:N, oracle, or a FILE.toml (default: default)",
    )
    parser.add_argument(
        "--start-s", type=float, metavar="S", help="duration of a replica's start (default: the profile's)"
    )
    parser.add_argument(
        "--ttft-ms", type=int, default=TTFT_MS, metavar="MS", help="TTFT target (default: 2000)"
    )
    parser.add_argument(
        "--share",
        type=int,
        default=99,
        metavar="PERCENT",
        help="requests that are to meet the target, for policy default; 0: no floor (default: 99)",
    )
    parser.add_argument(
        "--max",
        type=int,
        default=REPLICAS_MAX,
        metavar="N",
        help=f"most replicas, for policy default (default: {REPLICAS_MAX})",
    )
    parser.add_argument(
        "--after-s",
        type=float,
        default=0.0,
        metavar="S",
        help="measure requests and GPU-seconds only after S seconds of the trace (default: 0)",
    )
    parser.add_argument("--thin", type=int, default=1, metavar="N", help="keep one in N clients (default: 1)")
    parser.add_argument("--model", metavar="NAME", help="model whose requests to read from the log")
    parser.add_argument(
        "--frontier",
        action="store_true",
        help="compare cost and share in time of policy default at several shares, knative, static and oracle",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="plot demand, replicas and missed targets; with --frontier, cost against share",
    )


def backtest(options: Namespace) -> None:
    try:
        hardware = profile(options.profile)
        requests = _requests(options)
        setup = _setup(options, hardware, last_s=requests[-1].at_s)
        if options.frontier:
            _frontier(options, requests, hardware, setup)
            return
        with _bar(options.policy) as progress:
            result, fleet = run(
                requests,
                hardware,
                options.policy,
                setup,
                progress=progress,
            )
        if options.plot is not None:
            title = f"{options.policy} on {options.profile}, starts take {setup.start_s:g} s"
            plot.plot(fleet, options.plot, title=title, ttft_ms=options.ttft_ms)
    except (HardwareUnknown, InvalidTrace, InvalidPolicy, NothingStarts, plot.PlotMissing) as error:
        raise CommandFailed(str(error)) from error
    _show(result, as_json=options.json)


def _frontier(options: Namespace, requests: list[TraceRequest], hardware: Hardware, setup: Setup) -> None:
    with _bar("frontier") as progress:
        results = list(frontier(requests, hardware, setup, progress=progress))
    if options.plot is not None:
        title = f"{options.profile}, first tokens within {setup.ttft_ms} ms, starts take {setup.start_s:g} s"
        plot.plot_frontier(results, options.plot, title=title)
    if options.json:
        print(json.dumps([msgspec.structs.asdict(result) for result in results]))
        return
    columns = ("policy", "slo_attainment", "slo_attainment_not_at_zero", "gpu_seconds", "scale_actions")
    rows = [[f"{getattr(result, name)}" for name in columns] for result in results]
    print(table(columns=list(columns), rows=rows))


def _setup(options: Namespace, hardware: Hardware, *, last_s: float) -> Setup:
    start_s = options.start_s if options.start_s is not None else hardware.start_ms / 1000
    # False also for nan.
    if not 0 <= start_s <= DAY_S or options.ttft_ms <= 0:
        raise CommandFailed(
            f"--start-s must be from 0 to {DAY_S} and --ttft-ms must be positive, "
            f"got {start_s:g} and {options.ttft_ms}"
        )
    if not 0 <= options.share <= 100 or options.max < 1:
        raise CommandFailed(
            f"--share must be from 0 to 100 and --max at least 1, got {options.share} and {options.max}"
        )
    if not 0 <= options.after_s <= last_s:
        raise CommandFailed(
            f"--after-s must be from 0 to the trace's last request at {last_s:g} s, got {options.after_s:g}"
        )
    return Setup(start_s, options.ttft_ms, options.share, options.max, options.after_s)


def _requests(options: Namespace) -> list[TraceRequest]:
    if options.thin < 1:
        raise CommandFailed(
            f"--thin: must be 1 (all clients) or more (4: a quarter of them), got {options.thin}"
        )
    if options.trace is None and options.trace_format in (None, "log"):
        if options.model is None:
            raise CommandFailed(
                "name the model whose requests to replay with --model, or a file with --trace"
            )
        return traces.of_rows(with_log(options, lambda log: _of_log(log, options.model)))
    if options.trace is None:
        raise CommandFailed(f"--trace-format {options.trace_format} needs a file: name it with --trace")
    if options.trace_format == "log":
        raise CommandFailed(
            f"--trace-format log reads Rift's own log, not {options.trace}: leave out --trace"
        )
    return traces.read(
        options.trace, options.trace_format or traces.guessed(options.trace), thin=options.thin
    )


async def _of_log(log: JetStream, model: str) -> list[tuple[int, int, int]]:
    """Return every ended request of the model, in the order of acceptance."""
    requests: list[tuple[int, int, int]] = []
    after_ns = -1
    after_id = ""
    while True:
        question = select(
            "backtest_requests", model=model, after_ns=after_ns, after_id=after_id, limit=ROWS_MAX
        )
        rows = (await ask_control(log, question))["rows"]
        requests += [(row[0], row[1], row[2]) for row in rows]
        if len(rows) < ROWS_MAX:
            return requests
        after_ns = rows[-1][0]
        after_id = rows[-1][3]


def _show(result: Result, *, as_json: bool) -> None:
    figures = msgspec.structs.asdict(result)
    if as_json:
        print(json.dumps(figures))
        return
    rows = [
        [name, f"{value:,}" if isinstance(value, int | float) else value] for name, value in figures.items()
    ]
    print(table(columns=["figure", "value"], rows=rows))


@contextmanager
def _bar(name: str) -> Iterator[Callable[[float], None] | None]:
    """Show a progress bar on standard error if it is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return

    def draw(share: float) -> None:
        cells = int(share * BAR_CELLS)
        bar = "█" * cells + "░" * (BAR_CELLS - cells)
        sys.stderr.write(f"\r\033[K{bar} {share:4.0%}  {name}")
        sys.stderr.flush()

    draw(0.0)
    yield draw
    sys.stderr.write("\r\033[K")
