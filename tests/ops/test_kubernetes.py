"""The manifests of ops/kubernetes match each other, the catalogue, the command line and control's calls."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from events.contracts import DEADLINE_S
from events.subjects import slug
from rift import catalogue, settings
from rift.catalogue import nanousd_per_token
from rift.cli import parser
from rift.fleet.cluster import SELECTOR
from rift.launcher import STOP_S
from rift.metrics.address import CONTROL_PORT, WORKER_PORT, gateway_port
from tests import certificates
from tests.rift.fleet.apiserver import NAMESPACE, ApiServer, ObjectMeta
from tests.rift.fleet.test_kubernetes import running, until

FOLDER = Path(__file__).resolve().parents[2] / "ops" / "kubernetes"
NATS_SERVER = str(Path(sys.executable).with_name("nats-server"))
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
OBJECTS: list[dict[str, Any]] = [
    document
    for file in KUSTOMIZATION["resources"]
    for document in yaml.safe_load_all((FOLDER / file).read_text())
]
# The models of the price list that this hardware serves.
SERVED = {
    name: model.profiles["mi300x"]
    for name, model in catalogue.shipped().items()
    if "mi300x" in model.profiles
}


def named(kind: str) -> dict[str, dict[str, Any]]:
    return {found["metadata"]["name"]: found for found in OBJECTS if found["kind"] == kind}


WORKLOADS = named("Deployment") | named("StatefulSet")
WORKERS = {name: found for name, found in WORKLOADS.items() if name.startswith("rift-worker-")}


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = workload["spec"]["template"]["spec"]
    return found


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod(workload)["containers"]
    assert isinstance(found, dict)
    return found


def test_every_file_is_applied_in_one_namespace() -> None:
    assert {*KUSTOMIZATION["resources"], "kustomization.yaml"} == {f.name for f in FOLDER.glob("*.yaml")}
    assert len({(found["kind"], found["metadata"]["name"]) for found in OBJECTS}) == len(OBJECTS)
    for found in OBJECTS:
        if found["kind"] != "Namespace":
            assert found["metadata"]["namespace"] == NAMESPACE == KUSTOMIZATION["namespace"]
            assert found["metadata"]["labels"]["app.kubernetes.io/part-of"] == "rift"


def labels_of(workload: dict[str, Any]) -> set[tuple[str, str]]:
    return set(workload["spec"]["template"]["metadata"]["labels"].items())


def test_every_selector_finds_its_pods() -> None:
    for workload in WORKLOADS.values():
        assert set(workload["spec"]["selector"]["matchLabels"].items()) <= labels_of(workload)
        for spread in pod(workload).get("topologySpreadConstraints", ()):
            assert set(spread["labelSelector"]["matchLabels"].items()) <= labels_of(workload)
    own = [set(workload["spec"]["selector"]["matchLabels"].items()) for workload in WORKLOADS.values()]
    for workload in WORKLOADS.values():
        assert sum(selector <= labels_of(workload) for selector in own) == 1
    selectors = [service["spec"]["selector"] for service in named("Service").values()]
    selectors += [
        budget["spec"]["selector"]["matchLabels"] for budget in named("PodDisruptionBudget").values()
    ]
    for selector in selectors:
        assert any(set(selector.items()) <= labels_of(workload) for workload in WORKLOADS.values())


def test_every_object_that_a_pod_refers_to_exists() -> None:
    claims, maps = named("PersistentVolumeClaim"), named("ConfigMap")
    manual = (FOLDER.parent / "README.md").read_text()
    for workload in WORKLOADS.values():
        templates = [t["metadata"]["name"] for t in workload["spec"].get("volumeClaimTemplates", ())]
        volumes = {volume["name"]: volume for volume in pod(workload).get("volumes", ())}
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "rift-archive") in claims
            assert volume.get("configMap", {}).get("name", "rift") in maps
            if "secret" in volume:
                made = re.sub("^rift-worker-.*", "rift-worker-$model", volume["secret"]["secretName"])
                assert f"create secret generic {made} " in manual
        mounts = container(workload)["volumeMounts"]
        assert {mount["name"] for mount in mounts} == {*volumes, *templates}
        for mount in mounts:
            if mount["name"] == "settings" and "subPath" in mount:
                assert mount["subPath"] in maps["rift"]["data"]
        ports = {port["name"] for port in container(workload).get("ports", ())}
        probes = [probe for name, probe in container(workload).items() if name.endswith("Probe")]
        assert {probe["httpGet"]["port"] for probe in probes} <= ports
    images = {image["name"] for image in KUSTOMIZATION["images"]}
    assert images == {container(w)["image"] for w in WORKLOADS.values()} - {"nats:2.15.1"}


def test_only_control_has_a_service_account() -> None:
    accounts = {name: pod(found).get("serviceAccountName") for name, found in WORKLOADS.items()}
    assert {name for name, account in accounts.items() if account} == {"rift-control"}
    assert named("ServiceAccount").keys() == {accounts["rift-control"]}
    for name, workload in WORKLOADS.items():
        assert pod(workload).get("automountServiceAccountToken", True) is (name == "rift-control")
    (binding,) = named("RoleBinding").values()
    assert binding["roleRef"]["name"] in named("Role")
    assert [subject["name"] for subject in binding["subjects"]] == ["rift-control"]


@pytest.mark.anyio
async def test_controls_role_allows_exactly_its_calls(tmp_path: Path) -> None:
    (role,) = named("Role").values()
    server = ApiServer(role["rules"])
    name = server.create("deepseek-r1")
    server.pods = {f"{name}-x": ObjectMeta(name=f"{name}-x", namespace=NAMESPACE)}
    async with running(server, tmp_path) as fleet:
        fleet.want("deepseek-r1", 2)
        await until(lambda: server.replicas(name) == 2 and server.watches == 1)
        fleet.lost("deepseek-r1", f"{name}-x-0a1b2c3d", "silent")
        await until(lambda: not server.pods)
    allowed = {
        (verb, group, resource)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert server.refused == 0
    assert {call[:3] for call in server.calls} == allowed


# --- workers ----------------------------------------------------------------------------------------------


def test_every_model_has_its_workload_with_the_catalogues_gpus() -> None:
    found = {
        name: container(worker)["resources"]["limits"]["amd.com/gpu"] for name, worker in WORKERS.items()
    }
    assert found == {f"rift-worker-{slug(model)}": profile.gpus for model, profile in SERVED.items()}


def test_the_fleet_finds_the_workloads_by_their_labels() -> None:
    for model in SERVED:
        worker = WORKERS[f"rift-worker-{slug(model)}"]
        labels = worker["metadata"]["labels"]
        assert labels["rift/model"] == slug(model)
        for part in SELECTOR.split(","):
            key, _, value = part.partition("=")
            assert labels[key] == value or not value
        assert "replicas" not in worker["spec"], "kubectl apply would conflict with control"


def test_workers_differ_in_nothing_but_their_model_and_its_size() -> None:
    def rest(model: str) -> str:
        worker = WORKERS[f"rift-worker-{slug(model)}"]
        found = container(worker)
        found = {**worker, "args": found["args"], "resources": None}
        text = yaml.safe_dump({**found, "spec": _without_resources(worker["spec"])})
        return text.replace(slug(model), "MODEL").replace(model, "MODEL")

    assert len({rest(model) for model in SERVED}) == 1


def _without_resources(spec: dict[str, Any]) -> dict[str, Any]:
    template = spec["template"]
    (found,) = template["spec"]["containers"]
    bare = {**found, "resources": None}
    return {**spec, "template": {**template, "spec": {**template["spec"], "containers": [bare]}}}


def test_every_role_starts_with_valid_options() -> None:
    for name, workload in WORKLOADS.items():
        if name != "rift-nats":
            parser.build_parser().parse_args(container(workload)["args"])
    for model in SERVED:
        found = container(WORKERS[f"rift-worker-{slug(model)}"])
        told = parser.build_parser().parse_args(found["args"])
        assert (told.model, told.pod) == (model, "$(RIFT_POD)")
        (named_pod,) = [entry for entry in found["env"] if entry["name"] == "RIFT_POD"]
        assert named_pod["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"


def test_a_pods_grace_period_covers_draining() -> None:
    told = tomllib.loads(named("ConfigMap")["rift"]["data"]["rift.toml"])
    assert told["drain_s"] >= DEADLINE_S, "draining must not cut an answer off"
    for worker in WORKERS.values():
        assert pod(worker)["terminationGracePeriodSeconds"] >= told["drain_s"] + STOP_S["worker"]


# --- settings ---------------------------------------------------------------------------------------------


def test_the_settings_are_valid(tmp_path: Path) -> None:
    (tmp_path / "rift.toml").write_text(named("ConfigMap")["rift"]["data"]["rift.toml"])
    told = settings.load(tmp_path / "rift.toml", {})
    assert (told.fleet, told.hardware, told.log_replicas) == ("kubernetes", "mi300x", 3)
    assert {told.model, *told.scale} == set(SERVED)


def test_each_container_names_the_port_of_its_metrics(tmp_path: Path) -> None:
    file = tmp_path / "rift.toml"
    file.write_text(named("ConfigMap")["rift"]["data"]["rift.toml"])
    found = settings.load(file, {})
    for name, workload in WORKLOADS.items():
        if name == "rift-nats":
            continue
        default = gateway_port(found.port) if name == "rift-gateway" else CONTROL_PORT
        address = found.metrics_address(WORKER_PORT if name in WORKERS else default)
        ports = {port["name"]: port["containerPort"] for port in container(workload)["ports"]}
        assert address == ("0.0.0.0", ports["metrics"]), name


def test_the_prices_are_the_price_lists() -> None:
    told = tomllib.loads(named("ConfigMap")["rift"]["data"]["prices.toml"])["prices"]
    shipped = catalogue.shipped()
    assert told == {
        name: {"prompt_usd": shipped[name].prompt_usd, "output_usd": shipped[name].output_usd}
        for name in SERVED
    }
    assert all(nanousd_per_token(price["output_usd"], where=name) for name, price in told.items())


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what the manual's command writes, with certificates where its servers would find them."""
    folder = tmp_path_factory.mktemp("broker")
    manual = (FOLDER.parent / "README.md").read_text().partition("## Kubernetes")[2]
    command = re.search(r"rift (broker config broker (?:[^\n]*\\\n)*[^\n]*)", manual)
    assert command is not None
    words = command[1].replace("\\\n", " ").replace("config broker ", f"config {folder} ").split()
    assert parser.main([*words, "--data", str(folder), "--config", str(settings_file(folder))]) == 0
    return folder


