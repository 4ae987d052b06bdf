"""A small Kubernetes API server: deployments listed, watched and scaled, pods deleted, over real HTTP.

It follows the API's published description (api/openapi-spec/v3 of kubernetes/kubernetes: apis__apps__v1 and
api__v1; the "API Concepts" page for versions and watches) for exactly what the fleet calls, and refuses what
that does not describe. On top of it come the faults that a cluster has now and then: see `Fault` and the
methods from `cut` on. Numbers, labels and rules are kept as the cluster's would be; no pod ever runs.
"""

import math
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from socket import SO_LINGER, SOL_SOCKET
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import anyio
import h11
import msgspec
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSListener

NAMESPACE = "rift"
LATE_S = 0.5
CREATED = "2026-11-01T00:00:00Z"


class Body(msgspec.Struct, rename="camel", omit_defaults=True, forbid_unknown_fields=True):
    """Rejects unknown fields, as strict field validation does."""


class ObjectMeta(Body):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str = ""
    deletion_timestamp: str = ""
    deletion_grace_period_seconds: int = 0
    labels: dict[str, str] = {}


class ScaleSpec(Body):
    replicas: int = 0


class ScaleStatus(Body):
    selector: str = ""
    replicas: int = msgspec.field(default_factory=int)


class Scale(Body, kw_only=True):
    kind: Literal["Scale"] = msgspec.field(default_factory=lambda: "Scale")
    api_version: Literal["autoscaling/v1"] = msgspec.field(default_factory=lambda: "autoscaling/v1")
    metadata: ObjectMeta
    spec: ScaleSpec
    status: ScaleStatus | None = None


class Fault(NamedTuple):
    """The fault of one call: `status` refuses it; `hang` and `reset` end it without an answer, before it is
    carried out, and `unanswered` after; `late` carries it out after the client has left; `stale` reads the
    state before the last change; `race` changes the workload just before."""

    kind: Literal["status", "hang", "reset", "unanswered", "late", "stale", "race"]
    status: int = 0
    retry_after_s: int | None = None


class Call(NamedTuple):
    verb: str
    group: str
    resource: str
    name: str


class HTTPError(Exception):
    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Write(NamedTuple):
    name: str
    replicas: int
    # When the workload's scale was last read, and when this came.
    read_at: float
    at: float


