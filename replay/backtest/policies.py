"""Policies for a simulation: Rift's `decide`, Knative's autoscaler, a fixed number.

Each implements `simulator.Scaling`. The policy that knows the future is in `oracle.py`.
"""

import math
from collections import deque

import msgspec

from events.fleet import PLANS, Planned
from replay.backtest.simulator import SimulatedFleet
from replay.scaling.demand import Demand, Demands, Replicas, Reports
from replay.scaling.floor import PLAN_NS, has_floor, held, is_new, planned, terms_of, too_long
from replay.scaling.hardware import Hardware
from replay.scaling.policy import POLICY, Policy, decide

# The intervals between decisions of the autoscaler, and between reports of a worker.
TICK_S = 2.0
REPORT_S = 10.0


class Ours:
    """The `decide` of production, fed by the same events."""

    tick_s = TICK_S

    def __init__(self, policy: Policy, hardware: Hardware, *, start_s: float) -> None:
        self.demands: Demands | None = Demands(long_tokens=too_long(policy.ttft_ms, hardware))
        self._demands = self.demands
        self._policy = policy
        self._hardware = hardware
        self._start_ns = int(start_s * 1e9)
        self._decided_at_ns = 0
        self._reports = Reports(hardware)
        self._report_s = 0.0
        self._plans: list[Planned] = []
        self._plan_ns = 0

    def decide(self, now_s: float, fleet: SimulatedFleet) -> int | None:
        now_ns = int(now_s * 1e9)
        if now_s >= self._report_s:
            self._report_s = now_s + REPORT_S
            for replica in (*fleet.replicas.ready, *fleet.replicas.draining):
                self._reports.reported(now_ns, replica.load)
        running_sum, tokens_per_ks_sum = self._reports.at(now_ns)
        replicas = Replicas(
            wanted=fleet.wanted,
            ready=len(fleet.replicas.ready),
            starting=len(fleet.replicas.starting),
            draining=len(fleet.replicas.draining),
            start_ns=self._start_ns,
            decided_at_ns=self._decided_at_ns,
            running_sum=running_sum,
            tokens_per_ks_sum=tokens_per_ks_sum,
        )
        demand = self._demands.at(now_ns)
        if now_ns >= self._plan_ns and has_floor(self._policy, self._hardware):
            self._plan_ns = now_ns + PLAN_NS
            self._plan(demand, replicas)
        floor = held(self._plans, now_ns)
        decision = decide(demand, replicas, self._policy, self._hardware, floor)
        if decision is None:
            return None
        self._decided_at_ns = now_ns
        return decision.to_replicas

    def _plan(self, demand: Demand, replicas: Replicas) -> None:
        terms = terms_of(demand, replicas, self._policy, self._hardware, self._plans)
        plan = planned(self._demands.arrivals.at(demand.now_ns), terms)
        if is_new(plan, self._plans, POLICY):
            self._plans = self._plans[1 - PLANS :]
            sequence = self._plans[-1].sequence + 1 if self._plans else 1
            self._plans.append(
                Planned(sequence, demand.now_ns, plan.replicas, plan.restart, plan.is_missed, POLICY)
            )


class Static:
    """Keeps a fixed number of replicas from the first request on."""

    tick_s = TICK_S
    demands: Demands | None = None

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def decide(self, now_s: float, fleet: SimulatedFleet) -> int | None:
        return self._replicas


class KnativeSettings(msgspec.Struct, frozen=True):
    """Settings of the Knative Pod Autoscaler, with its defaults; `target` is one replica's concurrency."""

    target: float
    stable_s: int = 60
    panic_s: int = 6
    panic_threshold: float = 2.0
    grace_s: int = 30
    up_rate: float = 1000.0
    down_rate: float = 2.0


