"""The model catalogue: `rift models list`, `rift models add`.

`add` appends a table to `rift.toml` and leaves the rest of the file unchanged, comments included.
"""

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from events import book as books
from events import fleet as fleets
from events.book import Book
from events.fleet import Fleet
from events.jetstream import JetStream
from events.log import LogError
from replay.disk import replacing
from rift import settings
from rift.catalogue import Catalogue, nanousd_per_token
from rift.cli.arguments import Commands, add_command, add_config, add_group, positive
from rift.cli.connection import installation, load_settings, settings_file, with_log
from rift.cli.output import CommandFailed, first_message, table
from rift.data_dir import DataDirError
from rift.settings import InvalidSettings, Scale, Settings

COLUMNS = ("model", "context_tokens", "prompt_usd", "output_usd", "serves", "ready", "starting", "source")


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    actions = add_group(commands, "models", "list and extend the model catalogue")
    listed = add_command(actions, "list", show, "list all known models and their replicas")
    add_config(listed)
    new = add_command(actions, "add", add, "add a model to rift.toml")
    add_config(new)
    new.add_argument("name", metavar="NAME", help="name that clients use in requests")
    new.add_argument("--source", required=True, metavar="SOURCE", help="local path or model hub id")
    new.add_argument(
        "--context-tokens", required=True, type=positive, metavar="N", help="context window in tokens"
    )
    new.add_argument("--prompt-usd", required=True, metavar="USD", help='per million tokens, like "0.15"')
    new.add_argument("--output-usd", required=True, metavar="USD", help="per million tokens")
    new.add_argument("--title", default="", metavar="TEXT", help="display name")
    new.add_argument(
        "--profile",
        action="append",
        nargs="+",
        default=[],
        metavar=("HARDWARE", "NAME=VALUE"),
        help="how to serve it on this hardware: gpus=8, gpu_hour_usd=1.99, and engine arguments; repeatable",
    )


def show(options: Namespace) -> None:
    """List the catalogue with the prices in force, or with its own prices if the log does not answer."""
    settings = load_settings(options)

    async def read(log: JetStream) -> tuple[Book, Fleet]:
        return await books.read(log), await fleets.read(log)

    book = Book()
    fleet = Fleet()
    try:
        book, fleet = with_log(options, read)
    except* (DataDirError, LogError) as silent:
        print(f"rift: {first_message(silent)}; showing the catalogue's own prices", file=sys.stderr)
    lines = [_line(name, settings, book, fleet) for name in settings.catalogue()]
    if options.json:
        print(json.dumps(lines, ensure_ascii=False))
        return
    print(table(COLUMNS, [[line[column] for column in COLUMNS] for line in lines]))


def _line(name: str, settings: Settings, book: Book, fleet: Fleet) -> dict[str, Any]:
    model = settings.catalogue()[name]
    price = book.price(name)
    prompt = nanousd_per_token(model.prompt_usd, where=name) if price is None else price.prompt_nanousd
    output = nanousd_per_token(model.output_usd, where=name) if price is None else price.output_nanousd
    return {
        "model": name,
        "title": model.title,
        "context_tokens": model.context_tokens,
        "prompt_usd": _per_million(prompt),
        "output_usd": _per_million(output),
        "serves": _serves(settings.scales().get(name)),
        "wanted": fleet.wanted.get(name, 0),
        "ready": fleet.count(name, "ready"),
        "starting": fleet.count(name, "starting"),
        "source": model.source,
        "profiles": sorted(model.profiles),
    }


def _serves(scale: Scale | None) -> str:
    """Return the allowed numbers of replicas, or "" for a model that the settings do not serve."""
    return "" if scale is None else f"{scale.min}..{scale.max}"


def _per_million(nanousd_per_token: int) -> str:
    return f"{nanousd_per_token // 1000}.{nanousd_per_token % 1000:03}"


def add(options: Namespace) -> None:
    """Append the model's table to the settings file. Raises CommandFailed if the result would be invalid."""
    file = settings_file(options) or installation(options).folder / "rift.toml"
    before = file.read_bytes() if file.exists() else b""
    known: Catalogue = settings.parsed(before, {}, where=str(file)).catalogue()
    if options.name in known:
        raise CommandFailed(
            f"{options.name} is already in the catalogue; to change it, edit or add "
            f'[models."{options.name}"] in {file}'
        )
    gap = b"" if not before else b"\n" if before.endswith(b"\n") else b"\n\n"
    try:
        after = before + gap + _table(options).encode()
        settings.parsed(after, {}, where=str(file))
    except (InvalidSettings, UnicodeEncodeError) as error:
        raise CommandFailed(f"nothing was added: {error}") from error
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replacing(file) as beside:
        beside.write_bytes(after)
    if options.json:
        print(json.dumps({"model": options.name, "file": str(file)}))
        return
    print(
        f"added {options.name} to {file}. `rift up` knows and prices it after its next start;\n"
        "if you start the processes yourself, restart them and run `rift prices publish`.\n"
        f"To serve it, add\n\n[scale.{_text(options.name)}]\nmin = 0\nmax = 1"
    )


def _table(options: Namespace) -> str:
    lines = [f"[models.{_text(options.name)}]"]
    if options.title:
        lines.append(f"title = {_text(options.title)}")
    lines += [
        f"source = {_text(options.source)}",
        f"context_tokens = {options.context_tokens}",
        f"prompt_usd = {_text(options.prompt_usd)}",
        f"output_usd = {_text(options.output_usd)}",
    ]
    for hardware, *pairs in options.profile:
        lines += _profile(f"models.{_text(options.name)}.profiles.{_key(hardware)}", pairs)
    return "\n".join(lines) + "\n"


def _profile(path: str, pairs: list[str]) -> list[str]:
    own: list[str] = []
    arguments: list[str] = []
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (name and sign):
            raise CommandFailed(f"--profile: must be NAME=VALUE, like gpus=8, got {pair!r}")
        if name == "gpu_hour_usd":
            own.append(f"{name} = {_text(value)}")
        else:
            (own if name == "gpus" else arguments).append(f"{_key(name)} = {_value(value)}")
    lines = ["", f"[{path}]", *own]
    return [*lines, "", f"[{path}.args]", *arguments] if arguments else lines


def _value(text: str) -> str:
    """Return a TOML value: numbers, true and false stay bare, anything else becomes a string."""
    try:
        is_bare = isinstance(json.loads(text), bool | int | float)
    except ValueError:
        is_bare = False
    return text if is_bare else _text(text)


def _key(text: str) -> str:
    return text if re.fullmatch("[A-Za-z0-9_-]+", text) else _text(text)


def _text(text: str) -> str:
    """Return a TOML string. JSON's escapes are valid in TOML."""
    return json.dumps(text, ensure_ascii=False)
