"""Whole backtests: the figures of each policy, and the errors for invalid policies."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

from replay.backtest import plot
from replay.backtest.run import InvalidPolicy, Setup, run
from replay.backtest.simulator import TraceRequest
from replay.scaling.hardware import profile

R1 = profile("mi300x-deepseek-r1")
CPU = profile("cpu-smollm2-135m")


def waves(seed: int = 4) -> list[TraceRequest]:
    """Return two hours of load that varies by a factor of three, with an idle half hour in between."""
    chance = random.Random(seed)
    now_s, asked = 0.0, []
    while now_s < 9000:
        if 3600 < now_s < 5400:
            now_s = 5400.0
        per_s = 3.0 - 2.0 * abs((now_s % 3600) / 1800 - 1)
        now_s += chance.expovariate(per_s)
        asked.append(TraceRequest(now_s, 800, 1 + int(chance.expovariate(1 / 600))))
    return asked


@pytest.mark.parametrize(("start_s", "share", "per_knative"), [(15.0, 0, 1.0), (60.0, 99, 1.15)])
def test_the_default_serves_as_many_as_knative_and_costs_less_without_a_floor(
    start_s: float, share: int, per_knative: float
) -> None:
    """With a floor it keeps what the highest quarter of an hour needed."""
    asked = waves()[: 6000 if share else None]
    results = {
        policy: run(asked, R1, policy, Setup(start_s=start_s, share=share))[0]
        for policy in ("default", "knative", "oracle", "static:6")
    }
    ours, knative, oracle = results["default"], results["knative"], results["oracle"]
    assert {result.requests for result in results.values()} == {len(asked)}
    assert ours.slo_attainment >= knative.slo_attainment - 0.001
    assert ours.slo_attainment_not_at_zero >= 0.99
    assert ours.gpu_seconds < per_knative * knative.gpu_seconds
    assert oracle.gpu_seconds < ours.gpu_seconds < 1.5 * oracle.gpu_seconds
    assert oracle.slo_attainment >= 0.98
    assert ours.scale_actions < knative.scale_actions / 2
    assert results["static:6"].scale_actions == 1
    assert ours.cost_usd == pytest.approx(ours.gpu_seconds * 1.99 / 3600)


def test_figures_of_one_request() -> None:
    result, _ = run([TraceRequest(0.0, 1500, 101)], R1, "static:2", Setup(start_s=10.0, ttft_ms=10_100))
    assert result.slo_attainment == 1.0
    assert result.ttft_p50_ms == result.ttft_p99_ms == pytest.approx(10_100)
    assert result.gpu_seconds == pytest.approx(8 * 2 * 11.6)
    assert (result.cold_starts, result.requests_hit_by_cold_start, result.scale_actions) == (2, 1, 1)
    late, _ = run([TraceRequest(0.0, 1500, 101)], R1, "static:2", Setup(start_s=10.0, ttft_ms=10_099))
    assert late.slo_attainment == 0.0


def test_a_replica_without_gpus_counts_as_one_and_costs_nothing() -> None:
    result, _ = run([TraceRequest(0.0, 550, 1)], CPU, "default", Setup(start_s=20.0, ttft_ms=2000))
    assert result.gpu_seconds == pytest.approx(21.0)
    assert result.cost_usd == 0


def test_a_policy_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "warm.toml"
    # Some editors begin a file with a byte-order mark.
    file.write_text("\ufeffreplicas_min = 1\nreplicas_max = 1\n")
    result, fleet = run(waves(), R1, str(file), Setup(start_s=60.0, ttft_ms=2000))
    assert {wanted for _, wanted, _ in fleet.statistics.history} == {1}
    assert result.policy == str(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [("replicas = 1", "unknown field `replicas`; its fields are replicas_min"), ("x", "warm.toml: ")],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "warm.toml"
    file.write_text(text)
    with pytest.raises(InvalidPolicy, match=message):
        run(waves(), R1, str(file), Setup(start_s=60.0, ttft_ms=2000))


@pytest.mark.parametrize("policy", ["hpa", "static:", "static:-1"])
def test_an_unknown_policy_is_named(policy: str) -> None:
    with pytest.raises(InvalidPolicy, match=f"the policy '{policy}' is unknown; use default, knative"):
        run(waves(), R1, policy, Setup(start_s=60.0, ttft_ms=2000))


def test_a_picture(tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed: the extra `plot`")
    _, fleet = run(waves(), R1, "default", Setup(start_s=60.0, share=0))
    plot.plot(fleet, tmp_path / "x.png", title="default", ttft_ms=2000)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, fleet = run([TraceRequest(0.0, 1, 1)], R1, "static:1", Setup(start_s=1.0, ttft_ms=2000))
    with pytest.raises(plot.PlotMissing, match="the extra `plot`"):
        plot.plot(fleet, tmp_path / "x.png", title="", ttft_ms=2000)
