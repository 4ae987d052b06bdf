"""Allowances under seeds and faults: never charged beyond what is granted; planted mistakes are caught."""

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
SEEDS = 6

# A mutant that needs more seeds than this is one that the simulation does not see.
CAUGHT_WITHIN = 10


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds come back while a test looks; how long they are kept is tested in `test_credit_hold.py`."""
    monkeypatch.setattr(lane_credit, "IDLE_S", 30.0)


@pytest.mark.slow
def test_seeds_never_charge_more_than_granted_and_give_all_back() -> None:
    answers, said = Counter[str](), Counter[str]()
    for seed in range(SEEDS):
        for limits in (prepaid.CREDIT, prepaid.BUDGET):
            some, others = prepaid.run(seed, limits=limits)
            answers, said = answers + some, said + others
    assert answers["402"] > SEEDS
    assert answers["200"] > 10 * SEEDS
    assert said["CreditHeld"] > 10 * SEEDS


def _reserving_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CreditHold, "free", property(lambda self: self.event.nanousd - self.spent))


def _spending_what_is_not_ours_yet(patch: pytest.MonkeyPatch) -> None:
    def usable(self: LaneCredit, account: str) -> list[CreditHold]:
        return [hold for hold in self._holds.values() if not hold.is_closing]

    patch.setattr(LaneCredit, "_usable", usable)


def _settling_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(credit_settlement, "SILENT_NS", 0)


def _expecting_less(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(max_cost, "nanousd", lambda accepted, price, *, choices=1: TOKENS * price.output_nanousd)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutate",
    [
        _reserving_nothing,
        _spending_what_is_not_ours_yet,
        _settling_at_once,
        _expecting_less,
    ],
)
def test_a_planted_mistake_is_caught(
    monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mutate(monkeypatch)
    with pytest.raises(Violation):
        _run_seeds()


def _run_seeds() -> None:
    for seed in range(CAUGHT_WITHIN):
        prepaid.run(seed)
