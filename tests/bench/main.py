"""The command line of `ops/bench`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from replay.scaling import hardware
from tests.bench import bill, figures, gateway, growth, log, replay, scale, serve, servers, syscalls
from tests.chaos.rig import RigBroken


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ops/bench", description="Measure Rift, with both sides of each comparison in one run."
    )
    commands = parser.add_subparsers(dest="command", metavar="WHAT", required=True)

    command = _command(commands, "serve", "compare Rift with the engine's own server")
    command.add_argument("--streams", type=_numbers, default=(1, 8, 32, 64), metavar="N,N,…")
    command.add_argument("--rounds", type=int, default=5, metavar="N")
    command.add_argument("--seconds", type=float, default=8.0, metavar="S", help="measured time per figure")
    command.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
    command.add_argument("--output-tokens", type=_numbers, default=(128,), metavar="N,N,…")
    command.add_argument(
        "--paced",
        choices=hardware.profiles(),
        metavar="PROFILE",
        help="let the engines sleep for the steps of this hardware profile instead of computing",
    )
    command.add_argument("--syscalls", action="store_true", help="also count system calls, with strace")
    command.add_argument("--model", metavar="NAME|PATH", help="of the catalogue, or a folder (default: tiny)")
    command.add_argument("--not-durable", action="store_true", help="also measure without syncs")

    command = _command(commands, "gateway", "measure how many streams one gateway process holds")
    command.add_argument("--streams", type=_numbers, default=(500, 1000, 1500, 2000, 3000), metavar="N,N,…")
    command.add_argument("--seconds", type=float, default=10.0, metavar="S", help="measured time per figure")

    command = _command(commands, "growth", "measure what a token and a request cost with many others open")
    command.add_argument("--open", type=_numbers, default=(100, 1000, 5000), metavar="N,N,…")
    command.add_argument(
        "--fed", type=int, default=20_000, metavar="N", help="open requests for control alone"
    )
    command.add_argument("--seconds", type=float, default=8.0, metavar="S", help="measured time per figure")

    command = _command(commands, "log", "compare appends and reads with the plain client library")
    command.add_argument("--appends", type=int, default=2000, metavar="N")
    command.add_argument("--rounds", type=int, default=5, metavar="N")
    command.add_argument(
        "--shards",
        type=_numbers,
        default=(),
        metavar="N,N,…",
        help="instead, measure appends to this many shards, on one broker and on a cluster of three",
    )
    command.add_argument(
        "--writers", type=_numbers, default=(1, 16, 64, 256), metavar="N,N,…", help="with --shards"
    )
    command.add_argument("--seconds", type=float, default=3.0, metavar="S", help="measured time per figure")

    command = _command(commands, "replay", "compare a rebuild from the archive with a plain DuckDB table")
    command.add_argument("--requests", type=int, default=10_000_000, metavar="N", help="archived requests")
    command.add_argument("--log-requests", type=int, default=25_000, metavar="N", help="requests in the log")
    command.add_argument("--rounds", type=int, default=1, metavar="N")

    command = _command(commands, "bill", "bill a trace and audit every invoice")
    command.add_argument("--trace", type=Path, required=True, metavar="PATH", help="CSV, optionally gzipped")
    command.add_argument("--requests", type=int, metavar="N", help="use only the first N requests")

    command = _command(
        commands, "scale", "compare the scaling policy with fixed fleets, Knative's and an oracle"
    )
    command.add_argument("--trace-folder", type=Path, metavar="DIR", help="folder of the published traces")
    command.add_argument("--starts", type=_numbers, default=(15, 60, 150), metavar="S,S,…")
    command.add_argument(
        "--hours", type=float, default=12.0, metavar="H", help="length of the generated bursts (default: 12)"
    )
    command.add_argument(
        "--only", action="append", choices=scale.NAMES, default=[], help="measure this trace; may be repeated"
    )

    options = vars(parser.parse_args(arguments))
    name = options.pop("command")
    as_json = options.pop("json")
    modules = {
        "serve": serve,
        "gateway": gateway,
        "growth": growth,
        "log": log,
        "replay": replay,
        "bill": bill,
        "scale": scale,
    }
    module = modules[name]
    try:
        result = figures.plain(module.run(module.Options(**options), say))
    except (servers.ServerBroken, syscalls.StraceMissing, RigBroken) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        print(json.dumps(result.get("ratios", result), indent=1), flush=True)
    return 0


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--json", action="store_true", help="print all figures as one JSON value")
    return command


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
