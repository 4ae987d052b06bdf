"""The requests of an account in pages, newest first, each with its charge."""

from typing import Any

from events.contracts import SECOND_NS
from events.money import usd
from replay.billing.invoice import BillingRefused, Read
from replay.sql_files import sql


def listing(read: Read, account: str, limit: int, after: str | None) -> dict[str, Any]:
    """Return up to `limit` requests, newest first, that are older than `after`. Raises BillingRefused."""
    known, page = read(
        ("select count(*) from requests where account = ? and request_id = ?", [account, after or ""]),
        (sql("billing/requests"), {"account": account, "after": after, "limit": limit + 1}),
    )
    if after is not None and known.rows == [[0]]:
        raise BillingRefused(f"after: request {after!r} does not exist or was removed")
    rows = [dict(zip(page.columns, row, strict=True)) for row in page.rows]
    data = [_resource(row) for row in rows[:limit]]
    return {"object": "list", "data": data, "has_more": len(rows) > limit}


def _resource(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt_tokens"]
    output = row["output_tokens"]
    nanousd = row["charge_nanousd"]
    by_second = row["plan"] == "per_second"
    charge: dict[str, Any] | None = {"nanousd": nanousd, "usd": usd(nanousd)}
    if row["finished_at_ns"] is None:
        charge = None
    elif by_second:
        charge = {"at_most_nanousd": row["at_most_nanousd"] or 0, "final": False}
    shown = {
        "id": row["request_id"],
        "object": "inference",
        "kind": row["kind"],
        "model": row["model"],
        "status": row["state"],
        "created": row["accepted_at_ns"] // SECOND_NS,
        "finish_reason": row["finish_reason"],
        "group": row["group_id"],
        "choice": row["choice"],
        "usage": {"prompt_tokens": prompt, "output_tokens": output, "total_tokens": prompt + output},
        "charge": charge,
    }
    return shown | {"seconds": row["seconds"]} if by_second else shown
