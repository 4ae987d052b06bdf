"""The command line of `ops/bench`."""

import argparse
import json
import sys
from collections.abc import Sequence

from tests.bench import serve


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ops/bench", description="Measures Rift.")
    commands = parser.add_subparsers(dest="command", metavar="WHAT", required=True)
    command = commands.add_parser("serve", help="Rift beside the engine's own server")
    command.add_argument("--streams", type=_numbers, default=(1, 8, 32, 64), metavar="N,N,…")
    command.add_argument("--rounds", type=int, default=5, metavar="N")
    command.add_argument("--seconds", type=float, default=8.0, metavar="S", help="measured for each figure")
    command.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
    command.add_argument("--output-tokens", type=int, default=128, metavar="N")
    command.add_argument("--model", metavar="NAME|PATH", help="a catalogue's model or a folder (a tiny one)")
    command.add_argument("--not-durable", action="store_true", help="also without sync_interval: always")
    command.add_argument("--json", action="store_true", help="one JSON value on standard output")
    options = vars(parser.parse_args(arguments))
    del options["command"]
    as_json = options.pop("json")
    found = serve.run(serve.Options(**options), say)
    print(json.dumps(found) if as_json else json.dumps(found["ratios"], indent=1), flush=True)
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
