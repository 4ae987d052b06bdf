"""The log in memory: the twin of `events/jetstream`, for simulations, tests and trials without a broker.

One `MemoryBroker` holds the streams, and each process has a connection of its own. By default nothing fails
and nothing takes time. `Faults` with an injected random source makes the network and the broker unreliable;
`disconnect`, `freeze`, `restart`, `is_full` and `is_unwritable` cause one fault at once, and a `Stream` has
faults of its own. Nothing outlives the process.

    broker      the streams, their queues, and their faults
    connection  a process's connection
    readers     its live readers and its deliveries

Must not live here: a clock or randomness of its own, or a guarantee that the real broker does not give.
"""

from events.memory.broker import Chance, Faults, MemoryBroker
from events.memory.connection import MemoryLog, connect

__all__ = ["Chance", "Faults", "MemoryBroker", "MemoryLog", "connect"]
