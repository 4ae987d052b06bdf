"""Real workers on this machine: they start, serve, stop and are replaced as decided."""

import os
import signal
from typing import Any

import anyio
import pytest

from events.schema import ReplicaDraining, ReplicaLost, ReplicaStarting, ReplicaStopped
from tests.rift.fleet.conftest import Rig, of

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


Frames = list[tuple[str, dict[str, Any]]]


def statuses(frames: Frames) -> list[str]:
    """Return the statuses in order, each once."""
    said = [data["status"] for kind, data in frames if kind == "status"]
    return [status for status, before in zip(said, [None, *said], strict=False) if status != before]


def is_whole(frames: Frames, tokens: int) -> bool:
    kind, data = frames[-1]
    indices = [data["index"] for kind, data in frames if kind == "token"]
    return kind == "done" and data["usage"]["output_tokens"] == tokens and indices == sorted(set(indices))


@of("cold")
async def test_from_zero_to_one_and_back(rig: Rig) -> None:
    listed = (await rig.http.get(f"/v1/models/{rig.model}")).json()
    assert (listed["ready"], listed["replicas"], listed["starting"]) == (False, 0, 0)
    found: list[Frames] = []

    async def ask() -> None:
        found.append(await rig.frames(5))

    for number in range(2):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.sleep(1.5)
            await rig.decide(1)
        group = rig.pid(*await rig.ready(1))
        assert is_whole(found[number], 5)
        (first, *_, last) = statuses(found[number])
        assert (first, last) == ("starting", "running")
        await rig.decide(0)
        await rig.until(lambda fleet: not fleet.replicas[rig.model])
        await rig.until_gone(group)
    first, second = (next(data for kind, data in frames if kind == "status") for frames in found)
    assert "estimate_ms" not in first
    assert 1000 <= second["estimate_ms"] <= 30_000
    starting = (await rig.events(ReplicaStarting))[0]
    assert (starting.gpus, starting.hour_nanousd) == (2, 3_980_000_000)
    assert [type(event) for event in await rig.events(ReplicaDraining)] == [ReplicaDraining] * 2
    for stopped in await rig.events(ReplicaStopped):
        assert stopped.why == "drained"
        assert 1_500_000_000 < stopped.lived_ns < 60_000_000_000
    assert await rig.events(ReplicaLost) == []


@of("crowded")
async def test_two_hundred_requests_for_a_cold_model_are_all_answered(rig: Rig) -> None:
    answers: list[Frames] = []

    async def ask() -> None:
        answers.append(await rig.frames(10))

    async with anyio.create_task_group() as tasks:
        for _ in range(200):
            tasks.start_soon(ask)
        await anyio.sleep(3)
        assert answers == []
        await rig.decide(1)
    assert len(answers) == 200
    assert all(is_whole(frames, 10) for frames in answers)
    assert {data["attempts"] for frames in answers for kind, data in frames if kind == "done"} == {1}


@of("narrow")
async def test_a_request_without_a_slot_is_queued(rig: Rig) -> None:
    await rig.decide(1)
    await rig.ready(1)
    found: list[Frames] = []

    async def ask(tokens: int) -> None:
        found.append(await rig.frames(tokens))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, 150)
        await anyio.sleep(0.5)
        tasks.start_soon(ask, 5)
    assert [statuses(frames) for frames in found] == [["running"], ["queued", "running"]]
    await rig.decide(0)


@of("retired")
async def test_a_retired_replica_finishes_its_requests(rig: Rig) -> None:
    await rig.decide(2)
    groups = {replica: rig.pid(replica) for replica in await rig.ready(2)}
    answers: list[Frames] = []

    async def ask() -> None:
        answers.append(await rig.frames(200))

    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(ask)
        await anyio.sleep(1.5)
        await rig.decide(1)
        await rig.until(lambda fleet: fleet.count(rig.model, "draining") == 1)
        for _ in range(6):
            tasks.start_soon(ask)
    assert all(is_whole(frames, 200) for frames in answers)
    assert {data["attempts"] for frames in answers for kind, data in frames if kind == "done"} == {1}
    (left,) = await rig.ready(1)
    (gone,) = groups.keys() - {left}
    await rig.until_gone(groups[gone])
    (stopped,) = await rig.events(ReplicaStopped)
    assert (stopped.replica, stopped.why) == (gone, "drained")
    assert stopped.lived_ns > 4_000_000_000
    await rig.decide(0)


