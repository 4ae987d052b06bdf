"""The log on NATS JetStream: the only place that imports `nats`.

JetStream's own API is spoken as JSON over plain requests, because times, consumer sequences and statuses are
exact integers there. What a record means must not be known here.

    connection      the connection, streams and appends
    appends         pipelines and batches appends
    push_reader     live readers that notice every gap
    polling_reader  live readers that fetch at a pace
    history_scan    reads of the past up to a target
    deliveries      a worker's share of a model's queue
    request_reply   requests to the broker, and questions between processes
    wire            JetStream's subjects, headers and statuses
"""

from events.jetstream.connection import InvalidBroker, JetStream, connect

__all__ = ["InvalidBroker", "JetStream", "connect"]
