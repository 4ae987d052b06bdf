"""A gateway over HTTP with scripted answers: Rift's own gateway and server, a log in memory, and a script in
place of the worker. For tests that depend on bytes, not on a model.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random

import anyio
import httpx
import msgspec

from events import codec, ids, subjects
from events.book import key_digest
from events.encryption import Cipher, opened
from events.ids import parsed
from events.log import Log
from events.memory import MemoryBroker, connect
from events.schema import (
    AccountOpened,
    AnyEvent,
    AttemptStarted,
    CancelRequested,
    KeyIssued,
    Logprob,
    Price,
    PricePublished,
    Problem,
    ReplicaReady,
    ReplicaStarting,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
    ToolCallDelta,
)
from rift import keys
from rift.catalogue import Catalogue, Model
from rift.gateway import process as gateway
from rift.gateway.asgi.server import serve
from rift.gateway.state import GatewayConfig
from rift.metrics.families import Collector
from tests.chaos.rig import free_port

MODEL = "model-a"
MODELS: Catalogue = {
    MODEL: Model(source="sim", context_tokens=4096, prompt_usd="0.1", output_usd="0.35"),
    "idle": Model(source="sim", context_tokens=4096, prompt_usd="0.1", output_usd="0.35"),
}
READY_S = 10.0


class Tokens(msgspec.Struct, frozen=True):
    """One event with `count` tokens."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    count: int = 1


class Pause(msgspec.Struct, frozen=True):
    seconds: float


class End(msgspec.Struct, frozen=True):
    reason: str = "stop"
    error: Problem | None = None


Step = Tokens | Pause | End
Script = Callable[[RequestAccepted], Sequence[Step]]


def hello(accepted: RequestAccepted) -> list[Step]:
    return [*(Tokens(text) for text in ("Hello", ",", " world", " 🌊", "!")), End()]


def by_request(accepted: RequestAccepted) -> list[Step]:
    """Answer each kind of request plausibly, in a few tokens."""
    parameters = accepted.parameters
    messages = accepted.input
    prompt = messages if isinstance(messages, str) else messages[-1].content
    if "fail at once" in prompt:
        return [End("failed", Problem(code="engine", message="the engine failed"))]
    if "fail late" in prompt:
        return [
            Tokens("some"),
            Pause(1.2),
            End("failed", Problem(code="engine", message="the engine failed")),
        ]
    if "too long" in prompt:
        return [End("invalid", Problem(code="prompt_too_long", message="too long", param="messages"))]
    steps: list[Step] = []
    if parameters.reasoning_effort is not None:
        steps += [Tokens(reasoning="Let me"), Tokens(reasoning=" think.")]
    is_answered = not isinstance(messages, str) and messages[-1].role == "tool"
    if parameters.tools and not is_answered and parameters.tool_choice not in (None, "none"):
        name = parameters.tool_name or parameters.tools[0].name
        call = ToolCallDelta(index=0, id=f"call_{accepted.choice}", name=name)
        steps.append(Tokens(tool_calls=(call,)))
        for piece in ('{"city"', ': "Paris"}'):
            steps.append(Tokens(tool_calls=(ToolCallDelta(index=0, arguments=piece),)))
        return [*steps, End("tool_calls")]
    pieces = ["Hello", ",", " world", " 🌊", "!"]
    if parameters.response_format is not None:
        pieces = ['{"city"', ': "Paris",', ' "people": 2}']
    if "slowly" in prompt:
        pieces = [f" {number}" for number in range(200)]
    if accepted.group is not None:
        pieces[-1] += f" {accepted.choice}"
    for piece in pieces[: parameters.max_tokens]:
        steps.append(Tokens(piece, logprobs=_logprobs(piece, parameters.logprobs)))
        if "slowly" in prompt:
            steps.append(Pause(0.05))
    cut = parameters.max_tokens is not None and parameters.max_tokens < len(pieces)
    return [*steps, End("length" if cut else "stop")]


def _logprobs(piece: str, alternatives: int | None) -> tuple[Logprob, ...]:
    if alternatives is None:
        return ()
    others = [Logprob(token=f"{piece}{n}", logprob=-1.5 - n) for n in range(alternatives)]
    return (Logprob(token=piece, logprob=-0.5, top=tuple(others)),)