class ApiServer:
    """State first, then HTTP. `rules` are a Role's; None allows everything."""

    def __init__(self, rules: Sequence[Mapping[str, Any]] | None = None) -> None:
        self.rules = rules
        self.tokens = {"first"}
        self.faults: deque[Fault] = deque()
        self.calls: list[Call] = []
        self.writes: list[Write] = []
        self.pods: dict[str, ObjectMeta] = {}
        self.refused = 0
        self.watches = 0
        # Whether watches stay silent, and the delay of every answer.
        self.silent = False
        self.slow_s = 0.0
        self._version = 100
        self._oldest = 0
        self._deployments: dict[str, dict[str, Any]] = {}
        self._history: list[tuple[int, str, dict[str, Any]]] = []
        self._changed = anyio.Event()
        self._cuts = 0
        self._read_at: dict[str, float] = {}

    # --- what a cluster's owner does ---------------------------------------------------------------------

    def create(self, model: str, replicas: int = 0) -> str:
        name = f"rift-worker-{model}"
        labels = {"app.kubernetes.io/part-of": "rift", "rift/model": model}
        self._version += 1
        self._store("ADDED", _deployment(name, labels, replicas, uid=f"uid-{self._version}"))
        return name

    def delete(self, name: str) -> None:
        self._version += 1
        self._store("DELETED", self._deployments.pop(name))

    def replicas(self, name: str) -> int:
        return int(self._deployments[name]["spec"]["replicas"])

    def scale(self, name: str, replicas: int) -> None:
        """Scale as another user; an equal number still makes a new version."""
        self._version += 1
        found = self._deployments[name]
        self._store("MODIFIED", {**found, "spec": {**found["spec"], "replicas": replicas}})

    # --- faults beyond one call --------------------------------------------------------------------------

    def cut(self) -> None:
        """End all watches without a word."""
        self._cuts += 1
        self._wake()

    def expire(self) -> None:
        """Forget all history: open watches get an error, and later ones that begin before now are refused."""
        self._oldest = self._version
        self.cut()

    # --- HTTP --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def serving(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
        """Serve on a free port of this machine, and yield it."""
        plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port: int = plain.extra(SocketAttribute.local_port)
        listener = plain if tls is None else TLSListener(plain, tls, standard_compatible=False)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, self._connection)
            yield port
            tasks.cancel_scope.cancel()

    async def _connection(self, stream: ByteStream) -> None:
        async with stream:
            http = h11.Connection(h11.SERVER)
            try:
                while http.our_state is h11.IDLE:
                    request, body = await _request(http, stream)
                    if request is None or not await self._call(http, stream, request, body):
                        return
                    if http.our_state is h11.DONE:
                        http.start_next_cycle()
            except (anyio.BrokenResourceError, anyio.EndOfStream, anyio.ClosedResourceError):
                return

    async def _call(
        self, http: h11.Connection, stream: ByteStream, request: h11.Request, body: bytes
    ) -> bool:
        """Answer one request; False: the connection is over."""
        fault, at = self.faults.popleft() if self.faults else None, anyio.current_time()
        if fault and fault.kind == "hang":
            await anyio.sleep_forever()
        await anyio.sleep(LATE_S if fault and fault.kind == "late" else self.slow_s)
        if fault and fault.kind == "reset":
            _reset(stream)
            return False
        try:
            if fault and fault.kind == "status":
                raise HTTPError(fault.status, "", "injected")
            call, asked = self._known(request)
            if asked.get("watch") == "true":
                await self._watch(http, stream, asked)
                return False
            status, answer = 200, self._carry_out(call, asked, body, fault.kind if fault else "", at)
        except HTTPError as refusal:
            status, answer = refusal.status, _status(refusal)
        if fault and fault.kind == "unanswered":
            _reset(stream)
            return False
        headers = {}
        if fault and fault.retry_after_s is not None:
            headers["Retry-After"] = str(fault.retry_after_s)
        data = msgspec.json.encode(answer)
        await _send(http, stream, status, {**headers, "Content-Length": str(len(data))}, data)
        return True

    def _known(self, request: h11.Request) -> tuple[Call, dict[str, str]]:
        """Return what is called, once its token and rules have been checked. Raises HTTPError."""
        headers = dict(request.headers.raw_items())
        token = next((v.decode() for k, v in headers.items() if k.lower() == b"authorization"), "")
        if token.removeprefix("Bearer ") not in self.tokens or not token.startswith("Bearer "):
            raise HTTPError(401, "Unauthorized", "Unauthorized")
        url = urlsplit(request.target.decode())
        asked = dict(parse_qsl(url.query))
        verb = request.method.decode()
        match url.path.strip("/").split("/"):
            case ["apis", "apps", "v1", "namespaces", space, "deployments"] if verb == "GET":
                call = Call("watch" if "watch" in asked else "list", "apps", "deployments", "")
            case ["apis", "apps", "v1", "namespaces", space, "deployments", name, "scale"] if verb in VERBS:
                call = Call(VERBS[verb], "apps", "deployments/scale", name)
            case ["api", "v1", "namespaces", space, "pods", name] if verb == "DELETE":
                call = Call("delete", "", "pods", name)
            case _:
                raise HTTPError(404, "NotFound", "the server could not find the requested resource")
        self.calls.append(call)
        if space != NAMESPACE or not self._allows(call):
            self.refused += 1
            user = "system:serviceaccount:rift:rift-control"
            what = f'cannot {call.verb} resource "{call.resource}" in API group "{call.group}"'
            raise HTTPError(403, "Forbidden", f'{call.resource} is forbidden: User "{user}" {what}')
        return call, asked

    def _allows(self, call: Call) -> bool:
        return self.rules is None or any(
            call.group in rule["apiGroups"]
            and call.resource in rule["resources"]
            and call.verb in rule["verbs"]
            for rule in self.rules
        )

    # --- calls -------------------------------------------------------------------------------------------

    def _carry_out(self, call: Call, asked: Mapping[str, str], body: bytes, fault: str, at: float) -> Any:
        match call.verb, call.resource:
            case "list", _:
                items = [dict(item) for item in self._old(fault).values() if _selected(item, asked)]
                # Items of a list do not say again what they are.
                items = [{k: v for k, v in item.items() if k not in ("kind", "apiVersion")} for item in items]
                metadata = {"resourceVersion": str(self._version)}
                return {
                    "kind": "DeploymentList",
                    "apiVersion": "apps/v1",
                    "metadata": metadata,
                    "items": items,
                }
            case "get", _:
                self._read_at[call.name] = anyio.current_time()
                return _scale_of(self._found(call.name, self._old(fault)))
            case "update", _:
                return self._update(call.name, body, fault, at)
        return self._delete_pod(call.name, asked)

    def _update(self, name: str, body: bytes, fault: str, at: float) -> Scale:
        try:
            told = msgspec.json.decode(body, type=Scale)
        except msgspec.ValidationError as error:
            raise HTTPError(400, "BadRequest", f"Scale in version v1 cannot be handled: {error}") from error
        self.writes.append(Write(name, told.spec.replicas, self._read_at.get(name, -math.inf), at))
        if fault == "race" and name in self._deployments:
            self.scale(name, self.replicas(name))
        found = self._found(name, self._deployments)
        if (told.metadata.name, told.metadata.namespace) != (name, NAMESPACE):
            raise HTTPError(400, "BadRequest", "the name of the object does not match the name on the URL")
        if told.spec.replicas < 0:
            raise HTTPError(422, "Invalid", "spec.replicas: must be greater than or equal to 0")
        version = told.metadata.resource_version
        if version and version != found["metadata"]["resourceVersion"]:
            message = (
                f'Operation cannot be fulfilled on deployments.apps "{name}": the object has been modified; '
                "please apply your changes to the latest version and try again"
            )
            raise HTTPError(409, "Conflict", message)
        if told.spec.replicas != found["spec"]["replicas"]:
            self.scale(name, told.spec.replicas)
        return _scale_of(self._deployments[name])

    def _delete_pod(self, name: str, asked: Mapping[str, str]) -> Any:
        if name not in self.pods:
            raise HTTPError(404, "NotFound", f'pods "{name}" not found')
        metadata = self.pods.pop(name)
        metadata.deletion_timestamp = CREATED
        metadata.deletion_grace_period_seconds = int(asked["gracePeriodSeconds"])
        return {"kind": "Pod", "apiVersion": "v1", "metadata": metadata}

    async def _watch(self, http: h11.Connection, stream: ByteStream, asked: Mapping[str, str]) -> None:
        after, cuts = int(asked["resourceVersion"]), self._cuts
        if after < self._oldest:
            raise HTTPError(410, "Expired", f"too old resource version: {after} ({self._version})")
        await stream.send(_head(http, 200, {"Transfer-Encoding": "chunked"}))
        self.watches += 1
        try:
            with anyio.move_on_after(math.inf if self.silent else int(asked["timeoutSeconds"])):
                while self._cuts == cuts:
                    for version, kind, item in self._history:
                        if version > after and _selected(item, asked) and not self.silent:
                            await _chunk(http, stream, {"type": kind, "object": item})
                    after = self._version
                    await self._changed.wait()
                if after < self._oldest:
                    refusal = HTTPError(410, "Expired", f"too old resource version: {after}")
                    await _chunk(http, stream, {"type": "ERROR", "object": _status(refusal)})
                return
            await stream.send(http.send(h11.EndOfMessage()) or b"")
        finally:
            self.watches -= 1

    # --- state -------------------------------------------------------------------------------------------

    def _store(self, kind: str, item: dict[str, Any]) -> None:
        metadata = {**item["metadata"], "resourceVersion": str(self._version)}
        item = {**item, "metadata": metadata}
        if kind != "DELETED":
            self._deployments = {**self._deployments, metadata["name"]: item}
        self._history.append((self._version, kind, item))
        self._wake()

    def _old(self, fault: str) -> Mapping[str, dict[str, Any]]:
        """Return the deployments, or, stale, as they were before the last change."""
        if fault != "stale":
            return self._deployments
        old = {}
        for _, kind, item in self._history[:-1]:
            if kind != "DELETED" and item["metadata"]["name"] in self._deployments:
                old[item["metadata"]["name"]] = item
        return old

    def _found(self, name: str, deployments: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        if name not in deployments:
            raise HTTPError(404, "NotFound", f'deployments.apps "{name}" not found')
        return deployments[name]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


VERBS = {"GET": "get", "PUT": "update"}


def _deployment(name: str, labels: dict[str, str], replicas: int, *, uid: str) -> dict[str, Any]:
    """Return a Deployment as a server fills it in, its pods' template cut short."""
    container = {"name": "worker", "image": "rift"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    metadata = {
        "name": name,
        "namespace": NAMESPACE,
        "uid": uid,
        "creationTimestamp": CREATED,
        "labels": labels,
    }
    return {
        "kind": "Deployment",
        "apiVersion": "apps/v1",
        "metadata": metadata,
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template},
        "status": {},
    }


def _scale_of(item: dict[str, Any]) -> Scale:
    known = {k: v for k, v in item["metadata"].items() if k != "labels"}
    return Scale(
        metadata=msgspec.convert(known, ObjectMeta),
        spec=ScaleSpec(item["spec"]["replicas"]),
        status=ScaleStatus(
            selector=",".join(f"{k}={v}" for k, v in item["spec"]["selector"]["matchLabels"].items())
        ),
    )


def _selected(item: Mapping[str, Any], asked: Mapping[str, str]) -> bool:
    labels = item["metadata"]["labels"]
    wanted = [part.partition("=") for part in asked.get("labelSelector", "").split(",") if part]
    return all(key in labels and (not equal or labels[key] == value) for key, equal, value in wanted)


def _status(refusal: HTTPError) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": str(refusal),
        "reason": refusal.reason,
        "code": refusal.status,
    }


