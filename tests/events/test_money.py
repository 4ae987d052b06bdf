"""Amounts of money: exact both ways, and invalid text is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.money import InvalidMoney, nanousd, usd

AMOUNTS = {"10": 10_000_000_000, "0.25": 250_000_000, "-1.5": -1_500_000_000, "0.000000001": 1, "0": 0}


@pytest.mark.parametrize("text", AMOUNTS)
def test_amounts(text: str) -> None:
    assert nanousd(text) == AMOUNTS[text]


@given(st.integers(-(10**18) + 1, 10**18 - 1))
def test_what_is_shown_is_read_again(amount: int) -> None:
    assert nanousd(usd(amount)) == amount


@pytest.mark.parametrize(
    "text",
    ["", "1e3", "1.0000000001", "$5", "1,000", "--1", ".5", "5.", "nan", "inf", " 1", "1_000", "١", "9" * 10],
)
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(InvalidMoney, match="is not an amount; write USD"):
        nanousd(text)
