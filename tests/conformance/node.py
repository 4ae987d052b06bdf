"""Run scripts with Node and the packages of package-lock.json, if they are installed."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def run(script: str, *arguments: str, given: bytes = b"", timeout_s: float = 60.0) -> str:
    """Return the script's output. Skip the test if it cannot run; fail with its error if it fails."""
    return _run([str(FOLDER / script), *arguments], given, timeout_s, os.environ)


def run_text(script: str, environment: Mapping[str, str], timeout_s: float = 60.0) -> str:
    """As `run`, for the text of a module. It finds the packages by the working folder."""
    return _run(["--input-type=module"], script.encode(), timeout_s, {**os.environ, **environment})


def _run(arguments: list[str], given: bytes, timeout_s: float, environment: Mapping[str, str]) -> str:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (FOLDER / "node_modules" / "openai").exists():
        pytest.skip("the JavaScript clients are not installed: run `npm ci` in tests/conformance")
    done = subprocess.run(
        ["node", *arguments],
        input=given,
        capture_output=True,
        timeout=timeout_s,
        cwd=FOLDER,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()
