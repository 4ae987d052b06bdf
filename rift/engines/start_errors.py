"""Why an engine's process failed to start.

vLLM starts processes of its own. If one of them fails, vLLM only says in ours that it failed, and to see the
cause above: the process wrote it to the log. Here the process also writes it to a file that ours reads.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Names the file, for the processes that vLLM starts.
VARIABLE = "RIFT_START_ERRORS"

# The loggers of the modules in which vLLM's processes catch what ended their start.
LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")

# Enough to name a cause. A later process appends the consequences.
CHARACTERS_MAX = 2000


class StartFailed(Exception):
    """A process of the engine failed to start; the message is the cause that it named."""


class _Recorder(logging.Handler):
    """Append what ended the start of this process to the file."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        path = os.environ.get(VARIABLE)
        if error is None or path is None:
            return
        line = " ".join(str(error).split())[:CHARACTERS_MAX] or type(error).__name__
        with suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def record() -> None:
    """Record what ends the start of this process, if our own process reads it."""
    if VARIABLE not in os.environ:
        return
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Recorder) for handler in logger.handlers):
            logger.addHandler(_Recorder(logging.ERROR))


@contextmanager
def reported() -> Iterator[None]:
    """Raise StartFailed in place of an error in the context if a process named the cause of it."""
    with tempfile.TemporaryDirectory(prefix="rift-start-") as folder:
        path = Path(folder, "errors")
        os.environ[VARIABLE] = str(path)
        try:
            yield
        except Exception as error:
            # The first one is the cause: the processes that wait for it fail later.
            if path.exists() and (lines := path.read_text(encoding="utf-8", errors="replace").splitlines()):
                raise StartFailed(lines[0]) from error
            raise
        finally:
            del os.environ[VARIABLE]
