"""`rift accounts list`: who there is, with how many keys, and what each may still spend."""

from argparse import Namespace
from typing import Any

from events import book as books
from events.jetstream import JetStream
from rift import clock
from rift.cli.credit import month_now
from rift.cli.output import list_of, moment, money, with_log


def show(options: Namespace) -> None:
    async def read(log: JetStream) -> list[dict[str, Any]]:
        now_ns = clock.now_ns()
        book = await books.read(log)
        month = await month_now(log, book)
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

    list_of(
        with_log(options, read), as_json=options.json, shown={"opened": moment, "available_nanousd": money}
    )
