"""The catalogue on the command line: `rift models list`, `rift models add`.

A model that is added is a table at the end of `rift.toml`: what stands there stays as it is, comments too.
"""

import json
import os
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from events import book as books
from events import fleet as fleets
from events.book import Book
from events.fleet import Fleet
from events.jetstream import JetStream
from events.log import LogError
from replay.warehouse.result import QueryResult
from rift import settings
from rift.catalogue import Catalogue, nanousd_per_token
from rift.cli.connection import configuration, installation, load_settings
from rift.cli.output import CommandFailed, first_of, table, with_log
from rift.data_dir import DataDirError
from rift.settings import InvalidSettings, Scale, Settings

COLUMNS = ("model", "context_tokens", "prompt_usd", "output_usd", "serves", "ready", "starting", "source")


def list_models(options: Namespace) -> None:
    """Show the catalogue; prices are those in force, or where no log answers those of the catalogue."""
    told = load_settings(options)

    async def read(log: JetStream) -> tuple[Book, Fleet]:
        return await books.read(log), await fleets.read(log)

    book = Book()
    fleet = Fleet()
    try:
        book, fleet = with_log(options, read)
    except* (DataDirError, LogError) as nobody:
        print(f"rift: {first_of(nobody)}; these are the catalogue's own prices", file=sys.stderr)
    lines = [_line(name, told, book, fleet) for name in told.catalogue()]
    if options.json:
        print(json.dumps(lines, ensure_ascii=False))
        return
    print(table(QueryResult(list(COLUMNS), [[line[column] for column in COLUMNS] for line in lines])))


def _line(name: str, told: Settings, book: Book, fleet: Fleet) -> dict[str, Any]:
    model = told.catalogue()[name]
    price = book.price(name)
    prompt = nanousd_per_token(model.prompt_usd, where=name) if price is None else price.prompt_nanousd
    output = nanousd_per_token(model.output_usd, where=name) if price is None else price.output_nanousd
    return {
        "model": name,
        "title": model.title,
        "context_tokens": model.context_tokens,
        "prompt_usd": _per_million(prompt),
        "output_usd": _per_million(output),
        "serves": _serves(told.scales().get(name)),
        "wanted": fleet.wanted.get(name, 0),
        "ready": fleet.count(name, "ready"),
        "starting": fleet.count(name, "starting"),
        "source": model.source,
        "profiles": sorted(model.profiles),
    }


def _serves(scale: Scale | None) -> str:
    """How many replicas the settings allow; "" for a model that they do not serve."""
    return "" if scale is None else f"{scale.min}..{scale.max}"


def _per_million(nanousd_a_token: int) -> str:
    return f"{nanousd_a_token // 1000}.{nanousd_a_token % 1000:03}"


def add(options: Namespace) -> None:
    """Append the model's table to the settings file, if the whole is valid then. Raises CommandFailed."""
    file = configuration(options) or installation(options).folder / "rift.toml"
    before = file.read_bytes() if file.exists() else b""
    known: Catalogue = settings.parsed(before, {}, where=str(file)).catalogue()
    if options.name in known:
        where = f'[models."{options.name}"] in {file}'
        raise CommandFailed(f"{options.name} is in the catalogue already; change or add {where}")
    gap = b"" if not before else b"\n" if before.endswith(b"\n") else b"\n\n"
    after = before + gap + _table(options).encode()
    try:
        settings.parsed(after, {}, where=str(file))
    except InvalidSettings as error:
        raise CommandFailed(f"nothing was added: {error}") from error
    _replace(file, after)
    if options.json:
        print(json.dumps({"model": options.name, "file": str(file)}))
        return
    print(
        f"{options.name} is in {file}. `rift up` knows and prices it from its next start on;\n"
        "processes that are started one by one: start them again, and `rift prices publish`.\n"
        f"To have it served, add\n\n[scale.{_text(options.name)}]\nmin = 0\nmax = 1"
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
            raise CommandFailed(f"--profile: {pair!r} is no NAME=VALUE, like gpus=8")
        if name == "gpu_hour_usd":
            own.append(f"{name} = {_text(value)}")
        else:
            (own if name == "gpus" else arguments).append(f"{_key(name)} = {_value(value)}")
    lines = ["", f"[{path}]", *own]
    return [*lines, "", f"[{path}.args]", *arguments] if arguments else lines


def _value(text: str) -> str:
    """A number or true and false as they are, anything else as a text."""
    try:
        is_bare = isinstance(json.loads(text), bool | int | float)
    except ValueError:
        is_bare = False
    return text if is_bare else _text(text)


def _key(text: str) -> str:
    return text if re.fullmatch("[A-Za-z0-9_-]+", text) else _text(text)


def _text(text: str) -> str:
    """A text as TOML has it: JSON's escapes are among TOML's."""
    return json.dumps(text, ensure_ascii=False)


def _replace(file: Path, data: bytes) -> None:
    """Write the file whole or not at all, with the mode that it has."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(data)
    if file.exists():
        shutil.copymode(file, temporary)
    temporary.replace(file)
