"""The settings of a control process."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rift.control.scaling_config import ModelScaling
from rift.fleet import Driver


class ControlConfig(NamedTuple):
    """`scaling` holds the served models; `driver` is set if control itself starts and ends replicas."""

    shards: Sequence[int] = (0,)
    retention_days: int = 7
    scaling: Mapping[str, ModelScaling] = {}
    driver: Driver | None = None
