"""The aims of the scaling benchmark: which of them a row misses."""

from typing import Any

import pytest

from tests.bench import figures, scale

CASES = {case.name: case for case in scale.CASES}
GOOD = {
    "start_s": 60,
    "attainment": 0.99,
    "attainment_not_at_zero": 0.99,
    "attainment_knative": 0.99,
    "attainment_fixed_16": figures.NAN,
    "gpu_seconds_per_fixed": 0.7,
    "gpu_seconds_per_knative": 0.75,
    "actions_per_knative": 0.6,
}


@pytest.mark.parametrize(
    ("name", "change", "missed"),
    [
        ("bursty", {}, []),
        ("bursty", {"attainment_not_at_zero": 0.98, "attainment": 1.0}, ["attainment_not_at_zero >= 0.985"]),
        ("bursty", {"gpu_seconds_per_fixed": 1.01}, ["gpu_seconds_per_fixed <= 1.0"]),
        ("chat", {"gpu_seconds_per_knative": 0.76}, ["gpu_seconds_per_knative <= 0.75"]),
        ("day", {"attainment_knative": 0.991}, ["attainment >= 0.991"]),
        ("day", {"actions_per_knative": 0.61}, ["actions_per_knative <= 0.6"]),
        # At another start, costs have no aim, and the share has one where 16 replicas meet it.
        ("bursty", {"start_s": 15, "gpu_seconds_per_fixed": 2.0, "attainment_not_at_zero": 0.9}, []),
        (
            "bursty",
            {"start_s": 15, "attainment_fixed_16": 0.985, "attainment_not_at_zero": 0.9},
            ["attainment_not_at_zero >= 0.985"],
        ),
        ("day", {"start_s": 150, "attainment_not_at_zero": 0.95}, ["attainment_not_at_zero >= 0.96"]),
    ],
)
def test_a_row_names_the_aims_that_it_misses(name: str, change: dict[str, Any], missed: list[str]) -> None:
    assert scale.missed_aims(CASES[name], {**GOOD, **change}) == missed
