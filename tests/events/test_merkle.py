"""The tree of RFC 6962: its known vectors, and proofs for any choice of records."""

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events import merkle

# From the tests of the RFC's reference implementation (certificate-transparency).
INPUTS = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def records(size: int) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in range(size)]


@pytest.mark.parametrize("size", range(1, 9))
def test_known_roots(size: int) -> None:
    assert merkle.root([bytes.fromhex(text) for text in INPUTS[:size]]).hex() == ROOTS[size - 1]


def test_the_root_of_nothing() -> None:
    assert merkle.root([]) == hashlib.sha256(b"").digest()


chosen_of = st.integers(1, 70).flatmap(
    lambda size: st.tuples(st.just(size), st.sets(st.integers(0, size - 1), min_size=1))
)


@given(chosen_of)
def test_a_proof_gives_the_root(case: Any) -> None:
    size, chosen = case
    tree = records(size)
    nodes = merkle.prove(tree, chosen)
    assert merkle.proved_root(size, {index: tree[index] for index in chosen}, nodes) == merkle.root(tree)


@given(chosen_of, st.data())
def test_what_is_changed_gives_another_root(case: Any, data: Any) -> None:
    size, chosen = case
    tree = records(size)
    nodes = merkle.prove(tree, chosen)
    told = {index: tree[index] for index in chosen}
    changed = data.draw(st.sampled_from(sorted(chosen)))
    forged = told | {changed: hashlib.sha256(b"forged").digest()}
    assert merkle.proved_root(size, forged, nodes) != merkle.root(tree)
    assert merkle.proved_root(size, told, [*nodes, b"\0" * 32]) is None
    if nodes:
        assert merkle.proved_root(size, told, nodes[:-1]) is None
        assert merkle.proved_root(size, told, [*nodes[:-1], b"\0" * 32]) != merkle.root(tree)