class Served:
    """A running gateway. `script` writes the answers; `accepted` and `cancelled` are the log's requests."""

    def __init__(self) -> None:
        self.script: Script = by_request
        self.accepted: list[RequestAccepted] = []
        self.cancelled: list[CancelRequested] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = ""
        self.broker: MemoryBroker
        self.collectors: Sequence[Collector]
        self._stop: Callable[[], object]
        self._ends: dict[str, anyio.Event] = {}
        self._started = 0

    def forget(self) -> None:
        self.script = by_request
        self.accepted.clear()
        self.cancelled.clear()

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20)

    async def main(self, ready: threading.Event) -> None:
        stop = anyio.Event()
        chance = Random(7)
        loop = anyio.lowlevel.current_token()
        self._stop = partial(anyio.from_thread.run_sync, stop.set, token=loop)
        async with anyio.create_task_group() as tasks:
            self.broker = MemoryBroker(tasks, time.time_ns, chance=chance)
            self._write_book(chance)
            tasks.start_soon(self._work, connect(self.broker), tasks)
            config = GatewayConfig(
                lane=ids.new_lane_id(chance.randbytes(ids.RANDOM_BYTES)),
                models=MODELS,
                served=(),
                secret=b"scripted" * 4,
                entropy=chance.randbytes,
            )
            opened = await gateway.open_gateway(connect(self.broker), connect(self.broker), config, tasks)
            self.collectors = opened.collectors

            async def stopped() -> None:
                await stop.wait()
                await opened.end_streams()

            tasks.start_soon(self._announce_ready, ready)
            await serve(opened.app, opened.connections, host="127.0.0.1", port=self.port, stopped=stopped)
            await opened.close()
            tasks.cancel_scope.cancel()

    def stop(self) -> None:
        self._stop()

    def _write_book(self, chance: Random) -> None:
        prices = tuple(Price(model=name, prompt_nanousd=100, output_nanousd=350) for name in MODELS)
        events: list[AnyEvent] = [PricePublished(id="price", version=1, prices=prices)]
        for account in ("acme", "stranger"):
            key = keys.new_key(chance.randbytes(keys.ID_BYTES + keys.SECRET_BYTES))
            self.key = self.key or key.text
            events.append(AccountOpened(id=account, account=account))
            issued = KeyIssued(id=f"key-{account}", key=key.id, account=account, sha256=key_digest(key.text))
            events.append(issued)
        self.strangers_key = key.text
        self.broker.store(subjects.BOOK, subjects.book("test", "all"), codec.encode("test", events), None)
        replica: list[AnyEvent] = [
            ReplicaStarting(replica="r", model=MODEL, engine="sim"),
            ReplicaReady(replica="r", model=MODEL, slots=64, start_ns=1),
        ]
        subject = subjects.fleet(subjects.slug(MODEL))
        self.broker.store(subjects.FLEET, subject, codec.encode("test", replica), None)

    async def _announce_ready(self, ready: threading.Event) -> None:
        with anyio.fail_after(READY_S):
            while not ready.is_set():
                try:
                    await (await anyio.connect_tcp("127.0.0.1", self.port)).aclose()
                    ready.set()
                except OSError:
                    await anyio.sleep(0.02)

    # --- in place of the worker ------------------------------------------------------------------------

    async def _work(self, log: Log, tasks: anyio.abc.TaskGroup) -> None:
        stream = subjects.shard_stream(0)
        topics = [subjects.queue(0, subjects.slug(MODEL)), f"rift.0.cancel.*.{subjects.slug(MODEL)}"]
        async with log.follow(stream, topics, after=0) as reader:
            async for batch in reader:
                for stored in batch:
                    for event in codec.decode(stored.data)[1]:
                        if isinstance(event, RequestAccepted):
                            accepted, seal = await opened(log, event)
                            self.accepted.append(accepted)
                            self._ends[event.request] = anyio.Event()
                            tasks.start_soon(self._answer, log, accepted, seal, stored.stored_at_ns)
                        elif isinstance(event, CancelRequested):
                            self.cancelled.append(event)
                            if event.request in self._ends:
                                self._ends[event.request].set()

    async def _answer(self, log: Log, accepted: RequestAccepted, seal: Cipher | None, at_ns: int) -> None:
        self._started += 1
        attempt = f"att_{self._started}"
        index = 0
        reasoning_tokens = 0

        async def append(*events: AnyEvent) -> None:
            at = parsed(accepted.request).at
            closed = [event if seal is None else seal.closed(event) for event in events]
            await log.append("RIFT_0", subjects.work(at), codec.encode("worker", closed))

        def end(reason: str, error: Problem | None = None) -> RequestFinished:
            return RequestFinished(
                request=accepted.request, attempt=attempt, reason=reason, output_tokens=index, error=error,
                prompt_tokens=7, reasoning_tokens=reasoning_tokens,
            )  # type: ignore[arg-type]  # fmt: skip

        started = AttemptStarted(
            request=accepted.request, attempt=attempt, after=None, resume_index=0, worker="scripted",
            prompt_tokens=7, accepted_at_ns=at_ns, engine="sim", model_digest="d", delivery="ack",
        )  # fmt: skip
        first, *steps = self.script(accepted)
        if isinstance(first, End):
            # In one record, like a worker that rejects a request.
            return await append(started, end(first.reason, first.error))
        await append(started)
        for step in (first, *steps):
            if isinstance(step, Pause):
                with anyio.move_on_after(step.seconds):
                    await self._ends[accepted.request].wait()
            if self._ends[accepted.request].is_set():
                return await append(end("cancelled"))
            if isinstance(step, End):
                return await append(end(step.reason, step.error))
            if isinstance(step, Tokens):
                reasoning_tokens += step.count if step.reasoning else 0
                ids = tuple(range(index, index + step.count))
                cached = 0 if index else 4
                await append(
                    TokensGenerated(
                        attempt=attempt, index=index, token_ids=ids, text=step.text, cached_tokens=cached,
                        reasoning=step.reasoning, tool_calls=step.tool_calls, logprobs=step.logprobs,
                    )
                )  # fmt: skip
                index += step.count


@contextmanager
def serving() -> Iterator[Served]:
    served = Served()
    ready = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            anyio.run(served.main, ready)
        except BaseException as error:  # noqa: BLE001  # raised below, in the waiting thread
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(READY_S)
    try:
        assert not failed, failed
        yield served
    finally:
        if not failed:
            served.stop()
        thread.join(READY_S)
    assert not failed, failed


def chunks(text: str) -> list[dict[str, object]]:
    """Return the JSON of each `data:` line of a stream that ends in `[DONE]`."""
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]", lines[-1]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]
