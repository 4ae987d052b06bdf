"""The settings of a control process."""

from collections.abc import Mapping
from typing import NamedTuple

from replay.archive.signatures import SigningKey
from rift.control.scaling_config import ModelScaling
from rift.control.sql.frames import SqlSetup
from rift.fleet import Driver
from rift.log_disk.reserve import Reserve
from rift.metrics.address import Address


class ControlConfig(NamedTuple):
    """`scaling` holds the served models; `driver` is set if control itself starts and ends replicas; `sql`
    says how the process that answers SQL finds log and files. `metrics` is where to serve metrics, `reserve`
    that of the log's disk, None if the log is another installation's. Without `signing_key` nothing is
    signed."""

    retention_days: int = 7
    scaling: Mapping[str, ModelScaling] = {}
    driver: Driver | None = None
    sql: SqlSetup | None = None
    metrics: Address | None = None
    reserve: Reserve | None = None
    signing_key: SigningKey | None = None
