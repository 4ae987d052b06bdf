"""One installation with the simulated engine for each module that needs it."""

from collections.abc import Iterator

import pytest

from tests.service import Service

TOML = """
log_format = "json"

[models."wide:sim"]
source = "nowhere"
context_tokens = 16384
prompt_usd = "0.01"
output_usd = "0.02"
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("rift") / "data"
    folder.mkdir()
    (folder / "rift.toml").write_text(TOML)
    running = Service(folder, "--engine", "sim").start()
    yield running
    running.stop()
    assert running.processes() == []
