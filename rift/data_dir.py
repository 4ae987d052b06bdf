"""The data folder of one installation, and how its commands find the log.

version     version of the layout; Rift refuses a folder of another version
lock        held by the `rift up` that runs here
secret      signs request ids
signing.key signs archived segments and closed months; its public key is in the book
dev.key     first key of the first account; dev.key.ID is an earlier one, which is no longer valid
rift.toml   settings
rift.duckdb projections; rebuilt from the log and the archive
rift-sql.duckdb  the same again for operators' SQL; may be deleted while Rift is stopped
archive/    facts without contents, kept permanently; cannot be rebuilt
nats/       embedded broker: configuration, credentials, url, monitor, store, reserve
logs/       one file per process

The parts belong together: `rift backup` saves those that cannot be made again, and `rift up` refuses to start
without a part that the others need. All files are readable by their owner only.

Engines keep sockets, whose paths must be short. They are in a folder of the system's temporary directory,
named after this folder.
"""

import fcntl
import hashlib
import hmac
import os
import pwd
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from events.ids import SECRET_BYTES
from replay.archive.signatures import KEY_BYTES, SigningKey
from rift import __version__, nats_server
from rift.broker import secret_files
from rift.errors import RiftError
from rift.log_disk.reserve import Reserve
from rift.nats_server import Address

# Version of the folder's layout, not of Rift. A folder without the file has version 1. It grows with a change
# after which this Rift would misread an older folder, or an older Rift a new one.
VERSION = "1"
# In place of the version while `rift restore` fills the folder.
RESTORING = "restoring"
REMEDY = (
    "start one with ./ops/run, name its folder with --data or RIFT_DATA, or name a broker with --nats or "
    "RIFT_NATS_URL"
)


RESTORE = (
    "restore the whole folder from one backup, or name another folder with --data; to begin a new "
    "installation here, first move everything except rift.toml out of the folder"
)

# DuckDB takes a backslash for a slash, and a question mark for the end of a file's name; it needs UTF-8.
# nats-server's configuration has no escape for most control characters.
# What stands before the host of a URL.
CREDENTIAL = re.compile(r"[^/,]*@")
UNUSABLE = re.compile(r"[\x00-\x1f\\?\ud800-\udfff]")

