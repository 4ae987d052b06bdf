"""The settings of a control process."""

from collections.abc import Mapping
from typing import NamedTuple

from rift.control.scaling_config import ModelScaling
from rift.control.sql.frames import SqlSetup
from rift.fleet import Driver


class ControlConfig(NamedTuple):
    """`scaling` holds the served models; `driver` is set if control itself starts and ends replicas; `sql`
    says how the process that answers SQL finds log and files."""

    retention_days: int = 7
    scaling: Mapping[str, ModelScaling] = {}
    driver: Driver | None = None
    sql: SqlSetup | None = None