def settings_file(folder: Path) -> Path:
    file = folder / "rift.toml"
    file.write_text(named("ConfigMap")["rift"]["data"]["rift.toml"])
    return file


def test_nats_server_accepts_its_configuration(generated: Path, tmp_path: Path) -> None:
    tls = certificates.make(tmp_path / "tls")
    for number in range(WORKLOADS["rift-nats"]["spec"]["replicas"]):
        text = (generated / f"rift-nats-{number}.conf").read_text()
        (tmp_path / "nats.conf").write_text(text.replace("/etc/nats-tls", str(tls)))
        shutil.copy(generated / "authorization.conf", tmp_path)
        command = [NATS_SERVER, "-c", str(tmp_path / "nats.conf"), "-t"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        assert f'server_name: "rift-nats-{number}"' in text
        assert 'store_dir: "/data"' in text
        assert "sync_interval: always" in text


def mounts(workload: dict[str, Any]) -> dict[str, str]:
    """Return the name of the secret at each mounted path."""
    volumes = pod(workload)["volumes"]
    secrets = {one["name"]: one["secret"]["secretName"] for one in volumes if "secret" in one}
    return {
        one["mountPath"]: secrets[one["name"]]
        for one in container(workload)["volumeMounts"]
        if one["name"] in secrets
    }


def test_every_role_has_its_own_password_only(generated: Path) -> None:
    """The manual makes each workload's secret from the files of its roles."""
    manual = (FOLDER.parent / "README.md").read_text()
    for name, workload in WORKLOADS.items():
        if name == "rift-nats":
            continue
        told = {entry["name"]: entry.get("value") for entry in container(workload)["env"]}
        assert mounts(workload)[told["RIFT_NATS_CREDENTIALS"]] == name
        assert mounts(workload)[told["RIFT_NATS_TLS"]] == "rift-nats-ca"
    for role, files in (("gateway", ["gateway"]), ("control", ["control", "reader", "operator"])):
        made = "".join(f" --from-file=broker/credentials/{file}" for file in files)
        assert f"create secret generic rift-{role}{made}\n" in manual
        assert all((generated / "credentials" / file).exists() for file in files)
    assert "generic rift-worker-$model --from-file=broker/credentials/worker-$model" in manual
    for model in SERVED:
        assert (generated / "credentials" / f"worker-{slug(model)}").exists()


def test_every_role_finds_every_nats_server(generated: Path) -> None:
    servers = WORKLOADS["rift-nats"]["spec"]["replicas"]
    service = WORKLOADS["rift-nats"]["spec"]["serviceName"]
    assert service in named("Service")
    urls = [f"nats://rift-nats-{number}.{service}:4222" for number in range(servers)]
    for name, workload in WORKLOADS.items():
        told = {entry["name"]: entry.get("value") for entry in container(workload)["env"]}
        if name != "rift-nats":
            assert told["RIFT_NATS_URL"] == ",".join(urls)
    ports = {port["name"]: port["port"] for port in named("Service")[service]["spec"]["ports"]}
    given = tomllib.loads(named("ConfigMap")["rift"]["data"]["rift.toml"])["nats_monitor"]
    monitors = [f"http://rift-nats-{n}.{service}:{ports['monitor']}" for n in range(servers)]
    assert given == ",".join(monitors)
    for number in range(servers):
        text = (generated / f"rift-nats-{number}.conf").read_text()
        assert f'http: "0.0.0.0:{ports["monitor"]}"' in text
        assert f'listen: "0.0.0.0:{ports["client"]}"' in text
        assert f'listen: "0.0.0.0:{ports["route"]}"' in text
        others = [f"@rift-nats-{other}.{service}:{ports['route']}" for other in range(servers)]
        assert [other in text for other in others] == [other != number for other in range(servers)]


def test_the_manual_lists_controls_messages() -> None:
    runbook = (FOLDER.parent / "README.md").read_text().partition("## Kubernetes")[2].partition("\n## ")[0]
    words = [row.split("`")[1].strip("… ") for row in runbook.splitlines() if row.startswith("| `")]
    assert len(words) == 4
    said = (FOLDER.parents[1] / "rift" / "fleet" / "kubernetes.py").read_text()
    assert all(text in said for text in words)


def test_the_containerfile_copies_existing_files() -> None:
    root = FOLDER.parents[1]
    for line in (FOLDER / "Containerfile").read_text().splitlines():
        if line.startswith("COPY "):
            assert all((root / name).exists() for name in line.split()[1:-1]), line
