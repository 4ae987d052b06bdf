"""An account's slice of the archive, with proofs: what `auditor.py` needs to compute an invoice again.

    invoice.json   one line: the invoice, and `heads`: {stream: SHA-256 of its last manifest here}
    chain.jsonl    {"stream", "manifest"}: the exact text of every manifest, from a stream's first to its head
    records.jsonl  {"stream", "first", "sequence", "at_ns", "content", "subject", "writer", "events"}, ordered
                   by stream and sequence; `first` is the segment's, and an event is {"json": bare JSON} if it
                   is the account's, else its hash
    proofs.jsonl   {"stream", "first", "nodes"}: for each segment with such records, its multi-proof
    signatures.jsonl  {"stream", "last", "manifest", "signer", "signature"}: the last signed manifest of each
                   stream, which covers all before it
    README.txt     what this is, and how to run the auditor

The export of a closed month includes all manifests of the archive. The export of an open month includes the
manifests up to the invoice's positions, and a segment must end at each of these. All events
are exported as hashes, except these:
- those of the given requests, at each request's own address, up to the segment in which it ended, whether or
  not they counted
- the account's limits and corrections in the book
- the price lists, closed months and signing keys, which all accounts share

The caller computes the invoice, and `archive/` stores the segments.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from events import merkle, redaction, subjects
from events.ids import parse_request_id
from events.schema import SegmentSealed
from events.subjects import Address
from replay.archive.archive import Archive, SealedRecord
from replay.archive.manifest import Manifest
from replay.archive.signatures import is_valid
from replay.disk import naming, replacing
from replay.errors import ReplayError

SHARED = frozenset({"PricePublished", "PeriodClosed", "SigningKeyPublished"})
SIGNED = ("stream", "last", "manifest", "signer", "signature")
OWN = frozenset({"UsageCorrected", "LimitsSet"})
README = """\
An invoice of account {account} for {period}, and the part of the operator's log that it follows from.
Run `python auditor.py` with the path of this folder: it computes the invoice again and checks every hash.
Compare the heads that it prints with those that the operator has published.
"""


class AuditError(ReplayError):
    """The archive, the invoice and the folder do not match; the message names the remedy."""


class _Named(msgspec.Struct, frozen=True, gc=False):
    type: str
    request: str | None = None
    attempt: str | None = None
    account: str | None = None
    period: str | None = None


_named = msgspec.json.Decoder(_Named)


class _Lived(NamedTuple):
    """The range of a request's events: after `floor`, and up to `end` for those that count."""

    floor: int
    end: int
    request: str
    at: Address


class _Book:
    """Selects the entries of the book that the account may see."""

    def __init__(self, account: str) -> None:
        self.account = account
        self.closed: set[str] = set()

    def enter(self, _: Manifest) -> dict[str, list[str]]:
        return {}

    def shown(self, record: SealedRecord) -> list[bool]:
        return [self._is_shown(_named.decode(event)) for event in record.events]

    def _is_shown(self, event: _Named) -> bool:
        if event.type == "PeriodClosed" and event.period is not None:
            self.closed.add(event.period)
        return event.type in SHARED or (event.type in OWN and event.account == self.account)


class _Shard:
    """Selects the account's events of a shard.

    The caller passes segments and their records in order. Only requests that may be open in the current
    segment are kept in memory.
    """

    def __init__(self, account: str) -> None:
        self.account = account
        self.missing: set[str] = set()
        self._coming: list[_Lived] = []
        self._under_way: dict[str, _Lived] = {}
        self._addresses: set[Address] = set()
        self._request_of: dict[str, str] = {}

    def expect(self, lived: _Lived) -> None:
        """Add a request. Requests must come in descending order of their floors."""
        self.missing.add(lived.request)
        self._coming.append(lived)

    def enter(self, segment: Manifest) -> dict[str, list[str]] | None:
        """Return the filter for a segment, or None if it has no events of the account."""
        while self._coming and self._coming[-1].floor < segment.last:
            lived = self._coming.pop()
            self._under_way[lived.request] = lived
        self._under_way = {name: one for name, one in self._under_way.items() if one.end >= segment.first}
        self._request_of = {a: name for a, name in self._request_of.items() if name in self._under_way}
        self._addresses = {lived.at for lived in self._under_way.values()}
        own = {"requests": list(self._under_way), "attempts": list(self._request_of)}
        return own if self._under_way else None

    def shown(self, record: SealedRecord) -> list[bool]:
        """Return for each event whether it is the account's."""
        at = subjects.parse(record.subject)
        if at not in self._addresses:
            return [False for _ in record.events]
        return [self._is_own(_named.decode(event), at) for event in record.events]

    def _is_own(self, event: _Named, at: Address) -> bool:
        request = event.request or self._request_of.get(event.attempt or "", "")
        if request not in self._under_way or self._under_way[request].at != at:
            return False
        if event.type == "RequestAccepted" and event.account == self.account:
            self.missing.discard(request)
        if request in self.missing:
            return False
        if event.type == "AttemptStarted" and event.attempt is not None:
            self._request_of.setdefault(event.attempt, request)
        return True


