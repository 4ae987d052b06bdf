"""`rift status` and `rift models`, with a running installation, a damaged one, and none."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from anyio import to_thread

from events.contracts import SECOND_NS
from events.fleet import LOSSES_NS, Fleet
from events.schema import ControlElected, ReplicaLost, ReplicaReady, ReplicaStarting, ScaleDecided
from events.subjects import FLEET
from rift import settings
from rift.cli.status import command as status_command
from rift.cli.status.report import _stream_names, failing, losing, model_rows, unwell
from rift.metrics.listener import PAGE_S
from tests.chaos.cluster import Cluster
from tests.metrics.scrapes import Labels, documented, scraped, series
from tests.ops.test_alerts import assert_answered
from tests.rift.test_launcher import role
from tests.service import MODEL, Service

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

ADD = ["models", "add", "acme:1", "--source", "acme/one", "--context-tokens", "4096"]
PRICES = ["--prompt-usd", "0.125", "--output-usd", "2"]
PROFILE = [
    "--profile",
    "mi300x",
    "gpus=8",
    "gpu_hour_usd=1.99",
    "tensor_parallel_size=8",
    "kv_cache_dtype=fp8",
]


def status(service: Service, returns: int = 0) -> dict[str, Any]:
    done = service.rift("status", "--json")
    assert done.returncode == returns, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert all(f"rift: {problem}\n" in done.stderr for problem in found["problems"])
    return found


def test_status_shows_processes_queues_and_lag(service: Service) -> None:
    with service.client() as client:
        client.post("/v1/inference", json={"model": MODEL, "prompt": "Hi", "parameters": {"max_tokens": 3}})
    found = status(service)
    assert found["problems"] == []
    assert found["data"] == str(service.folder)
    assert found["nats_server"].startswith("2.")
    assert found["leader"]["epoch"] >= 1
    (gateway,) = found["gateways"]
    assert gateway["silent_ms"] < 9000
    (model,) = found["models"]
    assert (model["model"], model["wanted"], model["ready"], model["queued"]) == (MODEL, 1, 1, 0)
    assert model["tokens_per_s"] > 0
    assert 0 < model["ttft_p50_ms"] <= model["ttft_p99_ms"]
    assert model["limit"] == ""
    assert found["shards"] == [{"shard": 0, "supervised": True, "gateways": 1}]
    assert found["stale_ms"] == {}
    (replica,) = found["replicas"]
    assert (replica["engine"], replica["state"]) == ("sim", "ready")
    streams = {stream["stream"]: stream for stream in found["streams"]}
    assert {"RIFT_0", "RIFT_FLEET", "RIFT_BOOK", "RIFT_KEYS"} <= streams.keys()
    assert streams["RIFT_0"]["behind"] == 0
    assert streams["RIFT_0"]["bytes"] > 0
    # A leader that did not read the opening of the lane knows the address from its next report.
    deadline_s = time.monotonic() + 10
    while not (served := [row["address"] for row in found["metrics"] if row["role"] == "gateway"]):
        assert time.monotonic() < deadline_s
        found = status(service)
    (address,) = served
    page = httpx.get(f"http://{address}/metrics").text
    assert f'{{code="200",model="{MODEL}",route="POST /v1/inference"}} 1.0\n' in page
    assert f'rift_gateway_output_tokens_total{{model="{MODEL}"}} 3.0\n' in page
    shown = service.rift("status").stdout
    for text in (MODEL, address, "leads in epoch", "RIFT_BOOK", replica["replica"], gateway["lane"]):
        assert text in shown


def test_it_names_addresses_of_metrics_that_are_documented(service: Service) -> None:
    with service.client() as client:
        client.post("/v1/inference", json={"model": MODEL, "prompt": "Hi", "parameters": {"max_tokens": 3}})
    found = {row["role"]: scraped(row["address"]) for row in status(service)["metrics"]}
    for kind in ("control", "worker"):
        tables = documented(kind)
        shown = {
            name: {frozenset(dict(labels)) for labels in samples} for name, samples in found[kind].items()
        }
        assert {name for name in shown if name.startswith("rift_")} == tables.keys()
        assert all(shown[name] <= {labels} for name, labels in tables.items())
        assert found[kind]["process_cpu_seconds_total"][()] > 0
    worker = found["worker"]
    assert worker["rift_worker_attempts_total"][("end", "length"), ("model", MODEL)] >= 1
    assert worker["rift_worker_output_tokens_total"][("model", MODEL),] >= 3
    assert worker["rift_worker_append_seconds"][()] >= 1
    control = found["control"]
    assert control["rift_control_requests_total"][("model", MODEL), ("reason", "length")] >= 1
    assert control["rift_control_output_tokens_total"][("model", MODEL),] >= 3
    assert control["rift_control_charged_usd_total"][("model", MODEL),] > 0
    assert control["rift_control_decisions_total"][("direction", "from_zero"), ("model", MODEL)] == 1
    assert "gateway" in found


def test_alerts_and_dashboards_use_what_is_served(service: Service) -> None:
    with service.client() as client:
        client.post("/v1/inference", json={"model": MODEL, "prompt": "Hi", "parameters": {"max_tokens": 3}})
        assert client.get("/v1/inference/none").status_code == 404
    # An earlier test may have scraped the same page.
    time.sleep(PAGE_S)
    served: dict[str, Labels] = {}
    for row in status(service)["metrics"]:
        served |= series(row["address"])
    # They have no sample, and so no labels, before the first loss and without a cluster.
    for name in ("rift_control_replicas_lost_total", "rift_control_brokers"):
        served[name] = documented("control")[name]
    assert_answered(served)


def obeys_ctrl_c(command: list[str]) -> subprocess.Popen[str]:
    """Start a command that obeys Ctrl-C, also in a suite that a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def test_watch_repeats_the_status_until_ctrl_c(service: Service) -> None:
    command = [sys.executable, "-m", "rift", "status", "--watch", "--json", "--data", str(service.folder)]
    with obeys_ctrl_c(command) as watch:
        assert watch.stdout is not None, "it was started with a pipe"
        shown = [json.loads(watch.stdout.readline()) for _ in range(2)]
        watch.send_signal(signal.SIGINT)
        _, errors = watch.communicate(timeout=10)
    assert [report["models"][0]["ready"] for report in shown] == [1, 1]
    assert (watch.returncode, errors) == (0, "")


