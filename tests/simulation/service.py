"""The whole service in one process, from one seed: gateways, workers, the janitor, clients and faults.

The code is Rift's own except for the broker (in memory, with faults), the engine (simulated), the clock (it
jumps) and HTTP (calls of the ASGI app). The same seed produces the same log, to the last byte.

    python -m tests.simulation.service --first SEED              one run with its log messages
    python -m tests.simulation.service --first K --seeds N       N runs, with a line for each that fails
"""

import argparse
import logging
import random
import sys
from collections import Counter
from itertools import chain
from typing import NamedTuple

import anyio
from anyio.abc import TaskGroup

from events import codec, shards, subjects
from events.book import key_digest
from events.ids import parsed
from events.log import LogError
from events.memory import Faults, MemoryBroker, MemoryLog
from events.memory.broker import Stream
from events.schema import AccountOpened, AnyEvent, KeyIssued, Price, PricePublished
from rift import keys
from rift.engines import sim
from tests.simulation import clock
from tests.simulation.client import Client
from tests.simulation.corrections import correct, unanswered
from tests.simulation.ledger import Entry, Ledger, shard_streams
from tests.simulation.processes import (
    MODEL,
    MODELS,
    GatewayProcess,
    JanitorProcess,
    Process,
    Supervisor,
    WorkerProcess,
)
from tests.simulation.promise import Violation, hold

ACCOUNT = "acme"
PRICE = Price(model=MODEL, prompt_nanousd=100, output_nanousd=350)
MODEL_ENGINE = sim.SimEngine(MODELS[MODEL])
START_NS = 1_750_000_000_000_000_000

# One gateway more if there are three shards.
GATEWAYS, WORKERS = 2, 3
SHARDS_MAX = 3

# Two seeds in five have three shards: from the start, or opened meanwhile.
SEVERAL_FROM_START, SEVERAL_LATER, SEEDS_A_ROUND = 2, 3, 5
CLIENTS = 14

# Clients arrive and faults happen during UNREST_S. Then no new fault happens, and every request must end: the
# deadline of a request is 600 s, and the janitor ends it 5 s later.
UNREST_S = 60.0
SETTLED_S = 900.0
LATE_NS = 60 * 1_000_000_000

# The largest difference between the clocks of a cluster's servers.
SKEW_S = 2.0

# A request that has ended must have left its engine after this time.
ABORTED_S = 2.0

# After all requests have ended: time for the last acknowledgements, and a client's grace period.
REST_S = 30.0

# Every run has ended by then.
END_S = UNREST_S + 2 * SETTLED_S

FAULTS = Faults(
    append_s=0.05,
    unanswered=0.01,
    lost=0.01,
    late=0.01,
    doubled=0.02,
    disconnects=0.002,
    reader_s=0.1,
    reader_restarts=0.01,
    lying=0.5,
    again=0.1,
    lost_answers=0.1,
)


class Result(NamedTuple):
    """The outcome of one run, to print and to compare."""

    digest: str
    messages: int
    requests: int
    attempts: int
    mishaps: Counter[str]
    outcomes: Counter[str]
    reasons: Counter[str]
    shards: Counter[int]
    seconds: float


