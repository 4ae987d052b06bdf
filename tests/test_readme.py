"""The commands, tables and file names of the READMEs, against a running installation and the code."""

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
OPERATIONS = (ROOT / "ops" / "README.md").read_text()
GUIDE = (ROOT / "rift" / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("readme")
    running = Service(folder / ".rift", "--engine", "sim").start()
    yield running
    running.stop()


def run(service: Service, command: str) -> str:
    """Run a block as written, except for the port and the path of the installed commands."""
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


def test_the_limit_of_the_native_route_is_the_default_of_its_setting() -> None:
    assert f"`prompt` (up to {Settings().native_prompt_tokens_max:,} tokens, a setting)" in README


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


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
    table = dict(re.findall(r"^\| `(\w+)` \| (`\S+`) \|", OPERATIONS, re.MULTILINE))
    table |= dict.fromkeys(re.findall(r"^\| `(\w+)` \| \| ", OPERATIONS, re.MULTILINE), "")
    defaults = {field.name: field.default for field in msgspec.structs.fields(Settings)}
    assert table.keys() == defaults.keys()
    for name, shown in table.items():
        if shown:
            assert shown == f"`{defaults[name]}`".lower(), name


def test_every_models_price_is_the_catalogues() -> None:
    for name, model in catalogue.shipped().items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {model.prompt_usd} / {model.output_usd} | {model.context_tokens:,} |" in row


def test_every_file_that_the_guide_names_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", GUIDE)
    assert links
    assert not [link for link in links if not (ROOT / "rift" / link).exists()]
    named = re.findall(r"`((?:events|ops|replay|rift|tests)/[^`]*|README.md)`", GUIDE)
    assert len(set(named)) > 40
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_name_that_the_guide_gives_for_a_file_is_in_it() -> None:
    named = re.findall(r"`((?:events|replay|rift)/[^`]*\.\w+)` \(((?:`\w+`(?:, )?)+)\)", GUIDE)
    assert named
    for file, names in named:
        text = (ROOT / file).read_text()
        for name in re.findall(r"\w+", names):
            assert name in text, f"{file} has no {name}"


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "rift/README.md", "ops/README.md", "rift/gateway/README.md"),
        *("rift/gateway/CLIENTS.md", "rift/gateway/ERRORS.md", "rift/gateway/FIELDS.md"),
    ],
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for path, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^):]+)\)", text)):
        target = folder / path
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{path}#{anchor}"
