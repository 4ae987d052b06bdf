"""The cause of a failed start crosses from the process that failed to ours."""

import logging
import subprocess
import sys

import pytest

from rift.engines.start_errors import LOGGERS, StartFailed, reported

# As vLLM's processes: each logs its own failure, and the second one fails because the first did.
PROCESS = """
import logging, sys
from rift.engines.start_errors import record
record()
record()
for name, why in zip(sys.argv[1:], ("KV cache\\nneeds 8 GiB", "a worker failed")):
    try:
        raise ValueError(why)
    except ValueError:
        logging.getLogger(name).exception("failed to start.")
"""


def test_the_first_cause_replaces_the_engine_s_general_message() -> None:
    def start() -> None:
        with reported():
            subprocess.run([sys.executable, "-c", PROCESS, *LOGGERS], check=True, capture_output=True)
            raise RuntimeError("See root cause above.")

    with pytest.raises(StartFailed, match=r"^KV cache needs 8 GiB$"):
        start()


def test_an_error_without_a_recorded_cause_stays() -> None:
    with pytest.raises(RuntimeError, match="no such model"), reported():
        raise RuntimeError("no such model")
    assert not any(logging.getLogger(name).handlers for name in LOGGERS)
