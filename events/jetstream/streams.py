"""The settings of every stream, what may differ from them, and the servers that hold a stream."""

from collections.abc import Mapping, Sequence
from typing import Any

from events import subjects as names
from events.contracts import IDEMPOTENCY_S, SECOND_NS
from events.log import LogError

# Keys are small and expire: their streams get this fraction of a shard's space.
KEYS_FRACTION = 16

# The fleet's stream keeps everything since its oldest live replica and decision: space for a year of one
# replica's reports. The book is never trimmed, and when it is full no key can be revoked and nothing is
# trimmed. A quarter of a shard's space is by default two million holds with their settlements: two years of
# 100 prepaid accounts.
BOOK_FRACTION = 4

DAY_S = 24 * 3600


# A stream's leader hears from each of its servers every second. nats-server calls one offline only
# after minutes.
PEER_SILENT_NS = 5 * SECOND_NS


class InvalidBroker(LogError):
    """The broker does not have the settings that the protocol needs; the message names the difference."""


def stream_config(
    name: str, subject: str, *, replicas: int, max_bytes: int, max_age_s: int = 0, **other: object
) -> dict[str, Any]:
    return {
        "name": name,
        "subjects": [subject],
        "retention": "limits",
        "discard": "new",
        "storage": "file",
        "num_replicas": replicas,
        "max_bytes": max_bytes,
        "max_age": max_age_s * SECOND_NS,
        "max_msgs": -1,
        "allow_direct": False,
        "allow_atomic": True,
        "allow_rollup_hdrs": False,
        "deny_delete": True,
        "deny_purge": False,
        "sealed": False,
        "no_ack": False,
    } | other


def stream_configs(
    shards: int, replicas: int, max_bytes: int, retention_days: int
) -> Sequence[dict[str, Any]]:
    """Return the settings of every stream. `max_bytes` is the space of one shard."""
    keys_bytes = max_bytes // KEYS_FRACTION
    book_bytes = max_bytes // BOOK_FRACTION
    return [
        *(
            stream_config(
                names.shard_stream(shard), f"rift.{shard}.>", replicas=replicas, max_bytes=max_bytes
            )
            for shard in range(shards)
        ),
        stream_config(names.FLEET, "rift.fleet.>", replicas=replicas, max_bytes=book_bytes),
        stream_config(names.BOOK, "rift.book.>", replicas=replicas, max_bytes=book_bytes),
        stream_config(
            names.KEYS,
            "rift.keys.>",
            replicas=replicas,
            max_bytes=keys_bytes,
            max_age_s=int(IDEMPOTENCY_S),
        ),
        # Single keys can be erased. A full stream refuses more keys: an older one may be in use.
        stream_config(
            names.SECRETS,
            "rift.secret.>",
            replicas=replicas,
            max_bytes=keys_bytes,
            max_age_s=(retention_days + 1) * DAY_S,
            deny_delete=False,
        ),
    ]


def extended(current: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a stream must have beyond its `config`.

    An older Rift may have created it, or one with less space or fewer replicas. Neither is reduced: stored
    records may need the space, and an operator may want more copies.
    """
    bytes_max = current["max_bytes"]
    beyond = {
        "allow_atomic": True,
        "num_replicas": max(current["num_replicas"], config["num_replicas"]),
        "max_bytes": bytes_max if bytes_max < 0 else max(bytes_max, config["max_bytes"]),
    }
    if config["name"] == names.SECRETS:
        beyond["discard"] = "new"
    if config["max_age"]:
        beyond["max_age"] = max(current["max_age"], config["max_age"])
    return beyond


def compare(name: str, current: dict[str, Any], required: dict[str, Any]) -> None:
    """Raise InvalidBroker naming the first setting of a stream that differs."""
    for field, value in (required | {"persist_mode": "default"}).items():
        absent = value if value == "default" else type(value)()
        if (actual := current.get(field, absent)) != value:
            raise InvalidBroker(
                f"stream {name}: {field} is {actual!r}, Rift needs {value!r}, or it could lose records: set "
                f"it back, as with `nats stream edit {name}`"
            )


def servers(cluster: dict[str, Any]) -> Mapping[str, str]:
    """Return the state of each server that JetStream names for a stream; see `Log.stream_servers`."""
    peers = cluster.get("replicas") or ()
    if peers and not cluster.get("leader"):
        # Without a leader, another server answers. It has not heard from the others, and also names itself.
        return dict.fromkeys((peer["name"] for peer in peers), "leaderless")
    states = {}
    for peer in peers:
        state = "current" if peer["current"] else "behind"
        # A leader that has never heard from a server reports 0.
        is_silent = peer["active"] > PEER_SILENT_NS or not (peer["active"] or peer["current"])
        states[peer["name"]] = "silent" if is_silent else state
    if states:
        states[cluster["leader"]] = "leader"
    return states
