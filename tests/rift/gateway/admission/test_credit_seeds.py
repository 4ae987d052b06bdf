"""Credit under random faults: no account is charged more than granted, and planted mistakes are caught."""

from collections import Counter
from collections.abc import Callable

import pytest

from rift.control.duties import credit_settlement
from rift.gateway.admission import lane_credit, max_cost
from rift.gateway.admission.credit_hold import CreditHold
from rift.gateway.admission.lane_credit import LaneCredit
from tests.simulation import prepaid
from tests.simulation.promise import Violation

TOKENS = 20
SEEDS = 3

# If a planted mistake needs more seeds than this, the simulation does not detect it. Each begins with a
# seed that catches it.
CAUGHT_WITHIN = 10


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settle idle holds while a test runs. `test_credit_hold.py` tests the real times."""
    monkeypatch.setattr(lane_credit, "IDLE_S", 30.0)


@pytest.mark.slow
def test_no_seed_charges_more_than_granted_or_leaves_a_hold() -> None:
    answers = Counter[str]()
    events = Counter[str]()
    for seed in range(SEEDS):
        for limits in (prepaid.CREDIT, prepaid.BUDGET):
            statuses, appended = prepaid.run(seed, limits=limits)
            answers += statuses
            events += appended
    assert answers["402"] > SEEDS
    assert answers["200"] > 10 * SEEDS
    assert events["CreditHeld"] > 10 * SEEDS


def _reserve_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CreditHold, "free", property(lambda self: self.event.nanousd - self.spent))


def _spend_unconfirmed_holds(patch: pytest.MonkeyPatch) -> None:
    def usable(self: LaneCredit, account: str) -> list[CreditHold]:
        return [hold for hold in self._holds.values() if not hold.is_closing]

    patch.setattr(LaneCredit, "_usable", usable)


def _settle_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(credit_settlement, "SILENT_NS", 0)


def _ignore_the_prompt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(max_cost, "nanousd", lambda accepted, price, *, choices=1: TOKENS * price.output_nanousd)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutate", "first"),
    [
        (_reserve_nothing, 0),
        (_spend_unconfirmed_holds, 1),
        (_settle_at_once, 2),
        (_ignore_the_prompt, 0),
    ],
)
def test_a_planted_mistake_is_caught(
    monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None], first: int
) -> None:
    mutate(monkeypatch)
    with pytest.raises(Violation):
        _run_seeds(first)


def _run_seeds(first: int) -> None:
    for seed in range(first, first + CAUGHT_WITHIN):
        prepaid.run(seed)
