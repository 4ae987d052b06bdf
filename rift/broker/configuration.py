"""The text of a nats-server's configuration."""

from collections.abc import Mapping, Sequence

import msgspec

from rift.broker.roles import Permissions

# Up to 64 of the largest records may be in flight to one slow client.
MAX_PENDING_BYTES = 512 * 1024 * 1024

# A rebuild or a closing may take half an hour, and its answer is sent then.
ANSWER_WITHIN = "35m"


def quoted(text: str) -> str:
    """Return a string as nats-server's configuration has it."""
    return msgspec.json.encode(text).decode()


def authorization(permissions: Mapping[str, Permissions], passwords: Mapping[str, str]) -> str:
    """Return the block that makes each role a user. `passwords` is by role."""
    users = "".join(
        f"    {{ user: {quoted(role)}, password: {quoted(passwords[role])}, permissions: {{\n"
        f"{_permissions(granted)}    }} }}\n"
        for role, granted in permissions.items()
    )
    return f"authorization {{\n  users: [\n{users}  ]\n}}\n"


def _permissions(granted: Permissions) -> str:
    denied = f", deny: {_list(granted.denied)}" if granted.denied else ""
    answers = f'      allow_responses: {{ max: 1, expires: "{ANSWER_WITHIN}" }}\n' if granted.answers else ""
    return (
        f"      publish: {{ allow: {_list(granted.publish)}{denied} }}\n"
        f"      subscribe: {{ allow: {_list(granted.subscribe)} }}\n{answers}"
    )


def _list(subjects: Sequence[str]) -> str:
    return f"[{', '.join(map(quoted, subjects))}]"