class _Average:
    """The mean concurrency over a window of seconds, computed like Knative's buckets.

    Until a whole window has passed since the first second written, the mean covers only the seconds since
    then. After a window without a value, the average restarts.
    """

    def __init__(self, window_s: int) -> None:
        self._window_s = window_s
        self._seconds: deque[tuple[int, float]] = deque()
        self._first = 0

    def write(self, second: int, value: float) -> None:
        if not self._seconds or second - self._seconds[-1][0] >= self._window_s:
            self._first = second
            self._seconds.clear()
        self._seconds.append((second, value))
        while self._seconds[0][0] <= second - self._window_s:
            self._seconds.popleft()

    def value(self) -> float:
        if not self._seconds:
            return 0.0
        valid = min(self._seconds[-1][0] - self._first + 1, self._window_s)
        return sum(value for _, value in self._seconds) / valid


class Knative:
    """The Knative Pod Autoscaler on concurrency.

    It follows the documentation and pkg/autoscaler/scaling/autoscaler.go,
    pkg/autoscaler/aggregation/bucketing.go and pkg/reconciler/autoscaling/kpa/scaler.go.

    Each second it records the mean concurrency of the last second, including waiting requests. Every other
    second it computes concurrency / target over the stable window, rounded up. If the same quotient over the
    panic window is at least twice the ready replicas, it panics: it takes the larger of the two numbers and
    never scales down, until the quotient has been below that threshold for a stable window. A request that
    arrives at zero replicas triggers a decision at once. The last replica stops after an empty stable window
    and the grace period.
    """

    tick_s = 1.0
    demands: Demands | None = None

    def __init__(self, settings: KnativeSettings) -> None:
        self._settings = settings
        self._stable = _Average(settings.stable_s)
        self._panic = _Average(settings.panic_s)
        self._area_s = 0.0
        self._second = 0
        self._panic_at_s: float | None = None
        self._panic_wanted = 0
        self._active_s: float | None = None
        self._inactive_s: float | None = None

    def decide(self, now_s: float, fleet: SimulatedFleet) -> int | None:
        if not fleet.wanted and fleet.concurrency.under_way == 1:
            # Knative's activator reports the first request that it holds.
            self._write(self._second, 1.0)
            self._area_s = fleet.concurrency.integral_s
            return self._scaled(now_s, fleet)
        self._second += 1
        concurrency = fleet.concurrency.integral_s - self._area_s
        self._area_s = fleet.concurrency.integral_s
        if fleet.wanted or fleet.concurrency.under_way:
            self._write(self._second, concurrency)
        return self._scaled(now_s, fleet) if self._second % 2 == 0 else None

    def _write(self, second: int, concurrency: float) -> None:
        self._stable.write(second, concurrency)
        self._panic.write(second, concurrency)

    def _scaled(self, now_s: float, fleet: SimulatedFleet) -> int | None:
        desired = self.desired(now_s, len(fleet.replicas.ready), self._stable.value(), self._panic.value())
        return self._at_zero(now_s, fleet, desired)

    def desired(self, now_s: float, ready: int, stable: float, panic: float) -> int:
        """Return the desired replicas for the two averages, like `Scale` of Knative's autoscaler."""
        settings = self._settings
        pods = max(1, ready)
        most = math.ceil(settings.up_rate * pods)
        least = math.floor(pods / settings.down_rate)
        by_stable = math.ceil(stable / settings.target)
        by_panic = math.ceil(panic / settings.target)
        desired = min(max(by_stable, least), most)
        if by_panic / pods >= settings.panic_threshold:
            self._panic_at_s = now_s
        elif self._panic_at_s is not None and self._panic_at_s + settings.stable_s < now_s:
            self._panic_at_s = None
            self._panic_wanted = 0
        if self._panic_at_s is not None:
            desired = max(desired, min(max(by_panic, least), most))
            self._panic_wanted = desired = max(desired, self._panic_wanted)
        return desired

    def _at_zero(self, now_s: float, fleet: SimulatedFleet, desired: int) -> int | None:
        if fleet.replicas.ready and self._active_s is None:
            self._active_s = now_s
        if desired:
            if self._inactive_s is not None:
                self._inactive_s = None
                self._active_s = now_s
            return desired
        if not fleet.replicas.ready or self._active_s is None:
            return None
        if self._inactive_s is None:
            if now_s - self._active_s < self._settings.stable_s:
                return 1
            self._inactive_s = now_s
        if now_s - self._inactive_s < self._settings.grace_s:
            return None
        self._active_s = self._inactive_s = None
        return 0
