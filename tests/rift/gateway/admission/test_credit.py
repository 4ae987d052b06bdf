"""Credit, one rule per test: accounts are never charged more than granted, and every hold is settled."""

import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

from events import codec, ids, subjects
from events.ids import parse_request_id
from events.memory import Faults, MemoryBroker
from events.schema import AnyEvent, CreditGranted, LimitsSet, Parameters, RequestAccepted
from events.subjects import Address
from rift.gateway.admission import lane_credit
from rift.gateway.admission.credit import CreditReservations
from rift.gateway.admission.credit_hold import MeteredCompletion
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.process import Opened
from rift.gateway.streams.subscription import Subscription
from tests.simulation import clock, prepaid
from tests.simulation.client import Call
from tests.simulation.ledger import Ledger
from tests.simulation.prepaid import ACCOUNT, PRICE, settle_lost, standing_of, write_book
from tests.simulation.processes import MODEL, SECRET, GatewayProcess, JanitorProcess, WorkerProcess
from tests.simulation.service import START_NS

TOKENS = 20
# The highest cost: the whole context and the output.
MAX_COST = 512 * PRICE.prompt_nanousd + TOKENS * PRICE.output_nanousd
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settle idle holds while a test runs. `test_credit_hold.py` tests the real times."""
    monkeypatch.setattr(lane_credit, "IDLE_S", 30.0)


class World:
    """A broker without faults, a janitor, control's settlement, and the gateways and workers of a test."""

    def __init__(self, tasks: anyio.abc.TaskGroup, limits: tuple[AnyEvent, ...]) -> None:
        self.chance = random.Random(7)
        self.start_ns = START_NS
        self.broker = MemoryBroker(
            tasks, lambda: self.start_ns + int(anyio.current_time() * 1e9), chance=self.chance
        )
        self.ledger = Ledger(self.broker, PRICE)
        self.tasks = tasks
        self.key = write_book(self.broker, self.chance, limits)
        tasks.start_soon(settle_lost, self.broker)
        tasks.start_soon(JanitorProcess(self.broker, self.chance, "janitor").run)

    async def gateway(self, *, served: Collection[str] = ()) -> GatewayProcess:
        process = GatewayProcess(self.broker, self.chance, "gateway", served=served)
        self.tasks.start_soon(process.run)
        while not process.is_open:  # noqa: ASYNC110
            await anyio.sleep(0.01)
        return process

    async def work(self) -> None:
        self.tasks.start_soon(WorkerProcess(self.broker, self.chance, "worker").run)
        await anyio.sleep(0.1)

    def ask(
        self,
        gateway: GatewayProcess,
        path: str = "/v1/inference",
        *,
        headers: dict[str, str] | None = None,
        **body: Any,
    ) -> Call:
        given = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        call = Call("POST", path, headers=given | (headers or {}), body={"model": MODEL} | body)
        gateway.serve(call)
        return call

    async def answer(
        self, gateway: GatewayProcess, *, tokens: int = TOKENS, **more: Any
    ) -> tuple[int, dict[str, Any]]:
        call = self.ask(gateway, prompt="a prompt", parameters={"max_tokens": tokens}, **more)
        while await call.more():
            pass
        return call.status, json.loads(call.data)

    def accepted(self, gateway: GatewayProcess, **more: Any) -> RequestAccepted:
        """Return an acceptance on a gateway's lane that is not stored."""
        at = Address(0, opened(gateway).lane.id, MODEL)
        entropy = self.chance.randbytes(ids.RANDOM_BYTES)
        request = ids.new_request_id(secret=SECRET, account=ACCOUNT, at=at, floor=0, entropy=entropy)
        return RequestAccepted(
            request=request, account=ACCOUNT, key="key", model=MODEL, kind="inference", input="a prompt",
            parameters=Parameters(max_tokens=TOKENS), stream=False, prompt_tokens_max=512,
            deadline_ms=600_000, price_version=1, detached=True, **more,
        )  # fmt: skip

    def store(self, group: tuple[RequestAccepted, ...]) -> None:
        (accepted,) = group
        parsed = parse_request_id(accepted.request)
        assert parsed is not None
        data = codec.encode("gateway", [accepted])
        self.broker.store("RIFT_0", subjects.request(parsed.at), data, None)

    @property
    def charged(self) -> int:
        self.ledger.catch_up()
        assert not self.ledger.open
        return sum(self.ledger.charge_nanousd(entry) for entry in self.ledger.entries.values())

    def check_all_is_settled(self) -> None:
        standing = standing_of(self.broker)
        assert not standing.holds
        assert standing.spent_nanousd == self.charged


