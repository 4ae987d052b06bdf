"""Money: `rift invoice`, `rift prices`, `rift period`, `rift correct`, `rift rerate`."""

import json
import sys
from argparse import Namespace
from typing import Any

import msgspec

from events import book as books
from events.book import Book
from events.ids import parse_request_id
from events.jetstream import JetStream
from events.money import nanousd, usd
from events.pricing import Billed, cost_nanousd
from events.schema import Price, UsageCorrected
from replay.billing import focus_csv
from replay.billing.invoice import Invoice
from replay.warehouse.result import QueryResult
from rift import book_admin, prices
from rift.cli.connection import load_settings
from rift.cli.output import CommandFailed, asked, table, with_log
from rift.rpc import LONG_TIMEOUT_S, AskInvoice, ClosePeriod, Sql


def invoice(options: Namespace) -> None:
    async def get(log: JetStream) -> tuple[Invoice, Any]:
        told = await asked(log, AskInvoice(options.account, options.period))
        priced = await asked(log, Sql("from prices")) if options.csv else None
        return msgspec.convert(told, Invoice), priced

    found, priced = with_log(options, get)
    if options.csv:
        rows = [dict(zip(priced["columns"], row, strict=True)) for row in priced["rows"]]
        listed = {(row["version"], row["model"]): row for row in rows}
        print(focus_csv.csv_of(found, listed), end="")
    elif options.json:
        print(json.dumps(msgspec.to_builtins(found)))
    else:
        print(_shown(found))


def list_prices(options: Namespace) -> None:
    book = with_log(options, books.read)
    listed = [(name, price) for name, price in book.prices().items()]
    if options.json:
        told = [msgspec.to_builtins(price) for _, price in listed]
        print(json.dumps({"version": book.price_version, "prices": told}))
        return
    print(f"price list {book.price_version}, nano-USD a token (USD per million tokens: divide by 1,000)")
    columns = ["model", "prompt", "output", "cached prompt", "second"]
    print(table(QueryResult(columns, [[name, *_numbers(price)] for name, price in listed])))


def publish_prices(options: Namespace) -> None:
    async def publish(log: JetStream) -> tuple[Book, Book]:
        before = await books.read(log)
        published = prices.load(options.file, before)
        known = {*load_settings(options).catalogue(), *before.prices()}
        if unknown := sorted({price.model for price in published.prices} - known):
            raise CommandFailed(
                f"model {unknown[0]!r} is not in the catalogue: put it in rift.toml first, or mend the list. "
                f"Known are {', '.join(sorted(known))}"
            )
        if before.prices() != {price.model: price for price in published.prices}:
            await prices.publish(log, published)
        return before, await books.read(log)

    before, after = with_log(options, publish)
    if after.price_version == before.price_version:
        print(f"these prices are in force already, as version {after.price_version}; nothing was published")
        return
    print(
        f"price list {after.price_version} is in force for requests accepted from now on; nano-USD a token:"
    )
    for name, price in after.prices().items():
        if (old := before.price(name)) != price:
            print(f"  {name}: {_told(old)} -> {_told(price)}")


def close_period(options: Namespace) -> None:
    closed = with_log(options, lambda log: asked(log, ClosePeriod(options.period), LONG_TIMEOUT_S))
    if options.json:
        print(json.dumps(closed))
        return
    total = usd(closed["total_nanousd"])
    print(
        f"{closed['period']} is closed: {closed['accounts']} accounts, {total} USD, digest {closed['digest']}"
    )


def correct(options: Namespace) -> None:
    if not options.reason.strip() or not options.reason.isprintable():
        raise CommandFailed(f"{options.reason!r} is no reason; write one line of words")

    async def append(log: JetStream) -> UsageCorrected:
        book = await books.read(log)
        if options.model is not None and book.price(options.model) is None:
            raise CommandFailed(f"model {options.model!r} has no price, and so no line on an invoice")
        model = await _model_of(log, options) if options.request else options.model
        correction = UsageCorrected(
            id=book_admin.entry_id("correction", options.account, options.id),
            account=options.account,
            nanousd=nanousd(options.usd),
            reason=options.reason,
            request=options.request,
            model=model,
        )
        if not correction.nanousd:
            raise CommandFailed("a correction of 0 corrects nothing")
        if not await book_admin.add(log, book, correction):
            raise CommandFailed(
                f"the book has {correction.id} already, and it counts once: nothing was added"
            )
        return correction

    stored = with_log(options, append)
    if options.json:
        print(json.dumps(msgspec.to_builtins(stored)))
    else:
        print(f"{usd(stored.nanousd)} USD are on {stored.account}'s next invoice: {stored.reason}")


