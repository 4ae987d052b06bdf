"""The README's commands and tables, against a running installation and the code."""

import re
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from rift import catalogue
from rift.settings import Settings
from tests.service import ROOT, Service, environment

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("readme")
    running = Service(folder / ".rift", "--engine", "sim").start()
    yield running
    running.stop()


def run(service: Service, command: str) -> str:
    """Run a block as written, but for the port and where the installed commands are."""
    command = command.replace("http://127.0.0.1:8000", service.url)
    command = command.replace(".venv/bin/rift", f"{sys.executable} -m rift")
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=service.folder.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_commands_do_what_the_transcript_shows(service: Service) -> None:
    start, curl, sql = BLOCKS
    assert start.strip() == "./ops/run"
    answer = run(service, curl)
    assert "event: status" in answer
    assert "event: token" in answer
    assert answer.strip().splitlines()[-1].startswith('data: {"id":"req_0_')
    header, _, row = run(service, sql).splitlines()
    assert header.split() == ["state", "prompt_tokens", "output_tokens", "charge_nanousd"]
    state, prompt_tokens, output_tokens, charge = row.split()
    assert state == "finished"
    assert int(charge) == int(prompt_tokens) * 10 + int(output_tokens) * 20


def test_every_setting_is_in_the_table_with_its_default() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", README, re.MULTILINE))
    table |= dict.fromkeys(re.findall(r"^\| `(\w+)` \| \| ", README, re.MULTILINE), "")
    defaults = {field.name: field.default for field in msgspec.structs.fields(Settings)}
    assert table.keys() == defaults.keys()
    for name, shown in table.items():
        if shown:
            assert shown == f"`{defaults[name]}`".lower(), name


def test_every_models_price_is_the_catalogues() -> None:
    for name, model in catalogue.shipped().items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {model.prompt_usd} / {model.output_usd} | {model.context_tokens:,} |" in row