def opened(gateway: GatewayProcess) -> Opened:
    assert gateway._opened is not None, "a gateway that is open has parts"
    return gateway._opened


def credit_of(gateway: GatewayProcess) -> CreditReservations:
    return opened(gateway).credit


def live(test: Callable[[World], Awaitable[None]], *limits: AnyEvent, until_s: float = 3600.0) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            await test(World(tasks, limits))
            tasks.cancel_scope.cancel()

    clock.run(main, until_s=until_s)


def granted(nanousd: int) -> CreditGranted:
    return CreditGranted(id="grant", account=ACCOUNT, nanousd=nanousd)


def test_an_unlimited_account_reserves_nothing() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        before = len(world.broker.stream(subjects.BOOK).messages)
        assert (await world.answer(gateway))[0] == 200
        assert len(world.broker.stream(subjects.BOOK).messages) == before
        world.ledger.catch_up()
        (entry,) = world.ledger.entries.values()
        assert entry.accepted.allowance is None
        assert entry.accepted.prompt_tokens_max == 512

    live(test)


def test_402_names_the_credit_left_the_highest_cost_and_the_remedy() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        status, shown = await world.answer(gateway)
        assert status == 402
        assert shown["error"] == {
            "message": "account acme has 0.000015000 USD left of its credit, and this request could cost "
            "0.000020512 USD: set a smaller max_tokens, send a shorter prompt, or add credit",
            "type": "insufficient_quota",
            "param": None,
            "code": "credit_exhausted",
        }
        assert anyio.current_time() < 1.0
        assert (await world.answer(gateway, tokens=10))[0] == 200

    live(test, granted(15_000))


