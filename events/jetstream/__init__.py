"""The log on NATS JetStream: the only door to `nats`.

JetStream's own API is spoken as JSON over plain requests, since what must be exact (integer times,
consumer sequences, statuses) is exact there. What must not be here: what the records say.

    log.py       the connection, streams, appends, questions
    follower.py  live readers that notice every gap
    scan.py      history reads up to a target
    jobs.py      a worker's deliveries
    wire.py      what JetStream puts into subjects and headers
"""

from events.jetstream.connection import InvalidBroker, JetStream, connect

__all__ = ["InvalidBroker", "JetStream", "connect"]
