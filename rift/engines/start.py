"""Starts the configured engine. Only that one is imported: importing vLLM takes 30 s."""

from rift.catalogue import Model, Profile
from rift.engines import Engine, EngineFailed


async def start_engine(name: str, model: Model, profile: Profile) -> Engine:
    """Start `sim` or `vllm`. Raises EngineFailed, PrepareFailed."""
    if name == "sim":
        from rift.engines.sim import SimEngine

        return await SimEngine.start(model, profile)
    from rift.engines.prepare import path_of

    try:
        from rift.engines.vllm import VllmEngine
    except ImportError as error:
        raise EngineFailed(f"vLLM is not installed ({error}); install it with ./ops/run") from error
    return await VllmEngine.start(path_of(model.source), model, profile)
