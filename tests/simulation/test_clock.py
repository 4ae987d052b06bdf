import time

import anyio
import pytest
from anyio import to_thread

from tests.simulation import clock


def test_time_jumps_when_all_tasks_wait() -> None:
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await anyio.sleep(seconds)
        woken.append((name, anyio.current_time()))

    async def main() -> float:
        async with anyio.create_task_group() as tasks:
            for name, seconds in [("day", 86_400.0), ("hour", 3600.0), ("moment", 0.001)]:
                tasks.start_soon(sleeper, name, seconds)
        return anyio.current_time()

    began_at = time.monotonic()
    assert clock.run(main, until_s=1e6) == 86_400.0
    assert woken == [("moment", 0.001), ("hour", 3600.0), ("day", 86_400.0)]
    assert time.monotonic() - began_at < 2.0


def test_deadlines_are_exact() -> None:
    async def main() -> float:
        with anyio.move_on_after(7.5):
            await anyio.sleep_forever()
        return anyio.current_time()

    assert clock.run(main) == 7.5


def test_waiting_for_ever_is_an_error() -> None:
    with pytest.raises(clock.Deadlock, match="no timer is set"):
        clock.run(anyio.sleep_forever)


def test_a_program_that_does_not_end_is_an_error() -> None:
    async def main() -> None:
        while True:  # noqa: ASYNC110
            await anyio.sleep(1)

    with pytest.raises(clock.TooLong, match="the program still runs"):
        clock.run(main, until_s=100)


@pytest.mark.filterwarnings("ignore")
def test_a_thread_is_an_error_and_not_a_hang() -> None:
    async def main() -> None:
        await to_thread.run_sync(time.sleep, 0.01)

    with pytest.raises(clock.Deadlock, match="is there a thread"):
        clock.run(main)