# Only these are tightened: the folder may hold other files.
DATABASES = ("rift.duckdb", "rift-sql.duckdb")
PART_PREFIXES = ("dev.key.", *(f"{name}." for name in DATABASES))
JOURNALS = tuple(f"{name}.wal" for name in DATABASES)
FILES = ("version", "lock", "secret", "signing.key", "dev.key", "rift.toml", *DATABASES, *JOURNALS)
PARTS = (*FILES, "archive", "nats", "logs")
# Each start makes them anew if they are missing.
MADE_FILES = (
    "lock",
    *(f"nats/{name}" for name in ("nats.conf", "authorization.conf", "url", "monitor", "reserve")),
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
        digest = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:12]
        # Any user could create a folder of a known name in the system's temporary directory first.
        self._temporary_prefix = f"rift-{digest}-"
        self.temporary = Path(tempfile.gettempdir()) / f"{self._temporary_prefix}{secrets.token_hex(4)}"
        self.first_key = self.folder / "dev.key"
        self._lock: int | None = None

    def check(self) -> None:
        """Raise DataDirError if the folder has another version, a path that a part of Rift cannot open, or
        something else in place of a file. A missing folder is fine."""
        if (found := UNUSABLE.search(str(self.folder))) is not None:
            raise DataDirError(
                f"the path {str(self.folder)!r} has {found[0]!r} in it, which the database or the broker "
                "cannot open: rename that folder, or name another one with --data"
            )
        self._check_files()
        try:
            version = (self.folder / "version").read_text(errors="replace").strip()
        except FileNotFoundError:
            return
        except NotADirectoryError as error:
            raise DataDirError(f"{self.folder} is not a folder: name another one with --data") from error
        except OSError as error:
            self._check_owner()
            raise DataDirError(f"{self.folder}/version cannot be read: {error.strerror}") from error
        if version == RESTORING:
            raise DataDirError(
                f"a restore into {self.folder} did not finish: remove the folder, and run `rift restore` "
                "again"
            )
        if version != VERSION:
            raise DataDirError(
                f"{self.folder} is a data folder of version {version!r}, but Rift {__version__} needs "
                f"version {VERSION}: use the Rift that created it, or name another folder with --data"
            )

    def make(self) -> None:
        """Create what is missing. Raises DataDirError if the folder cannot be used or lacks a part."""
        self.check()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_owner()
            self._check_shared()
            self._check_parts()
            self.logs.mkdir(mode=0o700, exist_ok=True)
            for name, text in (
                ("version", VERSION),
                ("secret", secrets.token_hex(SECRET_BYTES)),
                ("signing.key", secrets.token_hex(KEY_BYTES)),
            ):
                if not os.path.lexists(self.folder / name):
                    # Another first start may have created it since. One of them gets the lock.
                    with suppress(FileExistsError):
                        secret_files.create_secret(self.folder / name, text)
        except FileExistsError as error:
            raise DataDirError(
                f"{error.filename2 or error.filename} is in the way: move it, or name another folder with "
                "--data"
            ) from error
        except OSError as error:
            raise DataDirError(
                f"the data folder {self.folder} cannot be used ({error.strerror}); name another one with "
                "--data"
            ) from error
        self.secret()

    def _check_files(self) -> None:
        """Raise DataDirError for a folder, or for a pipe, at which a reader would wait for ever."""
        made = [*(self.folder / name for name in MADE_FILES), *self.logs.glob("*.log")]
        made += self.nats.glob("credentials/*")
        for path in (*(self.folder / name for name in FILES), *made):
            try:
                mode = path.stat().st_mode
            except OSError:
                # Missing, or its reader reports it.
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
                remedy = "move it away, and the next start makes it" if path in made else RESTORE
                raise DataDirError(f"{path} is not a file: {remedy}")

    def _check_owner(self) -> None:
        """Raise DataDirError if the folder or a part belongs to another user: that user could change it."""
        user = _user(os.geteuid())
        # Whoever knows the broker's passwords can forge bills.
        names = (*PARTS, "nats/store", "nats/credentials", *MADE_FILES)
        for path in (self.folder, self.folder.resolve(), *(self.folder / name for name in names)):
            if not os.path.lexists(path) or (owner := path.lstat().st_uid) == os.geteuid():
                continue
            # Root may manage the settings of a service.
            if owner or path.name != "rift.toml":
                raise DataDirError(
                    f"{path} belongs to user {_user(owner)}, but Rift runs as {user}: start Rift as "
                    f"{_user(owner)}, run chown -R {user} {self.folder}, or name another folder with --data"
                )

    def _check_shared(self) -> None:
        """Raise DataDirError if the folder was not made for Rift and other users may need it, such as /etc.

        It would be closed to them.
        """
        mode = self.folder.stat().st_mode
        if not mode & 0o077 or os.path.lexists(self.folder / "version"):
            return
        other = next((path for path in self.folder.iterdir() if not _is_part(path.name)), None)
        if other is not None or mode & stat.S_ISVTX:
            holds = f" and holds {other.name}" if other else ""
            raise DataDirError(
                f"{self.folder} is open to other users{holds}, but a data folder is closed to them: name a "
                f"folder of its own with --data, or, if only Rift needs it, run chmod go-rwx {self.folder}"
            )

    def _check_parts(self) -> None:
        """Raise DataDirError if a part is missing without which the others are of no use."""
        store = self.nats / "store"
        for path in (self.archive, self.nats, store):
            if os.path.lexists(path) and not path.is_dir():
                raise DataDirError(f"{path} is not a folder: {RESTORE}")
        known = [path for path in (self.first_key, self.database, self.archive, store) if _holds_data(path)]
        for path in (self.folder / "secret", store):
            if known and not _holds_data(path):
                raise DataDirError(f"there is {known[0]}, but {path} is missing or empty: {RESTORE}")

    def tighten(self) -> int:
        """Close the folder and its parts to other users, and return how many files and folders were open.

        A closed folder protects what it holds, so it is not searched. Links are not followed.
        """
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            names = [name for name in os.listdir(handle) if _is_part(name)]
            return _close(handle) + sum(_tighten(handle, name) for name in names)
        finally:
            os.close(handle)

    def open_parent(self) -> Path | None:
        """Return a folder above this one in which any user can replace it, None if there is none."""
        for parent in self.folder.resolve().parents:
            mode = parent.stat().st_mode
            # In a sticky folder, such as /tmp, only the owner can rename an entry.
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                return parent
        return None

    def lock(self) -> None:
        """Lock the folder until this process ends. Raises DataDirError if another process holds the lock."""
        try:
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataDirError(
                f"another `rift up` runs in {self.folder}; stop it, or use another folder with --data"
            ) from error
        except OSError as error:
            raise DataDirError(f"{self.folder}/lock cannot be used: {error.strerror}") from error

    def is_locked(self) -> bool:
        """Return whether a `rift up` runs here."""
        try:
            handle = os.open(self.folder / "lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def clear_temporary(self) -> None:
        """Remove what the engines of this or an earlier start left behind."""
        for path in self.temporary.parent.glob(f"{self._temporary_prefix}*"):
            shutil.rmtree(path, ignore_errors=True)

    def secret(self) -> bytes:
        """Return the secret that signs request ids. Raises DataDirError."""
        if not self.folder.exists():
            raise DataDirError(
                f"there is no installation in {self.folder}; start one with ./ops/run, or name the folder "
                "that holds its `secret` with --data or RIFT_DATA"
            )
        file = self.folder / "secret"
        try:
            secret = bytes.fromhex(file.read_text().strip())
        except OSError as error:
            raise DataDirError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError:
            secret = b""
        # Request ids that anyone can sign would give away other accounts' answers.
        if len(secret) < SECRET_BYTES:
            raise DataDirError(f"{file} does not hold {2 * SECRET_BYTES} hex digits: {RESTORE}")
        return secret

    def signing_key(self) -> SigningKey | None:
        """Return the key that control signs with, None if there is none. Raises DataDirError."""
        file = self.folder / "signing.key"
        try:
            return SigningKey(bytes.fromhex(file.read_text().strip()))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataDirError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise DataDirError(
                f"{file} does not hold {2 * KEY_BYTES} hex digits: restore it, or delete it, and the next "
                "`rift up` makes another one"
            ) from error

    def keep_first_key(self, text: str) -> None:
        """Write the first key's file. Raises FileExistsError."""
        secret_files.create_secret(self.first_key, text)

    def archive_key(self) -> bytes:
        """Return the key for the content hashes in the archive. Raises DataDirError."""
        return hmac.new(self.secret(), b"archive content", hashlib.sha256).digest()

    def log_address(self, url: str | None, environment: Mapping[str, str]) -> Address:
        """Return the broker's address: `url`, else RIFT_NATS_URL, else the embedded broker.

        Raises DataDirError.
        """
        if url := url or environment.get("RIFT_NATS_URL"):
            try:
                parts = [urlsplit(one.strip()) for one in url.split(",")]
                is_valid = all(part.hostname and part.port != 0 for part in parts)
            except ValueError:
                is_valid = False
            if not is_valid:
                shown = CREDENTIAL.sub("…@", url)
                raise DataDirError(f"NATS URL must be nats://[TOKEN@]HOST:PORT[,…], got {shown!r}")
            hosts = [part.netloc.rpartition("@")[2] for part in parts]
            return Address(
                ",".join(f"nats://{host}" for host in hosts),
                token=parts[0].username,
                credentials=_folder(environment, "RIFT_NATS_CREDENTIALS"),
                tls=_folder(environment, "RIFT_NATS_TLS"),
            )
        if address := nats_server.address(self.nats):
            return address
        raise DataDirError(f"there is no installation in {self.folder}; {REMEDY}")

    def reserve(self, url: str | None, environment: Mapping[str, str]) -> Reserve | None:
        """Return the reserve on the log's disk, or None if the log is on another broker's disk."""
        embedded = not (url or environment.get("RIFT_NATS_URL"))
        return Reserve(self.nats / "reserve") if embedded else None


def _folder(environment: Mapping[str, str], variable: str) -> Path | None:
    """Return the folder that a variable names, None if it names none. Raises DataDirError."""
    if not (name := environment.get(variable)):
        return None
    if not (folder := Path(name)).is_dir():
        raise DataDirError(f"{variable} must name a folder, got {name!r}")
    return folder


def _is_part(name: str) -> bool:
    return name in PARTS or name.startswith(PART_PREFIXES)


def _holds_data(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _tighten(folder: int, name: str) -> int:
    """Close an entry of an open folder to other users, and return how many files and folders were open."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        # A link, a socket, or gone.
        return 0
    try:
        changed = _close(handle)
        if changed and stat.S_ISDIR(os.fstat(handle).st_mode):
            changed += sum(_tighten(handle, entry) for entry in os.listdir(handle))
        return changed
    finally:
        os.close(handle)


def _close(handle: int) -> int:
    """Take the rights of group and others away from a file of ours. Return 1 if there were any, else 0."""
    status = os.fstat(handle)
    if status.st_uid != os.geteuid() or not status.st_mode & 0o077:
        return 0
    os.fchmod(handle, status.st_mode & 0o700)
    return 1
