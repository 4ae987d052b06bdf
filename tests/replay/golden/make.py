"""Make a data folder as this version of Rift leaves it, packed with what it should say.

    PYTHONPATH=. python tests/replay/golden/make.py tests/replay/golden/NAME.tar.xz

The folder has a stopped installation with a few requests of the simulated engine, their archive, the database
and the keys. `golden.json` in it holds the requests' answers, the invoice and its month. A test opens every
pack with today's code, so a pack is added for a new layout, and none is made again.
"""

import json
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.service import MODEL, Service

PROMPTS = ("one", "two", "three")
# Each start makes these anew, and they name the machine that ran it.
LEFT_OUT = (
    *("lock", "logs", "rift-sql.duckdb"),
    *("nats/nats.conf", "nats/token", "nats/url", "nats/monitor", "nats/reserve"),
)


def content(service: Service) -> dict[str, Any]:
    """Send the requests, archive them, and return the pack's `golden.json`."""
    period = time.strftime("%Y-%m", time.gmtime())
    with service.client() as client:
        answers = {}
        for prompt in PROMPTS:
            body = {"model": MODEL, "prompt": prompt, "parameters": {"max_tokens": 20}}
            answer = client.post("/v1/inference", json=body).raise_for_status().json()
            answers[answer["id"]] = answer
        invoice = client.get(f"/v1/invoices/{period}").raise_for_status().json()
    # An export archives what is stored.
    with tempfile.TemporaryDirectory() as folder:
        options = ("--account", "dev", "--period", period, f"{folder}/audit")
        exported = service.rift("audit", "export", *options)
        assert exported.returncode == 0, exported.stderr
    return {"period": period, "answers": answers, "invoice": invoice}


def pack(folder: Path, to: Path) -> None:
    for name in LEFT_OUT:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(to, "w:xz", preset=9) as tar:
        tar.add(folder, arcname=".", filter=anonymous)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="rift-golden-") as temporary:
        data = Path(temporary) / "data"
        service = Service(data, "--engine", "sim").start()
        try:
            golden = content(service)
        finally:
            service.stop()
        (data / "golden.json").write_text(json.dumps(golden, indent=1))
        pack(data, Path(sys.argv[1]))