async def _model_of(log: JetStream, options: Namespace) -> str:
    """Return the model of the request that is corrected, which must be the account's."""
    if parse_request_id(options.request) is None:
        raise CommandFailed(f"{options.request!r} is no request id")
    select = (
        f"select model from requests where request_id = '{options.request}' and account = '{options.account}'"
    )
    found = await asked(log, Sql(select))
    if not found["rows"]:
        raise CommandFailed(f"{options.account} has no request {options.request}")
    return str(found["rows"][0][0])


# By account and model: what is charged in the period, and with which tokens. Under another list cached tokens
# may have a price of their own, so they are counted whatever the old one said.
RERATED = """
    select
        charges.account, charges.model, charges.plan,
        sum(charges.prompt_tokens + charges.cached_tokens) as prompt_tokens,
        coalesce(sum(least(requests.cached_tokens, requests.prompt_tokens))
            filter (where charges.prompt_tokens + charges.cached_tokens > 0), 0) as cached_tokens,
        sum(charges.output_tokens) as output_tokens,
        sum(charges.charge_nanousd) as nanousd
    from charges
    join requests using (request_id)
    where charges.period = '{period}' and charges.plan = 'per_token'
    group by all
    union all
    select account, model, plan, seconds, 0, 0, nanousd
    from invoice_lines
    where period = '{period}' and plan = 'per_second'
    order by 1, 2, 3
"""


def rerate(options: Namespace) -> None:
    """Show what a price list would have made of a period. Changes nothing."""

    async def get(log: JetStream) -> tuple[Book, Any]:
        return await books.read(log), await asked(log, Sql(RERATED.format(period=options.period)))

    book, found = with_log(options, get)
    listed = {price.model: price for price in prices.load(options.price_list, book).prices}
    rows: dict[str, list[int]] = {}
    for account, model, plan, prompt, cached, output, old in found["rows"]:
        price = listed.get(model)
        if price is None:
            new = old
        elif plan == "per_second":
            new = prompt * price.second_nanousd if price.second_nanousd is not None else old
        else:
            apart = cached if price.cached_prompt_nanousd is not None else 0
            new = cost_nanousd(Billed(prompt - apart, apart, output), price)
        told = rows.setdefault(account, [0, 0])
        told[0] = told[0] + old
        told[1] = told[1] + new
    answer = [[account, old, new, new - old] for account, (old, new) in rows.items()]
    columns = ["account", "old_nanousd", "new_nanousd", "difference_nanousd"]
    if options.json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in answer]))
    else:
        print(table(QueryResult(columns, answer)))
        print("without corrections; nothing was changed, `rift correct` appends one", file=sys.stderr)


def _shown(found: Invoice) -> str:
    columns = [
        "model",
        "plan",
        "price",
        "prompt tokens",
        "cached",
        "output tokens",
        "seconds",
        "requests",
        "USD",
    ]
    rows = [
        [
            line.model,
            line.plan,
            line.price_version,
            line.prompt_tokens,
            line.cached_tokens,
            line.output_tokens,
            line.seconds,
            line.requests,
            usd(line.nanousd),
        ]
        for line in found.lines
    ]
    reach = ", ".join(f"{stream}:{sequence}" for stream, sequence in sorted(found.positions.items()))
    head = f"invoice of {found.account}, {found.period}, {found.status}: up to {reach}"
    if found.status == "open":
        head += "\n(provisional: the period is not closed)"
    lines = table(QueryResult(columns, rows)) if rows else "nothing was charged"
    return f"{head}\n\n{lines}\n\ntotal {usd(found.total_nanousd)} USD ({found.total_nanousd} nano-USD)"


def _numbers(price: Price) -> list[int | None]:
    return [
        price.prompt_nanousd,
        price.output_nanousd,
        price.cached_prompt_nanousd,
        price.second_nanousd,
    ]


def _told(price: Price | None) -> str:
    if price is None:
        return "no price"
    named = zip(("in", "out", "cached", "a second"), _numbers(price), strict=True)
    return ", ".join(f"{amount} {name}" for name, amount in named if amount is not None)