@of("burst")
async def test_requests_that_arrive_while_a_worker_retires_are_not_delayed(rig: Rig) -> None:
    """Replicas stop and start again and again under load; no request waits 5 s or is cut."""
    await rig.decide(2)
    await rig.ready(2)
    answers: list[Frames] = []

    async def ask_on(until: float) -> None:
        while anyio.current_time() < until:
            answers.append(await rig.frames(20))

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(ask_on, anyio.current_time() + 5.5)
        for _ in range(2):
            await rig.decide(1)
            await anyio.sleep(0.5)
            await rig.decide(2)
            await anyio.sleep(2)
    assert len(answers) > 20
    assert all(is_whole(frames, 20) for frames in answers)
    done = [data for frames in answers for kind, data in frames if kind == "done"]
    assert {data["attempts"] for data in done} == {1}
    assert max(data["timing"]["queue_ms"] for data in done) < 4000
    await rig.decide(0)


@of("killed")
async def test_a_replica_that_is_killed_is_replaced(rig: Rig) -> None:
    await rig.decide(1)
    (first,) = await rig.ready(1)
    frames: list[Frames] = []

    async def ask() -> None:
        frames.append(await rig.frames(100))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.sleep(1)
        os.kill(group := rig.pid(first), signal.SIGKILL)
    await rig.until_gone(group)
    assert is_whole(frames[0], 100)
    assert frames[0][-1][1]["attempts"] == 2
    (second,) = await rig.ready(1)
    assert second != first
    (lost,) = await rig.events(ReplicaLost)
    assert (lost.replica, lost.cause, lost.why) == (first, "host", "killed by SIGKILL")
    await rig.decide(0)


@of("frozen")
async def test_a_frozen_replica_that_is_declared_lost_is_killed_and_replaced(rig: Rig) -> None:
    await rig.decide(1)
    (first,) = await rig.ready(1)
    os.kill(group := rig.pid(first), signal.SIGSTOP)
    await rig.say(ReplicaLost(replica=first, model=rig.model, why="silent for 35 s", cause="host"))
    await rig.until_gone(group)
    (second,) = await rig.ready(1)
    assert second != first
    assert [lost.why for lost in await rig.events(ReplicaLost)] == ["silent for 35 s"]
    await rig.decide(0)


@of("unneeded")
async def test_starting_replicas_are_stopped_first_and_at_once(rig: Rig) -> None:
    await rig.decide(2)
    await rig.until(lambda fleet: fleet.count(rig.model, "starting") == 2)
    replicas = [event.replica for event in await rig.events(ReplicaStarting)]
    groups = [rig.pid(replica) for replica in replicas]
    await anyio.sleep(1)
    await rig.decide(0)
    await rig.until(lambda fleet: not fleet.replicas[rig.model])
    for group in groups:
        await rig.until_gone(group)
    stopped = await rig.events(ReplicaStopped)
    assert {(event.replica, event.why) for event in stopped} == {(name, "not needed") for name in replicas}
    assert all(event.lived_ns > 1_000_000_000 for event in stopped)
    assert await rig.events(ReplicaLost) == []


@of("broken")
async def test_failed_starts_end_waiting_requests_without_the_engines_words_or_a_charge(rig: Rig) -> None:
    answers: dict[str, Any] = {}

    async def ask(name: str, stream: bool) -> None:
        if stream:
            answers[name] = await rig.frames(5)
        else:
            answers[name] = await rig.http.post("/v1/inference", json=rig.body(5))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, "stream", True)
        tasks.start_soon(ask, "whole", False)
        await anyio.sleep(1.5)
        await rig.decide(1)
    lost = await rig.events(ReplicaLost)
    why = "nowhere does not start: no weights here and more lines"
    assert [(event.cause, event.why) for event in lost[:2]] == [("engine", why)] * 2 or len(lost) >= 3
    (kind, ended) = answers["stream"][-1]
    assert kind == "error"
    assert ended["error"]["code"] == "model_unavailable"
    assert ended["error"]["message"] == (
        "broken does not start: 3 starts failed in a row; the operator's `rift status` shows why"
    )
    assert answers["whole"].status_code == 503
    assert answers["whole"].json()["error"]["message"] == ended["error"]["message"]
    shown = (await rig.http.get(f"/v1/inference/{ended['id']}")).json()
    assert (shown["status"], shown["charge"]["nanousd"]) == ("failed", 0)
    began = anyio.current_time()
    await ask("later", False)
    assert answers["later"].status_code == 503
    assert "4 starts failed" in answers["later"].json()["error"]["message"]
    assert anyio.current_time() - began < 30
    await rig.decide(0)
    assert any("restarting it in" in line for line in rig.screen)
