"""Every end of a reservation reaches every limit, and gives back the queue place once."""

import anyio
import pytest

from events import subjects
from events.log import OutcomeUnknown
from rift.gateway.admission.reservation import Reservations
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.choices import Choices
from rift.gateway.completion import Completion
from rift.gateway.state import GatewayConfig
from rift.gateway.streams.subscription import Subscription
from tests.rift.gateway.admission.test_credit import World, live, opened
from tests.simulation.prepaid import PRICE
from tests.simulation.processes import MODEL, MODELS, SECRET, GatewayProcess


class RecordingLimit:
    """A limit that records its calls, and refuses if it has an error."""

    def __init__(self, error: HTTPError | None = None) -> None:
        self.calls: list[str] = []
        self._error = error

    async def reserve(self, choices: Choices) -> Choices:
        self.calls.append("reserve")
        if self._error is not None:
            raise self._error
        return choices

    def follow(self, choices: Choices) -> None:
        self.calls.append("follow")

    def release(self, choices: Choices) -> None:
        self.calls.append("release")

    def unknown(self, choices: Choices) -> None:
        self.calls.append("unknown")


def reservations(gateway: GatewayProcess, *limits: RecordingLimit) -> Reservations:
    config = GatewayConfig(
        shard=0, lane="lane", secret=SECRET, models=MODELS, served=(), seal_content=False,
        entropy=gateway.chance.randbytes,
    )  # fmt: skip
    return Reservations(gateway.log, config, opened(gateway).lanes.own, limits)


def waiting(gateway: GatewayProcess) -> int:
    return opened(gateway).lanes.own.queue.length(MODEL)[0]


@pytest.mark.parametrize("end", ["release", "outcome_unknown"])
@pytest.mark.parametrize("is_followed", [False, True])
def test_an_end_without_acceptance_gives_back_everything(end: str, is_followed: bool) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        limit = RecordingLimit()
        reservation = await reservations(gateway, limit).reserve((world.accepted(gateway),), store=True)
        assert waiting(gateway) == 1
        if is_followed:
            reservation.follow(Subscription([Completion(reservation.choices[0], PRICE, keep_text=False)]))
            assert waiting(gateway) == 1
        getattr(reservation, end)()
        assert waiting(gateway) == 0
        assert limit.calls[-1] == {"release": "release", "outcome_unknown": "unknown"}[end]
        assert opened(gateway).lanes.own.is_idle

    live(test)


def test_a_committed_request_keeps_its_queue_place_until_it_starts() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        limit = RecordingLimit()
        reservation = await reservations(gateway, limit).reserve((world.accepted(gateway),), store=True)
        reservation.follow(Subscription([Completion(reservation.choices[0], PRICE, keep_text=False)]))
        world.store(reservation.choices)
        reservation.commit()
        await anyio.sleep(1)
        assert waiting(gateway) == 1
        await world.work()
        await anyio.sleep(5)
        assert waiting(gateway) == 0
        assert limit.calls == ["reserve", "follow"]

    live(test)


def test_a_limit_that_refuses_releases_the_others() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        first = RecordingLimit()
        second = RecordingLimit(HTTPError(429, "no room", code="full"))
        with pytest.raises(HTTPError):
            await reservations(gateway, first, second).reserve((world.accepted(gateway),), store=True)
        assert first.calls == ["reserve", "release"]
        assert waiting(gateway) == 0

    live(test)


def test_a_content_key_is_reserved_last_and_only_if_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        limit = RecordingLimit()
        reserve = reservations(gateway, limit).reserve
        accepted = world.accepted(gateway)
        assert (await reserve((accepted,), store=True)).choices[0].sealed is None
        reservation = await reserve((accepted,), store=False)
        assert reservation.choices[0].sealed == world.broker.stream(subjects.SECRETS).last_sequence

        async def fail(*given: object, **more: object) -> int:
            raise OutcomeUnknown("no answer")

        monkeypatch.setattr(gateway.log, "append", fail)
        with pytest.raises(OutcomeUnknown):
            await reserve((accepted,), store=False)
        assert limit.calls[-1] == "release"
        assert waiting(gateway) == 0

    live(test)
