"""Chromium with one tab for each test, and an installation with one warm and one cold model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages.chromium import Tab, chromium
from tests.service import Service

SLEEPY = "sleepy:1"
TOML = f"""
[scale."{SLEEPY}"]
idle_s = 5

[models."{SLEEPY}"]
source = "/simulated"
context_tokens = 4096
prompt_usd = "0.10"
output_usd = "0.35"

[models."{SLEEPY}".profiles.cpu.sim]
start_ms = 3000

[profiles."cpu-sleepy-1"]
gpus = 0
running_max = 64
kv_tokens = 262_144
prefill_tokens_per_s = 1_000_000
step_us = 20_000
step_us_per_running = 1
start_ms = 4000
gpu_hour_nanousd = 0
source = "a guess"
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("pages") / "data"
    folder.mkdir()
    (folder / "rift.toml").write_text(TOML)
    running = Service(folder, "--engine", "sim").start()
    yield running
    running.stop()


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    """Fail the test if its page caused any complaint."""
    with chromium(tmp_path) as opened:
        opened.look(width=1280, height=860)
        yield opened
        assert opened.complaints == []
