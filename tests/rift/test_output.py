"""What a terminal is sent: never a control character that a client or a file chose."""

import json
import os
import subprocess
import sys

import pytest

from replay.warehouse.result import QueryResult
from rift.cli import parser
from rift.cli.output import print_list, print_result, table
from rift.errors import printable

EVIL = "\x1b[31mred\x9b2J\nnext\x7f\u2028\u202e ä 漢"
SHOWN = "\\x1b[31mred\\x9b2J\\nnext\\x7f\\u2028\\u202e ä 漢"


def test_a_table_escapes_control_characters() -> None:
    assert table([EVIL], [[EVIL]]).splitlines() == [SHOWN, "-" * len(SHOWN), SHOWN]


def test_json_escapes_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(QueryResult([EVIL], [[EVIL]]), as_json=True)
    print_list([{"x": EVIL}], as_json=True, formats={})
    lines = capsys.readouterr().out.split("\n")
    assert [json.loads(line) for line in lines[:2]] == [[{EVIL: EVIL}], [{"x": EVIL}]]
    assert not [one for line in lines for one in line if one in "\x1b\x9b\x7f\u2028"]


def test_an_error_keeps_only_its_line_breaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert printable("one\ntwo\x1b", kept="\n") == "one\ntwo\\x1b"
    assert parser.main(["status", "--data", "/nowhere/\x1b[31m"]) == 1
    captured = capsys.readouterr()
    assert "\x1b" not in captured.err
    assert "/nowhere/\\x1b[31m" in captured.err


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_early_is_no_failure_to_report(lines: int) -> None:
    """`rift status | head` ends without a message, whether the output fits into the buffer or not."""
    code = f"""
import sys, types
from rift.cli import parser

options = types.SimpleNamespace(run=lambda _: print("x\\n" * {lines}))
parser.build_parser = lambda *_: types.SimpleNamespace(parse_args=lambda _: options)
sys.exit(parser.main([]))
"""
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert ended.stderr == b""
