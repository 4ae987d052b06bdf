"""What control does through others: it answers SQL in a process of its own, and scales with a driver."""

import os
import secrets
from argparse import Namespace
from pathlib import Path

from rift.broker.roles import READER
from rift.cli.connection import installation
from rift.control.sql.frames import SqlSetup
from rift.fleet import Driver
from rift.fleet.cluster import Cluster
from rift.fleet.kubernetes import KubernetesFleet
from rift.settings import Settings


def sql_setup(options: Namespace, settings: Settings, database: Path) -> SqlSetup:
    """Return what the process that answers SQL needs. Its file is beside control's `database`."""
    folder = installation(options)
    address = folder.log_address(options.nats, os.environ)
    return SqlSetup(
        database=str(database.with_stem(f"{database.stem}-sql").absolute()),
        url=address.url,
        access=address.access(READER),
        archive=str(folder.archive),
        archive_key=folder.archive_key(),
        log_format=settings.log_format,
    )


def driver(settings: Settings) -> Driver | None:
    """Return what the leader scales replicas with, or None if another process starts them.

    Raises ClusterError.
    """
    if settings.fleet != "kubernetes":
        return None
    return KubernetesFleet(Cluster.around(os.environ), jitter=secrets.SystemRandom().random)
