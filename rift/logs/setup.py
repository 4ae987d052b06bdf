"""What a process logs, and where: its own messages from level info on, and warnings of libraries, to standard
error. `rift up` sends that to a file for each process; a service manager to its own journal."""

import logging
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from rift.logs.formats import FORMATTERS, LAST, Format, JsonFormatter

# vLLM configures the loggers of each of its processes with this file if a variable of its own names it.
VLLM_VARIABLE = "VLLM_LOGGING_CONFIG_PATH"
VLLM_JSON = Path(__file__).with_name("vllm.json")

# Libraries that log each request at level info.
TALKATIVE = ("httpx", "httpcore")


def set_up(log_format: Format = "text") -> None:
    """Begin to log, or change the format."""
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(level=logging.INFO, handlers=[_Handler()])
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
    for handler in root.handlers:
        if isinstance(handler, _Handler):
            handler.setFormatter(FORMATTERS[log_format]())
            if log_format == "json":
                _log_uncaught()


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error. A class, so that handlers of others are left alone."""


def is_json() -> bool:
    """Return whether this process logs in JSON."""
    return any(isinstance(each.formatter, JsonFormatter) for each in logging.getLogger().handlers)


def _log_uncaught() -> None:
    """Log what Python would print: exceptions that nothing caught, and warnings."""
    logger = logging.getLogger(LAST)

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        logger.critical("uncaught exception", exc_info=(kind, error, trace))

    def unraisable(which: Any) -> None:
        logger.error("exception ignored", exc_info=(which.exc_type, which.exc_value, which.exc_traceback))

    def in_thread(which: Any) -> None:
        if which.exc_value is not None:
            uncaught(which.exc_type, which.exc_value, which.exc_traceback)

    sys.excepthook = uncaught
    sys.unraisablehook = unraisable
    threading.excepthook = in_thread
    logging.captureWarnings(True)
