"""The parts of a replica, for those that watch it."""

from typing import Literal

import msgspec

from rift.engines import Engine
from rift.worker.slots import UNBOUNDED, Slots
from rift.worker.worker import Worker


class Serving(msgspec.Struct):
    """A worker for each shard and, once the engine is ready, the engine and the slots that they share.
    No requests are taken while `unfilled_max` tokens of prompts wait in the engine."""

    state: Literal["starting", "ready", "draining"] = "starting"
    workers: list[Worker] = []
    engine: Engine | None = None
    slots: Slots | None = None
    unfilled_max: int = UNBOUNDED
