"""Each log in turn, and addresses that no other test uses."""

from collections.abc import AsyncIterator
from itertools import count

import pytest

from events.log import Log
from events.subjects import Address
from tests.contracts.twins import Twin, in_memory, on_nats

names = count()


@pytest.fixture(params=["memory", "nats"])
async def twin(request: pytest.FixtureRequest) -> AsyncIterator[Twin]:
    server = request.getfixturevalue("server") if request.param == "nats" else None
    async with on_nats(server) if server else in_memory() as found:
        yield found


@pytest.fixture
def log(twin: Twin) -> Log:
    return twin.log


@pytest.fixture
def at() -> Address:
    """An address that no other test uses."""
    number = next(names)
    return Address(0, f"lane{number:04}", f"model-{number}")
