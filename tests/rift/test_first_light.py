"""The README's promise with the real engine and the default model, once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import ROOT, Service, environment, frames, running

pytestmark = pytest.mark.engine

PROMPT = "Explain quantum computing to a 12-year-old."
COMMON = {"the", "a", "is", "of", "to", "and", "that", "in", "it", "computers", "computer", "quantum"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    prepare = [sys.executable, "-m", "rift.engines.prepare", "smollm2:135m"]
    subprocess.run(prepare, check=True, timeout=300, cwd=ROOT, env=environment())
    up = Service(tmp_path_factory.mktemp("first-light") / "data").start()
    yield up
    if up.process.poll() is None:
        up.stop()


def test_the_curl_line_streams_english_and_the_bill_is_in_sql(service: Service) -> None:
    line = "".join(service.screen).partition("curl -N")
    done = subprocess.run(["bash", "-c", line[1] + line[2]], capture_output=True, text=True, timeout=120)
    events = [frame.split("\n") for frame in done.stdout.strip().split("\n\n")]
    assert events[0][:3] == ["retry: 500", "id: 2", "event: status"]
    assert events[-1][1] == "event: done"
    assert '"simulated"' not in done.stdout
    with service.client() as client:
        (row,) = service.sql("select * from requests")
        answer = client.get(f"/v1/inference/{row['request_id']}").json()
    words = answer["output"].lower().split()
    assert len(words) > 30
    assert len(COMMON & set(words)) > 6, answer["output"]
    assert row["output_tokens"] == answer["usage"]["output_tokens"] > 30
    assert row["charge_nanousd"] == row["prompt_tokens"] * 10 + row["output_tokens"] * 20


def test_raw_and_templated_prompts_differ_and_usage_says_so(service: Service) -> None:
    def tokens(**parameters: object) -> int:
        body = {"model": "smollm2:135m", "prompt": PROMPT, "parameters": {"max_tokens": 1, **parameters}}
        with service.client() as client:
            return int(client.post("/v1/inference", json=body).json()["usage"]["prompt_tokens"])

    assert tokens(raw=True) < tokens(raw=False)


def test_many_streams_at_once_each_get_their_own_answer(service: Service) -> None:
    def body(number: int) -> dict[str, object]:
        return {
            "model": "smollm2:135m",
            "prompt": f"Count from {number}.",
            "parameters": {"max_tokens": 12},
            "stream": True,
        }

    with service.client() as client:
        for number in range(3):
            with client.stream("POST", "/v1/inference", json=body(number)) as response:
                events = list(frames(response))
            indices = [event["data"]["index"] for event in events if event["event"] == "token"]
            assert indices == sorted(set(indices))
            assert events[-1]["event"] == "done"


def test_the_engine_dies_with_its_worker_and_the_answer_continues(service: Service) -> None:
    """kill -9 of a worker in mid-answer also ends its engine, and the next start continues from the log."""
    engines = engine_processes()
    assert engines
    body = {
        "model": "smollm2:135m",
        "prompt": PROMPT,
        "parameters": {"max_tokens": 120, "ignore_eos": True},
        "stream": True,
    }
    text, statuses = "", []
    with (
        service.client() as client,
        client.stream("POST", "/v1/inference", json=body, timeout=120) as response,
    ):
        for event in frames(response):
            if event.get("event") == "token":
                text += event["data"]["delta"]
                if event["data"]["index"] == 20:
                    (worker,) = [pid for pid in service.processes() if "\0worker\0" in command(pid)]
                    os.kill(worker, signal.SIGKILL)
            elif event.get("event") == "status":
                statuses.append(event["data"].get("attempt"))
            elif event.get("event") == "done":
                done = event["data"]
    assert statuses == [1, 2]
    assert done["usage"]["output_tokens"] == 120
    with service.client() as client:
        assert client.get(f"/v1/inference/{done['id']}").json()["output"] == text
    assert not set(engines) & set(engine_processes())


def test_ctrl_c_stops_everything_within_10_s(service: Service) -> None:
    assert service.stop() < 10
    assert service.processes() == []
    deadline = time.monotonic() + 2
    while engine_processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine_processes() == []


def engine_processes() -> list[int]:
    """Find processes by their log file: vLLM renames its processes, and a kill orphans them."""
    return [pid for pid, line in running() if "VLLM::" in line and logs_here(pid)]


def logs_here(pid: int) -> bool:
    try:
        return "first-light" in os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return False


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
