"""One real engine per test module: its start takes half a minute, an answer of a tiny model no time."""

import gc
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rift.catalogue import Model, Profile
from rift.engines.vllm import VllmEngine
from tests import tiny_model

MODEL = Model(
    source="tiny",
    context_tokens=tiny_model.CONTEXT_TOKENS,
    prompt_usd="0.01",
    output_usd="0.02",
    tool_parser="hermes",
    tool_strict_level="parameter",
    reasoning_parser="deepseek_r1",
)
PROFILE = Profile(
    args={"dtype": "bfloat16", "enforce_eager": True, "max_num_batched_tokens": 2048, "max_num_seqs": 64},
    env={"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"},
)


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("tiny"), marks=("<think>", "</think>"))


async def start(path: Path, model: Model = MODEL, profile: Profile = PROFILE) -> VllmEngine:
    with warnings.catch_warnings():
        # torch and vLLM warn about each other's deprecated features during import.
        warnings.simplefilter("ignore")
        return await VllmEngine.start(path, model, profile, name="tiny")


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
