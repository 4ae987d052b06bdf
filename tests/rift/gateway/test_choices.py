"""Groups of choices: all are accepted or none is answered, and the prompt is charged once."""

import json
from functools import partial
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

from events import ids
from events.log import LogFull, OutcomeUnknown
from events.schema import Parameters, RequestAccepted
from rift.gateway import choices as groups
from rift.gateway.admission import lane_credit
from tests.rift.gateway.admission.test_credit import HELLO, TOKENS, World, granted, live
from tests.simulation.client import Call
from tests.simulation.prepaid import PRICE, standing_of
from tests.simulation.processes import SECRET, GatewayProcess

# Runs longer than a gateway retries an append: an engine generates 20 tokens a second.
LONG = 400

CHAT = "/v1/chat/completions"
OUTPUT = TOKENS * PRICE.output_nanousd


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settle idle credit holds within the test."""
    monkeypatch.setattr(lane_credit, "IDLE_S", 30.0)


both_kinds = pytest.mark.parametrize("several", [False, True], ids=["choices", "prompts"])


async def ask(world: World, gateway: GatewayProcess, n: int, *, several: bool = False, **more: Any) -> Call:
    """Ask for n choices, or with `several` for one choice of each of n prompts."""
    more = {"max_tokens": TOKENS, **more}
    if several:
        call = world.ask(gateway, "/v1/completions", prompt=["hello"] * n, **more)
    else:
        call = world.ask(gateway, CHAT, messages=HELLO, n=n, **more)
    while await call.more():
        pass
    return call


def cost_of_three(world: World, *, several: bool = False) -> int:
    world.ledger.catch_up()
    prompt = max(entry.life.prompt_tokens for entry in world.ledger.entries.values())
    return (3 if several else 1) * prompt * PRICE.prompt_nanousd + 3 * OUTPUT


def test_ids_of_a_group_are_known_from_the_first() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        first = world.accepted(gateway)
        group = groups.of(first, choices=3, secret=SECRET)
        assert group == groups.of(first, choices=3, secret=SECRET)
        assert len({accepted.request for accepted in group}) == 3
        for accepted in group:
            parsed = ids.verified(accepted.request, secret=SECRET, account=accepted.account)
            assert parsed is not None
            assert (parsed.at, parsed.floor) == (ids.parsed(first.request).at, 0)
        assert groups.of(first, choices=1, secret=SECRET) == (first,)

    live(test)


@pytest.mark.parametrize("seed", [None, 7, -4, 2**63 - 1, -(2**63)])
def test_each_choice_has_its_own_seed_if_the_request_has_one(seed: int | None) -> None:
    async def test(world: World) -> None:
        first: RequestAccepted = world.accepted(await world.gateway())
        group = groups.of(replace(first, parameters=Parameters(seed=seed)), choices=8, secret=SECRET)
        seeds = [accepted.parameters.seed for accepted in group]
        assert seeds[0] == seed
        assert len(set(seeds)) == (1 if seed is None else 8)
        assert all(one is None or -(2**63) <= one < 2**63 for one in seeds)
        assert -1 not in seeds, "an engine draws a seed for it"

    live(test)


@both_kinds
def test_each_prompt_is_charged_once(several: bool) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        call = await ask(world, gateway, 3, several=several)
        assert call.status == 200, call.data
        assert len(json.loads(call.data)["choices"]) == 3, call.data
        await anyio.sleep(100)
        standing = standing_of(world.broker)
        assert not standing.holds
        assert standing.spent_nanousd == cost_of_three(world, several=several)

    live(test, granted(10**6))


def test_a_group_is_reserved_whole_or_refused() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        call = await ask(world, gateway, 4)
        assert (call.status, json.loads(call.data)["error"]["code"]) == (402, "credit_exhausted")
        world.ledger.catch_up()
        assert not world.ledger.entries
        assert (await ask(world, gateway, 3)).status == 200

    live(test, granted(512 * PRICE.prompt_nanousd + 3 * OUTPUT))


@both_kinds
def test_control_settles_the_group_of_a_lost_gateway_at_the_same_cost(several: bool) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        headers = {"idempotency-key": "key"}
        world.tasks.start_soon(partial(ask, world, gateway, 3, several=several, headers=headers))
        await anyio.sleep(0.5)
        gateway.kill()
        other = await world.gateway()
        call = await ask(world, other, 3, several=several, headers=headers)
        assert call.status == 200, call.data
        assert len(json.loads(call.data)["choices"]) == 3, call.data
        await anyio.sleep(200)
        standing = standing_of(world.broker)
        assert not standing.holds
        assert standing.spent_nanousd == cost_of_three(world, several=several)

    live(test, granted(10**6))


@both_kinds
@pytest.mark.parametrize("problem", [LogFull, OutcomeUnknown])
def test_a_partly_stored_group_is_not_charged(problem: type[Exception], several: bool) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        store = world.broker.store

        def refusing(stream: str, subject: str, data: bytes, expect_last: int | None) -> int:
            if b'"choice":1' in data:
                raise problem("not this one")
            return store(stream, subject, data, expect_last)

        world.broker.store = refusing  # type: ignore[method-assign]
        call = await ask(world, gateway, 3, several=several, max_tokens=LONG)
        assert call.status == 503
        await anyio.sleep(200)
        world.ledger.catch_up()
        assert len(world.ledger.entries) == 2
        assert not world.ledger.open
        assert world.charged == 0
        world.check_all_is_settled()

    live(test, granted(10**7))


@both_kinds
def test_repeating_the_key_of_a_partly_stored_group_completes_it(several: bool) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        store = world.broker.store

        def losing(stream: str, subject: str, data: bytes, expect_last: int | None) -> int:
            if b'"choice":1' in data:
                gateway.kill()
            return store(stream, subject, data, expect_last) if not gateway.ended.is_set() else 0

        world.broker.store = losing  # type: ignore[method-assign]
        headers = {"idempotency-key": "key"}
        world.tasks.start_soon(partial(ask, world, gateway, 3, several=several, headers=headers))
        await anyio.sleep(1)
        world.broker.store = store  # type: ignore[method-assign]
        world.ledger.catch_up()
        assert len(world.ledger.entries) < 3
        await world.work()
        call = await ask(world, await world.gateway(), 3, several=several, headers=headers)
        assert call.status == 200, call.data
        assert len(json.loads(call.data)["choices"]) == 3, call.data
        await anyio.sleep(200)
        world.ledger.catch_up()
        assert len(world.ledger.entries) == 3
        standing = standing_of(world.broker)
        assert not standing.holds
        assert standing.spent_nanousd == cost_of_three(world, several=several)

    live(test, granted(10**6))
