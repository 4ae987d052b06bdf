"""The address on which a role serves its metrics."""

import re
from typing import NamedTuple

PORT_MAX = 65_535

# The role's own port, if the setting names none. The gateway's is the one after its API's.
CONTROL_PORT = 9471
WORKER_PORT = 9472

ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")


class InvalidAddress(ValueError):
    pass


class Address(NamedTuple):
    """If the port is 0 or taken, any free one is used."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class NamedAddress(Address):
    """An address with a port that the operator named: no other one is used."""


def gateway_port(api_port: int) -> int:
    return api_port + 1 if 0 < api_port < PORT_MAX else 0


def parsed(text: str, role_port: int) -> Address | None:
    """Return the address of `HOST` or `HOST:PORT`, None for "". Raises InvalidAddress."""
    if not text:
        return None
    match = ADDRESS.fullmatch(text)
    port = role_port if match is None or match["port"] is None else int(match["port"])
    if match is None or port > PORT_MAX:
        raise InvalidAddress(f'must be HOST, HOST:PORT like "127.0.0.1:9470", or "" for none, got {text!r}')
    kind = NamedAddress if match["port"] and port else Address
    return kind(match["host"].strip("[]"), port)
