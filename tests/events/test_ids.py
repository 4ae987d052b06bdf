"""Request ids: an issued id verifies for its account, and no other text does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.ids import (
    RANDOM_BYTES,
    SECRET_BYTES,
    new_attempt_id,
    new_lane_id,
    new_request_id,
    parse_request_id,
    verified,
)
from events.subjects import Address

SECRET, OTHER_SECRET = b"1" * SECRET_BYTES, b"2" * SECRET_BYTES
ID_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789_-"

lanes = st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES).map(new_lane_id)
models = st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True)
accounts = st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True)
addresses = st.builds(Address, st.integers(0, 9999), lanes, models)
floors = st.integers(0, 2**63 - 1)
entropies = st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES)


@st.composite
def issued(draw: st.DrawFn) -> tuple[str, str]:
    """An account and the id of one of its requests."""
    account = draw(accounts)
    text = new_request_id(
        secret=SECRET, account=account, at=draw(addresses), floor=draw(floors), entropy=draw(entropies)
    )
    return account, text


@given(accounts, addresses, floors, entropies)
def test_an_issued_id_says_where_its_events_stand(
    account: str, at: Address, floor: int, entropy: bytes
) -> None:
    text = new_request_id(secret=SECRET, account=account, at=at, floor=floor, entropy=entropy)
    found = verified(text, secret=SECRET, account=account)
    assert found is not None
    assert (found.text, found.at, found.floor) == (text, at, floor)


@given(issued(), accounts)
def test_a_foreign_id_does_not_verify(given_id: tuple[str, str], other: str) -> None:
    account, text = given_id
    assert (verified(text, secret=SECRET, account=other) is None) == (other != account)
    assert verified(text, secret=OTHER_SECRET, account=account) is None


@settings(max_examples=300)
@given(issued(), st.data())
def test_a_mutated_id_does_not_verify(given_id: tuple[str, str], data: st.DataObject) -> None:
    account, text = given_id
    at = data.draw(st.integers(0, len(text) - 1))
    kind = data.draw(st.sampled_from(["replace", "insert", "drop"]))
    character = data.draw(st.sampled_from(ID_CHARACTERS))
    tail = text[at:] if kind == "insert" else text[at + 1 :]
    mutated = text[:at] + ("" if kind == "drop" else character) + tail
    if mutated != text:
        assert verified(mutated, secret=SECRET, account=account) is None


@given(st.text())
def test_any_text_is_refused_without_an_error(text: str) -> None:
    assert verified(text, secret=SECRET, account="a") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text.upper(),
        lambda text: text.replace("req_0", "req_00"),
        lambda text: text.replace("req_0", "req_٠"),
        lambda text: text.replace("_7_", "_07_"),
        lambda text: text[:-1] + "=",
        lambda text: text.rpartition("_")[0],
        lambda text: "",
    ],
)
def test_another_spelling_of_an_id_is_another_id(change: object) -> None:
    text = new_request_id(
        secret=SECRET, account="a", at=Address(0, "lane5678", "m"), floor=7, entropy=b"0" * RANDOM_BYTES
    )
    assert callable(change)
    assert verified(text, secret=SECRET, account="a") is not None
    assert verified(change(text), secret=SECRET, account="a") is None


def test_parts_cannot_be_moved_across_their_borders() -> None:
    """The account is not in the id: an account's name must not be exchangeable for a part of the id."""
    at = Address(0, "lane5678", "m")
    one = new_request_id(secret=SECRET, account="ab", at=at, floor=7, entropy=b"0" * RANDOM_BYTES)
    two = new_request_id(secret=SECRET, account="b", at=at, floor=7, entropy=b"0" * RANDOM_BYTES)
    assert one.rpartition("_")[0] == two.rpartition("_")[0]
    assert one != two


@given(entropies, entropies)
def test_ids_differ_exactly_as_their_entropy(one: bytes, two: bytes) -> None:
    assert (new_attempt_id(one) == new_attempt_id(two)) == (one == two)
    assert (new_lane_id(one) == new_lane_id(two)) == (one == two)


@given(st.integers(0, RANDOM_BYTES * 2).filter(lambda size: size != RANDOM_BYTES))
def test_too_little_entropy_is_an_error_of_ours(size: int) -> None:
    with pytest.raises(AssertionError, match="random bytes"):
        new_request_id(
            secret=SECRET, account="a", at=Address(0, "lane5678", "m"), floor=0, entropy=b"0" * size
        )


def test_what_is_no_id_does_not_parse() -> None:
    assert parse_request_id("req_0_lane5678_m_7_short_mac") is None
