"""A worker whose engine kills its whole process at a chosen point of a request. `test_deaths.py` starts it.

    python -m tests.rift.worker.mortal POINT URL TOKEN MODEL FOLDER BROKER

POINT    where it dies: `prompt`, once the engine sees the prompt; `frozen`, the same, with the broker stopped
         since before the start was sent; `stored`, once the start is stored; `tokens`, after a step
FOLDER   gets a line in the file `prompts` for each prompt that the engine sees
BROKER   is the broker's process id
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import anyio

from events.jetstream import Access, connect
from rift.catalogue import Model, Pace, Profile
from rift.engines import Rendered
from rift.engines.sim import SimEngine
from rift.worker.shutdown import Shutdown
from rift.worker.slots import Slots
from rift.worker.worker import WorkerConfig, open_worker

MODEL = Model(source="sim", context_tokens=512, prompt_usd="0.1", output_usd="0.35")
STORED_S = 0.2


class MortalEngine(SimEngine):
    def __init__(self, point: str, folder: Path, broker: int) -> None:
        super().__init__(MODEL, Profile(sim=Pace(step_us=20_000, running_max=2)))
        self._point = point
        self._prompts = folder / "prompts"
        self._broker = broker

    async def render(self, *args: Any, **more: Any) -> Rendered:
        if self._point == "frozen" and not self._prompts.exists():
            os.kill(self._broker, signal.SIGSTOP)
        return await super().render(*args, **more)

    async def generate(self, *args: Any, **more: Any) -> None:
        with self._prompts.open("a") as prompts:
            prompts.write(f"{os.getpid()}\n")
        if self._point in ("prompt", "frozen"):
            die()
        if self._point == "stored":
            await anyio.sleep(STORED_S)
            die()
        self.after_step.append(die)
        await super().generate(*args, **more)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def main(point: str, url: str, password: str, model: str, folder: str, broker: str) -> None:
    log = await connect(url, Access(user="admin", password=password), name="mortal")
    engine = MortalEngine(point, Path(folder), int(broker))
    name = f"mortal-{os.getpid()}"
    slots = Slots(2, Shutdown())
    config = WorkerConfig(name=name, model=model, shard=0, slots=slots, entropy=os.urandom)
    async with open_worker(log, engine, config) as worker:
        print("ready", flush=True)
        await worker.run()


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:], backend_options={"use_uvloop": True})
