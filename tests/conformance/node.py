"""Run scripts with Node and the packages of package-lock.json, if they are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def run(script: str, *arguments: str, given: bytes = b"", timeout_s: float = 60.0) -> str:
    """Return the script's output. Skip the test if it cannot run; fail with its error if it fails."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (FOLDER / "node_modules" / "openai").exists():
        pytest.skip("the JavaScript clients are not installed: run `npm ci` in tests/conformance")
    command = ["node", str(FOLDER / script), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()
