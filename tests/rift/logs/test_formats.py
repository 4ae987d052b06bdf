"""A log line in each format, and a process's last words in either."""

import json
import logging
import re
import subprocess
import sys
from typing import Any

import pytest

from rift.logs.formats import JsonFormatter, TextFormatter, parsed
from rift.logs.setup import VLLM_JSON

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def record(message: str, *arguments: object, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("rift.x", logging.WARNING, "x.py", 1, message, arguments, None)
    made.__dict__.update(created=1_795_431_870.0049, **more)
    return made


def failed() -> logging.LogRecord:
    try:
        raise ValueError("first\nsecond \x1b[2J")
    except ValueError:
        return record("failed", exc_info=sys.exc_info())


def test_text_is_one_line_whatever_the_message_holds() -> None:
    fields = {"route": 'GET "/"', "status": 200, "model": "a:b"}
    line = TextFormatter().format(record("%s ends", "a\n2026 INFO rift: forged\x1b", fields=fields))
    assert line == (
        r"2026-11-23T11:04:30.004Z WARNING rift.x: a\n2026 INFO rift: forged\x1b ends "
        r'route="GET \"/\"" status=200 model=a:b'
    )
    trace = TextFormatter().format(failed()).splitlines()
    assert trace[1] == "Traceback (most recent call last):"
    assert trace[-2:] == ["ValueError: first", r"second \x1b[2J"]


def test_json_has_one_object_for_each_line() -> None:
    line = JsonFormatter().format(
        record("half 🌊 \ud83c", fields={"status": 200}, vllm_process_name="EngineCore")
    )
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2026-11-23T11:04:30.004Z", "level": "warning", "logger": "rift.x",
        "message": "half 🌊 \\ud83c", "status": 200, "process": "EngineCore",
    }  # fmt: skip
    trace = json.loads(JsonFormatter().format(failed()))
    assert trace["message"] == "failed"
    assert trace["exception"].endswith("ValueError: first\nsecond \x1b[2J")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rift: the disk is full", ("rift", "the disk is full")),
        ('{"logger": "rift", "message": "full", "level": "error"}', ("rift", "full")),
        ('{"logger": "rift.x", "message": "m"}', ("rift.x", "m")),
        ('{"logger": "rift"', ("", '{"logger": "rift"')),
        ("[1] Server ready", ("", "[1] Server ready")),
    ],
)
def test_a_line_is_read_back(line: str, expected: tuple[str, str]) -> None:
    assert parsed(line) == expected


PROCESS = """
import logging, threading, warnings
from rift.cli.parser import _fail
from rift.logs.setup import set_up
set_up()
logging.getLogger("a").info("text")
_fail("first\\nsecond")
set_up("json")
logging.getLogger("a").info("json")
logging.getLogger("httpx").info("a request")
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
_fail("why")
raise KeyError("uncaught")
"""


VLLM = """
import json, logging, logging.config, sys
logging.config.dictConfig(json.load(open(sys.argv[1])))
logging.getLogger("vllm.v1.engine").warning("of vLLM")
logging.getLogger("vllm.v1.engine").info("not shown")
logging.getLogger("rift.engines.vllm").info("ours")
"""


def test_vllms_processes_log_in_json_too() -> None:
    """vLLM reads the file in each of its processes, as its logging.config does here."""
    ended = subprocess.run(
        [sys.executable, "-c", VLLM, str(VLLM_JSON)], capture_output=True, text=True, check=True
    )
    assert [parsed(line) for line in ended.stderr.splitlines()] == [
        ("vllm.v1.engine", "of vLLM"), ("rift.engines.vllm", "ours")
    ]  # fmt: skip


def test_all_that_a_process_writes_is_in_its_format() -> None:
    ended = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    text, *words, first, warning, thread, last, uncaught = ended.stderr.splitlines()
    assert TIME.sub("", text) == " INFO a: text"
    assert words == ["rift: first", "second"]
    lines = [json.loads(line) for line in (first, warning, thread, last, uncaught)]
    assert all(TIME.fullmatch(line["time"]) for line in lines)
    assert [(line["logger"], line["level"]) for line in lines] == [
        ("a", "info"), ("py.warnings", "warning"), ("rift", "critical"), ("rift", "error"),
        ("rift", "critical"),
    ]  # fmt: skip
    assert parsed(last) == ("rift", "why")
    assert [line["exception"].splitlines()[-1] for line in (lines[2], lines[4])] == [
        "ZeroDivisionError: division by zero", "KeyError: 'uncaught'"
    ]  # fmt: skip
    assert (ended.returncode, ended.stdout) == (1, "")
