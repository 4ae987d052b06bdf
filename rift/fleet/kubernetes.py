"""The fleet on Kubernetes: one Deployment per model, scaled to the decided number.

    want ──▶ due ──▶ writer: read the scale, write it if it differs        (one task, one call at a time)
              ▲
              └───── watcher: list, then watch; correct a workload that someone scaled or recreated

The due queue holds no numbers: the writer takes the newest one when it comes to a model, so it never writes
an old number after a newer one. Each write names the version that was read just before, so a late write meets
another version and is refused. A write whose answer was lost may still take effect after a newer number was
found in place; the watcher sees that. Only `.spec.replicas` is ever written: the rest of a workload belongs
to the operator.

Kubernetes starts and ends the pods (SIGTERM, then draining within the grace period), and keeps their number.
"""

import logging
from collections.abc import Callable

import anyio

from events.subjects import slug
from events.wakeup import Wakeup
from rift.fleet.cluster import Cluster, Refused, Unreachable, Workload

logger = logging.getLogger(__name__)

# The first retry follows a transient fault soon. The last ones add little load, and still come within the
# time that a replica takes to start.
BACK_OFF_FIRST_S = 0.25
BACK_OFF_MAX_S = 30.0

# A longer Retry-After of the server is cut to this.
RETRY_AFTER_MAX_S = 120.0

# A lasting problem is logged this often.
LOG_S = 60.0

# How long a watch lasts before everything is listed again: about once a minute, with the time of the list.
WATCH_S = 50.0

# A watch that lasted this long was healthy.
HEALTHY_S = 5.0

Due = tuple[str, str]  # "scale" and a model, "end" and a pod, or:
WATCH: Due = ("watch", "")


