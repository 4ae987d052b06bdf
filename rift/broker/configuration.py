"""The text of a nats-server's configuration."""

from collections.abc import Mapping, Sequence

import msgspec

from events.contracts import MESSAGE_BYTES_MAX
from rift.broker.credentials import secret_name
from rift.broker.roles import ADMIN, Permissions

# Up to 64 of the largest records may be in flight to one slow client.
MAX_PENDING_BYTES = 512 * 1024 * 1024

# A rebuild or a closing may take half an hour, and its answer is sent then.
ANSWER_WITHIN = "35m"

# A subject that nothing reads.
NOWHERE = "rift.nowhere"

# The file beside the configuration with the users' passwords and permissions.
AUTHORIZATION = "authorization.conf"


class Routes(msgspec.Struct, frozen=True):
    """How the servers of a cluster reach one another. `others` are HOST:PORT; `password` lets a server in."""

    listen: str
    others: Sequence[str]
    password: str


class Server(msgspec.Struct, frozen=True):
    """One nats-server. `listen` and `monitor` are HOST:PORT, `store` a folder.

    `file_bytes` is the most that it stores. `tls` is a folder with `ca.pem`, `cert.pem` and `key.pem`; the
    certificate is for all names of the server, towards clients and other servers.
    """

    name: str
    listen: str
    monitor: str
    store: str
    file_bytes: int
    tls: str = ""
    routes: Routes | None = None

    def text(self) -> str:
        """Return the configuration, which includes AUTHORIZATION."""
        return (
            f"server_name: {_quoted(self.name)}\n"
            f"listen: {_quoted(self.listen)}\n"
            f"http: {_quoted(self.monitor)}\n"
            f"max_payload: {MESSAGE_BYTES_MAX}\n"
            f"max_pending: {MAX_PENDING_BYTES}\n"
            f"{self._tls('')}"
            "jetstream {\n"
            f"  store_dir: {_quoted(self.store)}\n"
            # Refuse a request with unknown fields, such as one that is really an answer.
            "  strict: true\n"
            "  sync_interval: always\n"
            f"  max_file_store: {self.file_bytes}\n"
            f"}}\n{self._cluster()}"
            f'include "{AUTHORIZATION}"\n'
        )

    def _cluster(self) -> str:
        if self.routes is None:
            return ""
        password = self.routes.password
        others = [f"nats://rift:{password}@{address}" for address in self.routes.others]
        return (
            "cluster {\n"
            "  name: rift\n"
            f"  listen: {_quoted(self.routes.listen)}\n"
            f"  authorization {{ user: rift, password: {_quoted(password)} }}\n"
            f"  routes: {_list(others)}\n"
            f"{self._tls('  ')}}}\n"
        )

    def _tls(self, indent: str) -> str:
        if not self.tls:
            return ""
        files = (("ca_file", "ca.pem"), ("cert_file", "cert.pem"), ("key_file", "key.pem"))
        lines = "".join(f"{indent}  {key}: {_quoted(f'{self.tls}/{name}')}\n" for key, name in files)
        return f"{indent}tls {{\n{lines}{indent}}}\n"


def authorization(permissions: Mapping[str, Permissions], passwords: Mapping[str, str]) -> str:
    """Return the text of AUTHORIZATION, which makes each role a user. `passwords` is by role."""
    names = {role: secret_name(passwords[role]) for role in permissions}
    users = "".join(
        f"    {{ user: {_quoted(role)}, password: {_quoted(passwords[role])}, permissions: {{\n"
        f"{_permissions(granted, names[role])}    }} }}\n"
        for role, granted in permissions.items()
    )
    # JetStream is a service of the system account. A mapping there also applies to the broker's own messages.
    mappings = {f"$JS.API.{call}": NOWHERE for call in permissions[ADMIN].hidden} | {
        f"$JS.API.{names[role]}.>": "$JS.API.>" for role, granted in permissions.items() if granted.hidden
    }
    lines = "".join(f"    {_quoted(name)}: {_quoted(target)}\n" for name, target in mappings.items())
    return (
        f"authorization {{\n  users: [\n{users}  ]\n}}\n"
        f'accounts {{\n  "$SYS": {{ mappings: {{\n{lines}  }} }}\n}}\n'
    )


def _permissions(granted: Permissions, secret: str) -> str:
    publish = [*granted.publish, *(f"$JS.API.{secret}.{call}" for call in granted.hidden)]
    denied = f", deny: {_list(granted.denied)}" if granted.denied else ""
    answers = f'      allow_responses: {{ max: 1, expires: "{ANSWER_WITHIN}" }}\n' if granted.answers else ""
    return (
        f"      publish: {{ allow: {_list(publish)}{denied} }}\n"
        f"      subscribe: {{ allow: {_list(granted.subscribe)} }}\n{answers}"
    )


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _list(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(_quoted, texts))}]"
