"""The fleet on Kubernetes: one workload a model, scaled to the number that was decided.

    want ──▶ due ──▶ writer: read the scale, write it if it differs        (one task, one call at a time)
              ▲
              └───── watcher: list, then watch; whoever else scaled, or made a workload anew, is corrected

What is due holds no numbers: the writer takes the newest when it comes to it, so an old one is never written
behind a newer. Each write names the version that was read just before, so one that is late finds another
version and is refused. A write whose answer was lost may still be carried out after a newer number was found
in place; the watcher sees that. Only `.spec.replicas` is ever written: images, resources and the rest of a
workload are the operator's.

Kubernetes starts and ends the pods (SIGTERM, then what the grace period leaves for draining), and keeps
their number.
"""

import logging
from collections.abc import Callable

import anyio

from events.subjects import slug
from rift.fleet.cluster import Cluster, Refused, Unreachable, Workload

logger = logging.getLogger(__name__)

# The first retry comes soon after a passing fault; the last ones are rare enough to be no load, and still
# within the time that a replica takes to start.
BACK_OFF_FIRST_S = 0.25
BACK_OFF_MAX_S = 30.0

# What the server may ask for: it is believed, up to here.
RETRY_AFTER_MAX_S = 120.0

# A trouble that goes on is said so often.
SAY_S = 60.0

# How long a watch is kept before everything is looked at again: once a minute with what the list may take.
LOOK_S = 50.0

# A watch that was kept this long was well.
WELL_S = 5.0

Due = tuple[str, str]  # "scale" and a model, "end" and a pod, or:
WATCH: Due = ("watch", "")


