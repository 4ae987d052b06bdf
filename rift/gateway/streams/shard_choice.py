"""Which shard a gateway uses: decided once, at its start.

It takes the shard with the fewest live gateways of those that accept requests and are served. (After a
restore, older shards accept none.) A shard is served if the leader supervises it and each model with ready
replicas has one that takes requests from it. Without an answer from a leader it takes the first shard that
accepts requests. An operator may name the shard; then the gateway waits until it is served.
"""

import logging
import math
from collections.abc import Callable, Mapping

import anyio

from events import fleet as fleets
from events import shards
from events.fleet import Fleet
from events.log import Log, LogError
from rift.errors import RiftError
from rift.rpc import AskShards, QuestionRefused, ask

logger = logging.getLogger(__name__)

ANSWER_S = 2.0
RETRY_S = 1.0

# A gateway that waits says so at once, and then this often.
NOTICE_S = 60.0


class ShardUnknown(RiftError):
    """The log has no such shard, or none that accepts requests; the message names those that do."""


async def choose(log: Log, named: int | None, chance: Callable[[], float], stop: anyio.Event) -> int | None:
    """Return the shard to use: `named` once it is served, or None if `stop` is set before. `chance` (0 to 1)
    decides between equals, so that gateways that start together spread out.

    Raises ShardUnknown, LogError.
    """
    accepting = await shards.accepting(log)
    if named is not None and named >= accepting.stop:
        raise ShardUnknown(
            f"there is no shard {named}: the log has {accepting.stop}, numbered from 0; `rift shards add` "
            "opens another"
        )
    if named is not None and named < accepting.start:
        raise ShardUnknown(
            f"shard {named} accepts no requests since the log was restored: use one from {accepting.start} on"
        )
    if len(accepting) == 1 or named == 0:
        return accepting.start
    noticed_s = -math.inf
    while True:
        is_due = anyio.current_time() >= noticed_s + NOTICE_S
        all_served = await _served(log, level=logging.WARNING if is_due else logging.DEBUG)
        served = {shard: gateways for shard, gateways in all_served.items() if shard in accepting}
        if named is None:
            return min(served, key=lambda shard: (served[shard], chance()), default=accepting.start)
        if named in served:
            return named
        if is_due:
            logger.warning("this gateway waits until shard %d is served by the leader and the workers", named)
            noticed_s = anyio.current_time()
        with anyio.move_on_after(RETRY_S):
            await stop.wait()
            return None


async def _served(log: Log, *, level: int) -> Mapping[int, int]:
    """Return the number of live gateways of each shard that is served; none if no leader answers."""
    try:
        rows = await ask(log, AskShards(), timeout_s=ANSWER_S)
    except (LogError, QuestionRefused) as error:
        logger.log(level, "the leader does not tell which shards it supervises: %s", error)
        return {}
    fleet = await fleets.read(log)
    return {row["shard"]: row["gateways"] for row in rows if has_workers(fleet, row["shard"])}


def has_workers(fleet: Fleet, shard: int) -> bool:
    """Return whether each model with ready replicas has one that takes requests from the shard."""
    ready = [
        [replica.shards for replica in replicas.values() if replica.state == "ready"]
        for replicas in fleet.replicas.values()
    ]
    return all(max(each) > shard for each in ready if each)
