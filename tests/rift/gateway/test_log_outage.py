"""A log that answers questions and stores nothing: what clients get, and how the service comes back."""

import json
from collections.abc import Awaitable, Callable

import anyio
import pytest

from events import codec
from events.contracts import LANE_REPORT_S, LOG_OUTAGE_S
from events.schema import CancelRequested
from rift.gateway.streams import log_health
from tests.rift.gateway.admission.test_credit import World, live
from tests.simulation.client import Call, Frame
from tests.simulation.ledger import STREAM
from tests.simulation.processes import SLOTS, GatewayProcess, WorkerProcess

Test = Callable[[World, GatewayProcess], Awaitable[None]]

# The lane's report is due within 3 s, and is then overdue; one look later the gateway knows.
NOTICED_S = 3.5 + log_health.UNWRITABLE_S
# A report that is sent after the outage shows its end.
BACK_S = 1.0


def during(test: Test) -> None:
    """Run a test with a gateway and a worker that serve."""

    async def main(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        await anyio.sleep(5.0)
        await test(world, gateway)

    live(main)


def get(gateway: GatewayProcess, world: World, path: str, method: str = "GET") -> Call:
    call = Call(method, path, headers={"authorization": f"Bearer {world.key}"})
    gateway.serve(call)
    return call


async def status(call: Call) -> tuple[int, str]:
    """Return the status of an answer, and the code of an error."""
    while await call.more():
        pass
    body = json.loads(call.data)
    return call.status, body.get("error", {}).get("code", "")


async def ready(gateway: GatewayProcess, world: World) -> int:
    return (await status(get(gateway, world, "/readyz")))[0]


async def rest(call: Call) -> list[Frame]:
    while await call.more():
        pass
    return call.take()


def cancels(world: World, request: str) -> list[str]:
    stored = world.broker.stream(STREAM).messages
    events = [event for message in stored for event in codec.decode(message.data)[1]]
    return [event.why for event in events if isinstance(event, CancelRequested) and event.request == request]


def test_the_gateway_is_not_ready_and_refuses_at_once_until_a_record_is_stored() -> None:
    async def test(world: World, gateway: GatewayProcess) -> None:
        assert await ready(gateway, world) == 200
        world.broker.is_unwritable = True
        await anyio.sleep(NOTICED_S)
        assert await ready(gateway, world) == 503
        asked_at_s = anyio.current_time()
        call = world.ask(gateway, prompt="hello")
        assert await status(call) == (503, "log_unavailable")
        assert call.headers[b"retry-after"] == b"5"
        assert anyio.current_time() == asked_at_s
        await anyio.sleep(120.0)
        assert await ready(gateway, world) == 503
        world.broker.is_unwritable = False
        await anyio.sleep(BACK_S)
        assert await ready(gateway, world) == 200
        assert (await world.answer(gateway))[0] == 200

    during(test)


def test_one_slow_sync_changes_nothing() -> None:
    async def test(world: World, gateway: GatewayProcess) -> None:
        for _ in range(10):
            world.broker.is_unwritable = True
            await anyio.sleep(log_health.UNWRITABLE_S - 0.3)
            world.broker.is_unwritable = False
            assert await ready(gateway, world) == 200
            await anyio.sleep(2.2)

    during(test)


def test_a_request_that_waits_for_its_acceptance_gets_its_503_once_the_log_is_known_to_fail() -> None:
    async def test(world: World, gateway: GatewayProcess) -> None:
        world.broker.is_unwritable = True
        asked_at_s = anyio.current_time()
        assert await status(world.ask(gateway, prompt="hello")) == (503, "log_unavailable")
        assert anyio.current_time() - asked_at_s < log_health.UNWRITABLE_S + 0.5

    during(test)


def test_a_request_waits_out_the_election_of_another_leader_of_the_broker() -> None:
    async def test(world: World, gateway: GatewayProcess) -> None:
        for log in (gateway.log, gateway.second_log):
            log.connection.freeze()
        await anyio.sleep(0.1)
        call = world.ask(gateway, prompt="hello", parameters={"max_tokens": 5})
        await anyio.sleep(5.0)
        for log in (gateway.log, gateway.second_log):
            log.connection.thaw()
        assert (await status(call))[0] == 200

    during(test)


@pytest.mark.parametrize("comes_back", [True, False])
def test_an_open_stream_ends_with_its_place_to_resume_and_is_read_once_or_free(comes_back: bool) -> None:
    async def test(world: World, gateway: GatewayProcess) -> None:
        call = world.ask(gateway, prompt="hello", stream=True, parameters={"max_tokens": 100})
        await anyio.sleep(2.0)
        world.broker.is_unwritable = True
        began_at_s = anyio.current_time()
        frames = await rest(call)
        waited_s = anyio.current_time() - began_at_s
        assert LOG_OUTAGE_S < waited_s < LOG_OUTAGE_S + LANE_REPORT_S + 1.0
        error = frames.pop()
        assert (error.kind, error.data["error"]["code"]) == ("error", "log_unavailable")
        request = error.data["id"]
        # A client that resumes too early gets the same answer.
        again = await rest(get(gateway, world, error.data["resume"]))
        assert [(frame.number, frame.kind) for frame in again] == [(error.number, "error")]
        await anyio.sleep(60.0)
        world.broker.is_unwritable = False
        if comes_back:
            await anyio.sleep(10.0)
            more = await rest(get(gateway, world, again[0].data["resume"]))
            assert more[-1].kind == "done"
            text = "".join(frame.data["delta"] for frame in [*frames, *more] if frame.kind == "token")
            world.ledger.catch_up()
            assert text == world.ledger.entries[request].text
        await anyio.sleep(60.0)
        assert ("unanswered" in cancels(world, request)) is not comes_back

    during(test)


@pytest.mark.parametrize("is_stream", [True, False])
def test_an_answer_that_cannot_be_resumed_is_cancelled_as_unanswered(is_stream: bool) -> None:
    async def test(world: World, gateway: GatewayProcess) -> None:
        messages = [{"role": "user", "content": "hello"}]
        call = world.ask(gateway, "/v1/chat/completions", messages=messages, stream=is_stream, max_tokens=100)
        await anyio.sleep(2.0)
        world.broker.is_unwritable = True
        if is_stream:
            *_, error, done = await rest(call)
            assert json.loads(error.data)["error"]["code"] == "log_unavailable"
            assert done.data == "[DONE]"
        else:
            assert await status(call) == (503, "log_unavailable")
        # Longer than any other retry of a gateway.
        await anyio.sleep(900.0)
        world.broker.is_unwritable = False
        await anyio.sleep(10.0)
        world.ledger.catch_up()
        (request,) = world.ledger.entries
        assert set(cancels(world, request)) == {"unanswered"}

    during(test)


@pytest.mark.parametrize("is_resumable", [True, False])
def test_a_client_that_left_during_the_outage_is_not_charged(is_resumable: bool) -> None:
    """It leaves before the gateway can know that the log stores nothing."""

    async def test(world: World, gateway: GatewayProcess) -> None:
        if is_resumable:
            call = world.ask(gateway, prompt="hello", stream=True, parameters={"max_tokens": 30})
        else:
            messages = [{"role": "user", "content": "hello"}]
            call = world.ask(gateway, "/v1/chat/completions", messages=messages, stream=True, max_tokens=30)
        await anyio.sleep(0.5)
        world.broker.is_unwritable = True
        await anyio.sleep(1.0)
        call.leave()
        await anyio.sleep(60.0)
        world.broker.is_unwritable = False
        await anyio.sleep(60.0)
        world.ledger.catch_up()
        (request,) = world.ledger.entries
        assert "unanswered" in cancels(world, request)

    during(test)


def test_a_cancellation_is_refused_and_takes_effect_when_the_log_is_back() -> None:
    async def test(world: World, gateway: GatewayProcess) -> None:
        call = world.ask(gateway, prompt="hello", stream=True, parameters={"max_tokens": 300})
        await anyio.sleep(2.0)
        world.ledger.catch_up()
        (request,) = world.ledger.entries
        world.broker.is_unwritable = True
        cancelled = get(gateway, world, f"/v1/inference/{request}", "DELETE")
        assert await status(cancelled) == (503, "log_unavailable")
        world.broker.is_unwritable = False
        frames = await rest(call)
        assert frames[-1].data["finish_reason"] == "cancelled"

    during(test)


def test_a_worker_keeps_its_engine_and_little_in_memory_for_minutes() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        process = WorkerProcess(world.broker, world.chance, "worker")
        world.tasks.start_soon(process.run)
        await anyio.sleep(1.0)
        for _ in range(2 * SLOTS):
            world.ask(gateway, prompt="hello", background=True, parameters={"max_tokens": 200})
        await anyio.sleep(2.0)
        world.broker.is_unwritable = True
        waiting = []
        for _ in range(30):
            await anyio.sleep(10.0)
            [worker] = process.serving.workers
            waiting.append(sum(len(writer._queue) for writer in worker._writers.values()))
        assert waiting[-1] == waiting[2] <= 6 * SLOTS
        world.broker.is_unwritable = False
        await anyio.sleep(60.0)
        assert not process.ended.is_set()
        world.ledger.catch_up()
        assert [entry.life.reason for entry in world.ledger.entries.values()] == ["length"] * 2 * SLOTS

    live(test)


def test_a_restart_of_the_broker_ends_no_stream() -> None:
    async def test(world: World, gateway: GatewayProcess) -> None:
        call = world.ask(gateway, prompt="hello", stream=True, parameters={"max_tokens": 200})
        await anyio.sleep(1.0)
        world.broker.restart(3.0)
        frames = await rest(call)
        assert frames[-1].kind == "done"

    during(test)


def test_a_gateway_starts_once_the_log_stores_records() -> None:
    async def test(world: World) -> None:
        world.broker.is_unwritable = True
        late = GatewayProcess(world.broker, world.chance, "late")
        world.tasks.start_soon(late.run)
        await anyio.sleep(300.0)
        assert not late.is_open
        assert not late.ended.is_set()
        world.broker.is_unwritable = False
        await anyio.sleep(10.0)
        assert late.is_open

    live(test)
