"""The newest requests of an account: pages of them, each with its facts and its charge."""

from typing import Any

from events.contracts import SECOND_NS
from events.money import usd
from replay.billing.invoice import BillingRefused, Read

COLUMNS = (
    "request_id, model, kind, state, finish_reason, prompt_tokens, output_tokens, charge_nanousd, plan,"
    " group_id, choice, accepted_at_ns, finished_at_ns"
)


def listing(read: Read, account: str, limit: int, after: str | None) -> dict[str, Any]:
    """Return up to `limit` requests, newest first, behind the request `after`. Raises BillingRefused."""
    place = [account, after or ""]
    behind = ""
    if after is not None:
        behind = (
            " and (accepted_at_ns, request_id) <"
            " (select (accepted_at_ns, request_id) from requests where account = ? and request_id = ?)"
        )
    there, found = read(
        ("select count(*) from requests where account = ? and request_id = ?", place),
        (
            f"select {COLUMNS} from requests where account = ?{behind}"
            " order by accepted_at_ns desc, request_id desc limit ?",
            [account, *(place if after is not None else []), limit + 1],
        ),
    )
    if after is not None and there.rows == [[0]]:
        raise BillingRefused(f"after: there is no request {after!r} any more")
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    shown = [_shown(row) for row in rows[:limit]]
    return {"object": "list", "data": shown, "has_more": len(rows) > limit}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt_tokens"]
    output = row["output_tokens"]
    nanousd = row["charge_nanousd"]
    is_known = row["plan"] == "per_token" and row["finished_at_ns"] is not None
    return {
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
        "charge": {"nanousd": nanousd, "usd": usd(nanousd)} if is_known else None,
    }
