"""Commands that write to a disk that is full or read-only: one line, status 1, and no file half replaced."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from replay.disk import DiskRefused, replacing
from rift.cli import main
from tests.replay import reckoning
from tests.replay.audits import PERIOD, export, ordinary
from tests.replay.conftest import Scribe
from tests.replay.conftest import scribe as scribe
from tests.replay.sealed import SealedLists
from tests.service import environment
from tests.small_disk import SmallDisk, small_disk

ADD = ["models", "add", "acme:1", "--source", "acme/one", "--context-tokens", "4096"]
PRICES = ["--prompt-usd", "0.125", "--output-usd", "2"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 4 << 20) as made:
        yield made


def test_a_model_that_does_not_fit_leaves_the_settings_as_they_were(
    disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    file = disk.path / "rift.toml"
    before = "# kept\n" + "# a long comment\n" * 400
    file.write_text(before)
    file.chmod(0o640)
    command = [*ADD, *PRICES, "--data", str(disk.path)]
    for refuse, accept, why in (
        (disk.fill, disk.free, "no space left on"),
        (disk.read_only, disk.writable, "read-only file system at"),
    ):
        refuse()
        assert main(command) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.splitlines() == [said.err.strip()]
        assert said.err.startswith(f"rift: {why} {disk.path} (")
        assert file.read_text() == before
        accept()
        assert os.listdir(disk.path) == ["rift.toml"], "nothing is left beside it"
    assert main(command) == 0
    assert file.read_text().startswith(before)
    assert file.stat().st_mode & 0o777 == 0o640


def replace(path: Path, data: bytes) -> None:
    with replacing(path) as beside:
        assert beside.suffix == path.suffix, "the suffix selects the format of a plot"
        beside.write_bytes(data)


def test_a_file_is_replaced_whole_or_not(disk: SmallDisk) -> None:
    path = disk.path / "plot.png"
    path.write_bytes(b"old")
    disk.fill(leave_bytes=8192)
    with pytest.raises(DiskRefused, match="no space left on"):
        replace(path, bytes(65536))
    assert path.read_bytes() == b"old"
    disk.free()
    replace(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(disk.path) == ["plot.png"]


@pytest.mark.parametrize("pages", range(6))
def test_an_export_that_does_not_fit_leaves_no_half(disk: SmallDisk, scribe: Scribe, pages: int) -> None:
    archive = SealedLists()
    archive.seal(ordinary(scribe).streams)
    invoice = reckoning.invoice(scribe.streams, "dev", PERIOD)
    folder = disk.path / "export"
    disk.fill(leave_bytes=pages * 4096)
    try:
        export(archive, scribe.streams, invoice, folder)
    except DiskRefused as refused:
        why = str(refused)
        assert list(folder.iterdir()) == []
        disk.free()
        export(archive, scribe.streams, invoice, folder)
        assert "no space left on" in why  # the last sizes fit
    assert (folder / "invoice.json").exists()


def test_output_that_does_not_fit_is_a_failure(disk: SmallDisk) -> None:
    disk.fill()
    with (disk.path / "models").open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "rift", "models", "list", "--data", str(disk.path)],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
    assert done.returncode == 1
    assert done.stderr.count("No space left on device") == 1
    assert "Exception" not in done.stderr
    assert "Traceback" not in done.stderr
