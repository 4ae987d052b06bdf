"""Data folders that earlier versions left, opened by this one. `golden/make.py` made them."""

import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service import MODEL, Service

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    opened = Service(tmp_path, "--engine", "sim")
    yield opened
    if hasattr(opened, "process") and opened.process.poll() is None:
        opened.stop()


@pytest.mark.parametrize("pack", sorted(GOLDEN.glob("*.tar.xz")), ids=lambda pack: pack.name)
def test_a_folder_is_one_shard_with_its_bills_and_can_get_another(pack: Path, service: Service) -> None:
    with tarfile.open(pack) as tar:
        tar.extractall(service.folder, filter="data")
    # The log still holds the requests, however long ago that was.
    (service.folder / "rift.toml").write_text("retention_days = 36500\n")
    golden = json.loads((service.folder / "golden.json").read_text())
    service.start()
    with service.client() as client:
        for request, answer in golden["answers"].items():
            assert client.get(f"/v1/inference/{request}").json()["output"] == answer["output"]
        assert bill(client, golden["period"]) == without_positions(golden["invoice"])
        assert shards(service) == [0]
        added = service.rift("shards", "add")
        assert added.returncode == 0, added.stderr
        assert shards(service) == [0, 1]
        verified = service.rift("replay", "--verify")
        assert verified.returncode == 0, verified.stdout + verified.stderr
        assert bill(client, golden["period"]) == without_positions(golden["invoice"])
        body = {"model": MODEL, "prompt": "new", "parameters": {"max_tokens": 2}}
        assert client.post("/v1/inference", json=body).status_code == 200


def bill(client: httpx.Client, period: str) -> dict[str, Any]:
    """Return an invoice. Control may be building its database of an earlier version again: 503 until then."""
    deadline = time.monotonic() + 30
    while (answer := client.get(f"/v1/invoices/{period}")).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.2)
    return without_positions(answer.raise_for_status().json())


def without_positions(invoice: dict[str, Any]) -> dict[str, Any]:
    """An open month's invoice names the end of the log, which has grown."""
    return {name: value for name, value in invoice.items() if name != "positions"}


def shards(service: Service) -> list[int]:
    listed = service.rift("shards", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    return [row["shard"] for row in json.loads(listed.stdout)]