def test_the_error_names_the_smaller_of_credit_and_budget() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        _, shown = await world.answer(gateway)
        assert shown["error"]["code"] == "credit_exhausted"

    async def other(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        _, shown = await world.answer(gateway)
        assert shown["error"]["code"] == "budget_exhausted"

    live(test, granted(15_000), LimitsSet(id="limits", account=ACCOUNT, budget_nanousd=16_000))
    live(other, granted(16_000), LimitsSet(id="limits", account=ACCOUNT, budget_nanousd=15_000))


def test_a_budget_renews_each_month() -> None:
    async def test(world: World) -> None:
        world.start_ns = int(datetime(2026, 11, 30, 23, 59, 40, tzinfo=UTC).timestamp()) * 10**9
        gateway = await world.gateway()
        await world.work()
        await anyio.sleep(5)
        assert (await world.answer(gateway, tokens=5))[0] == 200
        status, shown = await world.answer(gateway, tokens=100)
        assert (status, shown["error"]["code"]) == (402, "budget_exhausted")
        assert "left of its budget of 2026-11" in shown["error"]["message"]
        # The hold has room for it, but counts in November.
        await anyio.sleep(20)
        assert (await world.answer(gateway, tokens=5))[0] == 200
        await anyio.sleep(40)
        spent = standing_of(world.broker).spent_in
        assert {month: nanousd // 5000 for month, nanousd in spent.items()} == {"2026-11": 1, "2026-12": 1}
        world.check_all_is_settled()

    live(test, LimitsSet(id="limits", account=ACCOUNT, budget_nanousd=100_000))


def test_a_request_waits_for_held_credit_that_is_freed_soon() -> None:
    async def test(world: World) -> None:
        one, other = await world.gateway(), await world.gateway()
        await world.work()
        call = world.ask(one, "/v1/chat/completions", messages=HELLO, max_tokens=100, stream=True)
        while b"data: " not in call.data:
            await call.more()
        call.leave()
        # The first request reserved nearly everything. It is cancelled, and the unspent rest is free again.
        assert (await world.answer(other))[0] == 200
        assert anyio.current_time() < 10.0

    live(test, granted(110_000))


def test_two_gateways_never_spend_the_same_dollar() -> None:
    async def test(world: World) -> None:
        world.broker.faults = Faults(append_s=0.05, reader_s=0.05)
        gateways = [await world.gateway() for _ in range(4)]
        await world.work()
        covered = Counter[str]()

        async def cover(gateway: GatewayProcess) -> None:
            try:
                await credit_of(gateway).reserve((world.accepted(gateway),))
                covered["covered"] += 1
            except HTTPError as refusal:
                covered[refusal.code] += 1

        async with anyio.create_task_group() as tasks:
            for gateway in gateways:
                tasks.start_soon(cover, gateway)
        assert covered == {"covered": 1, "credit_exhausted": 3}

    live(test, granted(2 * MAX_COST - 1))


def test_a_crowd_is_accepted_up_to_the_credit() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        for number in range(30):
            world.ask(gateway, prompt=f"prompt {number}", parameters={"max_tokens": TOKENS})
        await anyio.sleep(0.5)
        world.ledger.catch_up()
        assert len(world.ledger.entries) == 10
        await anyio.sleep(100)
        assert world.charged <= 10 * MAX_COST
        world.check_all_is_settled()

    live(test, granted(10 * MAX_COST))


def test_concurrent_clients_with_one_idempotency_key_get_one_answer_and_one_charge() -> None:
    async def test(world: World) -> None:
        world.broker.faults = Faults(append_s=0.05)
        one, other = await world.gateway(), await world.gateway()
        await world.work()
        headers = {"idempotency-key": "key"}
        body = {"prompt": "a prompt", "parameters": {"max_tokens": TOKENS}}
        calls = []
        for number in range(20):
            calls.append(world.ask((one, other)[number % 3 == 0], headers=headers, **body))
            await anyio.sleep(0.01)
        for call in calls:
            while await call.more():
                pass
        assert {call.status for call in calls} == {200}
        assert len({json.loads(call.data)["id"] for call in calls}) == 1
        await anyio.sleep(100)
        assert world.charged > 0
        assert len(world.ledger.entries) == 1
        world.check_all_is_settled()

    live(test, granted(1_000_000))


def test_a_request_whose_client_disconnects_is_charged() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        call = world.ask(gateway, prompt="a prompt", parameters={"max_tokens": 200}, stream=True)
        while b"event: token" not in call.data:
            await call.more()
        call.leave()
        await anyio.sleep(60)
        assert world.charged > 0
        world.check_all_is_settled()

    live(test, granted(1_000_000))


@pytest.mark.parametrize("lands", [True, False])
def test_an_acceptance_of_unknown_outcome_is_charged_if_it_lands(lands: bool) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        ours = credit_of(gateway)
        accepted = await ours.reserve((world.accepted(gateway),))
        stream = Subscription([MeteredCompletion(accepted[0], PRICE)])
        opened(gateway).lanes.own.open(stream)
        ours.follow(accepted)
        opened(gateway).lanes.own.close(stream)
        ours.unknown(accepted)
        await anyio.sleep(10)
        if lands:
            world.store(accepted)
        await anyio.sleep(100)
        assert bool(world.charged) == lands
        world.check_all_is_settled()

    live(test, granted(100_000))


@pytest.mark.parametrize("end", ["release", "unknown"])
def test_a_repetition_leaves_the_first_reservation_of_its_request_alone(end: str) -> None:
    """Two clients with one idempotency key: the second reserves while the first one's append is under way."""

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        ours = credit_of(gateway)
        new = world.accepted(gateway, idempotency_hash="digest")
        accepted = await ours.reserve((new,))
        opened(gateway).lanes.own.open(Subscription([MeteredCompletion(accepted[0], PRICE)]))
        ours.follow(accepted)
        getattr(ours, end)((new,))
        world.store(accepted)
        await anyio.sleep(100)
        assert world.charged > 0
        world.check_all_is_settled()

    live(test, granted(100_000))


def test_a_request_accepted_by_two_gateways_is_spent_once() -> None:
    async def test(world: World) -> None:
        first, second = await world.gateway(), await world.gateway()
        await world.work()
        new = world.accepted(first, idempotency_hash="digest")
        of_first = await credit_of(first).reserve((new,))
        of_second = await credit_of(second).reserve((new,))
        opened(first).lanes.own.open(Subscription([MeteredCompletion(of_first[0], PRICE)]))
        credit_of(first).follow(of_first)
        for accepted in (of_second, of_first):
            world.store(accepted)
        credit_of(second).unknown(of_second)
        await anyio.sleep(100)
        assert world.charged > 0
        world.check_all_is_settled()

    live(test, granted(100_000))


def test_a_gateway_reserves_nothing_until_its_lane_reports_again() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        assert (await world.answer(gateway))[0] == 200
        gateway.freeze()
        await anyio.sleep(30)
        gateway.thaw()
        assert (await world.answer(gateway))[0] == 503
        with pytest.raises(HTTPError) as refused:
            await credit_of(gateway).reserve((world.accepted(gateway),))
        assert refused.value.code == "log_unavailable"
        await anyio.sleep(10)
        assert (await world.answer(gateway))[0] == 200

    live(test, granted(1_000_000))


def test_holds_of_a_lost_gateway_are_settled_once_its_requests_have_ended() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        assert (await world.answer(gateway, background=True))[0] == 202
        await anyio.sleep(5)
        # The second request is reserved, and never stored.
        await credit_of(gateway).reserve((world.accepted(gateway),))
        gateway.kill()
        await world.gateway()
        await anyio.sleep(40)
        assert standing_of(world.broker).holds
        await anyio.sleep(60)
        assert world.charged > 0
        world.check_all_is_settled()

    live(test, granted(100_000))


def test_seconds_of_a_lost_gateways_request_are_spent() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        assert (await world.answer(gateway, tokens=50, background=True))[0] == 202
        await anyio.sleep(1)
        gateway.kill()
        await world.gateway()
        await anyio.sleep(120)
        standing = standing_of(world.broker)
        assert (len(standing.holds), standing.spent_nanousd) == (0, 3 * 5000)

    live(test, granted(10**9), LimitsSet(id="limits", account=ACCOUNT, plan="per_second"))


def test_a_hold_of_a_lost_lane_waits_for_its_open_requests() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        accepted = await credit_of(gateway).reserve((world.accepted(gateway),))
        world.store(accepted)
        await anyio.sleep(1)
        gateway.kill()
        await world.gateway()
        await anyio.sleep(150)
        assert list(standing_of(world.broker).holds) == [accepted[0].allowance]
        await world.work()
        await anyio.sleep(60)
        assert world.charged > 0
        world.check_all_is_settled()

    live(test, granted(100_000))


def test_a_stopping_gateway_settles_its_holds() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        assert (await world.answer(gateway))[0] == 200
        assert standing_of(world.broker).holds
        gateway.stop.set()
        await gateway.ended.wait()
        world.check_all_is_settled()

    live(test, granted(1_000_000))


def test_plan_per_second_charges_whole_seconds() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        assert (await world.answer(gateway, tokens=50))[0] == 200
        await anyio.sleep(60)
        world.ledger.catch_up()
        (entry,) = world.ledger.entries.values()
        assert entry.accepted.plan == "per_second"
        # 50 tokens at 20 a second take 2.5 s.
        assert standing_of(world.broker).spent_nanousd == 3 * 5000

    live(test, granted(10**9), LimitsSet(id="limits", account=ACCOUNT, plan="per_second"))


def test_plan_per_second_needs_a_price_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepaid, "PRICE", replace(PRICE, second_nanousd=None))

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        status, shown = await world.answer(gateway)
        assert (status, shown["error"]["code"]) == (400, "plan_without_price")
        assert shown["error"]["message"] == (
            "account acme is on the plan per_second, and model-a has no price per second"
        )

    live(test, LimitsSet(id="limits", account=ACCOUNT, plan="per_second"))
