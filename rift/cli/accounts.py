"""`rift accounts list`: every account with its valid keys and available credit."""

from argparse import ArgumentParser, Namespace
from typing import Any

from events import book as books
from events.jetstream import JetStream
from rift import clock
from rift.cli.arguments import Commands, add_command, add_group
from rift.cli.connection import with_log
from rift.cli.credit import current_month
from rift.cli.output import money, print_list, utc_time


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    actions = add_group(commands, "accounts", "list accounts")
    add_command(actions, "list", show, "list all accounts")


def show(options: Namespace) -> None:
    async def read(log: JetStream) -> list[dict[str, Any]]:
        now_ns = clock.now_ns()
        book = await books.read(log)
        month = await current_month(log, book)
        valid = [held.event.account for held in book.keys.values() if held.state(now_ns) == "valid"]
        return [
            {
                "account": account,
                "opened": opened_at_ns,
                "keys": valid.count(account),
                "plan": book.credits.of(account).plan,
                "available_nanousd": book.credits.room(account, month),
            }
            for account, opened_at_ns in sorted(book.accounts.items())
        ]

    print_list(
        with_log(options, read),
        as_json=options.json,
        formats={"opened": utc_time, "available_nanousd": money},
    )
