"""A few cycles of each kind of fault, with real processes and a real nats-server; `ops/chaos` runs more."""

from functools import partial
from pathlib import Path

import anyio
import pytest

from tests.chaos import cycle
from tests.chaos.cycle import Options, Report
from tests.chaos.faults import KINDS

CYCLES = {
    "worker": 2,
    "grow": 3,
    "zombie": 2,
    "broker": 2,
    "disk": 2,
    "cluster": 2,
    "gateway": 3,
    "drain": 2,
    "acks": 1,
    "poison": 1,
    "hang": 1,
}
# The traces that each fault leaves. Without them the fault had no effect, and its test proves nothing.
MARKS = {
    "worker": lambda report: report.taken_over,
    "grow": lambda report: report.taken_over and len(report.requests_by_shard) == 3,
    "zombie": lambda report: report.ignored.tokens,
    "broker": lambda report: report.streams,
    "disk": lambda report: report.streams,
    "cluster": lambda report: report.streams,
    "gateway": lambda report: report.breaks,
    "drain": lambda report: report.breaks + report.taken_over,
    "acks": lambda report: report.ignored.tokens,
    "poison": lambda report: report.taken_over,
    "hang": lambda report: report.taken_over,
}
# Those that run on a cluster here.
BROKERS = {"acks": 3}
# With a few streams, a random seed leaves a gateway without any once in 200 runs.
SEEDS = {"grow": "41d79af3"}

pytestmark = pytest.mark.slow


def run(kind: str, cycles: int, folder: Path) -> tuple[Report, str]:
    output: list[str] = []
    brokers = BROKERS.get(kind, 1)
    options = Options(kind, cycles, seed=SEEDS.get(kind, ""), brokers=brokers, folder=folder / "chaos")
    report = anyio.run(partial(cycle.run, options, output.append), backend_options={"use_uvloop": True})
    return report, "\n".join(output)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_once_and_one_charge(kind: str, tmp_path: Path) -> None:
    report, output = run(kind, CYCLES[kind], tmp_path)
    assert (
        report.line()
        == f"{CYCLES[kind]} cycles, 0 lost, 0 duplicated, 0 reordered, 0 unexplained, charges equal"
    ), output
    assert MARKS[kind](report), f"the fault had no effect\n{output}"
