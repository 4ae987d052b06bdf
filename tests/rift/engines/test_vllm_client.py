"""The way to vLLM's engine process, with a client in its place: who reads, and who goes on reading."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from events.schema import Logprob
from rift.engines import RequestAborted, Step
from rift.engines.vllm_client import VllmClient

pytestmark = pytest.mark.anyio


class Client:
    """What `VllmClient` needs of vLLM's client. `say` is a step of the engine."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.aborted: list[str] = []
        self.readers = 0
        self._send, self._receive = anyio.create_memory_object_stream[Any](100)

    async def add_request_async(self, request: Any) -> None:
        self.added.append(request.request_id)

    async def abort_requests_async(self, names: list[str]) -> None:
        self.aborted += names

    async def get_output_async(self) -> Any:
        self.readers += 1
        assert self.readers == 1, "one reads for all"
        try:
            outputs = await self._receive.receive()
        finally:
            self.readers -= 1
        if isinstance(outputs, Exception):
            raise outputs
        return SimpleNamespace(outputs=outputs)

    def say(self, **ids: tuple[int, ...] | str) -> None:
        """One output for each request: its ids, or how it ends."""
        self._send.send_nowait(
            [
                SimpleNamespace(
                    request_id=name,
                    new_token_ids=[7] if isinstance(said, str) else list(said),
                    finish_reason=said if isinstance(said, str) else None,
                    prefill_stats=SimpleNamespace(num_cached_tokens=2),
                )
                for name, said in ids.items()
            ]
        )

    def die(self) -> None:
        self._send.send_nowait(OSError("the engine is dead"))

    def close(self) -> None:
        self._send.close()
        self._receive.close()


@pytest.fixture
def client() -> Any:
    made = Client()
    yield made
    made.close()


class Asked:
    """Requests that run, what they were told, and how they ended."""

    def __init__(self, client: Client, tasks: Any) -> None:
        self.core = VllmClient(client)
        self.steps: dict[str, list[Step]] = {}
        self.ends: dict[str, str] = {}
        self.scopes: dict[str, anyio.CancelScope] = {}
        self._tasks = tasks

    def start(self, name: str, wanted: Callable[[Step], bool] = lambda step: True) -> None:
        self.steps[name] = []

        def emit(step: Step) -> bool:
            self.steps[name].append(step)
            return wanted(step)

        async def run() -> None:
            with anyio.CancelScope() as self.scopes[name]:
                try:
                    await self.core.run(SimpleNamespace(request_id=name), emit)
                    self.ends[name] = "returned"
                except (OSError, ZeroDivisionError, RequestAborted) as error:
                    self.ends[name] = type(error).__name__
            self.ends.setdefault(name, "cancelled")

        self._tasks.start_soon(run)


async def settle() -> None:
    await anyio.wait_all_tasks_blocked()


async def test_who_reads_first_ends_first_and_another_goes_on(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        asked = Asked(client, tasks)
        for name in "abc":
            asked.start(name)
        await settle()
        client.say(a=(1, 2), b=(3,))
        client.say(a="stop", c=(4,))
        await settle()
        assert asked.ends == {"a": "returned"}
        client.say(b="length", c=(5,))
        await settle()
        client.say(c="stop")
        await settle()
    assert asked.ends == dict.fromkeys("abc", "returned")
    assert [step.token_ids for step in asked.steps["a"]] == [(1, 2), (7,)]
    assert [step.finish for step in asked.steps["b"]] == [None, "length"]
    assert [step.cached_tokens for step in asked.steps["a"]] == [2, 2]
    assert client.aborted == []
    assert asked.core.running == 0


async def test_a_request_that_the_engine_gives_up_ends_alone_and_its_last_token_is_not_told(
    client: Client,
) -> None:
    async with anyio.create_task_group() as tasks:
        asked = Asked(client, tasks)
        for name in "ab":
            asked.start(name)
        await settle()
        client.say(a=(1,), b=(2,))
        client.say(a="error", b="stop")
        await settle()
    assert asked.ends == {"a": "RequestAborted", "b": "returned"}
    assert [step.token_ids for step in asked.steps["a"]] == [(1,)]
    assert client.aborted == []


async def test_log_probabilities_are_read_where_they_are_wanted(client: Client) -> None:
    found: list[Step] = []

    def emit(step: Step) -> bool:
        found.append(step)
        return True

    def logprobs(output: Any) -> tuple[Logprob, ...]:
        return tuple(Logprob(token=str(token_id), logprob=-1.0) for token_id in output.new_token_ids)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(VllmClient(client).run, SimpleNamespace(request_id="a"), emit, logprobs)
        await settle()
        client.say(a=(1, 2))
        client.say(a="stop")
    assert [[logprob.token for logprob in step.logprobs] for step in found] == [["1", "2"], ["7"]]


async def test_a_cancelled_reader_is_aborted_and_another_reads_on(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        asked = Asked(client, tasks)
        for name in "ab":
            asked.start(name)
        await settle()
        asked.scopes["a"].cancel()
        await settle()
        assert client.aborted == ["a"]
        client.say(a=(9,), b="stop")
        await settle()
    assert asked.ends == {"a": "cancelled", "b": "returned"}
    assert asked.steps["a"] == []


async def test_who_is_cancelled_with_the_reader_passes_reading_on(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        asked = Asked(client, tasks)
        for name in "abc":
            asked.start(name)
        await settle()
        asked.scopes["a"].cancel()
        asked.scopes["b"].cancel()
        await settle()
        client.say(c="stop")
        with anyio.fail_after(2):
            await settle()
            while "c" not in asked.ends:  # noqa: ASYNC110
                await anyio.sleep(0.01)
    assert asked.ends == {"a": "cancelled", "b": "cancelled", "c": "returned"}


async def test_who_wants_no_more_is_aborted_and_told_nothing_more(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        asked = Asked(client, tasks)
        asked.start("a", lambda step: False)
        asked.start("b")
        await settle()
        client.say(a=(1,), b=(2,))
        client.say(a=(1,), b="stop")
        await settle()
    assert asked.ends == {"a": "returned", "b": "returned"}
    assert len(asked.steps["a"]) == 1
    assert client.aborted == ["a"]


async def test_what_emit_raises_is_raised_by_its_own_request(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        asked = Asked(client, tasks)
        asked.start("a", lambda step: bool(1 / 0))
        asked.start("b")
        await settle()
        client.say(a=(1,), b=(2,))
        client.say(b="stop")
        await settle()
    assert asked.ends == {"a": "ZeroDivisionError", "b": "returned"}
    assert client.aborted == ["a"]


async def test_a_dead_engine_ends_all(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        asked = Asked(client, tasks)
        for name in "abc":
            asked.start(name)
        await settle()
        client.die()
        await settle()
    assert asked.ends == dict.fromkeys("abc", "OSError")


async def test_an_abort_by_the_engine_returns_without_a_finish(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        asked = Asked(client, tasks)
        asked.start("a")
        await settle()
        client.say(a="abort")
        await settle()
    assert asked.ends == {"a": "returned"}
    assert [step.finish for step in asked.steps["a"]] == [None]
    assert client.aborted == []
