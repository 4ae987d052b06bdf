"""Merkle trees of RFC 6962 over record hashes: one root for a segment, and proofs for some of its records.

    leaf = SHA-256(0x00 + record hash)        node = SHA-256(0x01 + left + right)

The left part of a tree of n leaves is the largest power of two below n.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence


def leaf(record: bytes) -> bytes:
    return hashlib.sha256(b"\0" + record).digest()


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def root(records: Sequence[bytes]) -> bytes:
    """Return the root over record hashes in order; without records, the hash of no bytes."""
    level = [leaf(record) for record in records]
    if not level:
        return hashlib.sha256(b"").digest()
    while len(level) > 1:
        # An odd last node moves up unchanged, which gives the tree of RFC 6962.
        odd = level[-1:] if len(level) % 2 else []
        level = [node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)] + odd
    return level[0]


def prove(records: Sequence[bytes], chosen: Collection[int]) -> list[bytes]:
    """Return the nodes that `proved_root` needs in addition to the chosen records (indexes from 0).

    They are in order from left to right.
    """
    indexes = sorted(chosen)

    def nodes(low: int, high: int) -> Iterator[bytes]:
        if not _holds(indexes, low, high):
            yield root(records[low:high])
        elif high - low > 1:
            middle = low + split(high - low)
            yield from nodes(low, middle)
            yield from nodes(middle, high)

    return list(nodes(0, len(records)))


def proved_root(size: int, chosen: Mapping[int, bytes], nodes: Sequence[bytes]) -> bytes | None:
    """Return the root of a tree of `size` records with the chosen ones; None if a node is missing or left."""
    given = iter(nodes)
    indexes = sorted(chosen)

    def subtree(low: int, high: int) -> bytes:
        if not _holds(indexes, low, high):
            return next(given)
        if high - low == 1:
            return leaf(chosen[low])
        middle = low + split(high - low)
        return node(subtree(low, middle), subtree(middle, high))

    try:
        proved = subtree(0, size)
    except StopIteration:
        return None
    return proved if next(given, None) is None else None


def split(size: int) -> int:
    """Return the largest power of two below `size`, which is at least 2."""
    return 1 << ((size - 1).bit_length() - 1)


def _holds(indexes: Sequence[int], low: int, high: int) -> bool:
    first = bisect_left(indexes, low)
    return first < len(indexes) and indexes[first] < high
