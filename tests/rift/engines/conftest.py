"""One real engine for a module's tests: a start takes half a minute, a tiny model's answer none."""

import gc
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rift.catalogue import Model, Profile
from rift.engines.vllm import VllmEngine
from tests import tiny_model

MODEL = Model(source="tiny", context_tokens=tiny_model.CONTEXT_TOKENS, prompt_usd="0.01", output_usd="0.02")
PROFILE = Profile(
    args={"dtype": "bfloat16", "enforce_eager": True, "max_num_batched_tokens": 2048, "max_num_seqs": 64},
    env={"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"},
)


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("tiny"))


async def start(path: Path, model: Model = MODEL, profile: Profile = PROFILE) -> VllmEngine:
    with warnings.catch_warnings():
        # What torch and vLLM deprecate of one another while they are imported is not ours to mend.
        warnings.simplefilter("ignore")
        return await VllmEngine.start(path, model, profile)


async def stop(engine: VllmEngine) -> None:
    with warnings.catch_warnings():
        # vLLM leaves a context of zmq to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        await engine.close()
        gc.collect()


@pytest.fixture(scope="module")
async def engine(anyio_backend: object, tiny: Path) -> AsyncIterator[VllmEngine]:
    del anyio_backend
    engine = await start(tiny)
    yield engine
    await stop(engine)
