"""The fleet on Kubernetes, against a small API server over real HTTP."""

import logging
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import certifi
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rift.fleet.cluster import Cluster, ClusterError
from rift.fleet.kubernetes import KubernetesFleet
from tests.rift.fleet.apiserver import NAMESPACE, ApiServer, Fault, ObjectMeta

pytestmark = pytest.mark.anyio

MODEL = "deepseek-r1"
NAME = "rift-worker-deepseek-r1"
WITHIN_S = 10.0


@asynccontextmanager
async def running(
    server: ApiServer, folder: Path, *, watch_s: float = 50.0, call_s: float = 5.0
) -> AsyncIterator[KubernetesFleet]:
    """Run a fleet on a server, with short pauses after failures."""
    (folder / "token").write_text("first\n")
    async with server.serving() as port, anyio.create_task_group() as tasks:
        cluster = Cluster(f"http://127.0.0.1:{port}", NAMESPACE, token=folder / "token", call_s=call_s)
        fleet = KubernetesFleet(cluster, jitter=lambda: 0.02, watch_s=watch_s)
        tasks.start_soon(fleet.run)
        yield fleet
        tasks.cancel_scope.cancel()


async def until(holds: Callable[[], bool], what: Callable[[], object] = lambda: "") -> None:
    with anyio.move_on_after(WITHIN_S):
        while not holds():  # noqa: ASYNC110  # another task's state
            await anyio.sleep(0.005)
    assert holds(), what()


@pytest.fixture
def server() -> ApiServer:
    made = ApiServer()
    made.create(MODEL)
    return made


async def test_a_workload_gets_the_newest_number(server: ApiServer, tmp_path: Path) -> None:
    async with running(server, tmp_path) as fleet:
        for replicas in (1, 4, 2):
            fleet.want(MODEL, replicas)
        await until(lambda: server.replicas(NAME) == 2)
        fleet.want(MODEL, 0)
        await until(lambda: server.replicas(NAME) == 0)
        fleet.want(MODEL, 0)
        await anyio.sleep(0.05)
    assert [write.replicas for write in server.writes] == [2, 0]


