"""What clients of a stored request append is bounded, however often they come and go."""

from typing import Any

import anyio
import pytest

from events import codec
from events.contracts import CLIENT_GRACE_S
from events.schema import CancelRequested, ClientAttached
from tests.rift.gateway.admission.test_credit import World, live
from tests.rift.gateway.admission.test_rate_limits import ask, get, whole
from tests.rift.gateway.test_crowds import relay_of
from tests.simulation.client import Call
from tests.simulation.processes import WorkerProcess


def stored(world: World, kind: type) -> int:
    records = world.broker.stream("RIFT_0").messages
    return sum(isinstance(event, kind) for one in records for event in codec.decode(one.data)[1])


def test_clients_that_reconnect_all_the_time_append_one_report_a_second() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        first = ask(world, gateway, world.key, tokens=400, stream=True)
        while not first.data:
            await first.more()
        request = first.take()[0].data["id"]
        began_s = anyio.current_time()
        for _ in range(10):
            calls = [get(gateway, f"/v1/inference/{request}/events", world.key) for _ in range(20)]
            await anyio.sleep(0.25)
            assert all(call.data for call in calls)
            for call in calls:
                call.leave()
        passed_s = anyio.current_time() - began_s
        assert 1 <= stored(world, ClientAttached) <= passed_s + 2
        # The request goes on, and a client that stays keeps it.
        first.leave()
        reader = get(gateway, f"/v1/inference/{request}/events", world.key)
        await anyio.sleep(25)
        assert reader.take()[-1].kind == "done"

    live(test)


def test_a_second_reader_that_leaves_does_not_affect_the_first() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        began_s = anyio.current_time()
        first = ask(world, gateway, world.key, tokens=480, stream=True)
        while not first.data:
            await first.more()
        second = get(gateway, f"/v1/inference/{first.take()[0].data['id']}/events", world.key)
        while not second.data:
            await second.more()
        second.leave()
        while await first.more():
            pass
        done = first.take()[-1].data
        assert (done["finish_reason"], done["usage"]["output_tokens"]) == ("length", 480)
        assert anyio.current_time() - began_s > CLIENT_GRACE_S + 3

    live(test)


def test_a_request_that_is_cancelled_again_and_again_is_cancelled_once() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        worker = WorkerProcess(world.broker, world.chance, "worker")
        world.tasks.start_soon(worker.run)
        await anyio.sleep(0.1)
        first = ask(world, gateway, world.key, tokens=400, background=True)
        request = (await whole(first))[1]["id"]
        await anyio.sleep(1)
        # It ends once its worker continues.
        worker.freeze()
        for _ in range(5):
            headers = {"authorization": f"Bearer {world.key}"}
            call = Call("DELETE", f"/v1/inference/{request}", headers=headers)
            gateway.serve(call)
            assert (await whole(call))[0] == 202
        assert stored(world, CancelRequested) == 1

    live(test)


@pytest.mark.parametrize("more", [{"stream": True}, {"background": True}])
def test_clients_of_one_key_that_leave_are_followed_no_longer(more: dict[str, Any]) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        given = {"authorization": f"Bearer {world.key}", "idempotency-key": "one"}

        def again() -> Call:
            return world.ask(gateway, headers=given, prompt="a", parameters={"max_tokens": 400}, **more)

        for _ in range(5):
            call = again()
            await call.more()
            call.leave()
        await anyio.sleep(0.1)
        lane = relay_of(gateway)
        # The first holds the place in the queue, and one counts the limits.
        (followed,) = lane._subscriptions.values()
        assert len(followed) <= 2
        last = again()
        await anyio.sleep(25)
        assert last.status in (200, 202)
        assert lane.is_idle

    live(test)


def test_a_request_that_many_cancel_at_once_is_cancelled_once() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        path = "/v1/responses"
        headers = {"authorization": f"Bearer {world.key}"}
        body = {"input": "hello", "max_output_tokens": 400, "background": True}
        response = (await whole(world.ask(gateway, path, **body)))[1]["id"]
        request = response.replace("resp_", "req_", 1)
        await anyio.sleep(1)
        calls = [
            *[Call("DELETE", f"/v1/inference/{request}", headers=headers) for _ in range(10)],
            *[Call("POST", f"{path}/{response}/cancel", headers=headers) for _ in range(10)],
        ]
        for call in calls:
            gateway.serve(call)
        assert {(await whole(call))[0] for call in calls} <= {200, 202}
        assert stored(world, CancelRequested) == 1

    live(test)
