"""Routes about the gateway itself, all without a key: health, version and the OpenAPI document."""

from collections.abc import Mapping
from typing import Any

import msgspec

from rift import __version__
from rift.gateway.admission.auth import Authenticator
from rift.gateway.admission.log_room import LogRoom
from rift.gateway.asgi.connections import Connections
from rift.gateway.asgi.request import Request
from rift.gateway.state import GatewayConfig, LogState


class HealthRoutes:
    def __init__(
        self,
        state: LogState,
        config: GatewayConfig,
        auth: Authenticator,
        room: LogRoom,
        connections: Connections,
        document: Mapping[str, Any],
    ) -> None:
        self._room = room
        self._state = state
        self._config = config
        self._auth = auth
        self._connections = connections
        self._document = msgspec.json.encode(document)

    async def alive(self, request: Request) -> None:
        await request.answer(200, {"status": "ok"})

    async def ready(self, request: Request) -> None:
        """Answer 200 if the gateway can accept requests, whether or not a replica is ready.

        The proof is a stored record: the lane's report, every few seconds.
        """
        self.check()
        ready = [name for name in self._config.models if self._state.fleet.is_ready(name)]
        connections = {"open": self._connections.open, "max": self._connections.limit}
        await request.answer(200, {"status": "ready", "models_ready": ready, "connections": connections})

    def check(self) -> None:
        """Raise HTTPError (503) if the gateway accepts nothing now."""
        self._room.check()
        self._auth.check_book()

    async def version(self, request: Request) -> None:
        await request.answer(200, {"version": __version__, "engine": self._config.engine})

    async def openapi(self, request: Request) -> None:
        """Answer with the same bytes each time: a copy for each client that does not read would add up."""
        await request.start(200, b"application/json", [(b"content-length", b"%d" % len(self._document))])
        await request.write(self._document, more=False)
