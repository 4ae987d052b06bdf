"""The fleet: elections, decisions on the number of replicas, and the replicas' own reports."""

from typing import Literal

from events.schema.shapes import Digest, Event, Natural


class ControlElected(Event, frozen=True, kw_only=True, omit_defaults=True):
    """`control` leads from this event on, if `epoch` is higher than all before it.

    A candidate writes the epoch after the last one that it has read, so the first of two candidates in the
    log is elected.
    """

    epoch: Natural
    control: str


class ScaleDecided(Event, frozen=True, kw_only=True, omit_defaults=True):
    """The model is to have `to_replicas`.

    It counts if `epoch` is the leader's, `from_replicas` is the last decision, and `positions` include that
    decision, so a late or repeated one has no effect. `inputs` holds everything that the decision depends on;
    they can be computed again from the log up to `positions` (the last sequence of each stream) and from
    `decided_at_ns`.
    """

    model: str
    from_replicas: Natural
    to_replicas: Natural
    reason: str
    policy: str
    positions: dict[str, int]
    decided_at_ns: Natural
    inputs: dict[str, int]
    epoch: Natural = 0
    # Sequence of the ScalePlanned whose floor held, 0 without one.
    plan: Natural = 0


class ScalePlanned(Event, frozen=True, kw_only=True, omit_defaults=True):
    """The model's floor until the next plan: its fewest replicas, and its fewest after a start from zero.

    A replay of `requests` from `from_ns` to `planned_at_ns` gave it. `candidates` and `restarts` are each
    number that was tried and how many requests it served late. The replay can be repeated from the log up to
    `positions`; `sha256` is that of its input, and `inputs` holds the settings among it. It counts if `epoch`
    is the leader's. A plan that says the same as the last one is not stored.

    `shard_positions` are those of shards 0, 1, 2 and so on; `positions` has the others. With names, those of
    64 shards alone would take 1.3 KB.
    """

    model: str
    floor: Natural
    restart: Natural
    policy: str
    positions: dict[str, int]
    from_ns: Natural
    planned_at_ns: Natural
    requests: Natural
    sha256: Digest
    inputs: dict[str, int]
    candidates: tuple[tuple[Natural, Natural], ...] = ()
    restarts: tuple[tuple[Natural, Natural], ...] = ()
    # Even the most replicas that the settings allow would have missed the share.
    is_missed: bool = False
    epoch: Natural = 0
    shard_positions: tuple[Natural, ...] = ()


class ReplicaStarting(Event, frozen=True, kw_only=True, omit_defaults=True):
    """`metrics` is the address of its metrics, HOST:PORT, empty if it has none."""

    replica: str
    model: str
    engine: str
    hardware: str = "cpu"
    gpus: Natural = 0
    # The price of the whole replica per hour.
    hour_nanousd: Natural = 0
    metrics: str = ""


class ReplicaReady(Event, frozen=True, kw_only=True, omit_defaults=True):
    replica: str
    model: str
    slots: Natural
    start_ns: Natural
    context_tokens: Natural = 0


class ReplicaReported(Event, frozen=True, kw_only=True, omit_defaults=True):
    replica: str
    model: str
    running: Natural
    waiting: Natural
    kv_used_tokens: Natural = 0
    shards: Natural = 1


class ReplicaDraining(Event, frozen=True, kw_only=True, omit_defaults=True):
    replica: str
    model: str


class ReplicaStopped(Event, frozen=True, kw_only=True, omit_defaults=True):
    """`lived_ns` is the time since its `ReplicaStarting`, by the replica's clock."""

    replica: str
    model: str
    why: str = ""
    lived_ns: Natural = 0


class ReplicaLost(Event, frozen=True, kw_only=True, omit_defaults=True):
    """The replica ended unasked, or is silent, because of its host or of a failure of its engine."""

    replica: str
    model: str
    why: str = ""
    cause: Literal["host", "engine"] = "engine"