FAULTS = [
    Fault("status", 500),
    Fault("status", 503),
    Fault("status", 504, 0),
    Fault("status", 429),
    Fault("status", 409),
    Fault("status", 401),
    Fault("status", 403),
    Fault("status", 404),
    Fault("status", 422),
    Fault("hang"),
    Fault("reset"),
    Fault("unanswered"),
    Fault("late"),
    Fault("stale"),
    Fault("race"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_a_fault_that_passes_changes_nothing(server: ApiServer, tmp_path: Path, fault: Fault) -> None:
    server.scale(NAME, 1)
    async with running(server, tmp_path, call_s=0.3) as fleet:
        await until(lambda: server.watches == 1)
        server.faults += [fault] * 3
        fleet.want(MODEL, 3)
        await until(lambda: server.replicas(NAME) == 3 and not server.faults, lambda: server.calls)
    assert {write.replicas for write in server.writes} == {3}


async def test_retry_after_is_respected(server: ApiServer, tmp_path: Path) -> None:
    async with running(server, tmp_path) as fleet:
        await until(lambda: server.watches == 1)
        server.faults.append(Fault("status", 429, 1))
        server.slow_s = 0.1
        began_at = anyio.current_time()
        fleet.want(MODEL, 3)
        await anyio.sleep(0.05)
        fleet.want(MODEL, 4)
        await until(lambda: server.replicas(NAME) == 4)
        assert anyio.current_time() - began_at >= 1
    assert len(server.writes) == 1


async def test_scaling_by_hand_is_corrected(server: ApiServer, tmp_path: Path) -> None:
    async with running(server, tmp_path) as fleet:
        fleet.want(MODEL, 2)
        await until(lambda: server.replicas(NAME) == 2 and server.watches == 1)
        server.scale(NAME, 7)
        await until(lambda: server.replicas(NAME) == 2)
        server.delete(NAME)
        await until(lambda: server.calls[-1].verb == "get")
        server.create(MODEL, 1)
        await until(lambda: server.replicas(NAME) == 2)
    assert [call.verb for call in server.calls].count("list") == 1


@pytest.mark.parametrize("lose", [ApiServer.cut, ApiServer.expire], ids=lambda lose: lose.__name__)
async def test_a_lost_watch_is_restarted(
    server: ApiServer, tmp_path: Path, lose: Callable[[ApiServer], None]
) -> None:
    async with running(server, tmp_path) as fleet:
        fleet.want(MODEL, 2)
        for _ in range(3):
            await until(lambda: server.watches == 1)
            server.scale(NAME, 5)
            lose(server)
            await until(lambda: server.replicas(NAME) == 2)
        # The last watch may have reported enough to correct it.
        await until(lambda: [call.verb for call in server.calls].count("list") > 3)


async def test_a_silent_watch_is_replaced_soon(server: ApiServer, tmp_path: Path) -> None:
    async with running(server, tmp_path, watch_s=0.3) as fleet:
        server.silent = True
        fleet.want(MODEL, 2)
        await until(lambda: server.replicas(NAME) == 2 and server.watches == 1)
        server.scale(NAME, 5)
        await until(lambda: server.replicas(NAME) == 2)


async def test_a_token_that_was_rotated_is_read(server: ApiServer, tmp_path: Path) -> None:
    async with running(server, tmp_path) as fleet:
        await until(lambda: server.watches == 1)
        server.tokens = {"second"}
        fleet.want(MODEL, 2)
        await anyio.sleep(0.1)
        assert server.replicas(NAME) == 0
        (tmp_path / "token").write_text("second")
        await until(lambda: server.replicas(NAME) == 2)


ADVICE = {
    401: "rejects our token",
    403: "apply ops/kubernetes/rbac.yaml",
    422: "rejects this number",
    500: "trying again",
}


@pytest.mark.parametrize("status", ADVICE)
async def test_a_problem_is_logged_once_with_its_remedy(
    server: ApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    async with running(server, tmp_path) as fleet:
        await until(lambda: server.watches == 1)
        server.faults += [Fault("status", status)] * 4
        fleet.want(MODEL, 2)
        await until(lambda: server.replicas(NAME) == 2)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith(f"scaling {NAME} to 2: ")
    assert ADVICE[status] in said[0]
    assert f"({status} " in said[0] or f": {status} " in said[0]


async def test_a_missing_workload_is_logged_and_does_not_delay_others(
    server: ApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(server, tmp_path) as fleet:
        await until(lambda: server.watches == 1)
        server.faults.append(Fault("status", 404, 60))
        fleet.want("llama4:maverick", 1)
        fleet.want(MODEL, 2)
        await until(lambda: server.replicas(NAME) == 2)
        (said,) = [r.getMessage() for r in caplog.records if "rift-worker-llama4-maverick" in r.getMessage()]
        assert "the deployment is missing in namespace rift; apply the model's workload" in said
        other = server.create("llama4-maverick")
        await until(lambda: server.replicas(other) == 1)


async def test_a_lost_replicas_pod_is_deleted(
    server: ApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pods = (f"{NAME}-5d8f7-abcde", "rift-nats-0")
    server.pods = {pod: ObjectMeta(name=pod, namespace=NAMESPACE) for pod in pods}
    async with running(server, tmp_path) as fleet:
        await until(lambda: server.watches == 1)
        server.faults += [Fault("status", 500), Fault("unanswered")]
        for pod in pods:
            fleet.lost(MODEL, f"{pod}-0a1b2c3d", "silent")
        await until(lambda: pods[0] not in server.pods and not server.faults)
        fleet.lost(MODEL, f"{NAME}-5d8f7-gone-0a1b2c3d", "silent")
        fleet.want(MODEL, 1)
        await until(lambda: server.replicas(NAME) == 1)
        await anyio.sleep(0.05)
    assert list(server.pods) == ["rift-nats-0"]
    assert (
        "lost replica rift-nats-0-0a1b2c3d of deepseek-r1 is not a pod of rift-worker-deepseek-r1"
        in caplog.text
    )
    assert [call.name for call in server.calls].count(f"{NAME}-5d8f7-gone") == 1


# --- where the cluster is ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("account")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=k"
    files = ["-keyout", str(folder / "key"), "-out", str(folder / "ca.crt")]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command.split(), *files, *names], check=True, capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("openssl, which makes the certificate, is missing")
    (folder / "token").write_text("first")
    (folder / "namespace").write_text(NAMESPACE)
    return folder


async def test_a_pod_finds_its_cluster_and_trusts_no_other(
    server: ApiServer, certificate: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate / "ca.crt", certificate / "key")
    async with server.serving(tls) as port, anyio.create_task_group() as tasks:
        environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(port)}
        fleet = KubernetesFleet(Cluster.around(environment, certificate), jitter=lambda: 0.01)
        fleet.want(MODEL, 2)
        tasks.start_soon(fleet.run)
        await until(lambda: server.replicas(NAME) == 2)
        stranger = Cluster(
            f"https://127.0.0.1:{port}", NAMESPACE, token=certificate / "token", ca=Path(certifi.where())
        )
        other = KubernetesFleet(stranger, jitter=lambda: 0.5)
        other.want(MODEL, 5)
        tasks.start_soon(other.run)
        await until(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text)
        tasks.cancel_scope.cancel()
    assert server.replicas(NAME) == 2


def test_outside_a_cluster_the_error_names_the_missing_part(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="KUBERNETES_SERVICE_HOST and _PORT are not set here"):
        Cluster.around({})
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    with pytest.raises(ClusterError, match="give control's pod its service account"):
        Cluster.around(environment, tmp_path)


# --- whatever happens -------------------------------------------------------------------------------------

MODELS = ("a", "b")
STEPS = st.one_of(
    st.tuples(st.just("want"), st.sampled_from(MODELS), st.integers(0, 4)),
    st.tuples(st.just("want"), st.sampled_from(MODELS), st.integers(0, 4)),
    st.tuples(st.just("fault"), st.sampled_from(FAULTS), st.integers(1, 3)),
    st.tuples(st.just("scale"), st.sampled_from(MODELS), st.integers(0, 4)),
    st.tuples(st.just("again"), st.sampled_from(MODELS), st.integers(0, 4)),
    st.tuples(st.just("cut"), st.just(""), st.just(0)),
    st.tuples(st.just("expire"), st.just(""), st.just(0)),
    st.tuples(st.just("wait"), st.just(""), st.integers(1, 40)),
)


class Course:
    """One sequence of faults, and the wanted numbers over time."""

    def __init__(self, fleet: KubernetesFleet, server: ApiServer) -> None:
        self.fleet, self.server = fleet, server
        self.wants: dict[str, list[tuple[float, int]]] = {model: [] for model in MODELS}
        self.others = self.faults = 0

    async def step(self, kind: str, subject: Any, number: int) -> None:
        match kind:
            case "want":
                self.wants[subject].append((anyio.current_time(), number))
                self.fleet.want(subject, number)
            case "fault":
                self.faults += number
                self.server.faults += [subject] * number
            case "scale":
                self.others += 1
                self.server.scale(f"rift-worker-{subject}", number)
            case "again":
                self.others += 1
                self.server.delete(f"rift-worker-{subject}")
                self.server.create(subject, number)
            case "cut":
                self.server.cut()
            case "expire":
                self.server.expire()
            case _:
                await anyio.sleep(number / 1000)

    def there(self) -> bool:
        return not self.server.faults and all(
            self.server.replicas(f"rift-worker-{model}") == wants[-1][1]
            for model, wants in self.wants.items()
            if wants
        )

    def check(self) -> None:
        """Each written number was wanted at some time between the read before it and the write. Each write
        has a cause: a number, another user's change, or a fault. A late write causes two more: its own
        correction, and that of the write it ran into."""
        for write in self.server.writes:
            wants = self.wants[write.name.removeprefix("rift-worker-")]
            ends = [at for at, _ in wants[1:]] + [float("inf")]
            held = [
                n for (at, n), end in zip(wants, ends, strict=True) if at <= write.at and end >= write.read_at
            ]
            assert write.replicas in held, (write, wants)
        wanted = sum(map(len, self.wants.values()))
        assert len(self.server.writes) <= wanted + 2 * self.others + 3 * self.faults


async def course(steps: list[tuple[str, Any, int]], folder: Path) -> None:
    server = ApiServer()
    for model in MODELS:
        server.create(model)
    async with running(server, folder, watch_s=0.1, call_s=0.25) as fleet:
        taken = Course(fleet, server)
        for step in steps:
            await taken.step(*step)
        await until(taken.there)
        # Late writes still arrive and are corrected.
        await anyio.sleep(0.6 if Fault("late") in [step[1] for step in steps] else 0.02)
        await until(taken.there)
    taken.check()


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=14))
def test_the_last_number_is_reached_after_any_faults(
    steps: list[tuple[str, Any, int]], tmp_path: Path
) -> None:
    anyio.run(course, steps, tmp_path)
