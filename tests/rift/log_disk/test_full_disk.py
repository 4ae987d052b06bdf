"""A whole installation on a small disk that is filled and freed at different moments, without an operator."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rift.log_disk.reserve import RESERVE_BYTES, Reserve
from rift.log_disk.watch import POLL_S
from tests.rift.test_launcher import role
from tests.service import MODEL, Service, frames, joined
from tests.small_disk import SmallDisk, small_disk

pytestmark = pytest.mark.slow

# Enough for the streams of the smallest log, of which nats-server wants three quarters free, and the reserve.
DISK_BYTES = 720 * 1024 * 1024
SETTINGS = f"log_bytes_max = {1 << 28}\n"

BODY = {"model": MODEL, "prompt": "Hello", "parameters": {"max_tokens": 5}}
LONG = {"model": MODEL, "prompt": "Hello", "parameters": {"max_tokens": 200}, "stream": True}

# From the last byte on the disk until the refusal, and from the first free byte until an answer.
REFUSED_S = 5.0
BACK_S = 10.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", DISK_BYTES) as mounted:
        yield mounted


class Crowd:
    """A client that asks again and again. It notes the id of each answer, and anything else that it gets."""

    def __init__(self, service: Service) -> None:
        self.acknowledged: list[str] = []
        self.refusals: set[str] = set()
        self._service = service
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Crowd":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with self._service.client() as client:
            while not self._stop.wait(0.02):
                try:
                    response = client.post("/v1/inference", json=BODY)
                    if response.status_code == 200:
                        self.acknowledged.append(response.json()["id"])
                    else:
                        self.refusals.add(f"{response.status_code} {response.json()['error']['code']}")
                except Exception as error:  # noqa: BLE001  # the test shows it
                    self.refusals.add(repr(error))


def until(condition: Any, within_s: float, what: str) -> float:
    """Return how long it took until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within_s, f"{what}: not within {within_s:g} s"
        time.sleep(0.05)
    return time.monotonic() - began


def is_refused(service: Service) -> bool:
    """Return whether a request is refused because of the disk. A refusal is never slow."""
    with service.client() as client:
        began = time.monotonic()
        response = client.post("/v1/inference", json=BODY)
        if response.status_code == 200:
            return False
        assert response.status_code == 503, response.text
        assert "retry-after" in response.headers
        return response.json()["error"]["code"] == "log_full" and time.monotonic() < began + 1


def is_refused_when_full(disk: SmallDisk, service: Service) -> bool:
    """As `is_refused`. Fill the pages too that processes free meanwhile, but not those of the reserve."""
    if Reserve(service.folder / "nats" / "reserve").is_whole():
        disk.fill()
    return is_refused(service)


def is_served(service: Service) -> bool:
    with service.client() as client:
        return client.post("/v1/inference", json=BODY).status_code == 200


def is_ready(service: Service) -> bool:
    with service.client() as client:
        return client.get("/readyz").status_code == 200


def last_event(service: Service, events: list[dict[str, Any]]) -> None:
    """Read one stream to its end."""
    with service.client() as client, client.stream("POST", "/v1/inference", json=LONG) as response:
        events.extend(frames(response))


def test_a_disk_that_fills_up_and_is_freed_costs_no_answer_and_no_operator(disk: SmallDisk) -> None:
    folder = disk.path / "data"
    folder.mkdir()
    (folder / "rift.toml").write_text(SETTINGS)
    service = Service(folder, "--engine", "sim").start()
    screen = threading.Thread(target=lambda: service.screen.extend(service.process.stdout or ()))
    screen.start()
    acknowledged: list[str] = []
    try:
        for kills_the_broker in (False, True):
            events: list[dict[str, Any]] = []
            reader = threading.Thread(target=last_event, args=(service, events))
            with Crowd(service) as crowd:
                reader.start()
                until(lambda: len(crowd.acknowledged) > 2, 10, "answers")
                disk.fill()
                if kills_the_broker:
                    (broker,) = [pid for pid in service.processes() if role(pid) == "nats-server"]
                    os.kill(broker, signal.SIGKILL)
                until(lambda: is_refused_when_full(disk, service), REFUSED_S, "refusal")
                assert not is_ready(service)
                shown = service.rift("status")
                assert shown.returncode == 1
                assert f"the disk of {folder}/nats is full" in shown.stderr.splitlines()[-1]
                if not kills_the_broker:
                    # The reserve holds what the running request still writes.
                    reader.join(timeout=30)
                    assert events[-1]["event"] == "done"
                disk.free()
                until(lambda: is_served(service), BACK_S, "service")
                assert is_ready(service)
            acknowledged += crowd.acknowledged
            assert "503 log_full" in crowd.refusals
            assert crowd.refusals <= {"503 log_full", "503 log_unavailable"}
            reader.join(timeout=60)
            assert events[-1]["event"] in ("done", "error"), events[-1]
            joined(events)
        assert service.rift("status").returncode == 0
        stored = {row["request_id"] for row in service.sql("select request_id from requests")}
        assert stored.issuperset(acknowledged)
    finally:
        service.process.send_signal(signal.SIGINT)
        service.process.wait(20)
        screen.join()
        assert service.process.stdout is not None
        service.process.stdout.close()
    told = [line for line in service.screen if "the disk of" in line]
    assert ["again" in line for line in told] == [False, True, False, True], told
    assert not [line for line in service.screen if "WARNING" in line], "each process has a log of its own"
    refused_before_the_start(disk, service)


def refused_before_the_start(disk: SmallDisk, service: Service) -> None:
    disk.fill()
    done = service.rift("up", "--engine", "sim", "--port", "0")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rift: ")]
    assert f"the disk of {service.folder}/nats is full" in line
    disk.free()
    assert (service.folder / "nats" / "reserve").stat().st_size == RESERVE_BYTES


def test_a_broker_that_met_a_read_only_disk_is_started_again(disk: SmallDisk, tmp_path: Path) -> None:
    """Only the broker is on this disk: any other open file would keep it from becoming read-only."""
    folder = tmp_path / "data"
    (folder / "nats").parent.mkdir()
    (folder / "nats").symlink_to(disk.path)
    (folder / "rift.toml").write_text(SETTINGS)
    service = Service(folder, "--engine", "sim").start()
    try:
        (broker,) = [pid for pid in service.processes() if role(pid) == "nats-server"]
        os.kill(broker, signal.SIGSTOP)
        os.kill(broker, signal.SIGKILL)
        until(lambda: read_only(disk), 5, "read-only")
        until(lambda: not is_ready(service), REFUSED_S, "not ready")
        with service.client() as client:
            assert client.post("/v1/inference", json=BODY).status_code == 503
        shown = service.rift("status")
        assert shown.returncode == 1
        assert "Read-only file system" in shown.stderr.splitlines()[-1]
        # The watch looks this often, and says what it finds.
        time.sleep(2 * POLL_S)
        disk.writable()
        until(lambda: is_ready(service) and is_served(service), BACK_S, "service")
    finally:
        disk.writable()
        service.stop()
    assert any("Read-only file system" in line for line in service.screen[-1].splitlines())


def read_only(disk: SmallDisk) -> bool:
    try:
        disk.read_only()
    except Exception:  # noqa: BLE001  # a file is still open for writing
        return False
    return True
