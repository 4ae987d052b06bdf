"""Hardware profiles: the measurements behind them, and the largest concurrency within the SLO."""

import random

import pytest

from replay.backtest.policies import Static
from replay.backtest.simulator import SimulatedFleet, TraceRequest
from replay.scaling.hardware import HardwareUnknown, concurrency_max, profile, profiles

R1 = profile("mi300x-deepseek-r1")


def tokens_per_s(name: str, running: int) -> float:
    return 1e6 / profile(name).step_us_at(running)


def test_every_profile_says_where_it_is_from_and_what_is_assumed() -> None:
    assert set(profiles()) == {
        "mi300x-deepseek-r1",
        "mi300x-deepseek-v3",
        "mi300x-llama4-maverick",
        "cpu-smollm2-135m",
    }
    assert all("ssumed" in hardware.source for hardware in profiles().values())


def test_an_unknown_profile_is_named() -> None:
    with pytest.raises(HardwareUnknown, match=r"'h100-x'; there are mi300x-deepseek-r1, "):
        profile("h100-x")


@pytest.mark.parametrize(("users", "published"), [(10, 42), (18, 32), (30, 23)])
def test_deepseek_decodes_as_published(users: int, published: int) -> None:
    assert tokens_per_s("mi300x-deepseek-r1", users) == pytest.approx(published, rel=0.03)


def test_the_small_model_decodes_as_measured() -> None:
    assert tokens_per_s("cpu-smollm2-135m", 1) == pytest.approx(30, rel=0.01)
    assert 64 * tokens_per_s("cpu-smollm2-135m", 64) == pytest.approx(390, rel=0.01)


def test_what_runs_is_bounded_by_slots_and_by_tokens() -> None:
    assert R1.running_of(1000) == 64
    assert R1.running_of(100_000) == 10
    assert R1.running_of(5_000_000) == 1


def steady(per_s: float, *, prompt: int, output: int, count: int) -> tuple[float, float]:
    """Serve Poisson arrivals with one replica; return the share within 2 s and the mean concurrency."""
    chance = random.Random(5)
    now_s, asked = 0.0, []
    for _ in range(count):
        now_s += chance.expovariate(per_s)
        asked.append(TraceRequest(now_s, prompt, 1 + int(chance.expovariate(1 / output))))
    fleet = SimulatedFleet(asked, R1, start_s=0.0, scaling=Static(1))
    fleet.run()
    return sum(
        wait_s <= 2 for wait_s in fleet.statistics.ttft_s
    ) / count, fleet.concurrency.integral_s / now_s


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "output", "rates"),
    [(1000, 200, (3.0, 3.3, 3.5, 3.7, 3.9)), (3000, 100, (3.2, 3.6, 4.0, 4.4, 4.7))],
    ids=["slots", "prompts"],
)
def test_the_largest_concurrency_is_the_simulations(
    prompt: int, output: int, rates: tuple[float, ...]
) -> None:
    most = concurrency_max(R1, ttft_ms=2000, prompt_tokens=prompt, output_tokens=output)
    measured = [steady(per_s, prompt=prompt, output=output, count=100_000) for per_s in rates]
    met = [concurrency for share, concurrency in measured if share >= 0.99]
    missed = [concurrency for share, concurrency in measured if share < 0.99]
    assert met, measured
    assert missed, measured
    assert max(met) - 2 <= most <= min(missed) + 2, measured


def test_concurrency_falls_with_the_prompt_and_grows_with_the_target() -> None:
    def most(ttft_ms: int, prompt_tokens: int) -> int:
        return concurrency_max(R1, ttft_ms=ttft_ms, prompt_tokens=prompt_tokens, output_tokens=300)

    assert most(2000, 500) > most(2000, 5000) > most(2000, 12_000) == 1
    assert most(20_000, 500) > most(2000, 500)
