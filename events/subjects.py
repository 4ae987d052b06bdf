"""Streams and subjects. No request id and no client text is ever part of a subject, so the broker's memory
does not grow with traffic.

    RIFT_<shard>  rift.<shard>.request|work|cancel.<lane>.<model>, rift.<shard>.lane.<lane>
    RIFT_FLEET    rift.fleet.<model>, and elections on rift.fleet._leader
    RIFT_BOOK     rift.book.<kind>.<id>
    RIFT_KEYS     rift.keys.<digest of an account's idempotency key>
    RIFT_SECRETS  rift.secret.passing, rift.secret.kept

`<model>` is the model's slug, `<lane>` the random id of one gateway process.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

import msgspec

FLEET = "RIFT_FLEET"
BOOK = "RIFT_BOOK"
KEYS = "RIFT_KEYS"
SECRETS = "RIFT_SECRETS"

_REQUEST_SUBJECT = re.compile(r"rift\.(\d{1,4})\.(request|work|cancel)\.([a-z0-9]+)\.([a-z0-9-]+)")


class Address(msgspec.Struct, frozen=True):
    """The place of a request's events: part of their subjects."""

    shard: int
    lane: str
    model: str


def slug(model: str) -> str:
    """Return a model's name as one token of a subject."""
    return re.sub(r"[^a-z0-9]", "-", model)


def shard_stream(shard: int) -> str:
    return f"RIFT_{shard}"


def unnamed(positions: Mapping[str, int]) -> tuple[dict[str, int], tuple[int, ...]]:
    """Return positions without those of shards 0, 1, 2 and so on, and these in order."""
    others = dict(positions)
    shards: list[int] = []
    while (position := others.pop(shard_stream(len(shards)), None)) is not None:
        shards.append(position)
    return others, tuple(shards)


def named(others: Mapping[str, int], shards: Iterable[int]) -> dict[str, int]:
    """Return the positions of which `unnamed` returned the parts."""
    return {shard_stream(shard): position for shard, position in enumerate(shards)} | dict(others)


def shard_of(stream: str) -> int:
    """Return the number of a shard's stream, 0 for another stream."""
    number = stream.removeprefix("RIFT_")
    return int(number) if number.isdecimal() else 0


@lru_cache(1024)
def prefix(stream: str) -> str:
    """Return the beginning that a stream's subjects share, and no other stream's."""
    return "rift.secret." if stream == SECRETS else f"{stream.lower().replace('_', '.')}."


def of_shard(shard: int) -> str:
    """Return a pattern of all subjects of a shard."""
    return f"rift.{shard}.>"


def folded(shards: Iterable[int]) -> dict[str, str]:
    """Return the streams that facts and bills are computed from, each with a pattern of its subjects."""
    streams = {shard_stream(shard): of_shard(shard) for shard in shards}
    return streams | {FLEET: "rift.fleet.>", BOOK: "rift.book.>"}


def request(at: Address) -> str:
    return f"rift.{at.shard}.request.{at.lane}.{at.model}"


def work(at: Address) -> str:
    return f"rift.{at.shard}.work.{at.lane}.{at.model}"


def cancel(at: Address) -> str:
    return f"rift.{at.shard}.cancel.{at.lane}.{at.model}"


def lane(shard: int, lane_id: str) -> str:
    return f"rift.{shard}.lane.{lane_id}"


def history(at: Address) -> tuple[str, str, str]:
    """Return all subjects that can hold events of a request at this address."""
    return request(at), work(at), cancel(at)


def answers(shard: int, lane_id: str) -> tuple[str, str, str]:
    """Return the subjects that a gateway follows for a lane."""
    return f"rift.{shard}.work.{lane_id}.>", f"rift.{shard}.cancel.{lane_id}.>", lane(shard, lane_id)


def of_model(shard: int, model: str) -> tuple[str, str]:
    """Return the subjects that a worker follows for its model."""
    return f"rift.{shard}.work.*.{model}", cancels_of_model(shard, model)


def cancels_of_model(shard: int, model: str) -> str:
    return f"rift.{shard}.cancel.*.{model}"


def queue(shard: int, model: str) -> str:
    return f"rift.{shard}.request.*.{model}"


# The subject of elections. No model's slug begins with `_`.
LEADER = "rift.fleet._leader"


def fleet(model: str) -> str:
    return f"rift.fleet.{model}"


def book(kind: str, entry: str) -> str:
    return f"rift.book.{kind}.{entry}"


SHARD_LIST = book("shard", "list")

# Anchors of the archive's segments: one subject per stream.
ANCHORS = book("segment", "")


def idempotency(digest: str) -> str:
    return f"rift.keys.{digest}"


# Content keys: of requests with `store: false`, and of all other sealed requests.
SECRET_PASSING = "rift.secret.passing"
SECRET_KEPT = "rift.secret.kept"


def parse(subject: str) -> Address | None:
    """Return the address of a request's event, or None for any other subject."""
    match = _REQUEST_SUBJECT.fullmatch(subject)
    return Address(int(match[1]), match[3], match[4]) if match else None