class Service:
    def __init__(self, seed: int, tasks: TaskGroup, faults: Faults, *, mishaps: bool) -> None:
        self._has_mishaps = mishaps
        self.chance = random.Random(seed)
        kind = seed % SEEDS_A_ROUND
        self._shards = SHARDS_MAX if kind in (SEVERAL_FROM_START, SEVERAL_LATER) else 1
        self._shards_at_start = SHARDS_MAX if kind == SEVERAL_FROM_START else 1
        self.broker = MemoryBroker(
            tasks, self._now_ns, shards=self._shards_at_start, chance=self.chance, faults=faults
        )
        self.ledger = Ledger(self.broker, PRICE)
        self.clients: list[Client] = []
        self.mishaps: Counter[str] = Counter()
        # What control has corrected at the end, by request.
        self.corrected: dict[str, int] = {}
        self._tasks = tasks
        self._key = ""
        self._skew_ns = 0
        self._supervisor = Supervisor(self.broker, self.chance, tasks)

    def _now_ns(self) -> int:
        return START_NS + self._skew_ns + int(anyio.current_time() * 1e9)

    async def run(self) -> None:
        """Raises Violation."""
        await self._write_book()
        for shard in range(self._shards_at_start):
            await self._open_shard(shard)
        if not self._has_mishaps:
            self._tasks.start_soon(self._watch_engines)
        gateways = max(GATEWAYS, self._shards)
        for kind, many in ((GatewayProcess, gateways), (WorkerProcess, WORKERS), (JanitorProcess, 1)):
            for _ in range(many):
                self._supervisor.start(kind)
        async with anyio.create_task_group() as clients:
            with anyio.move_on_after(UNREST_S):
                async with anyio.create_task_group() as unrest:
                    if self._has_mishaps:
                        unrest.start_soon(self._inject_faults)
                    unrest.start_soon(self._open_shards)
                    unrest.start_soon(self._start_clients, clients)
            self._calm()
        await self._settle()
        if any(self.ledger.charge_nanousd(self.ledger.entries[each]) for each in self._unanswered()):
            self.corrected = await correct(self.broker)
        self._check()

    def _unanswered(self) -> list[str]:
        return [request for request in unanswered(self.broker) if request in self.ledger.entries]

    async def _write_book(self) -> None:
        key = keys.new_key(self.chance.randbytes(keys.ID_BYTES + keys.SECRET_BYTES))
        self._key = key.text
        events: list[AnyEvent] = [
            AccountOpened(id="account", account=ACCOUNT),
            KeyIssued(id="key", key=key.id, account=ACCOUNT, sha256=key_digest(key.text)),
            PricePublished(id="price", version=1, prices=(PRICE,)),
        ]
        data = codec.encode("cli", events)
        self.broker.store(subjects.BOOK, subjects.book("all", "all"), data, None)

    async def _open_shard(self, shard: int) -> None:
        """Open a shard whose stream exists, as `rift shards add` does, and watch it."""
        log = MemoryLog(self.broker)
        while True:
            try:
                await shards.open_up_to(log, shard + 1, writer="cli")
                break
            except LogError:
                await anyio.sleep(1.0)
        self._supervisor.shards = shard + 1
        self._tasks.start_soon(self.ledger.watch, shard)

    async def _open_shards(self) -> None:
        """Open the other shards while requests run. Gateways that start later use them."""
        for shard in range(self._shards_at_start, self._shards):
            await anyio.sleep(self.chance.uniform(0.0, UNREST_S / 3))
            self.broker.add_shard()
            await self._open_shard(shard)

    async def _start_clients(self, clients: TaskGroup) -> None:
        for number in range(CLIENTS):
            await anyio.sleep(self.chance.uniform(0.0, 2 * UNREST_S / CLIENTS * 0.8))
            client = Client(number, self.chance, self._key, self.ledger, self._supervisor.gateways)
            self.clients.append(client)
            clients.start_soon(client.run)

    async def _watch_engines(self) -> None:
        """Check that without faults, a request that has ended or was cancelled leaves its engine soon."""
        while True:
            await anyio.sleep(ABORTED_S / 10)
            over_ns = {
                attempt: entry.over_at_ns
                for entry in self.ledger.entries.values()
                for attempt in entry.attempts
                if entry.over_at_ns
            }
            for worker in self._supervisor.workers():
                for attempt in worker.engine.running:
                    since_s = (self._now_ns() - over_ns.get(attempt, self._now_ns())) / 1e9
                    hold(since_s < ABORTED_S, f"{attempt} is over, and its engine runs on")

    # --- mishaps -------------------------------------------------------------------------------------

    async def _inject_faults(self) -> None:
        mishaps = [*MISHAPS, *SHARD_MISHAPS] if self._shards > 1 else list(MISHAPS)
        while True:
            await anyio.sleep(self.chance.uniform(0.0, 8.0))
            name = self.chance.choice(mishaps)
            self.mishaps[name] += 1
            self._tasks.start_soon((MISHAPS | SHARD_MISHAPS)[name], self)

    def _some(self, kind: type[Process] = Process) -> Process | None:
        able = [p for p in self._supervisor.processes if isinstance(p, kind) and not p.ended.is_set()]
        return self.chance.choice(able) if able else None

    async def kill_a_worker(self) -> None:
        if (process := self._some(WorkerProcess)) is not None:
            process.kill()

    async def kill_a_gateway(self) -> None:
        if (process := self._some(GatewayProcess)) is not None:
            process.kill()

    async def kill_the_janitor(self) -> None:
        if (process := self._some(JanitorProcess)) is not None:
            process.kill()

    async def drain_a_worker(self) -> None:
        if isinstance(process := self._some(WorkerProcess), WorkerProcess):
            process.leaving.drain(0.0)

    async def retire_a_worker(self) -> None:
        if isinstance(process := self._some(WorkerProcess), WorkerProcess):
            process.leaving.retire()

    async def stop_a_gateway(self) -> None:
        if isinstance(process := self._some(GatewayProcess), GatewayProcess):
            process.stop.set()

    async def hang_an_engine(self) -> None:
        if isinstance(process := self._some(WorkerProcess), WorkerProcess):
            process.engine.hangs = True

    async def freeze(self) -> None:
        if (process := self._some()) is not None:
            process.freeze()
            await anyio.sleep(self.chance.uniform(0.0, 25.0))
            process.thaw()

    async def cut_a_connection(self) -> None:
        if (process := self._some()) is not None:
            process.disconnect(self.chance.uniform(0.0, 8.0))

    async def restart_the_broker(self) -> None:
        """Another server becomes the leader, with its own clock."""
        self._skew_ns = int(self.chance.uniform(-SKEW_S, SKEW_S) * 1e9)
        self.broker.restart(self.chance.uniform(0.1, 4.0))

    async def fill_the_disk(self) -> None:
        self.broker.is_full = True
        await anyio.sleep(self.chance.uniform(0.0, 12.0))
        self.broker.is_full = False

    async def stop_the_disk(self) -> None:
        self.broker.is_unwritable = True
        await anyio.sleep(self.chance.uniform(0.0, 45.0))
        self.broker.is_unwritable = False

    def _some_shard(self) -> Stream:
        shard = int(self.chance.random() * self.broker.shards)
        return self.broker.stream(subjects.shard_stream(shard))

    async def fill_a_shard(self) -> None:
        shard = self._some_shard()
        shard.is_full = True
        await anyio.sleep(self.chance.uniform(0.0, 12.0))
        shard.is_full = False

    async def stop_a_shard(self) -> None:
        shard = self._some_shard()
        shard.is_unwritable = True
        await anyio.sleep(self.chance.uniform(0.0, 45.0))
        shard.is_unwritable = False

    async def silence_a_shard(self) -> None:
        shard = self._some_shard()
        shard.set_silent(True)
        await anyio.sleep(self.chance.uniform(0.0, 45.0))
        shard.set_silent(False)

    # --- the end -------------------------------------------------------------------------------------

    def _calm(self) -> None:
        self.broker.faults = Faults(append_s=0.005)
        self.broker.is_full = self.broker.is_unwritable = False
        for stream in self.broker.streams.values():
            stream.is_full = stream.is_unwritable = False
            stream.set_silent(False)
        self._supervisor.is_calm = True
        for process in list(self._supervisor.processes):
            process.thaw()
            if isinstance(process, WorkerProcess) and process.engine.hangs:
                process.kill()

    async def _settle(self) -> None:
        """Wait until every accepted request has ended; then no process may still hold one."""
        until = anyio.current_time() + SETTLED_S
        while anyio.current_time() < until and self.ledger.open:
            await anyio.sleep(1.0)
            self.ledger.catch_up()
            self.ledger.check_deadlines(self._now_ns(), late_ns=LATE_NS)
        hold(not self.ledger.open, f"never ended: {[entry.id for entry in self.ledger.open]}")
        await anyio.sleep(REST_S)
        for worker in self._supervisor.workers():
            hold(not worker.at_work, f"{worker.name} holds requests that have ended: {worker.at_work}")
        for gateway in self._supervisor.gateways():
            hold(not gateway.followed, f"{gateway.name} follows requests that have ended: {gateway.followed}")
        streams = map(self.broker.stream, shard_streams(self.broker))
        for consumer in chain.from_iterable(stream.consumers.values() for stream in streams):
            hold(not consumer.unanswered, f"deliveries without an acknowledgement: {consumer.unanswered}")

    def _check(self) -> None:
        self.ledger.check_projection(self.chance.randint(1, 50))
        entries = list(self.ledger.entries.values())
        for entry in entries:
            whole = entry.life.reason == "length"
            hold(entry.life.reason != "failed", f"{entry.id} failed: {entry.life.error}")
            hold(
                answer_of(entry, whole=whole) == entry.text,
                f"{entry.id} differs from one engine's text",
            )
        unread = {
            request: self.ledger.charge_nanousd(self.ledger.entries[request])
            for request in self._unanswered()
        }
        owed = {request: -charge for request, charge in unread.items() if charge}
        hold(self.corrected == owed, f"{owed} is owed, {self.corrected} is corrected")
        for client in self.clients:
            mine = [entry for entry in entries if entry.prompt == client.prompt]
            charged = [entry for entry in mine if self.ledger.charge_nanousd(entry)]
            hold(len(charged) <= 1, f"{client.prompt}: charged {len(charged)} times")
            if client.was_not_accepted and charged and charged[0].id not in self.corrected:
                # Its gateway was lost before it could append the cancellation.
                hold(
                    charged[0].life.wanted is None,
                    f"{client.prompt}: {client.outcome}, and charged",
                )
                self.mishaps["charged, not answered"] += 1
            hold(
                client.outcome not in ("none", "gave up"),
                f"{client.prompt}: never answered",
            )

    def result(self) -> Result:
        entries = self.ledger.entries.values()
        return Result(
            self.ledger.digest(),
            sum(len(stream.messages) for stream in self.broker.streams.values()),
            len(entries),
            sum(len(entry.attempts) for entry in entries),
            self.mishaps,
            Counter(client.outcome for client in self.clients),
            Counter(f"{entry.life.reason} by {entry.life.ender}" for entry in entries),
            Counter(parsed(entry.id).at.shard for entry in entries),
            anyio.current_time(),
        )