class KubernetesFleet:
    """Implements `rift.fleet.Driver`. `name` is that of a model's Deployment, with its `{slug}`; `jitter`
    gives numbers from 0 to 1; `look_s` is how long a watch is trusted."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        jitter: Callable[[], float],
        name: str = "rift-worker-{slug}",
        look_s: float = LOOK_S,
    ) -> None:
        self._cluster = cluster
        self._jitter = jitter
        self._name = name
        self._look_s = look_s
        self._wanted: dict[str, int] = {}
        self._models: dict[str, str] = {}
        # When each is to be done, by the event loop's clock; 0: now.
        self._due: dict[Due, float] = {}
        self._failures: dict[Due, int] = {}
        self._more = anyio.Event()
        # What was last complained of, and when.
        self._said: dict[Due, tuple[int, float]] = {}

    def want(self, model: str, replicas: int) -> None:
        """Have the model's workload scaled to a number, from now on."""
        assert replicas >= 0, f"a workload has no {replicas} replicas"
        if self._wanted.get(model) != replicas:
            self._wanted[model] = replicas
            self._models[self._workload(model)] = model
            self._now_due(("scale", model))

    def lost(self, model: str, replica: str) -> None:
        """Have the pod of that name ended; its workload replaces it."""
        if not replica.startswith(self._workload(model) + "-"):
            logger.warning("lost replica %s of %s is no pod of %s", replica, model, self._workload(model))
            return
        # The worker's own name behind the pod's says which start of its container it was.
        self._now_due(("end", replica.rpartition("-")[0]))

    async def run(self) -> None:
        """Bring it about until cancelled. Raises ClusterError."""
        async with self._cluster, anyio.create_task_group() as tasks:
            tasks.start_soon(self._write)
            tasks.start_soon(self._watch)

    # --- the writer ------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            due = min(self._due, key=self._due.__getitem__, default=None)
            if due is None or self._due[due] > anyio.current_time():
                self._more = anyio.Event()
                with anyio.CancelScope(deadline=self._due[due] if due else float("inf")):
                    await self._more.wait()
                continue
            del self._due[due]
            try:
                await self._bring_about(due)
            except (Refused, Unreachable) as error:
                # Also where it became due again meanwhile: a new number does not hurry a server that fails.
                self._complain(due, error)
                self._due[due] = anyio.current_time() + self._pause_s(due, error)
            else:
                self._well(due)

    async def _bring_about(self, due: Due) -> None:
        kind, subject = due
        if kind == "end":
            await self._cluster.delete_pod(subject)
            logger.info("pod %s is being deleted: its replica was given up", subject)
            return
        found = await self._cluster.scale(self._workload(subject))
        wanted = self._wanted[subject]
        if found.replicas != wanted:
            await self._cluster.set_scale(found, wanted)
            logger.info(
                "deployment %s: %d replicas, as decided (%d before)", found.name, wanted, found.replicas
            )

    def _now_due(self, due: Due) -> None:
        """Have it done at once, or when its last failure's pause is over."""
        self._due.setdefault(due, 0.0)
        self._more.set()

    # --- the watcher -----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
            except (Refused, Unreachable) as error:
                self._complain(WATCH, error)
                await anyio.sleep(self._pause_s(WATCH, error))

    async def _look(self) -> None:
        """Look at all workloads, then at each change, until the watch ends. Raises Refused, Unreachable."""
        found, version = await self._cluster.workloads()
        here = {workload.name for workload in found}
        for workload in found:
            self._compare("FOUND", workload)
        for name, model in self._models.items():
            if name not in here:
                self._now_due(("scale", model))
        began_at = anyio.current_time()
        try:
            with anyio.move_on_after(self._look_s):
                await self._cluster.watch(version, self._compare, within_s=self._look_s)
        finally:
            kept_s = anyio.current_time() - began_at
            if kept_s >= WELL_S:
                self._well(WATCH)
        if kept_s < min(WELL_S, self._look_s):
            raise Unreachable("the watch ended as soon as it had begun")

    def _compare(self, change: str, found: Workload) -> None:
        """Have a workload corrected that is not as wanted. It may be long past: the writer reads anew."""
        if (model := self._models.get(found.name)) is None:
            return
        due = ("scale", model)
        if change != "DELETED" and self._said.get(due, (0, 0.0))[0] == 404:
            # It was missing, and here it is.
            self._due.pop(due, None)
        if change == "DELETED" or found.replicas != self._wanted[model]:
            self._now_due(due)

    # --- trouble ---------------------------------------------------------------------------------------

    def _pause_s(self, due: Due, error: Refused | Unreachable) -> float:
        """Return how long to wait behind another failure. Who lost a race for a version reads it again at
        once, once."""
        failures = self._failures.get(due, 0)
        self._failures[due] = failures + 1
        if isinstance(error, Refused):
            if error.status == 409 and failures == 0:
                return 0.0
            if error.retry_after_s is not None:
                return min(error.retry_after_s, RETRY_AFTER_MAX_S)
        return min(BACK_OFF_FIRST_S * (1 << min(failures, 16)), BACK_OFF_MAX_S) * self._jitter()

    def _complain(self, due: Due, error: Refused | Unreachable) -> None:
        """Say what is wrong and what to do, now and then once a minute. Passing faults are for nobody: a lost
        race, and a watch that its server cuts off or has too little history for."""
        status = error.status if isinstance(error, Refused) else 0
        if status in (409, 410) or (due == WATCH and not status and self._failures.get(due, 0) < 2):
            return
        said, said_at = self._said.get(due, (-1, 0.0))
        if status == said and anyio.current_time() - said_at < SAY_S:
            return
        self._said[due] = status, anyio.current_time()
        logger.warning("%s: %s", self._doing(due), self._advice(due, status, error))

    def _well(self, due: Due) -> None:
        self._failures.pop(due, None)
        self._said.pop(due, None)

    def _doing(self, due: Due) -> str:
        match due:
            case "scale", model:
                return f"scaling {self._workload(model)} to {self._wanted[model]}"
            case "end", pod:
                return f"deleting pod {pod}"
        return f"watching the deployments in namespace {self._cluster.namespace}"

    def _advice(self, due: Due, status: int, error: Refused | Unreachable) -> str:
        match status:
            case 401:
                return f"the API server does not know our token, which is read anew for each call ({error})"
            case 403:
                return f"our service account may not do that; apply ops/kubernetes/rbac.yaml ({error})"
            case 404 if due[0] == "scale":
                return (
                    f"there is no such deployment in namespace {self._cluster.namespace}; apply the model's "
                    f"workload from ops/kubernetes, or take the model out of rift.toml ({error})"
                )
            case 422:
                return f"the API server takes no such number ({error})"
        return f"{error}; it is tried again"

    def _workload(self, model: str) -> str:
        return self._name.format(slug=slug(model))
