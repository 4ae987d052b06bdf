"""`rift up`: start, stop, kill, second start, failures and exit statuses."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import Server
from tests.service import MODEL, Service, environment, frames, joined

pytestmark = pytest.mark.slow

LONG = {"model": "smollm2:135m", "prompt": "Hello", "parameters": {"max_tokens": 900}, "stream": True}
BODY = {"model": "smollm2:135m", "prompt": "Hello", "parameters": {"max_tokens": 5}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "my data"


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An installation that tests stop and start."""
    installed = Service(tmp_path_factory.mktemp("stopped") / "my data", "--engine", "sim")
    yield installed
    stop(installed)


@pytest.fixture
def service(installation: Service) -> Service:
    """The installation, running."""
    if not is_running(installation):
        again(installation)
    return installation


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An installation for the tests that leave it running, started beside packages with names of Rift's."""
    folder = tmp_path_factory.mktemp("shared")
    for name in ("rift", "events", "replay"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('not ours')\n")
    yield from up(folder, within=folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """As `shared`, with two workers, and with another broker in the environment."""
    elsewhere = {**environment(), "RIFT_NATS_URL": "nats://127.0.0.1:1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.service.environment", lambda: elsewhere)
        running = up(tmp_path_factory.mktemp("pair"), "--workers", "2")
        service = next(running)
    yield service
    yield from running


def up(folder: Path, *options: str, within: Path | None = None) -> Iterator[Service]:
    running = Service(folder / "my data", "--engine", "sim", *options).start(within)
    yield running
    stop(running)


def is_running(service: Service) -> bool:
    return hasattr(service, "process") and service.process.poll() is None


def stop(service: Service) -> None:
    if is_running(service):
        service.stop()
    gone(service)


def again(service: Service) -> None:
    """Start what has ended."""
    service.screen, service.url = [], ""
    service.start()


def gone(service: Service) -> None:
    """The guard needs a moment after a kill."""
    deadline = time.monotonic() + 5
    while service.processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert service.processes() == []


def answer(service: Service) -> dict[str, object]:
    with service.client() as client:
        response = client.post("/v1/inference", json=BODY)
    assert response.status_code == 200, response.text
    found: dict[str, object] = response.json()
    return found


def test_the_screen_shows_the_start_the_key_and_a_curl_line(shared: Service) -> None:
    text = "".join(shared.screen)
    lines = text.splitlines()
    assert lines[0].startswith("rift ")
    steps = "the log (nats-server)", "the gateway", f"{MODEL} in the simulated engine"
    for line, step in zip(lines[1:4], steps, strict=True):
        assert re.fullmatch(rf"  {re.escape(step)}.*: \d+\.\d s", line)
    assert lines[4] == f"rift is ready: {shared.url}"
    assert lines[5] == f"API key: {shared.key}"
    assert lines[7].startswith(f"Open {shared.url} in a browser")
    assert lines[8].startswith(f"curl -N {shared.url}/v1/inference")
    file = shared.folder / "dev.key"
    assert file.read_text() == shared.key + "\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {log.name for log in (shared.folder / "logs").iterdir()} == {
        "nats.log", "control.log", "gateway.log", "worker-0.log",
    }  # fmt: skip


def test_up_does_not_wait_for_a_model_that_is_scaled_to_zero(folder: Path) -> None:
    service = Service(folder, "--engine", "sim", "--workers", "0..1").start()
    try:
        assert service.screen[3] == "no worker serves smollm2:135m yet: the first request starts one\n"
        with service.client() as client:
            (listed,) = client.get("/v1/models").json()["data"]
        assert (listed["id"], listed["ready"], listed["replicas"]) == (MODEL, False, 0)
        answer(service)
    finally:
        service.stop()
    gone(service)


def test_ctrl_c_stops_everything_and_a_second_start_continues(service: Service) -> None:
    key, first = service.key, answer(service)
    with service.client() as client, client.stream("POST", "/v1/inference", json=LONG) as response:
        next(frames(response))
        assert service.stop() < 10
    assert service.process.returncode == 0
    assert "Traceback" not in service.logs()
    assert service.processes() == []
    rows = service.sql("select request_id, state from requests order by accepted_at_ns")
    assert {"request_id": first["id"], "state": "finished"} in rows
    again(service)
    assert service.key == key
    answer(service)
    assert len(service.sql("select 1 from requests")) == len(rows) + 1
    with service.client() as client:
        assert client.get(f"/v1/inference/{first['id']}").json()["output"] == first["output"]


def test_kill_9_leaves_nothing_behind(service: Service) -> None:
    assert len(service.processes()) >= 5
    service.stop(signal.SIGKILL)
    gone(service)
    again(service)
    assert answer(service)["finish_reason"] == "length"


def test_it_starts_in_a_folder_with_packages_of_the_same_names(shared: Service) -> None:
    assert (shared.folder.parent / "rift" / "__init__.py").exists()
    assert os.readlink(f"/proc/{shared.process.pid}/cwd") == str(shared.folder.parent)
    assert answer(shared)["finish_reason"] == "length"


def test_a_worker_that_cannot_start_reports_the_reason(tmp_path: Path, shared: Service) -> None:
    (tmp_path / "wrong.toml").write_text(
        '[models."smollm2:135m"]\nsource = "/nope"\n'
        'context_tokens = 100\nprompt_usd = "1"\noutput_usd = "1"\n'
    )
    done = shared.rift("worker", "--engine", "vllm", "--config", str(tmp_path / "wrong.toml"))
    assert done.returncode == 1
    assert "/nope" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["worker", "gateway", "control", "nats-server"])
