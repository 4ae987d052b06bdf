"""The log in memory: the twin of `events/jetstream`, for simulations, tests and trials without a broker.

One `MemoryBroker` holds the streams; each process has a connection of its own. By default nothing goes
wrong and nothing takes time. `Faults` and an injected random source make it a bad network and a bad broker;
`disconnect`, `freeze`, `restart` and `is_full` do one thing now. Nothing outlives the process.

    broker.py   the streams, their queues, and what goes wrong
    log.py      a process's connection
    readers.py  its live readers and its deliveries

What must not be here: a clock or chance of its own, or a kindness that the real broker does not have.
"""

from events.memory.broker import Chance, Faults, MemoryBroker
from events.memory.connection import MemoryLog, connect

__all__ = ["Chance", "Faults", "MemoryBroker", "MemoryLog", "connect"]
