"""Unknown keys are counted in the log, which anyone could fill otherwise."""

import logging

import pytest

from rift import keys
from rift.gateway.admission import auth
from rift.gateway.asgi import tally

pytestmark = pytest.mark.anyio

UNKNOWN = keys.new_key(bytes(keys.ID_BYTES + keys.SECRET_BYTES)).text


async def test_unknown_keys_are_counted_in_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(tally.anyio, "current_time", lambda: now_s)
    refused = auth.UnknownKeys()
    with caplog.at_level(logging.INFO):
        for _ in range(100):
            refused.count(UNKNOWN)
            refused.count(UNKNOWN[:-1])
        now_s += tally.REPORT_S
        refused.count(UNKNOWN)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("refused 1 requests with an unknown key; 0 of these keys were mistyped")
    assert second.startswith("refused 200 requests with an unknown key; 100 of these keys were mistyped")
    assert UNKNOWN[:-1] not in caplog.text
