"""Setup takes torch's CPU build from pip's sources, else from PyTorch's index, else names the remedies."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

OPS = Path(__file__).resolve().parents[2] / "ops"
VERSION = (OPS / "lock" / "torch-cpu.txt").read_text().split("torch==")[1].strip()

# `python` is this test's own, with pip in it, but installs into the folder "into" and has nothing installed.
INSTALL_TORCH = """
. "$1/setup"
venv=$2 python_version=3.12 torch_index=file://$2/pytorch log=$2/log.txt
install_torch
"""


def index(folder: Path, version: str | None) -> None:
    """Make a package index with one version of torch, which remembers the index, or without torch."""
    page = folder / "torch" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("")
    if version:
        wheel = page.with_name(f"torch-{version}-py3-none-any.whl")
        notes = f"torch-{version}.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("torch.py", f"index = {folder.name!r}\n")
            archive.writestr(f"{notes}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
            archive.writestr(
                f"{notes}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{notes}/RECORD", "")
        page.write_text(f'<a href="{wheel.name}">{wheel.name}</a>')


def install(folder: Path, constraint: str = "") -> subprocess.CompletedProcess[str]:
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --target {folder}/into\n')
    python.chmod(0o755)
    (folder / "constraints.txt").write_text(constraint)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    settings = folder / "pip.conf"
    settings.write_text(f"[global]\nindex-url = file://{folder}/own\nconstraint = {folder}/constraints.txt\n")
    environment |= {"PIP_CONFIG_FILE": str(settings), "PIP_NO_CACHE_DIR": "1"}
    command = ["bash", "-c", INSTALL_TORCH, "bash", str(OPS), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_source_that_has_the_cpu_build_is_used(tmp_path: Path) -> None:
    index(tmp_path / "own", VERSION)
    index(tmp_path / "pytorch", VERSION)
    ended = install(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "own" in (tmp_path / "into" / "torch.py").read_text()


@pytest.mark.parametrize(("registry", "constraint"), [(None, ""), ("2.13.0", "torch<=2.14.1")])
def test_without_one_it_comes_from_the_index_of_pytorch(
    tmp_path: Path, registry: str | None, constraint: str
) -> None:
    """With a constraint, pip explains a missing version in other words."""
    index(tmp_path / "own", registry)
    index(tmp_path / "pytorch", VERSION)
    ended = install(tmp_path, constraint)
    assert ended.returncode == 0, ended.stderr
    assert "pytorch" in (tmp_path / "into" / "torch.py").read_text()
    assert f"installing torch=={VERSION} from file://{tmp_path}/pytorch" in ended.stderr


@pytest.mark.parametrize("constraint", ["", "torch<2"])
def test_without_any_source_the_remedies_are_named(tmp_path: Path, constraint: str) -> None:
    index(tmp_path / "own", None)
    if constraint:
        index(tmp_path / "pytorch", VERSION)
    ended = install(tmp_path, constraint)
    assert ended.returncode == 1
    for words in (
        f"torch=={VERSION} for Python 3.12",
        f"file://{tmp_path}/pytorch",
        "PIP_FIND_LINKS",
        "--engine sim",
        "if a constraint excludes",
    ):
        assert words in ended.stderr
    assert not (tmp_path / "into").exists()
