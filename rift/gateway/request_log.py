"""One line in the log for each request, at its end. It never has content, a key, or a path as it was sent."""

import asyncio
import logging

from rift.gateway.exchange import Exchange

logger = logging.getLogger(__name__)

# Anyone can be refused at any rate, and needs no key for it. So of each account and error code, there are at
# most this many lines in a period; one more says how many requests have none.
LINES_MAX = 5
PERIOD_S = 1.0
# Further pairs of an account and a code in a period share one count.
PAIRS_MAX = 64
OTHERS = ("(others)", "(others)")

# Load balancers ask for these every few seconds: only a failure is worth a line.
PROBES = frozenset({"GET /health", "GET /livez", "GET /readyz"})

Pair = tuple[str | None, str]


class RequestLog:
    """Logs exchanges on level info. Call `observe` on an event loop."""

    def __init__(self) -> None:
        # The refusals of this period, which begins with the first one.
        self._counts: dict[Pair, int] = {}

    def observe(self, exchange: Exchange) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        if exchange.account is not None and 0 < exchange.status < 400:
            self._log(exchange)
        elif exchange.status >= 400 or exchange.route not in PROBES:
            self._log_sampled(exchange)

    def _log_sampled(self, exchange: Exchange) -> None:
        counts = self._counts
        if not counts:
            asyncio.get_running_loop().call_later(PERIOD_S, self._end_period)
        pair: Pair = (exchange.account, exchange.code)
        if pair not in counts and len(counts) >= PAIRS_MAX:
            pair = OTHERS
        counts[pair] = counts.get(pair, 0) + 1
        if counts[pair] <= LINES_MAX:
            self._log(exchange)

    def _end_period(self) -> None:
        counts, self._counts = self._counts, {}
        for (account, code), count in counts.items():
            if (omitted := count - LINES_MAX) > 0:
                known = _known({"omitted": omitted, "code": code, "account": account})
                logger.info("further requests have no line", extra={"fields": known})

    def _log(self, exchange: Exchange) -> None:
        first_ns = exchange.first_token_ns
        fields: dict[str, str | float | None] = {
            "route": exchange.route,
            "status": exchange.status,
            "code": exchange.code,
            "request": exchange.request_id,
            "client_request": exchange.client_request_id,
            "account": exchange.account,
            # Without an account, only the address can help to stop a flood.
            "client": exchange.client if exchange.account is None else "",
            "model": exchange.model,
            "prompt_tokens": exchange.prompt_tokens,
            "output_tokens": exchange.output_tokens,
            # A repeated or resumed answer had its first token before this request.
            "first_token_ms": _ms(max(0, first_ns - exchange.started_ns)),
        }
        known = _known(fields)
        known["total_ms"] = _ms(exchange.ended_ns - exchange.started_ns)
        logger.info(
            "request ended" if exchange.status else "client left before the answer", extra={"fields": known}
        )


def _known(fields: dict[str, str | float | None]) -> dict[str, str | float]:
    return {name: value for name, value in fields.items() if value}


def _ms(took_ns: int) -> float:
    return round(took_ns / 1_000_000, 1)
