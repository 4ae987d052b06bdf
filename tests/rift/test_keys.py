"""A key matches its checksum, and a typing error does not."""

from hypothesis import given
from hypothesis import strategies as st

from rift import keys

ENTROPY = st.binary(min_size=37, max_size=37)


@given(ENTROPY)
def test_a_key_matches_its_checksum_and_contains_its_id(entropy: bytes) -> None:
    key = keys.new_key(entropy)
    assert keys.is_well_formed(key.text)
    assert key.text.split("_")[1] == key.id


@given(ENTROPY, st.data())
def test_one_wrong_or_missing_character_is_detected(entropy: bytes, data: st.DataObject) -> None:
    text = keys.new_key(entropy).text
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567").filter(lambda c: c != text[at]))
    assert not keys.is_well_formed(text[:at] + other + text[at + 1 :])
    assert not keys.is_well_formed(text[:-1])
