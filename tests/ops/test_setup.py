"""The check of the machine shows every problem with its remedy, and a wrong option fails at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPS = Path(__file__).resolve().parents[2] / "ops"

# A machine that fails every check. These functions replace those that read the real machine.
POOR_MACHINE = """
. "$1/setup"
cpu_flags() { echo "flags : fpu avx sse"; }
memory_mb() { echo 3900; }
glibc_version() { echo 2.31; }
free_mb() { echo 10; }
has_library() { return 1; }
is_installed() { return 1; }
has() { [[ $1 != lscpu ]]; }
python=$2 python_version=3.11
preflight base engine
stop_if_problems
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_all_problems_are_shown_at_once() -> None:
    ended = run("bash", "-c", POOR_MACHINE, "bash", str(OPS), sys.executable)
    assert ended.returncode == 1
    for word in (
        "lscpu",
        "AVX2",
        "6 GB of memory",
        "glibc 2.34",
        "apt-get install -y libnuma1",
        "10 MB are free",
    ):
        assert word in ended.stderr
    assert not ended.stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--port", "x"),
        ("--port=65536",),
        ("--engine=tpu",),
        ("--port",),
        ("--workers", "x"),
        ("--workers=1..",),
        ("--workers", ""),
    ],
)
def test_a_wrong_option_is_wrong_usage(options: tuple[str, ...]) -> None:
    ended = run(str(OPS / "run"), *options)
    assert ended.returncode == 2
    assert options[0].partition("=")[0] in ended.stderr


@pytest.mark.parametrize("options", [("--workers", "0..4"), ("--workers=0..4",), ("--workers", "2")])
def test_every_number_of_workers_that_rift_up_takes_is_accepted(options: tuple[str, ...]) -> None:
    """The run ends with the next check, which finds no Python."""
    ended = run(str(OPS / "run"), *options, RIFT_PYTHON="/bin/false")
    assert (ended.returncode, "RIFT_PYTHON" in ended.stderr) == (1, True), ended.stderr


def test_an_unsupported_python_is_named() -> None:
    ended = run(str(OPS / "run"), RIFT_PYTHON="/bin/false")
    assert ended.returncode == 1
    assert "RIFT_PYTHON is '/bin/false'" in ended.stderr
