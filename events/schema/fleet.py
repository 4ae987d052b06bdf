"""The fleet: who leads, how many replicas each model shall have and why, and what became of each."""

from typing import Literal

from events.schema.shapes import Event, Natural


class ControlElected(Event, frozen=True, kw_only=True, omit_defaults=True):
    """`control` leads from here on. Who stands names the epoch after the last that it has read; it counts if
    `epoch` is higher than all before it: of two that stand, the first in the log is elected."""

    epoch: Natural
    control: str


class ScaleDecided(Event, frozen=True, kw_only=True, omit_defaults=True):
    """From now on the model shall have `to_replicas`. It counts if `epoch` is the leader's, `from_replicas`
    is what was decided last, and `positions` hold that: a late or repeated word is nobody's.

    `inputs` is all that the decision followed from; the log up to `positions` (the last sequence of each
    stream) and the time `decided_at_ns` say them again.
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


class ReplicaStarting(Event, frozen=True, kw_only=True, omit_defaults=True):
    replica: str
    model: str
    engine: str
    hardware: str = "cpu"
    gpus: Natural = 0
    # What the whole replica costs an hour.
    hour_nanousd: Natural = 0


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


class ReplicaDraining(Event, frozen=True, kw_only=True, omit_defaults=True):
    replica: str
    model: str


class ReplicaStopped(Event, frozen=True, kw_only=True, omit_defaults=True):
    """`lived_ns` counts from its `ReplicaStarting`, by its own clock."""

    replica: str
    model: str
    why: str = ""
    lived_ns: Natural = 0


class ReplicaLost(Event, frozen=True, kw_only=True, omit_defaults=True):
    """It ended, or is silent, and nobody asked for that: by its host, or by its own engine's failure."""

    replica: str
    model: str
    why: str = ""
    cause: Literal["host", "engine"] = "engine"
