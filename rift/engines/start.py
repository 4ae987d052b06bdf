"""Starts the configured engine. Only that one is imported: importing vLLM takes 30 s."""

from rift.catalogue import Model, Profile
from rift.engines import Engine, EngineFailed
from rift.engines.prompt_limits import check_token_bytes


async def start_engine(kind: str, name: str, model: Model, profile: Profile) -> Engine:
    """Start `sim` or `vllm` for the catalogue's model `name`. Raises EngineFailed, PrepareFailed."""
    if kind == "sim":
        from rift.engines.sim import SimEngine

        engine = await SimEngine.start(model, profile)
        check_token_bytes(engine.token_bytes_max, name, model)
        return engine
    from rift.engines.prepare import path_of

    try:
        from rift.engines.vllm import VllmEngine
    except ImportError as error:
        raise EngineFailed(f"vLLM is not installed ({error}); install it with ./ops/run") from error
    return await VllmEngine.start(path_of(model.source), model, profile, name=name)
