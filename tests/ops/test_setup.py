"""The check of the machine shows every problem with its remedy, and a wrong option fails at once."""

import os
import shutil
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


# A chroot without /sys.
NO_SYS = """
. "$1/setup"
lscpu() { echo "lscpu: failed to determine number of CPUs" >&2; return 1; }
python=$2
check_engine
printf '%s\n' "${problems[@]}"
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "RIFT_PYTHON"}
    return subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_all_problems_are_shown_at_once() -> None:
    ended = run("bash", "-c", POOR_MACHINE, "bash", str(OPS), sys.executable)
    assert ended.returncode == 1
    for word in (
        "lscpu",
        "AVX2",
        "6 GB of memory",
        "glibc 2.34",
        "libnuma.so.1",
        "10 MB are free",
    ):
        assert word in ended.stderr
    assert not ended.stdout
    command = ended.stderr.splitlines()[-1].replace("sudo ", "").strip()
    assert command == "apt-get update && apt-get install -y libnuma1 util-linux"


# A machine whose path has no Python except those in the folder $2; os-release says $3.
OTHER_PYTHON = """
. "$1/setup"
os_release() { echo "$system"; }
has() { true; }
system=$3
unset RIFT_PYTHON
PATH=$2 choose_python
stop_if_problems
"""


def test_lscpu_must_list_the_cores() -> None:
    ended = run("bash", "-c", NO_SYS, "bash", str(OPS), sys.executable)
    assert "mount /sys" in ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("system", "remedy"),
    [
        ("debian 12", "apt-get install -y python3 python3-venv"),
        ("debian 13", "apt-get install -y python3 python3-venv"),
        ("ubuntu 24.04", "apt-get install -y python3 python3-venv"),
        ("ubuntu 22.04", "apt-get install -y python3.11 python3.11-venv"),
        ("fedora 43", "pyenv install 3.13"),
    ],
)
def test_without_a_supported_python_the_remedy_fits_the_system(
    tmp_path: Path, system: str, remedy: str
) -> None:
    ended = run("bash", "-c", OTHER_PYTHON, "bash", str(OPS), str(tmp_path), system)
    assert (ended.returncode, "none is on the path" in ended.stderr) == (1, True), ended.stderr
    assert remedy in ended.stderr.replace("sudo ", "")


def test_an_unsupported_python_on_the_path_is_named(tmp_path: Path) -> None:
    other = tmp_path / "python3"
    other.write_text(f"#!/bin/sh\necho 3.14 {other}\n")
    other.chmod(0o755)
    ended = run("bash", "-c", OTHER_PYTHON, "bash", str(OPS), str(tmp_path), "debian 13")
    assert ended.returncode == 1
    assert f"needs Python 3.11, 3.12 or 3.13; {other} is Python 3.14" in ended.stderr


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_supported_python_runs_the_engine(tmp_path: Path, version: str) -> None:
    python = tmp_path / f"python{version}"
    python.write_text(f"#!/bin/sh\necho {version} {python}\n")
    python.chmod(0o755)
    script = OTHER_PYTHON + 'echo "$python_version $python"'
    ended = run("bash", "-c", script, "bash", str(OPS), str(tmp_path), "debian 13")
    assert (ended.returncode, ended.stdout) == (0, f"{version} {python}\n"), ended.stderr


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


@pytest.mark.parametrize(
    ("content", "told"), [("port = = 1\n", "Invalid value (at line 1"), (None, "does not exist")]
)
def test_a_broken_settings_file_is_told_before_the_installation(
    tmp_path: Path, content: str | None, told: str
) -> None:
    """On a machine that is not ready, so that nothing is installed in any case."""
    file = tmp_path / "rift.toml"
    if content is not None:
        file.write_text(content)
    home = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "", "RIFT_PYTHON": sys.executable}
    for options in (("--config", str(file)), ("--data", str(tmp_path))):
        ended = run(str(OPS / "run"), "--engine", "sim", "--port", "0", *options, **home)
        assert ended.returncode == 1
        is_named = f"settings file {file} " in ended.stderr and told in ended.stderr
        assert is_named == (content is not None or options[0] == "--config"), ended.stderr


def test_a_python_that_cannot_run_is_not_called_a_wrong_version(tmp_path: Path) -> None:
    """A shim of pyenv is on the path, although no version is selected that has it."""
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        shim = tmp_path / name
        shim.write_text(f"#!/bin/sh\necho 'pyenv: {name}: command not found' >&2\nexit 127\n")
        shim.chmod(0o755)
    for name in ("dirname", "uname", "sort", "head", "sed", "df", "awk", "grep", "flock", "cat", "mkdir"):
        (tmp_path / name).symlink_to(Path(shutil.which(name) or name))
    bash = shutil.which("bash") or "bash"
    ended = run(bash, str(OPS / "run"), "--engine", "sim", PATH=str(tmp_path))
    assert ended.returncode == 1
    assert f"{tmp_path}/python3.11 cannot run (pyenv: python3.11: command not found)" in ended.stderr
    ended = run(str(OPS / "run"), "--engine", "sim", RIFT_PYTHON=str(tmp_path / "python3.11"))
    assert ended.returncode == 1
    assert "cannot run (pyenv: python3.11: command not found)" in ended.stderr
    assert "not supported" not in ended.stderr


@pytest.mark.parametrize("home", ["/proc/nowhere", ""])
def test_a_home_that_cannot_be_written_is_named_with_the_remedy(home: str) -> None:
    script = '. "$1/setup"; check_cache; stop_if_problems'
    ended = run("bash", "-c", script, "bash", str(OPS), HOME=home, XDG_CACHE_HOME="")
    assert ended.returncode == 1
    assert f"{home}/.cache" in ended.stderr if home else "HOME" in ended.stderr
    assert "set XDG_CACHE_HOME" in ended.stderr


def test_an_unsupported_python_is_named() -> None:
    ended = run(str(OPS / "run"), RIFT_PYTHON="/bin/false")
    assert ended.returncode == 1
    assert "RIFT_PYTHON is '/bin/false'" in ended.stderr
