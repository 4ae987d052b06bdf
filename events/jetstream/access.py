"""Connections: how a process proves to the broker who it is, and how it knows the broker."""

import ssl
from pathlib import Path
from typing import Any

import anyio
import msgspec
import nats.errors

from events.errors import reason
from events.jetstream.connection import CLOSE_S, JetStream
from events.log import LogError

# A broker that is just starting answers in well under a second; callers that accept more must retry.
CONNECT_S = 5
RECONNECT_S = 0.1


class Access(msgspec.Struct, frozen=True):
    """A token, or a user with a password. `inbox` is the prefix of the subjects at which answers arrive.

    `tls` is a folder with `ca.pem`, and with `cert.pem` and `key.pem` if the broker asks for a certificate.
    `hidden` is what the names of API calls that remove records begin with, if the broker hides them.
    """

    token: str | None = None
    user: str | None = None
    password: str | None = None
    inbox: str = "_INBOX"
    tls: str | None = None
    hidden: str = ""

    def options(self) -> dict[str, Any]:
        """Return the client library's options. Raises OSError, ssl.SSLError for an unusable certificate."""
        context = None if self.tls is None else _context(Path(self.tls))
        return {
            "token": self.token,
            "user": self.user,
            "password": self.password,
            "inbox_prefix": self.inbox,
            "tls": context,
        }


def _context(folder: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    if (certificate := folder / "cert.pem").exists():
        context.load_cert_chain(certificate, folder / "key.pem")
    return context


class AccessRefused(LogError):
    """A broker is there, and it refuses this process, or this process does not trust it."""


def _unconnected(url: str, access: Access, problem: Exception) -> LogError:
    if isinstance(problem, ssl.SSLCertVerificationError):
        known = "this machine" if access.tls is None else f"{access.tls}/ca.pem"
        return AccessRefused(
            f"the NATS server at {url} has a certificate that {known} does not confirm: {reason(problem)}"
        )
    # A broker that refuses a password closes the socket, often before its reason was read.
    is_ended = isinstance(problem, BrokenPipeError | ConnectionResetError)
    if is_ended or "authorization violation" in str(problem).lower():
        who = "a process without user and password" if access.user is None else f"user {access.user}"
        return AccessRefused(f"the NATS server at {url} refuses {who}: {reason(problem)}")
    return LogError(f"no NATS server answers at {url}: {reason(problem)}")


async def connect(url: str, access: Access, *, name: str) -> JetStream:
    """Return the log at `url` (several with commas), which reconnects while it is open. Raises LogError."""
    try:
        options = access.options()
    except OSError as error:  # those of TLS are among them
        raise AccessRefused(f"the certificates in {access.tls} cannot be used: {reason(error)}") from error
    opened = JetStream(access.hidden)
    addresses = url.split(",")
    opened.untried = len(addresses)
    with anyio.move_on_after(CONNECT_S) as scope:
        opened.connecting = scope
        try:
            await opened.client.connect(
                addresses,
                name=name,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_S,  # type: ignore[arg-type]  # the client accepts a float
                # One that hangs leaves time for the others.
                connect_timeout=CONNECT_S / len(addresses),  # type: ignore[arg-type]  # a float is accepted
                ping_interval=5,
                max_outstanding_pings=2,
                allow_reconnect=True,
                disconnected_cb=opened.on_disconnected,
                reconnected_cb=opened.on_reconnected,
                error_cb=opened.on_error,
                **options,
            )
            await opened.replies.open()
        except (OSError, nats.errors.Error) as error:
            opened.problem = opened.problem or error
    opened.connecting = None
    if not opened.is_connected:
        with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_S):
            await opened.close()
        raise _unconnected(url, access, opened.problem or TimeoutError("no answer"))
    return opened
