"""Only the module of the command that runs is imported, and Ctrl-C ends it quietly."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rift.cli import parser
from tests.service import environment


def commands(of: str) -> list[str]:
    [actions] = [action for action in parser.build_parser(of)._actions if action.choices]
    return list(actions.choices or ())


def test_every_command_is_found() -> None:
    listed = [command for added in parser.COMMANDS.values() for command in added]
    assert commands("") == commands("--help") == commands("no-such") == listed
    for added in parser.COMMANDS.values():
        for command in added:
            assert commands(command) == list(added)


@pytest.mark.parametrize(
    ("command", "foreign"),
    [("gateway", "duckdb"), ("gateway", "aiohttp"), ("worker", "duckdb"), ("sql", "hypercorn")],
)
def test_a_process_loads_what_it_needs(command: str, foreign: str) -> None:
    check = f"""
import sys
from rift.cli.parser import build_parser
build_parser({command!r})
print({foreign!r} in sys.modules)
"""
    run = [sys.executable, "-c", check]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == "False\n"


def test_an_error_of_the_system_is_shown_without_its_number() -> None:
    assert parser._text(FileNotFoundError(2, "No such file", "a.csv")) == "a.csv: No such file"
    assert parser._text(OSError(28, "No space left on device")) == "No space left on device"
    assert parser._text(UnicodeEncodeError("utf-8", "f\udcfcr", 1, 2, "surrogates not allowed")) == (
        r"'f\udcfcr' cannot be written in utf-8: surrogates not allowed"
    )
    assert parser._text(TimeoutError("none within 5 s")) == "none within 5 s"


def test_ctrl_c_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for pressed in (KeyboardInterrupt(), BaseExceptionGroup("tasks", [KeyboardInterrupt()])):

        def run(_: object, pressed: BaseException = pressed) -> int:
            raise pressed

        monkeypatch.setattr(parser, "_run", run)
        assert parser.main(["status"]) == 128 + signal.SIGINT
        assert capsys.readouterr().err == "rift: interrupted\n"


def test_ctrl_c_during_the_imports_ends_the_process_at_once() -> None:
    """The command's module presses it while it is imported."""
    press = "signal.raise_signal(signal.SIGINT)"
    # A suite that a shell runs in the background ignores Ctrl-C.
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["rift", "status"]
class Pressed:
    def find_spec(self, name, *_):
        if name == "rift.cli.status.command":
            {press}
sys.meta_path.insert(0, Pressed())
from rift.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_closed_stream_is_no_socket(tmp_path: Path, closed: str) -> None:
    """uvloop aborts the process if one of its sockets has the number of a standard stream."""
    command = f'{sys.executable} -m rift status --data "$0" {closed}'
    run = ["bash", "-c", command, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    assert ("start one with ./ops/run" in done.stderr) == ("2>" not in closed), done.stderr


def test_up_refuses_a_fleet_that_control_cannot_have(tmp_path: Path) -> None:
    (tmp_path / "rift.toml").write_text('fleet = "kubernetes"\n')
    run = [sys.executable, "-m", "rift", "up", "--engine", "sim", "--data", str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, env=environment())
    assert done.returncode == 1
    assert "works in a pod" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rift.toml"]
