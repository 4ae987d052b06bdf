"""JetStream's reply subjects, headers, statuses and consumer configurations."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from nats.aio.msg import Msg

from events.contracts import SECOND_NS
from events.errors import reason as reason
from events.log import LogError, Stored
from events.subjects import prefix

# The status of a request to a subject without subscribers.
NO_RESPONDERS = "503"

# A pull ends normally with one of these: no messages, expired. Any other status means that the consumer is
# gone or has no leader, or that the batch is full. 100 is a heartbeat and does not end the pull.
PULL_ENDED = ("404", "408")
HEARTBEAT = "100"


ERR_STREAM_NOT_FOUND = 10059
ERR_NO_ROOM = 10047

REMEDIES = {
    ERR_STREAM_NOT_FOUND: "control opens the streams at its start: start it, or wait until it leads",
    ERR_NO_ROOM: "raise max_file_store of the servers, which reserve all that the streams may grow to",
}

# The subject at which a stored message is acknowledged begins so.
ACK = "$JS.ACK."


class ApiError(LogError):
    """JetStream refused a request of its API."""

    def __init__(self, path: str, error: dict[str, Any]) -> None:
        self.err_code = error.get("err_code")
        remedy = REMEDIES.get(self.err_code or 0)
        super().__init__(f"{path}: {error.get('description')}{f'; {remedy}' if remedy else ''}")


def status(message: Msg) -> str | None:
    """Return the status of a control message, or None for a stored one, whose writer chose its headers."""
    if message.reply.startswith(ACK):
        return None
    return message.headers.get("Status") if message.headers else None


def delivered(message: Msg) -> tuple[int, Stored, int]:
    """Return the delivery count, the message and the consumer's sequence, from the reply subject:
    `$JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<count>.<sequence>.<consumer's>.<time>.<pending>`.

    A message on a subject of another stream is empty: anyone can have the broker store a copy of a record by
    having it delivered to a subject of this stream.
    """
    tokens = message.reply.split(".")
    first = 4 if len(tokens) == 9 else 6
    count, sequence, consumer_sequence, time_ns = (int(token) for token in tokens[first : first + 4])
    data = message.data if message.subject.startswith(prefix(tokens[first - 2])) else b""
    return count, Stored(message.subject, sequence, time_ns, data), consumer_sequence


def unix_ns(time: str) -> int:
    """Return Unix nanoseconds of RFC 3339 in UTC, exactly."""
    seconds, _, fraction = time.removesuffix("Z").partition(".")
    whole = int(datetime.fromisoformat(f"{seconds}+00:00").timestamp())
    return whole * SECOND_NS + int(fraction.ljust(9, "0"))


def reader(
    stream: str, name: str, subjects: Iterable[str], *, after: int, inactive_s: int, **more: Any
) -> dict[str, Any]:
    """Return the request for an ephemeral consumer without acks that starts after `after`."""
    config = {
        "name": name,
        "ack_policy": "none",
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": after + 1,
        "replay_policy": "instant",
        # Without a filter, a reader of the whole stream misses no sequence.
        "filter_subjects": [one for one in subjects if one != f"{prefix(stream)}>"],
        "inactive_threshold": inactive_s * SECOND_NS,
        "mem_storage": True,
        "num_replicas": 1,
    }
    return {"stream_name": stream, "config": config | more}