def test_watch_shows_the_age_of_what_it_no_longer_learns() -> None:
    known: dict[str, Any] = {}
    first = {"models": ["m"], "brokers": {}, "stale_ms": {"models": 2000}, "problems": []}
    assert status_command._with_kept(dict(first), known, 10.0) == first
    silent: dict[str, Any] = {"problems": ["no log"], "stale_ms": {}}
    kept = status_command._with_kept(silent, known, 13.0)
    assert kept["models"] == ["m"]
    assert kept["stale_ms"] == {"models": 5000, "brokers": 3000}


def test_problems_stay_on_a_small_screen() -> None:
    text = "\n".join([*map(str, range(20)), "problem   no leader"])
    shown = status_command._cropped(text, 5, 80).splitlines()
    assert shown == ["0", "1", "2", "… 17 lines do not fit", "problem   no leader"]


def test_a_broker_that_is_silent_or_behind_is_a_problem() -> None:
    problems = unwell({"a": "leader", "b": "behind", "c": "silent", "d": "current"})
    assert [problem.split(",")[0] for problem in problems] == [
        "nats-server b has been behind the others for 1 s",
        "nats-server c does not answer the others",
    ]
    (problem,) = unwell({"a": "leaderless", "b": "silent", "c": "leaderless"})
    assert problem.startswith("the nats-servers that hold the log (a, b, c) have no leader")
    assert unwell({}) == []


def test_streams_are_shown_in_the_order_of_their_shards() -> None:
    assert _stream_names(11) == [
        *(f"RIFT_{shard}" for shard in range(11)),
        "RIFT_FLEET",
        "RIFT_BOOK",
        "RIFT_KEYS",
    ]


