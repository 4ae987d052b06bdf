"""A history over one shard, written again over three."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from events import codec, schema, subjects
from events.log import Stored
from events.subjects import BOOK, FLEET

SHARDS = 3
ONE = subjects.shard_stream(0)

Streams = dict[str, list[Stored]]


def in_order(streams: Mapping[str, Sequence[Stored]]) -> Streams:
    """Return a history whose stored times never step back: each shard makes its own times monotone."""
    ordered: Streams = {}
    for stream, messages in streams.items():
        at_ns, ordered[stream] = 0, []
        for stored in messages:
            at_ns = max(at_ns, stored.stored_at_ns)
            ordered[stream].append(msgspec.structs.replace(stored, stored_at_ns=at_ns))
    return ordered


class Split:
    """The history of shard 0, each request in one of three shards; requests of a group share theirs.

    `ids` maps the new id of each request to the old one.
    """

    def __init__(self, streams: Mapping[str, Sequence[Stored]]) -> None:
        self.streams: Streams = {subjects.shard_stream(shard): [] for shard in range(SHARDS)}
        self.streams[FLEET] = list(streams.get(FLEET, ()))
        self.ids: dict[str, str] = {}
        self._shards: dict[str, int] = {}
        self._attempts: dict[str, int] = {}
        # By shard: its length after each record of the original.
        self._lengths: list[list[int]] = [[0] for _ in range(SHARDS)]
        decoded = [codec.decode(stored.data) for stored in streams[ONE]]
        for _, events in decoded:
            for event in events:
                self._choose(event)
        for stored, (writer, events) in zip(streams[ONE], decoded, strict=True):
            self._put(stored, writer, events)
        self.streams[BOOK] = [self._entry(stored) for stored in streams[BOOK]]

    def _choose(self, event: Any) -> None:
        if isinstance(event, schema.RequestAccepted):
            self._shards.setdefault(event.request, hash_of(event.group or event.request))
        elif isinstance(event, schema.AttemptStarted):
            self._attempts.setdefault(event.attempt, self._shards.get(event.request, 0))

    def _put(self, stored: Stored, writer: str, events: Sequence[Any]) -> None:
        for shard in range(SHARDS):
            stream = self.streams[subjects.shard_stream(shard)]
            if mine := [self._moved(event, shard) for event in events if self._shard_of(event) == shard]:
                subject = re.sub(r"^rift\.0\.", f"rift.{shard}.", stored.subject)
                data = codec.encode(writer, mine)
                stream.append(Stored(subject, len(stream) + 1, stored.stored_at_ns, data))
            self._lengths[shard].append(len(stream))

    def _shard_of(self, event: Any) -> int:
        if hasattr(event, "request"):
            return self._shards.get(event.request, 0)
        return self._attempts.get(event.attempt, 0)

    def _moved(self, event: Any, shard: int) -> Any:
        if (request := getattr(event, "request", None)) is None:
            return event
        _, _, lane, model, floor, rest = request.split("_", 5)
        new = f"req_{shard}_{lane}_{model}_{self._lengths[shard][int(floor)]}_{rest}"
        self.ids[new] = request
        return msgspec.structs.replace(event, request=new)

    def _entry(self, stored: Stored) -> Stored:
        """Return a record of the book, with the positions of all three shards for those of the one."""
        writer, events = codec.decode(stored.data)
        return msgspec.structs.replace(
            stored, data=codec.encode(writer, [self._closed(event) for event in events])
        )

    def _closed(self, event: Any) -> Any:
        if not isinstance(event, schema.PeriodClosed) or ONE not in event.positions:
            return event
        last, root = event.positions[ONE], event.roots[ONE]
        positions = {subjects.shard_stream(n): lengths[last] for n, lengths in enumerate(self._lengths)}
        return msgspec.structs.replace(
            event,
            positions=event.positions | {stream: at for stream, at in positions.items() if at},
            roots=event.roots | {stream: root for stream, at in positions.items() if at},
        )


def hash_of(text: str) -> int:
    """Return a shard for a text: the same in every process."""
    return sum(text.encode()) % SHARDS