def export(
    archive: Archive,
    invoice: Mapping[str, Any],
    ends: Mapping[str, int],
    folder: Path,
    anchors: Mapping[str, Sequence[SegmentSealed]],
) -> None:
    """Write the account's slice for `invoice` to `folder`, which must be missing or empty.

    `anchors` are the book's, by stream and in order.

    `ends` maps each of these requests of the account to the sequence of the event that ended it:
    - requests that ended in the period, charged or not
    - requests that ended earlier and share a group (n > 1) with one of the former
    - requests of plan per_second that an earlier period charged for seconds in which one of the former ran

    Raises AuditError, DiskRefused, and then leaves no file. `invoice.json` is written last, so a folder
    without it is not a complete export.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise AuditError(f"{folder} is not empty: an export needs a folder of its own")
        try:
            _write(archive, invoice, ends, folder, anchors)
        except BaseException:
            # Half an export would occupy the disk, and the next try refuses a folder that is not empty.
            for file in folder.iterdir():
                file.unlink()
            raise


def _write(
    archive: Archive,
    invoice: Mapping[str, Any],
    ends: Mapping[str, int],
    folder: Path,
    anchors: Mapping[str, Sequence[SegmentSealed]],
) -> None:
    account = invoice["account"]
    period = invoice["period"]
    chains = _chains(archive, invoice)
    book = _Book(account)
    shards = _shards(account, ends)
    with (folder / "chain.jsonl").open("wb") as file:
        for stream, chain in chains.items():
            file.writelines(_line(stream=stream, manifest=manifest.text) for manifest in chain)
    with (folder / "signatures.jsonl").open("wb") as file:
        for stream, chain in chains.items():
            shown = {(segment.last, segment.sha256) for segment in chain}
            named = [one for one in anchors.get(stream, ()) if (one.last, one.manifest) in shown]
            # Not only control can append an anchor, but only control can sign one.
            newest = sorted(named, key=lambda one: one.last, reverse=True)
            if (one := next(filter(is_valid, newest), None)) is not None:
                file.write(_line(**{name: getattr(one, name) for name in SIGNED}))
    with (folder / "records.jsonl").open("wb") as records, (folder / "proofs.jsonl").open("wb") as proofs:
        parts: dict[str, _Book | _Shard] = {**shards, subjects.BOOK: book}
        for stream, part in sorted(parts.items()):
            for segment in chains.get(stream, ()):
                chosen: list[int] = []
                if (own := part.enter(segment)) is None:
                    continue
                for record in archive.bare_records(segment, **own):
                    if any(visible := part.shown(record)):
                        chosen.append(record.sequence - segment.first)
                        records.write(_record_line(stream, segment.first, record, visible))
                if chosen:
                    nodes = [node.hex() for node in merkle.prove(archive.hashes(segment), chosen)]
                    proofs.write(_line(stream=stream, first=segment.first, nodes=nodes))
    if missing := [min(shard.missing) for shard in shards.values() if shard.missing]:
        raise AuditError(f"the archive does not hold request {min(missing)} of {account}")
    if invoice["status"] == "closed" and period not in book.closed:
        raise AuditError(f"the close of {period} is not archived yet: seal {subjects.BOOK} first")
    (folder / "README.txt").write_text(README.format(account=account, period=period))
    heads = {stream: chain[-1].sha256 for stream, chain in chains.items()}
    with replacing(folder / "invoice.json") as beside:
        beside.write_bytes(_line(**invoice, heads=heads))


def _shards(account: str, ends: Mapping[str, int]) -> dict[str, _Shard]:
    """Return the shards by stream, each with its requests."""
    lives: list[_Lived] = []
    for request, end in ends.items():
        if (parsed := parse_request_id(request)) is None:
            raise AuditError(f"{request!r} is no request id")
        lives.append(_Lived(parsed.floor, end, request, parsed.at))
    shards: dict[str, _Shard] = {}
    for lived in sorted(lives, key=lambda lived: lived.floor, reverse=True):
        shards.setdefault(subjects.shard_stream(lived.at.shard), _Shard(account)).expect(lived)
    return shards


def _chains(archive: Archive, invoice: Mapping[str, Any]) -> dict[str, list[Manifest]]:
    """Return the manifests to export by stream, sorted by stream name. No chain is empty."""
    positions = invoice["positions"]
    chains: dict[str, list[Manifest]] = {}
    for stream in sorted({*archive.streams(), *positions}):
        chain = archive.manifests(stream)
        if invoice["status"] == "open":
            reached = positions.get(stream, 0)
            chain = [manifest for manifest in chain if manifest.last <= reached]
            if reached != (end := chain[-1].last if chain else 0):
                raise AuditError(
                    f"the open invoice reaches {stream}:{reached}, and no archived segment ends there (one "
                    f"ends at {end}): seal {stream}, and export an invoice that reaches as far as the archive"
                )
        if chain:
            chains[stream] = chain
    return chains


def _record_line(stream: str, first: int, record: SealedRecord, visible: Sequence[bool]) -> bytes:
    events = [
        {"json": event} if is_own else redaction.event_hash(event.encode())
        for event, is_own in zip(record.events, visible, strict=True)
    ]
    return _line(
        stream=stream,
        first=first,
        sequence=record.sequence,
        at_ns=record.at_ns,
        content=record.content,
        subject=record.subject,
        writer=record.writer,
        events=events,
    )


def _line(**fields: Any) -> bytes:
    return msgspec.json.encode(fields) + b"\n"