async def _request(http: h11.Connection, stream: ByteStream) -> tuple[h11.Request | None, bytes]:
    request, body = None, b""
    while True:
        match http.next_event():
            case h11.NEED_DATA:
                try:
                    http.receive_data(await stream.receive())
                except anyio.EndOfStream:
                    return None, b""
            case h11.Request() as request:
                pass
            case h11.Data(data=data):
                body += data
            case h11.EndOfMessage():
                return request, body
            case _:
                return None, b""


def _head(http: h11.Connection, status: int, headers: Mapping[str, str]) -> bytes:
    fields = [*headers.items(), ("Content-Type", "application/json")]
    return http.send(h11.Response(status_code=status, headers=fields)) or b""


async def _send(
    http: h11.Connection, stream: ByteStream, status: int, headers: Mapping[str, str], data: bytes
) -> None:
    head = _head(http, status, headers)
    rest = (http.send(h11.Data(data=data)) or b"") + (http.send(h11.EndOfMessage()) or b"")
    await stream.send(head + rest)


async def _chunk(http: h11.Connection, stream: ByteStream, event: Mapping[str, Any]) -> None:
    """Send one event of a watch in two pieces, as they may come."""
    line = msgspec.json.encode(event) + b"\n"
    middle = len(line) // 2
    for piece in (line[:middle], line[middle:]):
        await stream.send(http.send(h11.Data(data=piece)) or b"")


def _reset(stream: ByteStream) -> None:
    """Have the connection end with a reset."""
    socket = stream.extra(SocketAttribute.raw_socket)
    socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
