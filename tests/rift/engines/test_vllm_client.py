"""Requests in vLLM's engine process, with a scripted client that passes on steps as vLLM's reader does."""

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
    """The part of vLLM's client that `VllmClient` uses. `step` is one step of the engine."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.aborted: list[str] = []
        self.outputs_queue: Any = None
        self.resources = SimpleNamespace(output_queue_task=None)

    async def add_request_async(self, request: Any) -> None:
        self.added.append(request.request_id)

    async def abort_requests_async(self, names: list[str]) -> None:
        self.aborted += names

    def _format_exception(self, error: Exception) -> Exception:
        return error

    def step(self, **outputs: tuple[int, ...] | str) -> None:
        """Pass on one output for each request: its ids, or its finish reason."""
        each = [
            SimpleNamespace(
                request_id=name,
                new_token_ids=[7] if isinstance(output, str) else list(output),
                finish_reason=output if isinstance(output, str) else None,
                prefill_stats=SimpleNamespace(num_cached_tokens=2),
            )
            for name, output in outputs.items()
        ]
        self.outputs_queue.put_nowait(SimpleNamespace(outputs=each))

    def die(self) -> None:
        self.outputs_queue.put_nowait(OSError("the engine is dead"))


@pytest.fixture
def client() -> Client:
    return Client()


class Requests:
    """Running requests with their steps, and how each ended."""

    def __init__(self, client: Client, tasks: Any) -> None:
        self.client = VllmClient(client)
        self.steps: dict[str, list[Step]] = {}
        self.ends: dict[str, str] = {}
        self.scopes: dict[str, anyio.CancelScope] = {}
        self._tasks = tasks

    def start(self, name: str, continues: Callable[[Step], bool] = lambda step: True) -> None:
        self.steps[name] = []

        def emit(step: Step) -> bool:
            self.steps[name].append(step)
            return continues(step)

        async def run() -> None:
            with anyio.CancelScope() as self.scopes[name]:
                try:
                    await self.client.run(SimpleNamespace(request_id=name), emit)
                    self.ends[name] = "returned"
                except (OSError, ZeroDivisionError, RequestAborted) as error:
                    self.ends[name] = type(error).__name__
            self.ends.setdefault(name, "cancelled")

        self._tasks.start_soon(run)


async def settle() -> None:
    await anyio.wait_all_tasks_blocked()


async def test_each_request_gets_its_steps_and_ends_alone(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        requests = Requests(client, tasks)
        for name in "abc":
            requests.start(name)
        await settle()
        client.step(a=(1, 2), b=(3,))
        client.step(a="stop", c=(4,))
        await settle()
        assert requests.ends == {"a": "returned"}
        client.step(b="length", c=(5,))
        await settle()
        client.step(c="stop")
        await settle()
    assert requests.ends == dict.fromkeys("abc", "returned")
    assert [step.token_ids for step in requests.steps["a"]] == [(1, 2), (7,)]
    assert [step.finish for step in requests.steps["b"]] == [None, "length"]
    assert [step.cached_tokens for step in requests.steps["a"]] == [2, 2]
    assert client.aborted == []
    assert requests.client.running == 0


async def test_an_engine_error_ends_one_request_without_its_last_token(
    client: Client,
) -> None:
    async with anyio.create_task_group() as tasks:
        requests = Requests(client, tasks)
        for name in "ab":
            requests.start(name)
        await settle()
        client.step(a=(1,), b=(2,))
        client.step(a="error", b="stop")
        await settle()
    assert requests.ends == {"a": "RequestAborted", "b": "returned"}
    assert [step.token_ids for step in requests.steps["a"]] == [(1,)]
    assert client.aborted == []


async def test_log_probabilities_are_read_if_requested(client: Client) -> None:
    steps: list[Step] = []

    def emit(step: Step) -> bool:
        steps.append(step)
        return True

    def logprobs(output: Any) -> tuple[Logprob, ...]:
        return tuple(Logprob(token=str(token_id), logprob=-1.0) for token_id in output.new_token_ids)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(VllmClient(client).run, SimpleNamespace(request_id="a"), emit, logprobs)
        await settle()
        client.step(a=(1, 2))
        client.step(a="stop")
    assert [[logprob.token for logprob in step.logprobs] for step in steps] == [["1", "2"], ["7"]]


async def test_a_cancelled_request_is_aborted_and_others_continue(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        requests = Requests(client, tasks)
        for name in "ab":
            requests.start(name)
        await settle()
        requests.scopes["a"].cancel()
        await settle()
        assert client.aborted == ["a"]
        client.step(a=(9,), b="stop")
        await settle()
    assert requests.ends == {"a": "cancelled", "b": "returned"}
    assert requests.steps["a"] == []


async def test_a_request_whose_emit_returns_false_is_aborted(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        requests = Requests(client, tasks)
        requests.start("a", lambda step: False)
        requests.start("b")
        await settle()
        client.step(a=(1,), b=(2,))
        client.step(a=(1,), b="stop")
        await settle()
    assert requests.ends == {"a": "returned", "b": "returned"}
    assert len(requests.steps["a"]) == 1
    assert client.aborted == ["a"]


async def test_an_error_in_emit_ends_only_its_own_request(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        requests = Requests(client, tasks)
        requests.start("a", lambda step: bool(1 / 0))
        requests.start("b")
        await settle()
        client.step(a=(1,), b=(2,))
        client.step(b="stop")
        await settle()
    assert requests.ends == {"a": "ZeroDivisionError", "b": "returned"}
    assert client.aborted == ["a"]


async def test_a_dead_engine_ends_all_requests(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        requests = Requests(client, tasks)
        for name in "abc":
            requests.start(name)
        await settle()
        client.die()
        await settle()
        assert requests.ends == dict.fromkeys("abc", "OSError")
        requests.start("d")
        await settle()
    assert requests.ends["d"] == "OSError"
    assert client.added == ["a", "b", "c"]


async def test_what_follows_a_step_comes_after_the_output_of_every_request(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        requests = Requests(client, tasks)
        for name in "ab":
            requests.start(name)
        seen: list[int] = []
        requests.client.after_step.append(lambda: seen.append(sum(map(len, requests.steps.values()))))
        await settle()
        client.step(a=(1,), b=(2,))
        client.step(a="stop", b="stop")
        await settle()
    assert seen == [2, 4]


async def test_an_abort_by_the_engine_returns_without_a_finish(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        requests = Requests(client, tasks)
        requests.start("a")
        await settle()
        client.step(a="abort")
        await settle()
    assert requests.ends == {"a": "returned"}
    assert [step.finish for step in requests.steps["a"]] == [None]
    assert client.aborted == []
