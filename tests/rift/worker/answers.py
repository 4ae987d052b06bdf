"""Runs one attempt to its end on any engine, with a list as writer, from any part of an earlier answer."""

from collections.abc import Sequence
from typing import Any

from events.lifecycle import NEW
from events.request_history import CountedEvent, RequestHistory
from events.schema import AttemptStarted, Parameters, RequestAccepted, TokensGenerated
from rift.engines import Delta, Engine
from rift.worker.attempt import Attempt
from rift.worker.output_parser import joined
from rift.worker.prompt import prepare


class ListWriter:
    """The lane's writer, as a list."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, *events: Any) -> None:
        self.events += events

    add = put

    def put_tracked(self, event: Any, doubted: Any = None) -> Any:
        raise AssertionError("an attempt uses only put")


def accepted(prompt: Any = "tell me", **parameters: Any) -> RequestAccepted:
    return RequestAccepted(
        request="r",
        account="dev",
        key="k",
        model="m",
        kind="inference" if isinstance(prompt, str) else "chat",
        input=prompt,
        parameters=Parameters(**parameters),
        stream=True,
        prompt_tokens_max=8192,
        deadline_ms=60_000,
        price_version=1,
    )


async def run(engine: Engine, asked: RequestAccepted, past: RequestHistory | None = None) -> list[Any]:
    """Return the events of an attempt that continues the history `past`."""
    index = sum(len(event.token_ids) for event in tokens_of(past.counted)) if past else 0
    started = AttemptStarted(
        request=asked.request,
        attempt=f"a-{asked.request}",
        after=None,
        resume_index=index,
        worker="w",
        prompt_tokens=1,
        accepted_at_ns=0,
        engine="sim",
        model_digest="",
        delivery="",
    )
    writer = ListWriter()
    attempt = Attempt(await prepare(engine, asked), started, engine=engine, writer=writer)
    if past is not None:
        attempt.resume(past)
    await attempt.run(30)
    return writer.events


def past_of(events: Sequence[TokensGenerated]) -> RequestHistory:
    return RequestHistory(counted=[CountedEvent(event, NEW, 0) for event in events])


def tokens_of(events: Sequence[Any]) -> list[TokensGenerated]:
    tokens = [getattr(event, "event", event) for event in events]
    return [event for event in tokens if isinstance(event, TokensGenerated)]


def ids_of(events: Sequence[Any]) -> list[int]:
    return [token_id for event in tokens_of(events) for token_id in event.token_ids]


def answer_of(events: Sequence[Any]) -> Delta:
    """Return the whole answer of the events."""
    return joined(Delta(event.text, event.reasoning, event.tool_calls) for event in tokens_of(events))
