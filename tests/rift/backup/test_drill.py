"""The drill: a service under load is backed up, runs on, loses everything but its archive, and is restored on
another machine, which is another folder and other ports here."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.service import MODEL, ROOT, Service, frames

pytestmark = pytest.mark.slow

TOML = "log_bytes_max = 268435456\nshards = 1\n"
EXPORT = ("audit", "export", "--account", "dev", "--period", f"{datetime.now(UTC):%Y-%m}")


class Drill:
    """The new service, and the ids of what the old one was asked, by what it had stored of them when."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self.folder = folder
        self.ids: dict[str, str] = {}
        self.old_key = ""


def ask(service: Service, *, headers: dict[str, str] | None = None, **more: Any) -> str:
    parameters = {"max_tokens": more.pop("max_tokens", 5)}
    body = {"model": MODEL, "prompt": "hi", "parameters": parameters, **more}
    with service.client() as client:
        answer = client.post("/v1/inference", json=body, headers=headers or {})
    assert answer.is_success, answer.text
    return str(answer.json()["id"])


def rift(service: Service, *arguments: str | Path) -> str:
    done = service.rift(*map(str, arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    folder = tmp_path_factory.mktemp("drill")
    backup = folder / "backup"
    old = Service(folder / "old", "--engine", "sim")
    old.folder.mkdir()
    (old.folder / "rift.toml").write_text(TOML)
    new = Drill(Service(folder / "new", "--engine", "sim"), folder)
    try:
        new.old_key = old.start().key
        new.ids["in the backup"] = ask(old, headers={"Idempotency-Key": "once"})
        new.ids["running"] = ask(old, max_tokens=3000, background=True)
        rift(old, *EXPORT, folder / "first")
        rift(old, "backup", backup)
        new.ids["in the archive"] = ask(old)
        rift(old, *EXPORT, folder / "second")
        shutil.copytree(old.folder / "archive", folder / "survived")
        new.ids["lost"] = ask(old)
    finally:
        old.stop(signal.SIGKILL)
    shutil.rmtree(old.folder)
    said = rift(new.service, "restore", backup, "--archive", folder / "survived")
    assert "1 requests that ran" in said
    assert said.endswith(f"start it with: rift up --data {new.service.folder}\n")
    new.service.start()
    yield new
    new.service.stop()


def test_old_keys_and_ids_answer_as_before(drill: Drill) -> None:
    assert drill.service.key == drill.old_key
    with drill.service.client(drill.old_key) as client:
        answers = {name: client.get(f"/v1/inference/{one}") for name, one in drill.ids.items()}
    assert {name: answer.status_code for name, answer in answers.items()} == {
        "in the backup": 200,
        "running": 200,
        "in the archive": 404,
        "lost": 404,
    }
    assert len(answers["in the backup"].json()["output"]) > 8
    assert answers["running"].json()["error"]["code"] == "log_lost"
    again = ask(drill.service, headers={"Idempotency-Key": "once"})
    assert again == drill.ids["in the backup"], "one request, and one charge"


def test_new_requests_are_streamed_at_new_positions(drill: Drill) -> None:
    body = {"model": MODEL, "prompt": "hi", "stream": True, "parameters": {"max_tokens": 5}}
    with drill.service.client() as client, client.stream("POST", "/v1/inference", json=body) as response:
        events = list(frames(response))
    assert events[-1]["event"] == "done"
    assert events[-1]["data"]["id"].startswith("req_1_")


def test_every_bill_agrees(drill: Drill) -> None:
    rift(drill.service, "replay", "--verify")
    rift(drill.service, *EXPORT, drill.folder / "third")
    rift(drill.service, "archive", "verify")
    totals = [audited(drill.folder / export) for export in ("first", "second", "third")]
    assert totals == sorted(set(totals)), "each bill has the requests of the bills before it"


def audited(export: Path) -> int:
    """Return the sum that the auditor computes, in nano-USD."""
    command = [sys.executable, ROOT / "replay" / "auditor.py", export]
    done = subprocess.run(command, capture_output=True, text=True)
    equal = re.match(r"equal: .*: (\d+) nano-USD", done.stdout)
    assert equal, done.stdout + done.stderr
    return int(equal[1])
