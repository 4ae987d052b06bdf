"""An account's slice of the archive, with proofs: what `auditor.py` needs to compute an invoice again.

    invoice.json   one line: the invoice, and `heads`: {stream: SHA-256 of its last manifest here}
    chain.jsonl    {"stream", "manifest"}: the exact text of every manifest, from a stream's first to its head
    records.jsonl  {"stream", "first", "sequence", "at_ns", "content", "subject", "writer", "events"}, ordered
                   by stream and sequence; `first` is the segment's, and an event is {"json": bare JSON} if it
                   is the account's, else its hash
    proofs.jsonl   {"stream", "first", "nodes"}: for each segment with such records, its multi-proof
    README.txt     what this is, and how to run the auditor

An invoice of a closed month comes with all manifests of the archive, one of an open month with those up to
the positions it reaches, where segments must end. The account's are: the events of the requests asked for,
at each one's own address, whether they counted or not; in the book its limits and corrections; and the price
lists and closed months, which are everybody's.

What must not live here: what a bill is (the caller's invoice says that), and how segments are stored.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from events import bare, merkle, subjects
from events.ids import parse_request_id
from events.subjects import Address
from replay.archive import Archive, Manifest, SealedRecord

SHARED = frozenset({"PricePublished", "PeriodClosed"})
OWN = frozenset({"UsageCorrected", "LimitsSet"})
README = """\
An invoice of account {account} for {period}, and the part of the operator's log that it follows from.
Run `python auditor.py` with the path of this folder: it computes the invoice again and checks every hash.
Compare the heads that it prints with those that the operator has published.
"""


class AuditError(ValueError):
    """The archive, the invoice and the folder do not go together; says which, and what to do."""


class _Named(msgspec.Struct, frozen=True, gc=False):
    type: str
    request: str | None = None
    attempt: str | None = None
    account: str | None = None
    period: str | None = None


_named = msgspec.json.Decoder(_Named)


class _Slice:
    """Tells the account's events from all others. Records are shown to it in the order of their stream."""

    def __init__(self, account: str, requests: Collection[str]) -> None:
        self.account = account
        self.closed: set[str] = set()
        self.missing = set(requests)
        self.floors: dict[str, int] = {}
        self._at: dict[str, Address] = {}
        self._request_of: dict[str, str] = {}
        for request in requests:
            if (parsed := parse_request_id(request)) is None:
                raise AuditError(f"{request!r} is no request id")
            self._at[request] = parsed.at
            stream = subjects.shard_stream(parsed.at.shard)
            self.floors[stream] = min(self.floors.get(stream, parsed.floor), parsed.floor)
        self._addresses = frozenset(self._at.values())

    def own(self) -> dict[str, list[str]]:
        """Return what a segment of a shard is asked for."""
        return {"requests": list(self._at), "attempts": list(self._request_of)}

    def shown(self, stream: str, record: SealedRecord) -> list[bool]:
        """Return for each event whether it is the account's."""
        if stream == subjects.BOOK:
            return [self._is_own_entry(_named.decode(event)) for event in record.events]
        at = subjects.parse(record.subject)
        if at not in self._addresses:
            return [False for _ in record.events]
        return [self._is_own(_named.decode(event), at) for event in record.events]

    def _is_own_entry(self, event: _Named) -> bool:
        if event.type == "PeriodClosed" and event.period is not None:
            self.closed.add(event.period)
        return event.type in SHARED or (event.type in OWN and event.account == self.account)

    def _is_own(self, event: _Named, at: Address) -> bool:
        request = event.request or self._request_of.get(event.attempt or "", "")
        if self._at.get(request) != at:
            return False
        if event.type == "RequestAccepted" and event.account == self.account:
            self.missing.discard(request)
        if request in self.missing:
            return False
        if event.type == "AttemptStarted" and event.attempt is not None:
            self._request_of.setdefault(event.attempt, request)
        return True


def export(archive: Archive, invoice: Mapping[str, Any], requests: Collection[str], folder: Path) -> None:
    """Write the account's slice for `invoice` to `folder`, which is made, or is empty.

    `requests` are the ids of the account's requests that ended in the period, charged or not, and of any
    that ended before in a group (n > 1) with one of these. Raises AuditError; without `invoice.json`, which
    is written last, what is in the folder is no export.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise AuditError(f"{folder} is not empty: an export needs a folder of its own")
    chains = _chains(archive, invoice)
    part = _Slice(invoice["account"], requests)
    with (folder / "chain.jsonl").open("wb") as file:
        for stream, chain in chains.items():
            file.writelines(_line(stream=stream, manifest=manifest.text) for manifest in chain)
    with (folder / "records.jsonl").open("wb") as records, (folder / "proofs.jsonl").open("wb") as proofs:
        for stream, chain in chains.items():
            for segment in _segments(stream, chain, invoice["positions"], part.floors):
                chosen: list[int] = []
                own = part.own() if stream != subjects.BOOK else {}
                for record in archive.bare_records(segment, **own):
                    if any(shown := part.shown(stream, record)):
                        chosen.append(record.sequence - segment.first)
                        records.write(_told(stream, segment.first, record, shown))
                if chosen:
                    nodes = [node.hex() for node in merkle.prove(archive.hashes(segment), chosen)]
                    proofs.write(_line(stream=stream, first=segment.first, nodes=nodes))
    if part.missing:
        raise AuditError(f"the archive does not hold request {min(part.missing)} of {part.account}")
    if invoice["status"] == "closed" and invoice["period"] not in part.closed:
        raise AuditError(f"the close of {invoice['period']} is not archived yet: seal {subjects.BOOK} first")
    (folder / "README.txt").write_text(README.format(account=part.account, period=invoice["period"]))
    heads = {stream: chain[-1].sha256 for stream, chain in chains.items()}
    (folder / "invoice.json").write_bytes(_line(**invoice, heads=heads))


def _chains(archive: Archive, invoice: Mapping[str, Any]) -> dict[str, list[Manifest]]:
    """Return the manifests to show, by stream in order of their names; no chain is empty."""
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


def _segments(
    stream: str, chain: Sequence[Manifest], positions: Mapping[str, int], floors: Mapping[str, int]
) -> Iterator[Manifest]:
    """Yield each segment that may hold something of the account's."""
    if stream == subjects.BOOK:
        yield from chain
    elif stream in floors:
        for manifest in chain:
            if manifest.last > floors[stream] and manifest.first <= positions.get(stream, 0):
                yield manifest


def _told(stream: str, first: int, record: SealedRecord, shown: Sequence[bool]) -> bytes:
    events = [
        {"json": event} if is_own else bare.event_hash(event.encode())
        for event, is_own in zip(record.events, shown, strict=True)
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
