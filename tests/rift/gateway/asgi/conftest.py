"""The loop of the gateway, and deadlines that a test can wait for."""

import pytest

from rift.gateway.asgi import connections as module


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    """The loop of the gateway."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_S", 0.4)
    monkeypatch.setattr(module, "WRITE_S", 0.6)
    monkeypatch.setattr(module, "CHECK_S", 0.05)
    monkeypatch.setattr(module, "LINGER_S", 0.3)
