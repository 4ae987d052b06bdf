"""The data folder of one installation, and how its commands find the log.

version     version of the layout; Rift refuses a folder of another version
lock        held by the `rift up` that runs here
secret      signs request ids
dev.key     first key of the first account
rift.toml   settings
rift.duckdb projections; may be deleted at any time
archive/    facts without contents, kept permanently; cannot be rebuilt
nats/       embedded broker: configuration, token, url, monitor, store, reserve
logs/       one file per process

Engines keep sockets, whose paths must be short. They are in a folder of the system's temporary directory,
named after this folder.
"""

import fcntl
import hashlib
import hmac
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from events.ids import SECRET_BYTES
from rift import __version__, nats_server
from rift.errors import RiftError
from rift.nats_server import Address
from rift.log_disk.reserve import Reserve

# Version of the folder's layout, not of Rift. A folder without the file has version 1. It grows with a change
# after which this Rift would misread an older folder, or an older Rift a new one.
VERSION = "1"
REMEDY = (
    "start one with ./ops/run, name its folder with --data or RIFT_DATA, or name a broker with --nats or "
    "RIFT_NATS_URL"
)


class DataDirError(RiftError):
    """The data folder cannot be used; the message gives the reason and the remedy."""


class DataDir:
    """A data folder. It may exist already and hold other files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.nats = self.folder / "nats"
        self.logs = self.folder / "logs"
        self.database = self.folder / "rift.duckdb"
        self.archive = self.folder / "archive"
        digest = hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]
        self.temporary = Path(tempfile.gettempdir()) / f"rift-{digest}"
        self.first_key = self.folder / "dev.key"
        self._lock: int | None = None

    def check(self) -> None:
        """Raise DataDirError if the folder has another version. A missing folder is fine."""
        try:
            version = (self.folder / "version").read_text(errors="replace").strip()
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataDirError(f"{self.folder}/version cannot be read: {error.strerror}") from error
        if version != VERSION:
            raise DataDirError(
                f"{self.folder} is a data folder of version {version!r}, but Rift {__version__} needs "
                f"version {VERSION}: use the Rift that created it, or name another folder with --data"
            )

    def make(self) -> None:
        """Create what is missing. Raises DataDirError."""
        self.check()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            version = self.folder / "version"
            if not version.exists():
                nats_server.write_secret(version, VERSION)
        except OSError as error:
            raise DataDirError(f"the data folder {self.folder} cannot be used: {error.strerror}") from error
        secret = self.folder / "secret"
        if not secret.exists():
            nats_server.write_secret(secret, secrets.token_hex(SECRET_BYTES))

    def lock(self) -> None:
        """Lock the folder until this process ends. Raises DataDirError if another process holds the lock."""
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataDirError(
                f"another `rift up` runs in {self.folder}; stop it, or use another folder with --data"
            ) from error

    def clear_temporary(self) -> None:
        """Remove what the engines of this or an earlier start left behind."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def secret(self) -> bytes:
        """Return the secret that signs request ids. Raises DataDirError."""
        if not self.folder.exists():
            raise DataDirError(f"there is no installation in {self.folder}; {REMEDY}")
        try:
            return bytes.fromhex((self.folder / "secret").read_text().strip())
        except (OSError, ValueError) as error:
            raise DataDirError(f"{self.folder}/secret cannot be read: {error}") from error

    def archive_key(self) -> bytes:
        """Return the key for the content hashes in the archive. Raises DataDirError."""
        return hmac.new(self.secret(), b"archive content", hashlib.sha256).digest()

    def log_address(self, url: str | None, environment: Mapping[str, str]) -> Address:
        """Return the broker's address: `url`, else RIFT_NATS_URL, else the embedded broker.

        Raises DataDirError.
        """
        if url := url or environment.get("RIFT_NATS_URL"):
            parts = [urlsplit(one.strip()) for one in url.split(",")]
            if not all(part.hostname for part in parts):
                raise DataDirError(f"NATS URL must be nats://[TOKEN@]HOST:PORT[,…], got {url!r}")
            hosts = [part.netloc.rpartition("@")[2] for part in parts]
            return Address(",".join(f"nats://{host}" for host in hosts), parts[0].username)
        if address := nats_server.address(self.nats):
            return address
        raise DataDirError(f"there is no installation in {self.folder}; {REMEDY}")

    def reserve(self, url: str | None, environment: Mapping[str, str]) -> Reserve | None:
        """Return the reserve on the log's disk, or None if the log is on another broker's disk."""
        embedded = not (url or environment.get("RIFT_NATS_URL"))
        return Reserve(self.nats / "reserve") if embedded else None