def answer_of(entry: Entry, *, whole: bool) -> str:
    """Return the text that an uninterrupted engine generates for as many tokens as the log holds."""
    ids = MODEL_ENGINE.encode(entry.prompt, raw=False, tokens_max=100_000)
    decoder = MODEL_ENGINE.decoder()
    key = sim._key(ids, entry.accepted.parameters.seed)
    text = "".join(decoder.feed(sim._token(key, index)) for index in range(len(entry.token_ids)))
    return text + decoder.flush() if whole else text


MISHAPS = {
    "kill a worker": Service.kill_a_worker,
    "kill a gateway": Service.kill_a_gateway,
    "kill the janitor": Service.kill_the_janitor,
    "drain a worker": Service.drain_a_worker,
    "retire a worker": Service.retire_a_worker,
    "stop a gateway": Service.stop_a_gateway,
    "hang an engine": Service.hang_an_engine,
    "freeze": Service.freeze,
    "cut a connection": Service.cut_a_connection,
    "restart the broker": Service.restart_the_broker,
    "fill the disk": Service.fill_the_disk,
    "stop the disk": Service.stop_the_disk,
}

# Only where there are several.
SHARD_MISHAPS = {
    "fill a shard": Service.fill_a_shard,
    "stop a shard": Service.stop_a_shard,
    "silence a shard": Service.silence_a_shard,
}


def run(seed: int, faults: Faults = FAULTS, *, mishaps: bool = True) -> Result:
    """Run the service from a seed. Raises Violation with the command that repeats it."""

    async def main() -> Result:
        async with anyio.create_task_group() as tasks:
            service = Service(seed, tasks, faults, mishaps=mishaps)
            await service.run()
            tasks.cancel_scope.cancel()
        return service.result()

    try:
        return clock.run(main, until_s=END_S)
    except BaseException as error:
        command = f"python -m tests.simulation.service --first {seed}"
        raise Violation(f"{_first_error(error)}\nrepeat it with: {command}") from error


def _first_error(error: BaseException) -> str:
    """Return the first error of the innermost exception group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


class _Moment(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{anyio.current_time():9.3f} {record.name}: {record.getMessage()}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the simulated service from seeds.")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    chosen = parser.parse_args(arguments)
    if chosen.seeds == 1:
        handler = logging.StreamHandler()
        handler.setFormatter(_Moment())
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    else:
        logging.disable()
    failed = 0
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        try:
            result = run(seed)
            if chosen.seeds == 1:
                print(result)
        except Violation as violation:
            failed += 1
            print(f"seed {seed}: {violation}", flush=True)
    print(f"{chosen.seeds} seeds, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
