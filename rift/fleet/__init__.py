"""Drivers hold each model at the number of replicas that the leader decided. The decision itself must not
live here.

    decision_reader  passes decisions and losses from the fleet's stream to a driver
    local            processes on this machine
    kubernetes       one Deployment per model
    cluster          the Kubernetes API
"""

from typing import Protocol


class Driver(Protocol):
    def want(self, model: str, replicas: int) -> None:
        """Set a model's number of replicas. Returns at once; the newest number holds."""

    def lost(self, model: str, replica: str, why: str) -> None:
        """End whatever is left of a lost replica; another one replaces it. An unknown replica is ignored."""

    async def run(self) -> None:
        """Start and end replicas until cancelled. A failure is retried for ever, with longer pauses."""
