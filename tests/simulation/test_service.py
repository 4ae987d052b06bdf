"""Rift's own gateways, workers and janitor in one process, under random faults from seeds.

`ops/simulate` runs more seeds. `KEPT` holds seeds that once failed.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from events import lifecycle
from events.memory import Faults
from events.memory.broker import Stream
from events.schema import TokensGenerated
from rift.gateway.api import requests
from rift.gateway.streams import lane_reader
from rift.gateway.submission import idempotency
from rift.worker import attempt
from tests.simulation import outage, service
from tests.simulation.promise import Violation

ROOT = Path(__file__).parents[2]
SEEDS = 45

# These seeds found: a client charged after the error `log_full` (20) or `log_unavailable` (26, 220), a
# draining worker that began a job it had just taken (34), and a worker that took the late repeat of an
# acceptance for a new request (159, 386).
KEPT = (20, 26, 34, 159, 220, 386)

CALM = Faults(append_s=0.01)


def full(shard: Stream, is_full: bool) -> None:
    shard.is_full = is_full


def unwritable(shard: Stream, is_unwritable: bool) -> None:
    shard.is_unwritable = is_unwritable


# The simulation must catch each mutant within this many seeds.
CAUGHT_WITHIN = 40


def test_seeds_keep_the_promises_and_together_they_are_eventful() -> None:
    results = [service.run(seed) for seed in sorted({*range(SEEDS), *KEPT})]
    many = len(results)
    outcomes, reasons, mishaps, shards = Counter[str](), Counter[str](), Counter[str](), Counter[int]()
    for result in results:
        outcomes += result.outcomes
        reasons += result.reasons
        mishaps += result.mishaps
        shards += result.shards
    assert sum(result.requests for result in results) > 8 * many
    assert sum(result.attempts - result.requests for result in results) > 2 * many
    assert outcomes["done"] > 6 * many
    assert reasons["cancelled by worker"] > many / 10
    assert mishaps.keys() >= {*service.MISHAPS, *service.SHARD_MISHAPS}
    assert min(shards[shard] for shard in range(service.SHARDS_MAX)) > many / 3


def test_without_faults_every_request_is_answered() -> None:
    calm = service.run(1, CALM, mishaps=False)
    assert set(calm.outcomes) <= {"done", "left"}
    assert calm.attempts == calm.requests
    assert not calm.mishaps


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("set_broken", [full, unwritable, Stream.set_silent])
def test_a_shard_is_out_of_service_and_the_others_go_on(set_broken: outage.Break, restarts: bool) -> None:
    served = outage.run(set_broken, restarts=restarts)
    assert len(served.meanwhile) > 4


def test_a_seed_replays_to_the_last_byte() -> None:
    assert [service.run(seed).digest for seed in (3, 5)] == [service.run(seed).digest for seed in (3, 5)]


def test_a_seed_replays_in_another_process() -> None:
    """Hashes and memory addresses differ in another process; the log must not."""
    code = "from tests.simulation import service; print(service.run(5).digest)"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == service.run(5).digest


def test_a_failing_seed_prints_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    counts_a_repeat(monkeypatch)
    with pytest.raises(Violation, match=r"\nrepeat it with: python -m tests.simulation.service"):
        run_many(CAUGHT_WITHIN)


# --- mutants: Rift's own code with one thing broken -------------------------------------------------


def counts_a_repeat(patch: pytest.MonkeyPatch) -> None:
    counted = lifecycle.RULES[TokensGenerated]

    def generated(life: lifecycle.Life, event: Any) -> lifecycle.Life:
        return counted(life, replace(event, index=life.next_index))

    patch.setitem(lifecycle.RULES, TokensGenerated, generated)


def continues_without_the_logged_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attempt.Attempt, "resume", lambda self, past: None)


def does_not_abort_the_engine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attempt.Attempt, "stop", lambda self, reason: None)


def repeats_frames_after_a_resume(patch: pytest.MonkeyPatch) -> None:
    event_id = requests.event_id
    patch.setattr(requests, "event_id", lambda request: max(0, event_id(request) - 2))


def misses_events_during_a_history_read(patch: pytest.MonkeyPatch) -> None:
    attach = lane_reader.LaneReader.attach

    async def deaf(self: lane_reader.LaneReader, *arguments: Any) -> Any:
        self._missed = _DropsAll()
        return await attach(self, *arguments)

    patch.setattr(lane_reader.LaneReader, "attach", deaf)


class _DropsAll(list[Any]):
    def append(self, item: Any) -> None:
        pass


def follows_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lane_reader.LaneReader, "close", lambda self, one: one.release_client())


def treats_every_idempotency_key_as_new(patch: pytest.MonkeyPatch) -> None:
    async def find(self: Any, digest: str, entry: Any) -> None:
        return None

    async def claim(self: Any, digest: str, entry: Any, *, replaces: int) -> idempotency.KeyClaim:
        return idempotency.KeyClaim(entry, True, 1)

    patch.setattr(idempotency.IdempotencyKeys, "find", find)
    patch.setattr(idempotency.IdempotencyKeys, "claim", claim)


MUTANTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    counts_a_repeat,
    continues_without_the_logged_tokens,
    does_not_abort_the_engine,
    repeats_frames_after_a_resume,
    misses_events_during_a_history_read,
    follows_for_ever,
    treats_every_idempotency_key_as_new,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_simulation_catches(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation):
        run_many(CAUGHT_WITHIN)


def run_many(seeds: int) -> None:
    """Run each seed with faults, and the first three also without."""
    for seed in range(seeds):
        if seed < 3:
            service.run(seed, CALM, mishaps=False)
        service.run(seed)