class KubernetesFleet:
    """Implements `rift.fleet.Driver`. `name` is the name of a model's Deployment, with its `{slug}`; `jitter`
    returns numbers from 0 to 1; a watch lasts `watch_s`."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        jitter: Callable[[], float],
        name: str = "rift-worker-{slug}",
        watch_s: float = WATCH_S,
    ) -> None:
        self._cluster = cluster
        self._jitter = jitter
        self._name = name
        self._watch_s = watch_s
        self._wanted: dict[str, int] = {}
        self._models: dict[str, str] = {}
        # When each is due, by the event loop's clock; 0: now.
        self._due_at_s: dict[Due, float] = {}
        self._failures: dict[Due, int] = {}
        self._became_due = Wakeup()
        # The status of the last logged problem of each, and when it was logged.
        self._logged: dict[Due, tuple[int, float]] = {}

    def want(self, model: str, replicas: int) -> None:
        """Scale the model's workload to this number, and keep it there."""
        assert replicas >= 0, f"a workload cannot have {replicas} replicas"
        if self._wanted.get(model) != replicas:
            self._wanted[model] = replicas
            self._models[self._workload(model)] = model
            self._add_due(("scale", model))

    def lost(self, model: str, replica: str, why: str) -> None:
        """Delete the replica's pod; its workload replaces it."""
        if not replica.startswith(self._workload(model) + "-"):
            logger.warning("lost replica %s of %s is not a pod of %s", replica, model, self._workload(model))
            return
        # The suffix after the pod's name distinguishes restarts of its container.
        self._add_due(("end", replica.rpartition("-")[0]))

    async def run(self) -> None:
        """Scale and watch until cancelled. Raises ClusterError."""
        async with self._cluster, anyio.create_task_group() as tasks:
            tasks.start_soon(self._write)
            tasks.start_soon(self._watch)

    # --- the writer ------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            due = min(self._due_at_s, key=self._due_at_s.__getitem__, default=None)
            if due is None or self._due_at_s[due] > anyio.current_time():
                with anyio.CancelScope(deadline=self._due_at_s[due] if due else float("inf")):
                    await self._became_due.wait()
                continue
            del self._due_at_s[due]
            try:
                await self._carry_out(due)
            except (Refused, Unreachable) as error:
                # Even if it became due again meanwhile: a new number must not hurry a server that fails.
                self._log_problem(due, error)
                self._due_at_s[due] = anyio.current_time() + self._pause_s(due, error)
            else:
                self._note_success(due)

    async def _carry_out(self, due: Due) -> None:
        kind, subject = due
        if kind == "end":
            await self._cluster.delete_pod(subject)
            logger.info("pod %s is being deleted: its replica was declared lost", subject)
            return
        workload = await self._cluster.scale(self._workload(subject))
        wanted = self._wanted[subject]
        if workload.replicas != wanted:
            await self._cluster.set_scale(workload, wanted)
            logger.info(
                "deployment %s: %d replicas, as decided (%d before)", workload.name, wanted, workload.replicas
            )

    def _add_due(self, due: Due) -> None:
        """Make it due at once, or when the pause after its last failure is over."""
        self._due_at_s.setdefault(due, 0.0)
        self._became_due.set()

    # --- the watcher -----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            try:
                await self._list_and_watch()
            except (Refused, Unreachable) as error:
                self._log_problem(WATCH, error)
                await anyio.sleep(self._pause_s(WATCH, error))

    async def _list_and_watch(self) -> None:
        """Compare all workloads, then each change, until the watch ends. Raises Refused, Unreachable."""
        workloads, version = await self._cluster.workloads()
        names = {workload.name for workload in workloads}
        for workload in workloads:
            self._compare("LISTED", workload)
        for name, model in self._models.items():
            if name not in names:
                self._add_due(("scale", model))
        began_at_s = anyio.current_time()
        try:
            with anyio.move_on_after(self._watch_s):
                await self._cluster.watch(version, self._compare, within_s=self._watch_s)
        finally:
            lasted_s = anyio.current_time() - began_at_s
            if lasted_s >= HEALTHY_S:
                self._note_success(WATCH)
        if lasted_s < min(HEALTHY_S, self._watch_s):
            raise Unreachable("the watch ended as soon as it had begun")

    def _compare(self, change: str, workload: Workload) -> None:
        """Make a workload due that differs from the decision. The change may be old: the writer reads
        again."""
        if (model := self._models.get(workload.name)) is None:
            return
        due = ("scale", model)
        if change != "DELETED" and self._logged.get(due, (0, 0.0))[0] == 404:
            # It was missing and now exists, so its pause ends.
            self._due_at_s.pop(due, None)
        if change == "DELETED" or workload.replicas != self._wanted[model]:
            self._add_due(due)

    # --- problems --------------------------------------------------------------------------------------

    def _pause_s(self, due: Due, error: Refused | Unreachable) -> float:
        """Return how long to wait after a failure. The first version conflict is retried at once."""
        failures = self._failures.get(due, 0)
        self._failures[due] = failures + 1
        if isinstance(error, Refused):
            if error.status == 409 and failures == 0:
                return 0.0
            if error.retry_after_s is not None:
                return min(error.retry_after_s, RETRY_AFTER_MAX_S)
        return min(BACK_OFF_FIRST_S * (1 << min(failures, 16)), BACK_OFF_MAX_S) * self._jitter()

    def _log_problem(self, due: Due, error: Refused | Unreachable) -> None:
        """Log the problem and its remedy at once, then every LOG_S. Transient faults are not logged: a
        version conflict, and a watch that the server ends or has too little history for."""
        status = error.status if isinstance(error, Refused) else 0
        if status in (409, 410) or (due == WATCH and not status and self._failures.get(due, 0) < 2):
            return
        logged_status, logged_at_s = self._logged.get(due, (-1, 0.0))
        if status == logged_status and anyio.current_time() - logged_at_s < LOG_S:
            return
        self._logged[due] = status, anyio.current_time()
        logger.warning("%s: %s", self._task(due), self._advice(due, status, error))

    def _note_success(self, due: Due) -> None:
        self._failures.pop(due, None)
        self._logged.pop(due, None)

    def _task(self, due: Due) -> str:
        match due:
            case "scale", model:
                return f"scaling {self._workload(model)} to {self._wanted[model]}"
            case "end", pod:
                return f"deleting pod {pod}"
        return f"watching the deployments in namespace {self._cluster.namespace}"

    def _advice(self, due: Due, status: int, error: Refused | Unreachable) -> str:
        match status:
            case 401:
                return f"the API server rejects our token, which is read again for each call ({error})"
            case 403:
                return f"our service account lacks the permission; apply ops/kubernetes/rbac.yaml ({error})"
            case 404 if due[0] == "scale":
                return (
                    f"the deployment is missing in namespace {self._cluster.namespace}; apply the model's "
                    f"workload from ops/kubernetes, or take the model out of rift.toml ({error})"
                )
            case 422:
                return f"the API server rejects this number ({error})"
        return f"{error}; trying again"

    def _workload(self, model: str) -> str:
        return self._name.format(slug=slug(model))
