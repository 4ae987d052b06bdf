"""The two formats of a log line: `text` for people and `json` for collectors.

A record may have fields of its own: `logger.info(…, extra={"fields": {…}})` with a mapping of names to texts
and numbers. Text shows them as `name=value`, in quotes if needed; JSON as members of the line's object.
"""

import logging
import re
import time
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from rift.errors import printable

Format = Literal["text", "json"]

# The logger of a process's last message: why it ends.
LAST = "rift"
LAST_PREFIX = f"{LAST}: "

NEEDS_QUOTES = re.compile(r'[\s"=]')


class _Formatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._second = (-1, "")

    def _time(self, record: logging.LogRecord) -> str:
        """Return a record's time in RFC 3339: UTC, with milliseconds."""
        second, ms = divmod(int(record.created * 1000), 1000)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
        return f"{self._second[1]}.{ms:03d}Z"

    def _trace(self, record: logging.LogRecord) -> str:
        """Return the record's exception and stack, "" if there is neither."""
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return f"{trace}\n{self.formatStack(record.stack_info)}" if record.stack_info else trace


class TextFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_quoted(value)}" for name, value in _fields(record).items())
        # A message is one line: a client's text in it must not look like a line of ours.
        message = printable(record.getMessage() + fields)
        line = f"{self._time(record)} {record.levelname} {record.name}: {message}"
        trace = self._trace(record)
        return line + "\n" + printable(trace, kept="\n\t") if trace else line


class JsonFormatter(_Formatter):
    """One object a line, with `time`, `level`, `logger`, `message`, the fields, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self._time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        # vLLM names its processes, which share the log of their worker.
        if process := getattr(record, "vllm_process_name", None):
            line["process"] = process
        if trace := self._trace(record):
            line["exception"] = trace
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:
            sound = {
                name: value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
                for name, value in line.items()
            }
            return msgspec.json.encode(sound, enc_hook=str).decode()


FORMATTERS: dict[Format, type[_Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    return getattr(record, "fields", {})


def _quoted(value: Any) -> str:
    text = str(value)
    return msgspec.json.encode(text).decode() if NEEDS_QUOTES.search(text) else text


class _Line(msgspec.Struct):
    logger: str
    message: str


def parsed(line: str) -> tuple[str, str]:
    """Return the logger and the message of a JSON line. Of another line, the logger is LAST if it has
    LAST_PREFIX, else "", and the message is the rest."""
    if line.startswith("{"):
        try:
            read = msgspec.json.decode(line, type=_Line)
        except msgspec.MsgspecError:
            return "", line
        return read.logger, read.message
    return (LAST, line.removeprefix(LAST_PREFIX)) if line.startswith(LAST_PREFIX) else ("", line)
