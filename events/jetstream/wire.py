"""What JetStream puts into reply subjects, headers and consumer configurations."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from nats.aio.msg import Msg

from events.contracts import SECOND_NS
from events.log import LogError, Stored

# The status of a request that nobody listens for.
NO_RESPONDERS = "503"

# A pull's end in order: no messages, expired. Any other is a consumer that is gone or has no leader, or a
# batch that is full; 100 is a heartbeat, and no end.
PULL_ENDED = ("404", "408")
HEARTBEAT = "100"


class ApiError(LogError):
    """JetStream refused a request of its API."""

    def __init__(self, path: str, error: dict[str, Any]) -> None:
        super().__init__(f"{path}: {error.get('description')}")
        self.err_code = error.get("err_code")


def status(message: Msg) -> str | None:
    """Return the status of a control message, or None for a stored one."""
    return message.headers.get("Status") if message.headers else None


def delivered(message: Msg) -> tuple[int, Stored, int]:
    """Return the delivery count, the message and the consumer's sequence, from the reply subject:
    `$JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<count>.<sequence>.<consumer's>.<time>.<pending>`."""
    tokens = message.reply.split(".")
    at = 4 if len(tokens) == 9 else 6
    count, sequence, consumer_sequence, time_ns = (int(token) for token in tokens[at : at + 4])
    return count, Stored(message.subject, sequence, time_ns, message.data), consumer_sequence


def unix_ns(time: str) -> int:
    """Return Unix nanoseconds of RFC 3339 in UTC, exactly."""
    seconds, _, fraction = time.removesuffix("Z").partition(".")
    whole = int(datetime.fromisoformat(f"{seconds}+00:00").timestamp())
    return whole * SECOND_NS + int(fraction.ljust(9, "0"))


def reader(
    stream: str, name: str, subjects: Iterable[str], *, after: int, inactive_s: int, **more: Any
) -> dict[str, Any]:
    """Return the request for an ephemeral consumer without acks that starts behind `after`."""
    config = {
        "name": name,
        "ack_policy": "none",
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": after + 1,
        "replay_policy": "instant",
        "filter_subjects": list(subjects),
        "inactive_threshold": inactive_s * SECOND_NS,
        "mem_storage": True,
        "num_replicas": 1,
    }
    return {"stream_name": stream, "config": config | more}
