"""The fit recovers the speeds of its samples, and the command those of a running engine."""

import json
import math
import tomllib
from collections.abc import Iterator
from random import Random

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from replay.scaling.hardware import Hardware
from rift import calibrate
from rift.calibrate import Prompt, Running
from tests.service import Service

PROMPTS = [64 << doubled for doubled in range(8)]
LEVELS = [1, 2, 4, 8, 16, 32, 64]


@given(
    rate=st.integers(100, 50_000),
    overhead_ms=st.integers(1, 200),
    step_us=st.integers(1_000, 100_000),
    per_running_us=st.integers(0, 5_000),
    seed=st.integers(0, 1 << 32),
)
@example(rate=100, overhead_ms=1, step_us=1000, per_running_us=1, seed=7251477)
def test_the_fit_recovers_the_speeds_behind_noisy_samples(
    rate: int, overhead_ms: int, step_us: int, per_running_us: int, seed: int
) -> None:
    noise = Random(seed)

    def about(value: float) -> float:
        return value * noise.uniform(0.98, 1.02)

    prompts = [Prompt(n, about(overhead_ms / 1000 + n / rate)) for n in PROMPTS]
    running = [Running(n, about((step_us + per_running_us * n) / 1e6)) for n in LEVELS]
    found = calibrate.fit(prompts, running)
    for n in LEVELS:
        wanted_us = step_us + per_running_us * n
        # A profile has whole microseconds, also for each running request.
        assert abs(found.step_s(n) * 1e6 - wanted_us) <= 0.05 * wanted_us + n / 2 + 1
    assert found.step_off < 0.07
    for n in PROMPTS:
        # A lower bound is no faster than the truth: noise hides the difference between lengths.
        wanted = overhead_ms / 1000 + n / rate
        assert found.prefill_at_least or found.ttft_s(n) == pytest.approx(wanted, rel=0.05)
    if found.prefill_at_least:
        assert PROMPTS[-1] / rate < 0.2 * overhead_ms / 1000


@given(st.integers(1, 100_000), st.integers(0, 5_000), st.integers(1, 50_000))
def test_exact_samples_are_fitted_exactly(step_us: int, per_running_us: int, rate: int) -> None:
    prompts = [Prompt(n, 0.01 + n / rate) for n in PROMPTS]
    running = [Running(n, (step_us + per_running_us * n) / 1e6) for n in LEVELS]
    found = calibrate.fit(prompts, running)
    assert (found.step_us, found.step_us_per_running) == (step_us, per_running_us)
    assert found.prefill_tokens_per_s == pytest.approx(rate, rel=1e-3)
    assert not found.prefill_at_least
    assert found.step_off < 1e-3
    assert found.ttft_off < 1e-3


def test_neither_part_of_a_line_is_negative() -> None:
    falling = calibrate.line([(1, 3.0), (2, 2.0), (3, 1.0)])
    assert falling.slope == 0.0
    assert 1.0 < falling.base < 2.0, "small values weigh more"
    steep = calibrate.line([(1, 0.1), (2, 3.0), (3, 6.0)])
    assert steep.base == 0.0
    assert 0.1 < steep.slope < 2.0


def test_an_insignificant_slope_gives_a_lower_bound() -> None:
    flat = [Prompt(n, 0.02 + (0.001 if n % 128 else -0.001)) for n in PROMPTS]
    found = calibrate.fit(flat, [Running(1, 0.02)])
    assert found.prefill_at_least
    assert found.prefill_tokens_per_s > 1_000_000
    assert (found.step_us, found.step_us_per_running) == (20_000, 0)
    one = calibrate.fit([Prompt(100, 0.5)], [Running(1, 0.02)])
    assert one.prefill_at_least
    assert one.prefill_tokens_per_s == 200


