"""On a real broker's disk, encrypted content is nowhere in the clear, and unreadable without its key."""

import base64
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from events import codec, encryption
from events.jetstream import connect
from events.schema import RequestAccepted
from rift import nats_server
from tests.service import MODEL, Service, frames, running, until

pytestmark = pytest.mark.slow

TOML = "seal_content = true\n"
PLANTED = "The heron keeps its secret beneath the seventh bridge"


@pytest.fixture(scope="module", params=["asked", "always"])
def sealing_service(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("forgetting") / "data"
    folder.mkdir()
    (folder / "rift.toml").write_text(TOML if request.param == "always" else "")
    running = Service(folder, "--engine", "sim").start()
    yield running
    running.stop()


def holds(folder: Path, words: bytes) -> bool:
    """Return whether a file of the broker contains these bytes."""
    return any(words in file.read_bytes() for file in (folder / "nats").rglob("*") if file.is_file())


def keys(service: Service) -> dict[str, bytes]:
    """Return each request's key as its message encodes it."""

    async def read() -> dict[str, bytes]:
        at = nats_server.address(service.folder / "nats")
        assert at is not None
        log = await connect(at.url, at.access("admin"), name="test")
        found = {}
        last = await log.last_sequence("RIFT_0")
        async for batch in log.scan("RIFT_0", ["rift.0.>"], first=1, target=last):
            for event in (event for stored in batch for event in codec.decode(stored.data)[1]):
                if isinstance(event, RequestAccepted) and event.sealed is not None:
                    secret = await encryption.secret(log, event.sealed)
                    found[event.request] = base64.b64encode(secret.key) if secret is not None else b""
        await log.close()
        return found

    return anyio.run(read)


def ask(client: httpx.Client, *, store: bool = True, **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": PLANTED, "parameters": {"max_tokens": 8}, "store": store, **more}
    answer = client.post("/v1/inference", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_removed_content_is_nowhere_on_the_disk(sealing_service: Service) -> None:
    service = sealing_service
    is_always = "seal_content" in (service.folder / "rift.toml").read_text()
    with service.client() as client:
        sealed = ask(client, store=is_always)
        other = ask(client, store=is_always)
        assert not holds(service.folder, PLANTED.encode())
        assert len(sealed["output"]) > 8
        assert not holds(service.folder, sealed["output"][:20].encode())
        at = f"/v1/inference/{sealed['id']}"
        assert client.get(at).json()["output"] == sealed["output"]
        with client.stream("GET", f"{at}/events") as stream:
            deltas = "".join(e["data"]["delta"] for e in frames(stream) if e.get("event") == "token")
        assert deltas == sealed["output"]
        key = keys(service)[sealed["id"]]
        assert holds(service.folder, key), "it has to be there to be erased"
        assert client.delete(f"{at}/content").json() == {
            "id": sealed["id"], "object": "inference.content", "deleted": True
        }  # fmt: skip
        assert not holds(service.folder, key)
        assert client.delete(f"{at}/content").status_code == 200, "once more is as once"
        for gone in (client.get(at), client.get(f"{at}/events")):
            assert (gone.status_code, gone.json()["error"]["code"]) == (410, "content_removed")
        assert client.get(f"/v1/inference/{other['id']}").json()["output"] == other["output"]
    row = until(
        service, f"select * from requests where request_id = '{sealed['id']}' and finished_at_ns is not null"
    )
    assert row["charge_nanousd"] == sealed["charge"]["nanousd"]
    done = service.rift("replay", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    if not is_always:
        with service.client() as client:
            stored = ask(client)
            assert holds(service.folder, PLANTED.encode()), "content that is stored in the clear is found"
            refused = client.delete(f"/v1/inference/{stored['id']}/content")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "content_not_sealed")


def test_a_worker_that_takes_over_decrypts_the_earlier_output(sealing_service: Service) -> None:
    service = sealing_service
    with service.client() as client:
        body = {"model": MODEL, "prompt": PLANTED, "parameters": {"max_tokens": 100}, "store": False}
        begun = client.post("/v1/inference", json=body | {"background": True}).json()
        at = f"/v1/inference/{begun['id']}"
        while not client.get(at).json()["usage"]["output_tokens"]:
            time.sleep(0.05)
        refused = client.delete(f"{at}/content")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "request_not_ended")
        kill_worker(service)
        while client.get(at).json()["finish_reason"] is None:
            time.sleep(0.1)
        ended = client.get(at).json()
        assert ended["attempts"] == 2
        whole = client.post("/v1/inference", json=body).json()
        assert ended["output"] == whole["output"]


def kill_worker(service: Service) -> None:
    (worker,) = [pid for pid, line in running() if str(service.folder) in line and " worker " in line]
    os.kill(worker, signal.SIGKILL)
