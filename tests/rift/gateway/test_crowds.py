"""Concurrent clients, clients whose body never comes, and keys revoked while a request is accepted."""

import gc
from typing import Any

import anyio
import pytest

from events import subjects
from events.log import OutcomeUnknown
from events.schema import LimitsSet
from rift.gateway.admission import queue_share
from rift.gateway.dialects.sampling import ParsedRequest
from rift.gateway.streams.lane_reader import SLOW, LaneReader
from rift.gateway.submission.acceptance_writer import AcceptanceWriter
from tests.rift.gateway.admission.test_credit import World, live
from tests.rift.gateway.admission.test_rate_limits import (
    OTHER,
    ask,
    first_frame,
    get,
    key_of,
    reasons,
    revoke,
    whole,
)
from tests.simulation.client import Call
from tests.simulation.prepaid import ACCOUNT
from tests.simulation.processes import MODEL, GatewayProcess

CROWD = 60


class Late(Call):
    """A call whose body arrives once `comes` is set, unless its client disconnects first."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.comes = anyio.Event()

    async def receive(self) -> dict[str, Any]:
        async with anyio.create_task_group() as tasks:
            for event in (self.comes, self._gone):
                tasks.start_soon(self._first, event, tasks.cancel_scope)
        return {"type": "http.disconnect"} if self._gone.is_set() else await super().receive()

    async def _first(self, event: anyio.Event, scope: anyio.CancelScope) -> None:
        await event.wait()
        scope.cancel()


def relay_of(gateway: GatewayProcess) -> LaneReader:
    assert gateway._opened is not None
    return gateway._opened.lanes.own


async def ended_answer(world: World, gateway: GatewayProcess, **more: Any) -> str:
    status, shown = await whole(ask(world, gateway, world.key, **more))
    assert status == 200
    request: str = shown["id"]
    return request


def test_clients_that_attach_do_not_keep_the_prompt_again() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        await anyio.sleep(0.1)
        waiting = ask(world, gateway, world.key, stream=True)
        await anyio.sleep(1.5)
        (request,) = relay_of(gateway).followed
        readers = [get(gateway, f"/v1/inference/{request}/events", world.key) for _ in range(2)]
        await anyio.sleep(0.5)
        followed = relay_of(gateway)._subscriptions[request]
        first = followed[0].answer.accepted
        clients = [one for one in followed if one.client is not None]
        assert len(clients) == 3
        assert waiting.status == 200
        assert all(reader.status == 200 for reader in readers)
        assert all(one.answer.accepted is first for one in clients)

    live(test)


def test_clients_of_one_key_keep_no_prompt() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        await anyio.sleep(0.1)
        headers = {"authorization": f"Bearer {world.key}", "idempotency-key": "one"}
        calls = [world.ask(gateway, headers=headers, prompt="a long one", stream=True) for _ in range(5)]
        await anyio.sleep(2)
        assert [call.status for call in calls] == [200] * 5
        kept = [one for one in gc.get_objects() if type(one) is ParsedRequest]
        assert not any(one.input == "a long one" for one in kept)

    live(test)


@pytest.mark.parametrize("how", ["plain", "with keys", "not stored"])
def test_a_crowd_that_comes_at_once_gets_no_more_than_one_after_the_other(how: str) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        flood = key_of(world, OTHER)
        await anyio.sleep(0.1)
        answers: list[tuple[int, Any]] = []

        async def one(number: int) -> None:
            more: dict[str, Any] = {"store": False} if how == "not stored" else {}
            headers = {"authorization": f"Bearer {flood.text}"}
            if how == "with keys":
                headers["idempotency-key"] = f"key-{number}"
            answers.append(
                await whole(world.ask(gateway, headers=headers, prompt="a prompt", background=True, **more))
            )

        async with anyio.create_task_group() as tasks:
            for number in range(CROWD):
                tasks.start_soon(one, number)
        assert [status for status, _ in answers].count(202) == queue_share.FREE_COLD
        assert {code for status, code in answers if status == 429} == {"queue_share"}

    live(test)


def test_first_tries_of_one_key_at_once_share_one_place() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        flood = key_of(world, OTHER)
        await anyio.sleep(0.1)
        headers = {"authorization": f"Bearer {flood.text}", "idempotency-key": "one"}
        answers: list[tuple[int, Any]] = []

        async def one() -> None:
            call = world.ask(gateway, headers=headers, prompt="a prompt", background=True)
            answers.append(await whole(call))

        async with anyio.create_task_group() as tasks:
            for _ in range(CROWD):
                tasks.start_soon(one)
        assert [status for status, _ in answers] == [202] * CROWD
        assert len({shown["id"] for _, shown in answers}) == 1
        assert len(relay_of(gateway).followed) == 1

    live(test)


def test_an_empty_queue_admits_a_first_request_of_many_choices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queue_share, "FREE_COLD", 5)

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        key = key_of(world, OTHER)
        await anyio.sleep(0.1)
        given = {"authorization": f"Bearer {key.text}"}
        call = world.ask(gateway, "/v1/completions", headers=given, prompt="hello", n=8, max_tokens=3)
        status, shown = await whole(call)
        assert (status, len(shown["choices"])) == (200, 8)

    live(test)


def test_large_prompts_of_one_account_leave_room_for_other_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_share, "QUEUE_BYTES_MAX", 100_000)

    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        key = key_of(world, OTHER)
        await anyio.sleep(0.1)
        given = {"authorization": f"Bearer {key.text}"}
        # Four bytes per character in the queue.
        large = [
            await whole(world.ask(gateway, headers=given, prompt="🌊" * 3000, background=True))
            for _ in range(8)
        ]
        assert [status for status, _ in large] == [202] * 3 + [429] * 5
        assert (await whole(ask(world, gateway, world.key, background=True)))[0] == 202

    live(test)


def test_a_reader_whose_body_never_comes_leaves_no_subscription() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        request = await ended_answer(world, gateway)
        relay = relay_of(gateway)
        await anyio.sleep(1)
        for path in (f"/v1/inference/{request}/events", f"/v1/responses/{request}?stream=true"):
            call = Late("GET", path, headers={"authorization": f"Bearer {world.key}"})
            gateway.serve(call)
            await anyio.sleep(0.2)
            call.leave()
            await anyio.sleep(0.2)
            assert (relay.buffered.total, relay.is_idle) == (0, True)

    live(test)


def test_a_key_revoked_while_a_readers_body_comes_reads_nothing() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        key = key_of(world, ACCOUNT)
        await anyio.sleep(0.1)
        asked = ask(world, gateway, world.key, tokens=100, background=True)
        request = (await whole(asked))[1]["id"]
        path = f"/v1/inference/{request}/events"
        call = Late("GET", path, headers={"authorization": f"Bearer {key.text}"})
        gateway.serve(call)
        await anyio.sleep(0.1)
        revoke(world, key, ACCOUNT)
        await anyio.sleep(0.1)
        call.comes.set()
        with anyio.fail_after(1):
            while await call.more():
                pass
        assert [frame.kind for frame in call.take()] == ["error"]
        await anyio.sleep(10)
        assert reasons(world) == ["length"]

    live(test)


def test_an_idempotency_key_gives_no_access_to_other_models() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        narrow = key_of(world, ACCOUNT, models=("another",))
        await anyio.sleep(0.1)
        for key, status in ((world.key, 200), (world.key, 200), (narrow.text, 403)):
            given = {"authorization": f"Bearer {key}", "idempotency-key": "one"}
            assert (await whole(world.ask(gateway, headers=given, prompt="a prompt")))[0] == status

    live(test)


def test_a_request_whose_stream_was_broken_off_frees_its_limit_at_its_end() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        call = ask(world, gateway, world.key, tokens=60, stream=True)
        await first_frame(call)
        relay_of(gateway).break_off_all(SLOW)
        while await call.more():
            pass
        await anyio.sleep(30)
        assert (await whole(ask(world, gateway, world.key)))[0] == 200

    live(test, LimitsSet(id="l", account=ACCOUNT, concurrent=1))


def test_a_request_whose_content_key_is_gone_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway claimed the idempotency key, but could not append, and the content key was erased."""

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        append = gateway.log.append

        async def deaf(stream: str, subject: str, data: bytes, **more: Any) -> int:
            if ".request." in subject:
                raise OutcomeUnknown("no answer")
            return await append(stream, subject, data, **more)

        async def ask_again() -> tuple[int, Any]:
            given = {"authorization": f"Bearer {world.key}", "idempotency-key": "left"}
            return await whole(world.ask(gateway, headers=given, prompt="a prompt", store=False))

        with monkeypatch.context() as patch:
            patch.setattr(gateway.log, "append", deaf)
            assert await ask_again() == (503, "log_unavailable")
        kept = world.broker.stream(subjects.SECRETS)
        kept.trim(kept.last_sequence)
        assert await ask_again() == (410, "content_removed")
        await anyio.sleep(60)
        assert not reasons(world)

    live(test)


def test_a_repeat_that_completes_another_gateways_request_keeps_its_client_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()

        async def died(*_: object) -> None:
            raise OutcomeUnknown("the gateway died")

        async def ask_as(client_id: str) -> tuple[int, Any]:
            given = {"authorization": f"Bearer {world.key}", "idempotency-key": "left"}
            return await whole(world.ask(gateway, headers=given | {"x-request-id": client_id}, prompt="hi"))

        with monkeypatch.context() as patch:
            patch.setattr(AcceptanceWriter, "accept", died)
            assert await ask_as("first") == (503, "log_unavailable")
        assert (await ask_as("again"))[0] == 200
        world.ledger.catch_up()
        [entry] = world.ledger.entries.values()
        assert entry.accepted.client_request_id == "first"

    live(test)
