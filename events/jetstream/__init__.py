"""The log on NATS JetStream: the only place that imports `nats`.

It uses JetStream's own JSON API over plain requests, because times, consumer sequences and statuses are exact
integers there. Nothing here may depend on the content of records.

    library         loads the client library, before any other module
    access          opens a connection: passwords, certificates
    connection      a connection, streams and appends
    streams         the settings of the streams
    direct_client   the client library without tasks between messages and socket
    broker_check    the servers' settings, at their monitoring ports
    appends         pipelines and batches appends
    push_reader     live readers that notice every gap
    polling_reader  live readers that fetch at a pace
    history_scan    reads of the past up to a target
    deliveries      a worker's share of a model's queue
    snapshots       copies of whole streams
    request_reply   requests to the broker, and questions between processes
    wire            JetStream's subjects, headers and statuses
"""

import events.jetstream.library  # noqa: F401
from events.jetstream.access import Access, AccessRefused, connect
from events.jetstream.broker_check import BrokerCheck, BrokerUnreadable, MonitorSilent, ask_monitor
from events.jetstream.connection import JetStream
from events.jetstream.snapshots import Snapshot
from events.jetstream.streams import InvalidBroker

__all__ = [
    "Access",
    "AccessRefused",
    "BrokerCheck",
    "BrokerUnreadable",
    "InvalidBroker",
    "JetStream",
    "MonitorSilent",
    "Snapshot",
    "ask_monitor",
    "connect",
]
