"""`rift status`: the command. It raises a message for each problem, and `--watch` shows the report again."""

import json
import os
import platform
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from typing import Any

from events.log import LogError
from rift import __version__
from rift.cli.arguments import Commands, add_command
from rift.cli.connection import installation, with_log
from rift.cli.output import CommandFailed, first_message
from rift.cli.status.report import ask_all
from rift.cli.status.text import as_text
from rift.data_dir import DataDirError

REDRAW_S = 1.0
CLEAR = "\033[H\033[J"

# The parts of a report that `--watch` shows again, with their age, while nothing newer is known.
KEPT = ("brokers", "models", "replicas", "streams", "nats", "nats_server")


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    parser = add_command(
        commands, "status", status, "show what runs, is queued and lags; exit status 1 if there is a problem"
    )
    parser.add_argument("--watch", action="store_true", help="show it again every second until Ctrl-C")


def status(options: Namespace) -> None:
    """Show the status. Then raise a CommandFailed for each problem."""
    report = _watch(options) if options.watch else _report(options)
    if not options.watch:
        print(json.dumps(report, ensure_ascii=False) if options.json else as_text(report))
    if problems := report["problems"]:
        raise ExceptionGroup("problems", [CommandFailed(problem) for problem in problems])


def _watch(options: Namespace) -> dict[str, Any]:
    """Show the status every REDRAW_S until Ctrl-C, and return the last one."""
    report: dict[str, Any] = {"problems": []}
    known: dict[str, tuple[Any, float]] = {}
    is_screen = sys.stdout.isatty() and not options.json
    try:
        while True:
            began_s = time.monotonic()
            report = _with_kept(_report(options), known, time.monotonic())
            if options.json:
                shown = json.dumps(report, ensure_ascii=False)
            else:
                problems = "".join(f"\nproblem   {problem}" for problem in report["problems"])
                shown = f"{time.strftime('%H:%M:%S')}  {as_text(report)}{problems}\n"
            if is_screen:
                size = shutil.get_terminal_size()
                shown = CLEAR + _cropped(shown, size.lines - 1, size.columns)
            print(shown, flush=True)
            time.sleep(max(0.0, began_s + REDRAW_S - time.monotonic()))
    except KeyboardInterrupt:
        return report


def _with_kept(report: dict[str, Any], known: dict[str, tuple[Any, float]], now_s: float) -> dict[str, Any]:
    """Return the report with the newest known value of each part that is missing in it, and remember it."""
    for part in KEPT:
        if part in report:
            known[part] = report[part], now_s - report["stale_ms"].get(part, 0) / 1000
        elif part in known:
            value, at_s = known[part]
            report[part] = value
            report["stale_ms"][part] = round((now_s - at_s) * 1000)
    return report


def _cropped(text: str, lines_max: int, columns: int) -> str:
    """Return the text as it fits a terminal; the problems, at its end, stay."""
    lines = [line[:columns] for line in text.splitlines()]
    if len(lines) <= lines_max:
        return "\n".join(lines)
    problems = [line for line in lines if line.startswith("problem ")][: max(0, lines_max - 2)]
    kept = lines_max - len(problems) - 1
    left_out = f"… {len(lines) - lines_max + 1} lines do not fit"
    return "\n".join([*lines[: max(0, kept)], left_out, *problems])


def _report(options: Namespace) -> dict[str, Any]:
    """Return all that is known. `stale_ms` has the age of each part that is not of this moment."""
    report: dict[str, Any] = {
        "rift": __version__,
        "python": platform.python_version(),
        "data": str(installation(options).folder),
        "problems": [],
        "stale_ms": {},
    }
    try:
        report |= with_log(options, ask_all)
    except* (DataDirError, LogError) as silent:
        report["problems"].append(first_message(silent))
    if (reserve := installation(options).reserve(options.nats, os.environ)) and reserve.file.exists():
        report["disk"] = {"folder": str(reserve.file.parent), "free_bytes": reserve.free_bytes}
        try:
            reserve.check()
        except OSError as error:
            report["problems"].append(f"{reserve.trouble()} ({error.strerror})")
    return report
