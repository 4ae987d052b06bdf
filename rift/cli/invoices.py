"""Invoices and their corrections: `rift invoice`, `rift period close`, `rift correct`."""

import json
from argparse import ArgumentParser, Namespace
from typing import Any

import msgspec

from events import book as books
from events.ids import parse_request_id
from events.jetstream import JetStream
from events.money import nanousd, usd
from events.schema import UsageCorrected
from replay.billing import focus_csv
from replay.billing.invoice import Invoice
from rift import book_admin
from rift.cli import arguments
from rift.cli.arguments import Commands, add_command, add_group
from rift.cli.connection import ask_control, with_log
from rift.cli.output import CommandFailed, positions, table
from rift.rpc import LONG_TIMEOUT_S, AskInvoice, ClosePeriod, Sql


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    show = add_command(commands, "invoice", invoice, "show an account's invoice for a month")
    arguments.add_account(show)
    arguments.add_period(show)
    show.add_argument("--csv", action="store_true", help="print the lines as FOCUS 1.2 CSV")

    period = add_group(commands, "period", "close billing periods")
    close = add_command(period, "close", close_period, "make a month's invoices final")
    close.add_argument(
        "period", type=arguments.period, metavar="YYYY-MM", help="calendar month that has ended, UTC"
    )

    change = add_command(commands, "correct", correct, "put a correction on an account's next invoice")
    arguments.add_account(change)
    change.add_argument("--usd", required=True, metavar="AMOUNT", help="amount; negative is a refund")
    change.add_argument("--reason", required=True, help="why; stored permanently in the book")
    change.add_argument("--request", metavar="ID", help="request that is corrected")
    change.add_argument(
        "--model", metavar="NAME", help="model whose invoice line changes (default: the request's)"
    )
    arguments.add_entry_id(change)


def invoice(options: Namespace) -> None:
    async def get(log: JetStream) -> tuple[Invoice, Any]:
        answer = await ask_control(log, AskInvoice(options.account, options.period))
        prices = await ask_control(log, Sql("from prices")) if options.csv else None
        return msgspec.convert(answer, Invoice), prices

    bill, prices = with_log(options, get)
    if options.csv:
        rows = [dict(zip(prices["columns"], row, strict=True)) for row in prices["rows"]]
        listed = {(row["version"], row["model"]): row for row in rows}
        print(focus_csv.csv_of(bill, listed), end="")
    elif options.json:
        print(json.dumps(msgspec.to_builtins(bill)))
    else:
        print(_text(bill))


def close_period(options: Namespace) -> None:
    closed = with_log(options, lambda log: ask_control(log, ClosePeriod(options.period), LONG_TIMEOUT_S))
    if options.json:
        print(json.dumps(closed))
        return
    total = usd(closed["total_nanousd"])
    print(
        f"{closed['period']} is closed: {closed['accounts']} accounts, {total} USD, digest {closed['digest']}"
    )


def correct(options: Namespace) -> None:
    if not options.reason.strip() or not options.reason.isprintable():
        raise CommandFailed(f"--reason: must be one line of text, got {options.reason!r}")

    async def append(log: JetStream) -> UsageCorrected:
        book = await books.read(log)
        if options.model is not None and book.price(options.model) is None:
            raise CommandFailed(
                f"--model: {options.model!r} has no price, so no invoice has a line for it; "
                "`rift prices list` shows the models that have"
            )
        model = options.model if options.request is None else await _model_of(log, options)
        correction = UsageCorrected(
            id=book_admin.entry_id("correction", options.account, options.id),
            account=options.account,
            nanousd=nanousd(options.usd),
            reason=options.reason,
            request=options.request,
            model=model,
        )
        if not correction.nanousd:
            raise CommandFailed("--usd: must not be 0, which would correct nothing")
        if not await book_admin.add(log, book, correction):
            raise CommandFailed(
                f"the book already has {correction.id}, and an id counts once: nothing was added"
            )
        return correction

    stored = with_log(options, append)
    if options.json:
        print(json.dumps(msgspec.to_builtins(stored)))
    else:
        print(f"added {usd(stored.nanousd)} USD to {stored.account}'s next invoice: {stored.reason}")


async def _model_of(log: JetStream, options: Namespace) -> str:
    """Return the model of the corrected request. Raises CommandFailed if the account has no such request."""
    if parse_request_id(options.request) is None:
        raise CommandFailed(f"--request: {options.request!r} is not a request id")
    select = (
        f"select model from requests where request_id = '{options.request}' and account = '{options.account}'"
    )
    answer = await ask_control(log, Sql(select))
    if not answer["rows"]:
        raise CommandFailed(f"account {options.account} has no request {options.request}")
    return str(answer["rows"][0][0])


def _text(bill: Invoice) -> str:
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
        for line in bill.lines
    ]
    head = f"invoice of {bill.account}, {bill.period}, {bill.status}: up to {positions(bill.positions)}"
    if bill.status == "open":
        head += "\n(provisional: the period is not closed)"
    lines = table(columns, rows) if rows else "nothing was charged"
    return f"{head}\n\n{lines}\n\ntotal {usd(bill.total_nanousd)} USD ({bill.total_nanousd} nano-USD)"
