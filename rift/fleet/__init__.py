"""Drivers: they bring each model's replicas to the number that was decided. How many a model needs, and why,
must not be known here.

    decision_reader  tells a driver what the fleet's stream decided
    local            processes of this machine
    kubernetes       one workload a model
    cluster          the Kubernetes API
"""

from typing import Protocol


class Driver(Protocol):
    """Holds each model to a number of replicas, until told another."""

    def want(self, model: str, replicas: int) -> None:
        """From now on the model shall have so many replicas. Returns at once; the newest number holds."""

    def lost(self, model: str, replica: str) -> None:
        """This replica was given up: end whatever is left of it. What is wanted still holds, so another takes
        its place. One that is not known here is nobody's."""

    async def run(self) -> None:
        """Bring it about until cancelled; what fails is tried again, later each time, for ever."""
