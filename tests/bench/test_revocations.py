"""Revocations at two real gateways: keys are rejected within 2 s, and streams end within 5."""

import re
import subprocess
import sys

import pytest

from tests.service import ROOT, environment


@pytest.mark.slow
def test_a_revoked_key_is_rejected_within_2_s_and_its_stream_ends_within_5() -> None:
    command = [sys.executable, "-m", "tests.bench.revocations", "--keys", "21"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    refused, ended = (float(text) for text in re.findall(r"max ([0-9.]+) ms", ran.stdout))
    assert "refused, of 42" in ran.stdout
    assert "streams ended, of 3" in ran.stdout
    assert refused < 2000
    assert ended < 5000