def test_a_child_that_dies_is_restarted(shared: Service, name: str) -> None:
    (victim,) = [pid for pid in shared.processes() if name in role(pid)]
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            answer(shared)
            break
        except Exception:  # noqa: BLE001  # whatever a client may see meanwhile
            time.sleep(0.2)
    assert answer(shared)["finish_reason"] == "length"
    assert victim not in shared.processes()


def role(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    if words[0].endswith("/nats-server"):
        return "nats-server"
    return words[words.index("rift") + 1] if "rift" in words else ""


def test_an_answer_continues_when_its_worker_dies(pair: Service) -> None:
    pair.sql("select 1")  # the first question waits for its process to start
    body = BODY | {"parameters": {"max_tokens": 150}, "stream": True}
    with pair.client() as client:
        whole = client.post("/v1/inference", json=body | {"stream": False}).json()["output"]
        with client.stream("POST", "/v1/inference", json=body) as response:
            events = []
            for event in frames(response):
                events.append(event)
                if len(events) == 10:
                    request = event["data"]["id"]
                    (row,) = pair.sql(f"select worker from attempts where request_id = '{request}'")
                    (pid,) = [pid for pid in pair.processes() if row["worker"] in command(pid)]
                    os.kill(pid, signal.SIGKILL)
    tokens = [event["data"] for event in events if event["event"] == "token"]
    assert "".join(token["delta"] for token in tokens) == whole
    assert [event["data"]["attempt"] for event in events if event["event"] == "status"] == [1, 2]
    assert events[-1]["data"]["usage"]["output_tokens"] == 150


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_a_stopping_gateway_tells_its_clients_to_resume(shared: Service) -> None:
    body = BODY | {"parameters": {"max_tokens": 200}, "stream": True}
    (gateway,) = [pid for pid in shared.processes() if role(pid) == "gateway"]
    with shared.client() as client, client.stream("POST", "/v1/inference", json=body) as response:
        events = []
        for event in frames(response):
            events.append(event)
            if len(events) == 10:
                told_at = time.monotonic()
                os.kill(gateway, signal.SIGTERM)
    assert (events[-1]["event"], events[-1]["data"]["error"]["code"]) == ("error", "gateway_stopping")
    resume = events[-1]["data"]["resume"]
    while gateway in shared.processes():
        assert time.monotonic() < told_at + 5
        time.sleep(0.05)
    rest = list(resumed(shared, resume))
    with shared.client() as client:
        whole = client.get(f"/v1/inference/{events[0]['data']['id']}").json()
    assert joined(events + rest) == whole["output"]
    assert rest[-1]["event"] == "done"


def resumed(service: Service, path: str) -> Iterator[dict[str, object]]:
    """Resume as a client does: again and again until a gateway answers."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with service.client() as client, client.stream("GET", path) as response:
                if response.status_code == 200:
                    yield from frames(response)
                    return
        except httpx.TransportError:
            time.sleep(0.1)


def test_a_stopping_worker_hands_its_answers_over(pair: Service) -> None:
    pair.sql("select 1")  # as above
    body = BODY | {"parameters": {"max_tokens": 150}, "stream": True}
    with pair.client() as client, client.stream("POST", "/v1/inference", json=body) as response:
        events = []
        for event in frames(response):
            events.append(event)
            if len(events) == 10:
                request = event["data"]["id"]
                (row,) = pair.sql(f"select worker from attempts where request_id = '{request}'")
                (pid,) = [pid for pid in pair.processes() if row["worker"] in command(pid)]
                os.kill(pid, signal.SIGTERM)
    assert events[-1]["data"]["attempts"] == 2
    assert events[-1]["data"]["usage"]["output_tokens"] == 150
    found = pair.sql(f"select outcome from attempts where request_id = '{request}' order by number")
    assert [row["outcome"] for row in found] == ["draining", "finished"], found


def test_a_start_without_its_log_is_refused_and_changes_nothing(service: Service, server: Server) -> None:
    answer(service)
    service.stop()
    nats, aside = service.folder / "nats", service.folder.parent / "aside"
    nats.rename(aside)
    lost = service.rift("up", "--port", "0", "--engine", "sim")
    assert lost.returncode == 1
    assert f"{nats / 'store'} is missing or empty: restore the whole folder" in lost.stderr
    assert not nats.exists()
    # A broker that does not start is named at once, with its own words.
    (nats / "store").mkdir(parents=True)
    (nats / "store" / "jetstream").touch()
    began = time.monotonic()
    broken = service.rift("up", "--port", "0", "--engine", "sim")
    assert broken.returncode == 1
    assert "rift: nats ended 4 times while Rift started, at last with exit status 1: " in broken.stderr
    assert time.monotonic() < began + 40
    shutil.rmtree(nats)
    (nats / "store" / "jetstream").mkdir(parents=True)
    empty = service.rift("up", "--port", "0", "--engine", "sim")
    assert empty.returncode == 1
    assert "rift.duckdb holds RIFT_BOOK up to" in empty.stderr
    assert "but the log ends at 0; restore the whole folder" in empty.stderr
    assert not list((nats / "store" / "jetstream").rglob("RIFT_*"))
    assert not (nats / "reserve").exists(), "a refused start takes no space"
    url = server.address.url
    control = service.rift("control", "--nats", url, **server.environment)
    assert control.returncode == 1
    assert control.stderr.startswith(
        f"rift: the log at {url.removeprefix('nats://')} is not the log of {service.folder}"
    )
    assert service.key == (service.folder / "dev.key").read_text().strip()
    shutil.rmtree(nats)
    aside.rename(nats)
    again(service)
    assert answer(service)["finish_reason"] == "length"


def test_a_first_key_that_is_no_longer_valid_is_kept_beside_another(service: Service) -> None:
    key = service.key
    key_id = key.split("_")[1]
    assert service.rift("keys", "revoke", key_id).returncode == 0
    service.stop()
    service.folder.chmod(0o755)
    again(service)
    answer(service)
    kept = service.folder / f"dev.key.{key_id}"
    assert kept.read_text() == key + "\n"
    assert (service.folder / "dev.key").read_text() == service.key + "\n"
    assert service.key != key
    assert service.screen[0].startswith("tightened the permissions of 1 files and folders in ")
    assert f"is revoked: it is now in {kept}, and another key is issued" in service.screen[3]
    open_to_others = [path for path in service.folder.rglob("*") if path.lstat().st_mode & 0o077]
    assert open_to_others == []


def test_up_uses_its_own_broker_whatever_the_environment_names(pair: Service) -> None:
    assert b"RIFT_NATS_URL=nats://127.0.0.1:1\0" in Path(f"/proc/{pair.process.pid}/environ").read_bytes()
    answer(pair)
    named = Service(pair.folder.parent / "none").rift("up", "--nats", "nats://127.0.0.1:1")
    assert named.returncode == 1
    assert "leave out --nats" in named.stderr


def test_up_gives_up_on_a_gateway_that_always_ends(folder: Path) -> None:
    """Another process takes the port after the check of the port."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = str(holder.getsockname()[1])
        command = [
            sys.executable,
            "-m",
            "rift",
            "up",
            "--data",
            str(folder),
            "--engine",
            "sim",
            "--port",
            port,
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as up:
            assert up.stdout is not None
            assert "starts in" in up.stdout.readline()
            holder.listen()
            _, said = up.communicate(timeout=60)
    assert up.returncode == 1
    last = said.splitlines()[-1]
    assert last.startswith("rift: gateway ended 4 times while Rift started, at last with exit status 1: ")
    assert f"its log is {folder / 'logs' / 'gateway.log'}" in last
    assert "in use" in last
    gone(Service(folder))


def test_a_second_up_in_the_same_folder_is_refused(shared: Service) -> None:
    done = shared.rift("up", "--port", "0")
    assert done.returncode == 1
    assert "another `rift up` runs in" in done.stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = Service(tmp_path).rift("up", "--engine", "sim", "--port", str(port))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('workers = "x"', "workers: must be N or MIN..MAX"),
        ("unknown = 1", "unknown"),
        ('model = "nothing"', "'nothing' is not in the catalogue"),
        (
            '[models.a]\nsource = "x"\ncontext_tokens = 100\nprompt_usd = "0.0001"\noutput_usd = "1"',
            "models.a.prompt_usd",
        ),
    ],
)
def test_an_invalid_setting_is_named(tmp_path: Path, toml: str, words: str) -> None:
    (tmp_path / "rift.toml").write_text(toml)
    done = Service(tmp_path).rift("up", "--engine", "sim", "--port", "0")
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        ["up", "--port", "0"], ["gateway"], ["worker"], ["control"], ["status"], ["sql", "select 1"],
        ["keys", "create", "--account", "a"], ["models", "list"], ["prices", "publish", "p.toml"],
        ["archive", "verify"], ["replay", "--digest"], ["calibrate", "--model", "a"],
        ["backtest", "--profile", "cpu-smollm2-135m", "--model", "a"],
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_folder_of_another_version_is_refused_by_name(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "version").write_text("99\n")
    (tmp_path / "rift.toml").write_text("not_yet_known = true\n")
    done = Service(tmp_path).rift(*command)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rift: {tmp_path} is a data folder of version '99', but Rift ")
    assert {file.name for file in tmp_path.iterdir()} == {"version", "rift.toml"}, "the folder is unchanged"


