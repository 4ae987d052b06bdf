"""The README's program runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_program_accepts_answers_and_reads_a_request() -> None:
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "events/README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [
        "RequestAccepted",
        "AttemptStarted",
        "TokensGenerated",
        "RequestFinished",
    ]