def test_status_names_what_does_not_answer(tmp_path: Path) -> None:
    service = Service(tmp_path / "data", "--engine", "sim").start()
    try:
        # Frozen, not killed: `rift up` would restart it.
        (control,) = [pid for pid in service.processes() if role(pid) == "control"]
        os.kill(control, signal.SIGSTOP)
        found = status(service, returns=1)
        os.kill(control, signal.SIGCONT)
        assert found["problems"][0].startswith("no control process answers as leader")
        assert (found["leader"], found["gateways"]) == (None, None)
        assert found["models"][0]["ready"] == 1, "the log is enough to know that"
    finally:
        service.stop()
    assert "leaked" not in (service.folder / "logs" / "control.log").read_text(), "DuckDB was closed"
    found = status(service, returns=1)
    assert found["problems"][0].startswith("no NATS server answers at")
    assert "models" not in found
    nowhere = Service(tmp_path / "nowhere").rift("status")
    assert nowhere.returncode == 1
    assert "there is no installation in" in nowhere.stderr


async def test_status_names_a_lost_server_of_a_cluster(tmp_path: Path) -> None:
    rig = Cluster(tmp_path, engine="sim", workers=1)
    async with anyio.create_task_group() as tasks:
        try:
            await rig.start(tasks)
            rig.role("standby", "control", "--database", str(rig.folder / "standby.duckdb"))
            found = await _until(rig, lambda found: found["leader"]["standbys"])
            assert found["problems"] == []
            assert sorted(found["brokers"]) == ["nats-0", "nats-1", "nats-2"]
            lost = "nats-0" if await rig.leader(0) != "nats-0" else "nats-1"
            rig.brokers.kill(lost)
            problem = f"nats-server {lost} does not answer the others, one of 3 that hold the log"
            await _until(rig, lambda found: found["problems"] == [problem] and found["leader"]["standbys"])
            shown = await _status(rig)
            assert shown.returncode == 1
            assert f"broker    {lost}: silent" in shown.stdout
            assert "standbys  control-" in shown.stdout
        finally:
            await rig.stop()
            rig.guard.dismiss()
            tasks.cancel_scope.cancel()


async def _status(rig: Cluster, *options: str) -> subprocess.CompletedProcess[str]:
    words = ["status", *options, *rig.broker_options]
    variables = rig.brokers.environment("status")
    return await to_thread.run_sync(lambda: Service(rig.folder).rift(*words, **variables))