def test_json_is_one_value_on_standard_output(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rift", "up", "--json", "--engine", "sim", "--port", "0", "--data", "d"]
    up = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert up.stdout is not None
    said = json.loads(up.stdout.readline())
    up.send_signal(signal.SIGINT)
    rest, notes = up.communicate(timeout=15)
    assert said.keys() == {"url", "api_key", "data"}
    assert rest == ""
    assert "the gateway" in notes


def test_exit_statuses_and_json(shared: Service, tmp_path: Path) -> None:
    assert shared.rift("nonsense").returncode == 2
    assert shared.rift("sql").returncode == 2
    assert shared.rift("keys", "create", "--account", "NOT OK").returncode == 2
    refused = shared.rift("sql", "delete from requests")
    assert refused.returncode == 1
    assert refused.stderr.startswith("rift: ")
    made = shared.rift("keys", "create", "--account", "shop", "--json")
    assert made.returncode == 0
    assert json.loads(made.stdout).keys() == {"account", "id", "key"}
    with shared.client(json.loads(made.stdout)["key"]) as client:
        assert client.post("/v1/inference", json=BODY).status_code == 200
    asked = shared.rift("ask", "cost-per-account", "since=1h", "account=shop")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.split()[:2] == ["account", "model"]
    assert " 0.0000" in asked.stdout.splitlines()[2], "money as text"
    asked = shared.rift("ask", "slowest-requests", "account=shop", "--json")
    assert [type(row["accepted_at_ns"]) for row in json.loads(asked.stdout)] == [int]
    unknown = shared.rift("ask", "why")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("rift: no question is named 'why'; choose from cold-starts, ")
    nowhere = Service(tmp_path / "empty").rift("sql", "select 1")
    assert nowhere.returncode == 1
    assert "there is no installation in" in nowhere.stderr


def test_the_key_is_stored_only_in_its_file(service: Service) -> None:
    """Only `dev.key` contains the key: not the log's store, a log file or the database."""
    answer(service)
    service.stop()
    key = service.key.encode()
    found = [file.name for file in service.folder.rglob("*") if file.is_file() and key in file.read_bytes()]
    assert found == ["dev.key"]
