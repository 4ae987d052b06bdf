"""A process that starts while a cluster elects waits for it, within a limit."""

import json
from typing import Any

import pytest
from nats.aio.msg import Msg

from events.jetstream import JetStream
from events.log import OutcomeUnknown
from rift import startup

pytestmark = pytest.mark.anyio

ELECTING = {"code": 503, "err_code": 10008, "description": "JetStream system temporarily unavailable"}


def electing(answers: int, monkeypatch: pytest.MonkeyPatch) -> JetStream:
    """Return a log whose cluster has a leader only after some answers."""
    log = JetStream()
    bodies: list[dict[str, Any]] = [{"error": ELECTING}] * answers + [{"streams": ["RIFT_BOOK"]}]

    async def answer(within_s: float, subject: str, data: bytes) -> Msg:
        return Msg(log.client, data=json.dumps(bodies.pop(0)).encode())

    monkeypatch.setattr(log.replies, "ask_within", answer)
    monkeypatch.setattr(startup, "STREAMS_POLL_S", 0.0)
    return log


async def test_a_start_waits_until_a_cluster_has_elected(monkeypatch: pytest.MonkeyPatch) -> None:
    log = electing(3, monkeypatch)
    assert await startup.once_answered(log.streams) == {"RIFT_BOOK"}


async def test_a_start_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    log = electing(3, monkeypatch)
    monkeypatch.setattr(startup, "STREAMS_S", -1.0)
    with pytest.raises(OutcomeUnknown, match="temporarily unavailable"):
        await startup.once_answered(log.streams)
