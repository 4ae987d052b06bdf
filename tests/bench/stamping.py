"""`rift worker` with a simulated engine whose every token says when it was generated.

The stamp is CLOCK_MONOTONIC in nanoseconds, which all processes of a machine share: who reads the token
knows how long it was on its way.
"""

import sys
import time
from typing import Any

from rift import cli
from rift.catalogue import Model, Pace, Profile
from rift.engines.sim import SimEngine

PROFILE = Profile(sim=Pace(step_us=100_000, running_max=8192))


class Stamps:
    def feed(self, token_id: int) -> str:
        return f" {time.monotonic_ns()}"

    def flush(self) -> str:
        return ""


if __name__ == "__main__":
    start = SimEngine.__init__

    def stamping(engine: Any, model: Model, profile: Profile) -> None:
        start(engine, model, PROFILE)

    SimEngine.__init__ = stamping
    # The gateway is measured, not how slowly Python tokenizes and hashes a megabyte.
    SimEngine.encode = lambda engine, prompt, *, raw: [0]
    SimEngine.decoder = lambda engine: Stamps()
    sys.exit(cli.main(sys.argv[1:]))