def test_a_step_is_measured_while_all_streams_run() -> None:
    """Two streams: 10 ms per token together, 5 ms alone. One starts early, the other has tokens in pairs."""
    early = [(index * 0.005, index) for index in range(20)]
    early += [(0.1 + index * 0.01, 20 + index) for index in range(30)]
    late = [(0.1 + index * 0.02, index * 2) for index in range(20)]
    found = calibrate.step_s([early, late])
    assert found == pytest.approx(0.01)
    assert calibrate.step_s([early, [(9.0, 0), (9.1, 1)]]) is None
    assert calibrate.step_s([early]) == pytest.approx(0.39 / 49, rel=0.01)


def test_the_output_is_a_profile() -> None:
    hardware = Hardware(
        gpus=8,
        running_max=64,
        kv_tokens=1_000_000,
        prefill_tokens_per_s=15_000,
        step_us=14_000,
        step_us_per_running=1_000,
        start_ms=60_000,
        gpu_hour_nanousd=1_990_000_000,
        source='said "so"',
    )
    text = calibrate.toml("mi300x-deepseek-r1", hardware, {"gpus": "as the replica says"})
    (found,) = tomllib.loads(text).items()
    assert found == ("mi300x-deepseek-r1", msgspec.to_builtins(hardware))
    assert "gpus = 8  # not measured: as the replica says" in text.splitlines()


# --- a live replica ---------------------------------------------------------------------------------------

STEP_US, PER_RUNNING_US, PREFILL = 12_000, 600, 8_000
TOML = f"""
[models."paced:sim"]
source = "nowhere"
context_tokens = 16384
prompt_usd = "0.01"
output_usd = "0.02"

[models."paced:sim".profiles.cpu]
sim.step_us = {STEP_US}
sim.step_us_per_running = {PER_RUNNING_US}
sim.prefill_tokens_per_s = {PREFILL}
"""


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("paced") / "data"
    folder.mkdir()
    (folder / "rift.toml").write_text(TOML)
    running = Service(folder, "--engine", "sim", "--model", "paced:sim").start()
    yield running
    running.stop()


@pytest.mark.slow
def test_the_pace_of_a_simulated_engine_is_measured(paced: Service) -> None:
    command = ["calibrate", "--model", "paced:sim", "--url", paced.url, "--seconds", "10"]
    done = paced.rift(*command, "--concurrency-max", "16", "--gpu-hour-usd", "1.99", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["name"] == "cpu-paced-sim"
    found = msgspec.convert(told["profile"], Hardware)
    for running in (1, 4, 16):
        wanted = STEP_US + PER_RUNNING_US * running
        assert found.step_us_at(running) == pytest.approx(wanted, rel=0.1), told
    assert found.prefill_tokens_per_s == pytest.approx(PREFILL, rel=0.1), told
    assert (found.running_max, found.gpu_hour_nanousd) == (64, 1_990_000_000)
    assert found.source.startswith("calibrated on paced-sim-")
    named = {"gpus", "running_max", "start_ms", "kv_tokens", "gpu_hour_nanousd"}
    assert told["not_measured"].keys() == named
    assert math.isclose(told["running"][0]["step_s"], (STEP_US + PER_RUNNING_US) / 1e6, rel_tol=0.1)


@pytest.mark.slow
def test_errors_name_the_obstacle(paced: Service) -> None:
    (row,) = paced.sql("select count(*) as n from requests")
    for options, words in [
        (["--model", "smollm2:135m"], "0 replicas of smollm2:135m are ready, and calibration measures one"),
        (["--model", "paced:sim", "--url", "http://127.0.0.1:1"], "name the gateway with --url"),
        (["--model", "paced:sim", "--url", paced.url, "--key", "wrong"], "answers 401"),
        (["--model", "unknown", "--url", paced.url], "model 'unknown' is not in the catalogue"),
    ]:
        done = paced.rift("calibrate", *options)
        assert done.returncode == 1
        assert words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert paced.sql("select count(*) as n from requests") == [row]
