"""Loads the client library without what Rift does not use.

nats-py imports aiohttp, if it is installed, for WebSockets: 0.1 s and 9 MB of each process.
"""

import sys

if "aiohttp" not in sys.modules:
    sys.modules["aiohttp"] = None  # type: ignore[assignment]
    import nats.aio.transport  # noqa: F401

    del sys.modules["aiohttp"]
