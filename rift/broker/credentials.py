"""The credential files: one for each role, with its password, in one folder.

A process needs its own role's file only; the broker's configuration has the passwords of all.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from events.jetstream import Access
from rift.broker import roles
from rift.broker.secret_files import create_secret
from rift.errors import RiftError

PASSWORD_BYTES = 32


class CredentialUnusable(RiftError):
    """A role's file is missing or holds no password; the message gives the remedy."""


def ensure(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the password of each role, and create the files that are missing. Raises CredentialUnusable."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in names:
        if not os.path.lexists(folder / name):
            # Not of digits only, which nats-server could take for a number.
            create_secret(folder / name, f"rift-{secrets.token_hex(PASSWORD_BYTES)}")
    return {name: _password(folder / name) for name in names}


def access(folder: Path, role: str, *, tls: Path | None = None) -> Access:
    """Return the access of a role. Raises CredentialUnusable."""
    password = _password(folder / role)
    return Access(
        user=role,
        password=password,
        inbox=roles.inbox(role),
        tls=None if tls is None else str(tls),
        hidden=f"{secret_name(password)}.",
    )


def secret_name(password: str) -> str:
    """Return the part of a subject that only this role and the broker know. It does not tell the password."""
    return hashlib.sha256(f"hidden {password}".encode()).hexdigest()


def _password(file: Path) -> str:
    try:
        text = file.read_text(errors="replace").strip()
    except FileNotFoundError as error:
        raise CredentialUnusable(
            f"{file} is missing, so this process cannot be {file.name} at the broker; `rift up` and "
            "`rift broker config` write it, for a worker if its model is in the rift.toml that they read"
        ) from error
    except OSError as error:
        raise CredentialUnusable(f"{file} cannot be read: {error.strerror}") from error
    if len(text) < PASSWORD_BYTES or not text.isascii() or len(text.split()) != 1:
        raise CredentialUnusable(f"{file} does not hold the password of {file.name} at the broker")
    return text
