"""Price lists: `rift prices list`, `rift prices publish`, `rift rerate`."""

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import msgspec

from events import book as books
from events.book import Book
from events.jetstream import JetStream
from events.pricing import Billed, cost_nanousd
from events.schema import Price
from rift import book_admin, price_lists
from rift.cli.arguments import Commands, add_command, add_config, add_group, add_period
from rift.cli.connection import ask_control, load_settings, select, with_log
from rift.cli.output import CommandFailed, table


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    actions = add_group(commands, "prices", "list and publish prices")
    add_command(actions, "list", show, "list the prices in force")
    new = add_command(actions, "publish", publish, "publish the next price list", has_json=False)
    add_config(new)
    new.add_argument("file", type=Path, metavar="FILE", help='TOML: [prices."MODEL"] prompt_usd = "0.15" …')

    rate = add_command(commands, "rerate", rerate, "show what another price list would have charged")
    rate.add_argument(
        "--price-list", type=Path, required=True, metavar="FILE", help="price list, as for `prices publish`"
    )
    add_period(rate)
    rate.add_argument(
        "--diff", action="store_true", required=True, help="show the difference; change nothing"
    )


def show(options: Namespace) -> None:
    book = with_log(options, books.read)
    in_force = book.prices()
    if options.json:
        listed = [msgspec.to_builtins(price) for price in in_force.values()]
        print(json.dumps({"version": book.price_version, "prices": listed}))
        return
    print(f"price list {book.price_version}, nano-USD per token (divide by 1,000 for USD per million tokens)")
    columns = ["model", "prompt", "output", "cached prompt", "second"]
    print(table(columns, [[name, *_numbers(price)] for name, price in in_force.items()]))


def publish(options: Namespace) -> None:
    async def append(log: JetStream) -> tuple[Book, Book]:
        before = await books.read(log)
        published = price_lists.load(options.file, before)
        known = {*load_settings(options).catalogue(), *before.prices()}
        if unknown := sorted({price.model for price in published.prices} - known):
            raise CommandFailed(
                f"model {unknown[0]!r} is not in the catalogue: add it to rift.toml first, or correct the "
                f"price list; known models: {', '.join(sorted(known))}"
            )
        if before.prices() != {price.model: price for price in published.prices}:
            await book_admin.publish_prices(log, before, published)
        return before, await books.read(log)

    before, after = with_log(options, append)
    if after.price_version == before.price_version:
        print(f"these prices are already in force as version {after.price_version}; nothing was published")
        return
    print(
        f"price list {after.price_version} is in force for requests accepted from now on; nano-USD per token:"
    )
    for name, price in after.prices().items():
        if (old := before.price(name)) != price:
            print(f"  {name}: {_text(old)} -> {_text(price)}")


def rerate(options: Namespace) -> None:
    """Show what a price list would have charged for a period. Change nothing."""

    async def get(log: JetStream) -> tuple[Book, Any]:
        return await books.read(log), await ask_control(log, select("rerate", period=options.period))

    book, charged = with_log(options, get)
    listed = {price.model: price for price in price_lists.load(options.price_list, book).prices}
    sums: dict[str, list[int]] = {}
    for account, model, plan, prompt, cached, output, old in charged["rows"]:
        price = listed.get(model)
        if price is None:
            new = old
        elif plan == "per_second":
            new = prompt * price.second_nanousd if price.second_nanousd is not None else old
        else:
            apart = cached if price.cached_prompt_nanousd is not None else 0
            new = cost_nanousd(Billed(prompt - apart, apart, output), price)
        of_account = sums.setdefault(account, [0, 0])
        of_account[0] += old
        of_account[1] += new
    rows = [[account, old, new, new - old] for account, (old, new) in sums.items()]
    columns = ["account", "old_nanousd", "new_nanousd", "difference_nanousd"]
    if options.json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows]))
    else:
        print(table(columns, rows))
        print("without corrections; nothing was changed, `rift correct` adds a correction", file=sys.stderr)


def _numbers(price: Price) -> list[int | None]:
    return [
        price.prompt_nanousd,
        price.output_nanousd,
        price.cached_prompt_nanousd,
        price.second_nanousd,
    ]


def _text(price: Price | None) -> str:
    if price is None:
        return "no price"
    amounts = zip(("in", "out", "cached", "per second"), _numbers(price), strict=True)
    return ", ".join(f"{amount} {name}" for name, amount in amounts if amount is not None)