async def _until(rig: Cluster, is_so: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Return the first status of a led installation that satisfies a condition."""
    with anyio.fail_after(60):
        while True:
            done = await _status(rig, "--json")
            found: dict[str, Any] = json.loads(done.stdout)
            if found.get("leader") and is_so(found):
                return found
            await anyio.sleep(0.3)


def test_a_model_that_cannot_start_is_a_problem() -> None:
    wants = ScaleDecided(
        model=MODEL,
        epoch=1,
        from_replicas=0,
        to_replicas=1,
        reason="minimum",
        policy="default",
        positions={},
        decided_at_ns=0,
        inputs={},
    )
    starting = ReplicaStarting(replica="r-1", model=MODEL, engine="vllm")
    lost = ReplicaLost(replica="r-1", model=MODEL, why="no room")
    fleet = Fleet()
    fleet.apply(ControlElected(epoch=1, control="control-a"), 1, 1)
    for sequence, event in enumerate((wants, starting), start=2):
        fleet.apply(event, sequence, sequence)
        assert failing(fleet) == []
    fleet.apply(lost, 4, 4)
    failure = f"{MODEL} cannot start, failed starts: 1, the last: no room"
    assert failing(fleet) == [failure]
    held = {"limits": [{"model": MODEL, "limit": "max allows 1 replica"}]}
    (row,) = model_rows(fleet, held)
    assert row["limit"] == f"max allows 1 replica; {failure}"
    gave_up = msgspec.structs.replace(wants, from_replicas=1, to_replicas=0, positions={FLEET: 4})
    fleet.apply(gave_up, 5, 5)
    assert failing(fleet) == [failure], "the policy gave up"
    fleet.at_ns += 2 * 3600 * SECOND_NS
    assert failing(fleet) == []


def test_lost_replicas_are_a_problem_until_enough_are_ready() -> None:
    def begin(fleet: Fleet, name: str) -> None:
        fleet.apply(ReplicaStarting(replica=name, model=MODEL, engine="sim"), fleet.position + 1, 1)
        fleet.apply(ReplicaReady(replica=name, model=MODEL, slots=1, start_ns=1), fleet.position + 1, 1)

    fleet = Fleet()
    begin(fleet, "r-0")
    for number in range(2):
        assert losing(fleet) == []
        lost = ReplicaLost(replica=f"r-{number}", model=MODEL, why="killed by SIGKILL", cause="host")
        fleet.apply(lost, fleet.position + 1, 1)
        (problem,) = losing(fleet)
        assert problem.startswith(
            f"{MODEL} has 0 of 1 replicas ready, lost within minutes: {number + 1}, "
            "the last: killed by SIGKILL; "
        )
        begin(fleet, f"r-{number + 1}")
    assert losing(fleet) == []
    fleet.apply(ReplicaLost(replica="r-2", model=MODEL, cause="host"), fleet.position + 1, 1)
    assert losing(fleet)
    fleet.at_ns += LOSSES_NS
    assert losing(fleet) == [], "long ago"


def test_models_are_listed_with_prices_and_replicas(service: Service) -> None:
    done = service.rift("models", "list", "--json")
    lines = {line["model"]: line for line in json.loads(done.stdout)}
    assert done.returncode == 0
    assert done.stderr == ""
    first = lines[MODEL]
    assert (first["prompt_usd"], first["output_usd"]) == ("0.010", "0.020")
    assert (first["serves"], first["ready"]) == ("1..1", 1)
    assert (lines["deepseek-r1"]["serves"], lines["deepseek-r1"]["ready"]) == ("", 0)
    assert MODEL in service.rift("models", "list").stdout


def test_models_are_listed_without_a_log(tmp_path: Path) -> None:
    done = Service(tmp_path / "data").rift("models", "list", "--json")
    assert done.returncode == 0
    assert "the catalogue's own prices" in done.stderr
    assert json.loads(done.stdout)[0]["prompt_usd"] == "0.010"


def test_adding_a_model_keeps_the_rest_of_the_file(tmp_path: Path) -> None:
    service, file = Service(tmp_path), tmp_path / "rift.toml"
    before = "# ours, by hand\nport = 9000   # behind the proxy"
    file.write_text(before)
    file.chmod(0o640)
    done = service.rift(*ADD, *PRICES, *PROFILE, "--title", 'Acme "One" – é')
    assert done.returncode == 0, done.stderr
    assert '[scale."acme:1"]' in done.stdout
    assert file.read_text().startswith(before + "\n\n[models.")
    assert file.stat().st_mode & 0o777 == 0o640
    added = settings.load(file, {}).models["acme:1"]
    assert (added.source, added.context_tokens) == ("acme/one", 4096)
    assert (added.prompt_usd, added.output_usd) == ("0.125", "2")
    assert added.title == 'Acme "One" – é'
    assert added.profiles["mi300x"].gpus == 8
    assert added.profiles["mi300x"].args == {"tensor_parallel_size": 8, "kv_cache_dtype": "fp8"}
    again = service.rift(*ADD, *PRICES)
    assert again.returncode == 1
    assert "acme:1 is already in the catalogue" in again.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([*ADD, "--prompt-usd", "0.00001", "--output-usd", "1"], "models.acme:1.prompt_usd"),
        ([*ADD, *PRICES, "--profile", "cpu", "gpus=many"], "profiles[...].gpus"),
        ([*ADD, *PRICES, "--profile", "cpu", "fast"], "must be NAME=VALUE, like gpus=8, got 'fast'"),
        (["models", "add", "Not OK", *ADD[3:], *PRICES], "Not OK"),
        ([*ADD, *PRICES, "--title", "f\udcfcr"], "nothing was added"),
        (["models", "add", "deepseek_v3", *ADD[3:], *PRICES], "would share one subject"),
        (["models", "add", "deepseek-v3", *ADD[3:], *PRICES], "already in the catalogue"),
    ],
)
def test_an_invalid_model_is_not_added(tmp_path: Path, more: list[str], words: str) -> None:
    file = tmp_path / "rift.toml"
    file.write_text("port = 9000\n")
    done = Service(tmp_path).rift(*more)
    assert done.returncode == 1
    assert words in done.stderr
    assert file.read_text() == "port = 9000\n"
    assert [path.name for path in tmp_path.iterdir()] == ["rift.toml"]
