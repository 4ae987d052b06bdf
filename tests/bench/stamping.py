"""`rift worker` with a simulated engine whose tokens contain the time at which they were generated.

The stamp is CLOCK_MONOTONIC in nanoseconds, which all processes of a machine share, so the reader of a token
can compute its delay.
"""

import sys
import time
from typing import Any

from rift import cli
from rift.catalogue import Model, Pace, Profile
from rift.engines.sim import SimEngine

PROFILE = Profile(sim=Pace(step_us=100_000, running_max=8192))


class StampDecoder:
    def feed(self, token_id: int) -> str:
        return f" {time.monotonic_ns()}"

    def flush(self) -> str:
        return ""


if __name__ == "__main__":
    start = SimEngine.__init__

    def stamping(engine: Any, model: Model, profile: Profile) -> None:
        start(engine, model, PROFILE)

    SimEngine.__init__ = stamping
    # Measure the gateway, not Python's speed at tokenizing and hashing a megabyte.
    SimEngine.encode = lambda engine, prompt, *, raw, tokens_max: [0]
    SimEngine.decoder = lambda engine: StampDecoder()
    sys.exit(cli.main(sys.argv[1:]))
