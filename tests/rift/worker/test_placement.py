"""Which worker takes a request: not the one whose engine has a long prompt to fill, if another asks."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import anyio
import pytest

from events import codec, ids, subjects
from events.fleet import may_ask, unfilled_max
from events.memory import MemoryBroker, MemoryLog
from events.schema import AttemptStarted, Parameters, RequestAccepted, RequestFinished, TokensGenerated
from rift.catalogue import Model, Pace, Profile
from rift.control import scaling_config
from rift.engines.sim import PROMPT_BYTES_PER_TOKEN, SimEngine
from rift.settings import Scale, Settings
from rift.worker.shutdown import Shutdown
from rift.worker.slots import Slots
from rift.worker.worker import WorkerConfig, open_worker

pytestmark = pytest.mark.anyio

MODEL = Model(source="sim", context_tokens=8192, prompt_usd="0.1", output_usd="0.1")
AT = subjects.Address(0, "lane1234", "model-a")
# Tokens of a prompt that takes half a second, and of one that takes 5 ms.
LONG, SHORT = 500, 5


class Rig:
    """A queue, and its workers, each of which fills 1,000 tokens a second and holds back with 100 of them."""

    def __init__(self, broker: MemoryBroker, *names: str) -> None:
        self.log = MemoryLog(broker)
        self.shutdowns = {name: Shutdown() for name in names}
        self.ended: set[str] = set()
        self._stream = broker.stream("RIFT_0")
        self._numbers = count()

    async def serve(self, name: str) -> None:
        engine = SimEngine(MODEL, Profile(sim=Pace(step_us=1000, prefill_tokens_per_s=1000)))
        slots = Slots(8, self.shutdowns[name], unfilled_max=100)
        engine.after_step.append(slots.step)
        config = WorkerConfig(name=name, model="model-a", shard=0, slots=slots, entropy=self._entropy)
        async with open_worker(self.log, engine, config) as worker:
            await worker.run()
        self.ended.add(name)

    def accept(self, tokens: int) -> str:
        """Accept a request with a prompt of so many tokens, and return its id."""
        request = ids.new_request_id(
            secret=b"s" * 32, account="dev", at=AT, floor=0, entropy=self._entropy(ids.RANDOM_BYTES)
        )
        accepted = RequestAccepted(
            request=request,
            account="dev",
            key="k",
            model="model:a",
            kind="inference",
            input="x" * tokens * PROMPT_BYTES_PER_TOKEN,
            parameters=Parameters(max_tokens=2),
            stream=True,
            prompt_tokens_max=8192,
            deadline_ms=60_000,
            price_version=1,
        )
        self._stream.add(subjects.request(AT), codec.encode("w", [accepted]), now_ns())
        return request

    def happened(self, *kinds: type) -> Iterator[Any]:
        for stored in self._stream.after(0):
            yield from (event for event in codec.decode(stored.data)[1] if isinstance(event, kinds))

    def workers(self) -> dict[str, str]:
        """Return the worker of each request that was begun."""
        return {event.request: event.worker for event in self.happened(AttemptStarted)}

    def _entropy(self, size: int) -> bytes:
        return next(self._numbers).to_bytes(size, "big")


def now_ns() -> int:
    return int(anyio.current_time() * 1e9)


@asynccontextmanager
async def serving(*names: str) -> AsyncIterator[Rig]:
    async with anyio.create_task_group() as tasks:
        rig = Rig(MemoryBroker(tasks, now_ns), *names)
        for name in names:
            tasks.start_soon(rig.serve, name)
        with anyio.fail_after(10):
            yield rig
        tasks.cancel_scope.cancel()


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110
        await anyio.sleep(0.005)


async def test_requests_go_to_the_worker_without_a_long_prompt() -> None:
    async with serving("one", "two") as rig:
        long = rig.accept(LONG)
        await until(rig.workers)
        short = [rig.accept(SHORT) for _ in range(4)]
        await until(lambda: len(rig.workers()) == 5)
        workers = rig.workers()
        assert {workers[request] for request in short} == {"one", "two"} - {workers[long]}


async def test_a_worker_on_its_own_takes_the_next_request_once_it_has_filled_its_prompt() -> None:
    async with serving("one") as rig:
        long = rig.accept(LONG)
        await until(rig.workers)
        rig.accept(SHORT)
        await until(lambda: len(list(rig.happened(RequestFinished))) == 2)
        events = list(rig.happened(AttemptStarted, TokensGenerated))
        starts = [at for at, event in enumerate(events) if isinstance(event, AttemptStarted)]
        assert events[starts[0]].request == long
        assert starts[1] > 1, "the first token of the long prompt comes before"


async def test_a_worker_that_holds_back_ends_at_its_shutdown() -> None:
    async with serving("one") as rig:
        rig.accept(LONG)
        await until(rig.workers)
        rig.accept(SHORT)
        rig.shutdowns["one"].drain(0.0)
        await until(lambda: rig.ended)
        assert len(rig.workers()) == 1


def test_a_replica_asks_for_as_many_usual_prompts_as_fill_its_share_of_the_target() -> None:
    most = unfilled_max(2000, 15_000)
    assert most == 15_000
    assert unfilled_max(100, 15_000) == 3_750, "250 ms: an engine must not idle"
    assert [may_ask(unfilled, most, 4_000) for unfilled in (0, 3_000, 12_000, 14_999)] == [4, 3, 1, 1]
    assert [may_ask(unfilled, most, 4_000) for unfilled in (15_000, 90_000)] == [0, 0]
    assert may_ask(0, most, 0) == most


def test_a_replica_holds_back_by_the_profile_of_its_model() -> None:
    r1 = "deepseek-r1"
    measured = Settings(model=r1, hardware="mi300x", scale={r1: Scale(ttft_ms=1000)})
    assert scaling_config.unfilled_max(measured, r1) == 7_500
    unknown = Settings(model="model:a", models={"model:a": MODEL})
    paced = Settings(model="model:a", models={"model:a": MODEL}, engine="sim")
    for settings in (unknown, paced):
        assert scaling_config.unfilled_max(settings, "model:a") == scaling_config.UNBOUNDED
