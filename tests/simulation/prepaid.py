"""The simulated service with one account whose credit is too small.

Gateways die, freeze, stop and lose acknowledgements while they reserve, spend and settle credit, and control
settles the credit of lost lanes.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from events import codec, subjects
from events.book import Book, key_digest
from events.credit import Balance
from events.log import LogError
from events.memory import Faults, MemoryBroker, MemoryLog
from events.publisher import destination
from events.schema import AccountOpened, AnyEvent, CreditGranted, KeyIssued, LimitsSet, Price, PricePublished
from replay.warehouse.warehouse import Warehouse
from rift import keys
from rift.control.duties.credit_settlement import CreditSettlement
from tests.simulation import clock, service
from tests.simulation.client import Call
from tests.simulation.corrections import inline
from tests.simulation.ledger import Ledger, shard_streams
from tests.simulation.processes import MODEL
from tests.simulation.promise import Violation, hold
from tests.simulation.service import ACCOUNT, END_S, UNREST_S

# A prompt is almost free, so a request costs nearly its worst case, and credit that is spent twice shows.
PRICE = Price(model=MODEL, prompt_nanousd=1, output_nanousd=1000, second_nanousd=5000)
ASKERS = 50
TOKENS_MAX = 40
GRANTED = ASKERS * TOKENS_MAX * PRICE.output_nanousd // 4

# Covers the silence of a lost lane (60 s) and the wait for an acceptance of unknown outcome (45 s).
BACK_S = 300.0
PROJECT_S = 10.0


def write_book(broker: MemoryBroker, chance: random.Random, limits: Sequence[AnyEvent]) -> str:
    """Write accounts, prices and limits; return the account's key."""
    key = keys.new_key(chance.randbytes(keys.ID_BYTES + keys.SECRET_BYTES))
    events: list[AnyEvent] = [
        AccountOpened(id="account", account=ACCOUNT),
        KeyIssued(id="key", key=key.id, account=ACCOUNT, sha256=key_digest(key.text)),
        PricePublished(id="price", version=1, prices=(PRICE,)),
    ]
    for event in (*events, *limits):
        broker.store(*destination(event), codec.encode("cli", [event]), None)
    return key.text


def standing_of(broker: MemoryBroker) -> Balance:
    book = Book()
    for stored in broker.stream(subjects.BOOK).messages:
        book.fold(stored)
    return book.credits.of(ACCOUNT)


async def settle_lost(broker: MemoryBroker) -> None:
    """Project, and settle the credit of lost lanes, as control does."""
    with tempfile.TemporaryDirectory() as folder, closing(Warehouse.open(Path(folder) / "db")) as warehouse:
        settlement = CreditSettlement(MemoryLog(broker), inline(warehouse))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(settlement.follow_book)
            while True:
                await anyio.sleep(PROJECT_S)
                for name in (subjects.BOOK, subjects.FLEET, *shard_streams(broker)):
                    applied = warehouse.positions().get(name, 0)
                    if messages := broker.stream(name).messages[applied:]:
                        warehouse.apply(name, messages)
                with suppress(LogError):
                    await settlement.settle_lost()


class Prepaid(service.Service):
    def __init__(self, seed: int, tasks: TaskGroup, faults: Faults, *, limits: tuple[AnyEvent, ...]) -> None:
        super().__init__(seed, tasks, faults, mishaps=True)
        self.ledger = Ledger(self.broker, PRICE)
        self.limits = limits
        self.answers: Counter[str] = Counter()

    async def _write_book(self) -> None:
        self._key = write_book(self.broker, self.chance, self.limits)
        self._tasks.start_soon(settle_lost, self.broker)

    async def _start_clients(self, clients: TaskGroup) -> None:
        for number in range(ASKERS):
            await anyio.sleep(self.chance.uniform(0.0, 1.6 * UNREST_S / ASKERS))
            clients.start_soon(self._ask_for, number)

    async def _ask_for(self, number: int) -> None:
        """Send one request; with an idempotency key, retry until it is answered. Some disconnect."""
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        if number % 3 == 0:
            headers["idempotency-key"] = f"key {number}"
        many = self.chance.choice([TOKENS_MAX, TOKENS_MAX, 5])
        body = {"model": MODEL, "prompt": f"asker {number}", "parameters": {"max_tokens": many}}
        leaves = self.chance.random() < 0.2
        for _ in range(10 if number % 3 == 0 else 1):
            listening = self._supervisor.gateways()
            if listening:
                call = Call("POST", "/v1/inference", headers=headers, body=body | {"stream": leaves})
                self.chance.choice(listening).serve(call)
                while await call.more():
                    if leaves and call.data:
                        call.leave()
                self.answers[str(call.status)] += 1
                if call.whole and call.status in (200, 402):
                    return
            await anyio.sleep(self.chance.uniform(0.1, 3.0))

    async def _settle(self) -> None:
        await super()._settle()
        await anyio.sleep(BACK_S)

    @property
    def cost(self) -> int:
        return PRICE.output_nanousd

    def _check(self) -> None:
        super()._check()
        standing = standing_of(self.broker)
        charged = sum(self.ledger.charge_nanousd(entry) for entry in self.ledger.entries.values())
        most = min(n for n in (standing.granted_nanousd, standing.budget_nanousd) if n is not None)
        hold(charged <= most, f"{charged} nano-USD charged, {most} granted")
        hold(not standing.holds, f"never settled: {standing.holds}")
        corrected = sum(self.corrected.values())
        hold(standing.spent_nanousd == charged, f"{charged} charged, {standing.spent_nanousd} settled")
        hold(standing.corrected_nanousd == corrected, f"corrections: {standing.corrected_nanousd}")


CREDIT = (CreditGranted(id="grant", account=ACCOUNT, nanousd=GRANTED),)
BUDGET = (LimitsSet(id="limits", account=ACCOUNT, budget_nanousd=GRANTED),)


def run(
    seed: int, faults: Faults = service.FAULTS, *, limits: tuple[AnyEvent, ...] = CREDIT
) -> tuple[Counter[str], Counter[str]]:
    """Return the counts of HTTP statuses and of the book's events. Raises Violation."""

    async def main() -> Prepaid:
        async with anyio.create_task_group() as tasks:
            prepaid = Prepaid(seed, tasks, faults, limits=limits)
            await prepaid.run()
            tasks.cancel_scope.cancel()
        return prepaid

    try:
        prepaid = clock.run(main, until_s=END_S)
    except BaseException as error:
        raise Violation(f"seed {seed}: {service._first_error(error)}") from error
    events: Counter[str] = Counter()
    for stored in prepaid.broker.stream(subjects.BOOK).messages:
        events.update(type(event).__name__ for event in codec.decode(stored.data)[1])
    return prepaid.answers, events
