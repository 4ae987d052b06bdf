"""Scaling policies on traces: `rift backtest`."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from events.jetstream import JetStream
from replay.backtest import plot, traces
from replay.backtest.run import InvalidPolicy, Result, run
from replay.backtest.simulator import NothingStarts, TraceRequest
from replay.backtest.traces import InvalidTrace
from replay.scaling.hardware import HardwareUnknown, profile
from replay.warehouse.result import QueryResult
from rift.cli.output import CommandFailed, asked, table, with_log
from rift.rpc import Sql

POLICIES = "default, knative, static:N, oracle, or a FILE.toml (default)"
TTFT_MS = 2000
# Rows of one answer: what a question may return at most.
ROWS = 100_000
BAR_CELLS = 24


def backtest(options: Namespace) -> None:
    try:
        hardware = profile(options.profile)
        requests = _requests(options)
        start_s = options.start_s if options.start_s is not None else hardware.start_ms / 1000
        if start_s < 0 or options.ttft_ms <= 0:
            raise CommandFailed("--start-s and --ttft-ms are times, and a target of 0 nobody meets")
        with _bar(options.policy) as progress:
            found, fleet = run(
                requests,
                hardware,
                options.policy,
                start_s=start_s,
                ttft_ms=options.ttft_ms,
                progress=progress,
            )
        if options.plot is not None:
            title = f"{options.policy} on {options.profile}, a start takes {start_s:g} s"
            plot.plot(fleet, options.plot, title=title, ttft_ms=options.ttft_ms)
    except (HardwareUnknown, InvalidTrace, InvalidPolicy, NothingStarts, plot.PlotMissing) as wrong:
        raise CommandFailed(str(wrong)) from wrong
    _show(found, as_json=options.json)


def _requests(options: Namespace) -> list[TraceRequest]:
    if options.thin < 1:
        raise CommandFailed(f"--thin {options.thin}: write 1 for all clients, 4 for a quarter of them")
    if options.trace is None and options.trace_format in (None, "log"):
        if options.model is None:
            raise CommandFailed("name the model whose requests are replayed with --model, or a --trace")
        return traces.of_rows(with_log(options, lambda log: _of_log(log, options.model)))
    if options.trace is None:
        raise CommandFailed(f"--trace-format {options.trace_format} is a file's: name it with --trace")
    if options.trace_format == "log":
        raise CommandFailed(f"{options.trace}: format log is Rift's own log, which is no file; leave --trace")
    return traces.read(
        options.trace, options.trace_format or traces.guessed(options.trace), thin=options.thin
    )


async def _of_log(log: JetStream, model: str) -> list[tuple[int, int, int]]:
    """Every ended request of the model, in order of its acceptance."""
    name = model.replace("'", "''")
    rows: list[tuple[int, int, int]] = []
    after = "true"
    while True:
        answer = await asked(
            log,
            Sql(
                "select accepted_at_ns, prompt_tokens, output_tokens, request_id from requests "
                f"where model = '{name}' and finished_at_ns is not null and {after} "
                f"order by accepted_at_ns, request_id limit {ROWS}"
            ),
        )
        found = QueryResult(**answer).rows
        rows += [(row[0], row[1], row[2]) for row in found]
        if len(found) < ROWS:
            return rows
        after = f"(accepted_at_ns, request_id) > ({found[-1][0]}, '{found[-1][3]}')"


def _show(found: Result, *, as_json: bool) -> None:
    figures = msgspec.structs.asdict(found)
    if as_json:
        print(json.dumps(figures))
        return
    shown = {
        name: f"{value:,}" if isinstance(value, int | float) else value for name, value in figures.items()
    }
    print(table(QueryResult(columns=["figure", "value"], rows=[list(row) for row in shown.items()])))


@contextmanager
def _bar(name: str) -> Iterator[Callable[[float], None] | None]:
    """A bar on standard error, where that is a terminal."""
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
