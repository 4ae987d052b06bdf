"""`rift spans`: the requests that ended in a time as OpenTelemetry spans, printed or sent to a collector."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec

from events.jetstream import JetStream
from replay import questions
from replay.spans import otlp
from replay.spans.request_spans import EndedRequest, spans_of
from rift import __version__, clock
from rift.cli.arguments import Commands, account, add_command
from rift.cli.connection import ask_control, select, with_log
from rift.cli.log.collector import Collector
from rift.cli.output import CommandFailed, utc_time
from rift.rpc import Sql

# A request has about 4 kB of spans, and 1 kB in an answer to SQL. Collectors accept messages of 20 MB by
# default, and such an answer has 8 MB at most. Each page takes a search through all requests.
BATCH_REQUESTS = 2_000


class Window(NamedTuple):
    """Requests that ended from `since_ns` on and before `until_ns`; `account` limits them to one account."""

    since_ns: int
    until_ns: int
    account: str | None


class SpanBatch(NamedTuple):
    """One message, the numbers of its requests and spans, and when the last of the requests ended."""

    message: dict[str, Any]
    requests: int
    spans: int
    ended_at_ns: int


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    text = "export the requests that ended in a time as OpenTelemetry spans"
    parser = add_command(commands, "spans", spans, text, has_json=False)
    parser.add_argument(
        "--since",
        default="1h",
        metavar="TIME",
        help="like 15m, 7d or 2026-11-28T09:30, UTC (default: 1h ago)",
    )
    parser.add_argument("--until", default="now", metavar="TIME", help="end, not included (default: now)")
    parser.add_argument("--account", type=account, metavar="NAME", help="only the requests of this account")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--json", action="store_true", help="print OTLP/JSON, one message a line")
    target.add_argument(
        "--otlp",
        metavar="URL",
        help="send to a collector by OTLP over HTTP; OTEL_EXPORTER_OTLP_HEADERS has headers for it",
    )


def spans(options: Namespace) -> None:
    window = _window(options)
    if options.otlp is None:
        with_log(options, partial(_export, window, _print))
        return
    collector = Collector.at(options.otlp)
    done = with_log(options, partial(_export, window, collector.send))
    print(f"exported {done} to {collector.shown}{collector.complaint}")


def _window(options: Namespace) -> Window:
    now_ns = clock.now_ns()
    since_ns = questions.time_ns("--since", options.since, now_ns)
    until_ns = questions.time_ns("--until", options.until, now_ns)
    if since_ns >= until_ns:
        raise CommandFailed(f"--since {options.since} must be before --until {options.until}")
    return Window(since_ns, until_ns, options.account)


async def _export(window: Window, send: Callable[[Any], Awaitable[None]], log: JetStream) -> str:
    """Send all spans, and return their number as text. Raises CommandFailed, which says how to continue."""
    await _check_account(log, window.account)
    done = ""
    requests = count = 0
    try:
        async for batch in batches(partial(ask_control, log), window):
            await send(batch.message)
            requests += batch.requests
            count += batch.spans
            done = f"continue with --since {utc_time(batch.ended_at_ns)}, which sends a few spans again"
    except CommandFailed as failed:
        if not done:
            raise
        raise CommandFailed(f"{failed}; {count} spans are exported: {done}") from failed
    return f"{count} spans of {requests} requests"


async def _print(message: Any) -> None:
    print(json.dumps(message))


async def batches(ask: Callable[[Sql], Awaitable[Any]], window: Window) -> AsyncIterator[SpanBatch]:
    """Yield the requests of a window in the order of their ends. `ask` answers SQL and may raise."""
    since_ns, after = window.since_ns, ""
    while True:
        answer = await ask(page(window, since_ns, after))
        rows = [dict(zip(answer["columns"], row, strict=True)) for row in answer["rows"]]
        requests = msgspec.convert(rows, list[EndedRequest])
        if requests:
            made = [span for request in requests for span in spans_of(request)]
            since_ns, after = requests[-1].finished_at_ns, requests[-1].request_id
            yield SpanBatch(otlp.export(made, __version__), len(requests), len(made), since_ns)
        if len(requests) < BATCH_REQUESTS:
            return


def page(window: Window, since_ns: int, after: str) -> Sql:
    """Return the question for a window's requests behind the request `after`, which ended at `since_ns`."""
    values = {"until": window.until_ns, "account": window.account, "limit": BATCH_REQUESTS}
    return select("spans", since=since_ns, after=after, **values)


async def _check_account(log: JetStream, account: str | None) -> None:
    """Raise CommandFailed if there is no such account."""
    if account is None:
        return
    answer = await ask_control(log, Sql(f"select count(*) from accounts where account = '{account}'"))
    if answer["rows"] == [[0]]:
        raise CommandFailed(
            f"--account: there is no account {account!r}; `rift accounts list` shows the accounts"
        )
