"""Helpers that export handwritten histories and run the auditor on them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from events.schema import LimitsSet, Price, PricePublished, RequestFinished, SegmentSealed, UsageCorrected
from replay import audit_export, auditor
from replay.archive.signatures import SigningKey, signed
from tests.replay import reckoning
from tests.replay.conftest import Scribe, started, tokens_of
from tests.replay.sealed import SealedLists

PERIOD = "2023-11"
FILES = ("invoice.json", "chain.jsonl", "records.jsonl", "proofs.jsonl")


def export(
    archive: SealedLists,
    streams: Any,
    invoice: Mapping[str, Any],
    folder: Path,
    key: SigningKey | None = None,
) -> Path:
    requests = reckoning.requests(streams, invoice["account"], invoice["period"])
    audit_export.export(archive, invoice, requests, folder, anchors(archive, key))
    return folder


def anchors(archive: SealedLists, key: SigningKey | None) -> dict[str, list[SegmentSealed]]:
    """Return the book's entries of each segment, signed if there is a key."""
    return {
        stream: [
            signed(
                SegmentSealed(id="x", stream=stream, first=one.first, last=one.last, manifest=one.sha256), key
            )
            for one in chain
        ]
        for stream, chain in archive.chains.items()
    }


def exported(scribe: Scribe, folder: Path, key: SigningKey | None = None, **fields: Any) -> Path:
    """Export the month of account dev, sealed in three segments; `fields` are put into the invoice."""
    archive = SealedLists()
    for part in (1, 2, 3):
        archive.seal(
            {name: messages[: -(-len(messages) * part // 3)] for name, messages in scribe.streams.items()}
        )
    return export(
        archive, scribe.streams, reckoning.invoice(scribe.streams, "dev", PERIOD) | fields, folder, key
    )


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = auditor.main(str(folder))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def prices(scribe: Scribe, version: int, **fields: Any) -> None:
    price = {"model": "tiny:1", "prompt_nanousd": 10, "output_nanousd": 20} | fields
    scribe.book(PricePublished(id=scribe.unique(), version=version, prices=(Price(**price),)))


def limits(scribe: Scribe, **fields: Any) -> None:
    scribe.book(LimitsSet(id=scribe.unique(), **({"account": "dev"} | fields)))


def ordinary(scribe: Scribe) -> Scribe:
    """Write a month with accounts that share records, a failover, a correction and a zombie."""
    prices(scribe, 1, second_nanousd=10**6, cached_prompt_nanousd=3)
    scribe.finished_request()
    scribe.finished_request(account="acme", key="key-of-acme")
    mine, theirs = scribe.request_id(), scribe.request_id(account="acme")
    scribe.tell(scribe.accepted(mine), scribe.accepted(theirs, account="acme", key="acme"), kind="request")
    scribe.tell(started(mine, "att-mine"), started(theirs, "att-theirs", worker="worker-of-acme"))
    scribe.tell(tokens_of("att-theirs", 0, 5), tokens_of("att-mine", 0, 2, cached_tokens=4))
    scribe.tell(started(mine, "att-next", after="att-mine", resume_index=2))
    scribe.tell(tokens_of("att-mine", 2, 9), tokens_of("att-next", 2, 1))
    scribe.tell(RequestFinished(request=mine, attempt="att-next", reason="stop", output_tokens=3))
    # A second, different terminal event is ignored.
    scribe.tell(RequestFinished(request=mine, attempt=None, reason="failed", output_tokens=3))
    scribe.tell(RequestFinished(request=theirs, attempt="att-theirs", reason="stop", output_tokens=5))
    scribe.book(
        UsageCorrected(id="correction-of-dev", account="dev", nanousd=-7, reason="sorry"),
        UsageCorrected(id="correction-of-acme", account="acme", nanousd=-9, reason="sorry"),
    )
    limits(scribe, plan="per_second")
    scribe.finished_request(plan="per_second")
    return scribe


def lines_of(folder: Path, name: str) -> list[Any]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]
