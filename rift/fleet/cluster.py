"""The part of the Kubernetes API that the fleet needs: list, watch and scale workloads, and delete pods.

This module holds addresses, the token, requests and the meaning of answers. The wanted numbers and the
retries must not live here.
"""

import math
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx
import msgspec

from events.errors import reason
from rift.errors import RiftError

Shape = TypeVar("Shape")

# Kubernetes mounts each pod's service account here.
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

# The labels of Rift's workloads; `rift/model` holds the model's slug.
SELECTOR = "app.kubernetes.io/part-of=rift,rift/model"

# An API server answers such calls in milliseconds, and within a second while etcd elects a leader. A later
# answer is useless to clients that wait for a replica.
CALL_S = 10.0

# A lost replica no longer reports, so its GPUs are worth more than a long shutdown.
LOST_GRACE_S = 5

# The largest object of a watch. etcd refuses more than 1.5 MiB.
LINE_BYTES_MAX = 4 << 20


class ClusterError(RiftError):
    """This process does not run in a cluster; the message names the missing part."""


class Unreachable(RiftError):
    """No API server answered. The call may or may not have been carried out."""


class Refused(RiftError):
    """The API server refused a call. `retry_after_s` is when it wants the next one."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status} {message}")
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


class Workload(msgspec.Struct, frozen=True):
    """`version` is opaque: it may only be compared for equality."""

    name: str
    replicas: int
    version: str


class _Metadata(msgspec.Struct, frozen=True, rename="camel"):
    name: str = ""
    resource_version: str = ""


# A Scale of 0 replicas lacks this field; a Deployment always has it, since the server fills in the default.
class _Spec(msgspec.Struct, frozen=True):
    replicas: int = 0


class _Object(msgspec.Struct, frozen=True):
    """A Deployment, or its Scale."""

    metadata: _Metadata
    spec: _Spec = _Spec()

    def workload(self) -> Workload:
        return Workload(self.metadata.name, self.spec.replicas, self.metadata.resource_version)


class _List(msgspec.Struct, frozen=True):
    metadata: _Metadata
    items: list[_Object]


class _Change(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


class _Details(msgspec.Struct, frozen=True, rename="camel"):
    retry_after_seconds: int = 0


class _Status(msgspec.Struct, frozen=True):
    message: str = ""
    code: int = 0
    details: _Details | None = None


class Cluster:
    """One namespace of the API server at `url`; an async context. The token's file is read for each call,
    since tokens rotate."""

    def __init__(
        self, url: str, namespace: str, *, token: Path, ca: Path | None = None, call_s: float = CALL_S
    ) -> None:
        self.namespace = namespace
        self._url = url
        self._token = token
        self._ca = ca
        self._call_s = call_s
        self._deployments = f"/apis/apps/v1/namespaces/{namespace}/deployments"
        self._pods = f"/api/v1/namespaces/{namespace}/pods"

    @classmethod
    def around(cls, environment: Mapping[str, str], account: Path = SERVICE_ACCOUNT) -> "Cluster":
        """Return the cluster in which this process is a pod. Raises ClusterError."""
        host, port = (environment.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
        if not host or not port:
            raise ClusterError(
                'fleet = "kubernetes" works in a pod: KUBERNETES_SERVICE_HOST and _PORT are not set here. '
                'Run control as ops/kubernetes has it, or choose fleet = "local" or "none"'
            )
        try:
            namespace = (account / "namespace").read_text().strip()
        except OSError as error:
            raise ClusterError(
                f"{error.filename}: {error.strerror}; give control's pod its service account "
                "(automountServiceAccountToken, ops/kubernetes/rbac.yaml)"
            ) from error
        url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        return cls(url, namespace, token=account / "token", ca=account / "ca.crt")

    async def __aenter__(self) -> "Cluster":
        """Raises ClusterError if the CA's file cannot be used."""
        try:
            verify = ssl.create_default_context(cafile=self._ca) if self._ca else True
        except (OSError, ssl.SSLError) as error:
            raise ClusterError(f"{self._ca}: {reason(error)}") from error
        # The environment may name a proxy, but the server is inside the cluster.
        self._client = httpx.AsyncClient(
            base_url=self._url, verify=verify, timeout=self._call_s, trust_env=False
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    # --- calls: each raises Refused, Unreachable ---------------------------------------------------------

    async def workloads(self) -> tuple[list[Workload], str]:
        """Return Rift's current workloads, and the version to watch from."""
        listed = _decoded(_List, await self._call("GET", self._deployments, {"labelSelector": SELECTOR}))
        return [item.workload() for item in listed.items], listed.metadata.resource_version

    async def watch(self, version: str, changed: Callable[[str, Workload], None], *, within_s: float) -> None:
        """Call `changed` for each change since a version (ADDED, MODIFIED or DELETED) until the server ends
        the watch. The server is asked to end it after `within_s`; the caller must time out a server that
        hangs."""
        parameters = {
            "watch": "true",
            "labelSelector": SELECTOR,
            "resourceVersion": version,
            "timeoutSeconds": str(math.ceil(within_s)),
        }
        timeout = httpx.Timeout(self._call_s, read=None)
        request = self._request("GET", self._deployments, parameters, timeout=timeout)
        try:
            response = await self._client.send(request, stream=True)
            try:
                if not response.is_success:
                    raise _refusal(response, await response.aread())
                await _changes(response, changed)
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise _lost(error) from error

    async def scale(self, name: str) -> Workload:
        """Return the server's latest scale of a workload."""
        return _decoded(_Object, await self._call("GET", f"{self._deployments}/{name}/scale")).workload()

    async def set_scale(self, workload: Workload, replicas: int) -> None:
        """Scale a workload. Raises Refused (409) if it has changed since `workload` was read."""
        metadata = {"name": workload.name, "namespace": self.namespace, "resourceVersion": workload.version}
        body = {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": metadata,
            "spec": {"replicas": replicas},
        }
        await self._call("PUT", f"{self._deployments}/{workload.name}/scale", body=body)

    async def delete_pod(self, name: str) -> None:
        """Delete a pod with a short grace period, if it exists."""
        try:
            parameters = {"gracePeriodSeconds": str(LOST_GRACE_S)}
            await self._call("DELETE", f"{self._pods}/{name}", parameters)
        except Refused as error:
            if error.status != 404:
                raise

    async def _call(
        self, verb: str, path: str, parameters: Mapping[str, str] | None = None, *, body: object = None
    ) -> bytes:
        try:
            response = await self._client.send(self._request(verb, path, parameters, body=body))
        except httpx.HTTPError as error:
            raise _lost(error) from error
        if not response.is_success:
            raise _refusal(response, response.content)
        return response.content

    def _request(
        self,
        verb: str,
        path: str,
        parameters: Mapping[str, str] | None,
        *,
        body: object = None,
        timeout: httpx.Timeout | None = None,
    ) -> httpx.Request:
        try:
            token = self._token.read_text().strip()
        except OSError as error:
            raise Unreachable(f"the service account's token {self._token}: {error.strerror}") from error
        return self._client.build_request(
            verb,
            path,
            params=parameters,
            json=body,
            headers={"Authorization": f"Bearer {token}", "Accept": "application/json"},
            timeout=timeout or self._call_s,
        )


async def _changes(response: httpx.Response, changed: Callable[[str, Workload], None]) -> None:
    """Read a watch's lines, each a change. Raises Refused for a line that reports an error."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > LINE_BYTES_MAX:
            raise Unreachable(f"a line of the watch has more than {LINE_BYTES_MAX} bytes")
        for line in filter(None, lines):
            change = _decoded(_Change, line)
            if change.type == "ERROR":
                status = _decoded(_Status, change.object)
                raise Refused(status.code, status.message)
            if change.type in ("ADDED", "MODIFIED", "DELETED"):
                changed(change.type, _decoded(_Object, change.object).workload())


def _decoded(shape: type[Shape], data: bytes | msgspec.Raw) -> Shape:
    try:
        return msgspec.json.decode(data, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreachable(f"the answer does not come from a Kubernetes API server: {error}") from error


def _refusal(response: httpx.Response, content: bytes) -> Refused:
    """Return the refusal with the server's message, or with the HTTP reason if a proxy answered."""
    try:
        status = msgspec.json.decode(content, type=_Status)
    except (msgspec.DecodeError, UnicodeDecodeError):
        status = _Status(response.reason_phrase)
    header = response.headers.get("Retry-After", "")
    after = int(header) if header.isdecimal() else status.details and status.details.retry_after_seconds
    return Refused(response.status_code, status.message, float(after) if after else None)


def _lost(error: httpx.HTTPError) -> Unreachable:
    return Unreachable(f"{type(error).__name__} {error}".strip())
