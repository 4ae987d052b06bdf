"""The processes: `rift up`, and each of its parts alone."""

import json
import os
import secrets
import signal
import sys
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import anyio

from events import subjects
from events.schema import ReplicaStarting
from replay.archive.archive import Archive
from rift import launcher as installation_up
from rift.catalogue import Profile
from rift.cli.connection import configuration, connected, connected_role, installation, load_settings
from rift.control import process as control_process
from rift.control.scaling_config import served
from rift.engines import Engine, EngineFailed
from rift.fleet import Driver
from rift.fleet.cluster import Cluster
from rift.fleet.kubernetes import KubernetesFleet
from rift.gateway import process as gateway_process
from rift.settings import SHARDS, Settings
from rift.supervisor import RETIRE, Guard
from rift.worker import process as worker_process
from rift.worker.shutdown import Shutdown


def up(options: Namespace) -> None:
    settings = load_settings(options)
    found = installation(options)
    found.make()
    found.lock()

    def say(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    def greet(url: str, key: str) -> None:
        if options.json:
            print(json.dumps({"url": url, "api_key": key, "data": str(found.folder)}), flush=True)
        else:
            say(installation_up.greeting(url, key, settings.model))

    roles = installation_up.role_options(settings, configuration(options))
    serving = installation_up.serving_options(settings, options.workers)
    _run(installation_up.Launcher(found, settings, roles, serving=serving, say=say, greet=greet).run)


def gateway(options: Namespace) -> None:
    settings = load_settings(options)
    secret = installation(options).secret()

    async def serve(stop: anyio.Event) -> None:
        async with (
            connected_role(options, settings, "gateway") as log,
            connected(options, "gateway-history") as history_log,
        ):
            await gateway_process.run(
                log,
                history_log,
                host=settings.host,
                port=settings.port,
                models=settings.catalogue(),
                served=frozenset(settings.scales()),
                secret=secret,
                seal_content=settings.seal_content,
                stop=stop,
            )

    _run(partial(_until_told, serve))


def worker(options: Namespace) -> None:
    settings = load_settings(options)
    named = options.pod or subjects.slug(settings.model)
    replica = options.replica or f"{named}-{secrets.token_hex(4)}"
    profile = settings.catalogue()[settings.model].profiles.get(settings.hardware, Profile())
    starting = ReplicaStarting(
        replica=replica,
        model=settings.model,
        engine=settings.engine,
        hardware=settings.hardware,
        gpus=profile.gpus,
        hour_nanousd=profile.hour_nanousd,
    )
    guard = _guard()
    leaving = Shutdown()

    async def serve() -> None:
        async with connected_role(options, settings, replica) as log:
            start_engine = partial(_start_engine, settings, profile)
            await worker_process.serve(log, start_engine, starting, shards=SHARDS, leaving=leaving)

    words: dict[signal.Signals, Callable[[], None]] = {
        signal.SIGTERM: partial(leaving.drain, settings.drain_s),
        signal.SIGINT: partial(leaving.drain, settings.drain_s),
        RETIRE: leaving.retire,
    }
    try:
        _run(partial(_listening, words, serve))
    finally:
        if guard is not None:
            guard.dismiss()


def control(options: Namespace) -> None:
    found = installation(options)
    settings = load_settings(options)
    archive = Archive(found.archive, key=found.archive_key(), content=settings.archive_content)

    async def serve(stop: anyio.Event) -> None:
        async with connected_role(options, settings, "control") as log:
            await control_process.run(
                log,
                options.database or found.database,
                archive,
                stop=stop,
                retention_days=settings.retention_days,
                served=served(settings),
                driver=_driver(settings),
            )

    _run(partial(_until_told, serve))


def _driver(settings: Settings) -> Driver | None:
    """Return what the leader scales with; None: `rift up` does, or somebody. Raises ClusterError."""
    if settings.fleet != "kubernetes":
        return None
    return KubernetesFleet(Cluster.around(os.environ), jitter=secrets.SystemRandom().random)


async def _start_engine(settings: Settings, profile: Profile) -> Engine:
    """Import only the engine that is asked for: the real one takes 30 s to import."""
    model = settings.catalogue()[settings.model]
    if settings.engine == "sim":
        from rift.engines.sim import SimEngine

        return await SimEngine.start(model, profile)
    from rift.engines.prepare import path_of

    try:
        from rift.engines.vllm import VllmEngine
    except ImportError as error:
        raise EngineFailed(f"vLLM is not installed here ({error}); ./ops/run installs it") from error
    return await VllmEngine.start(path_of(model.source), model, profile)


async def _until_told(serve: Callable[[anyio.Event], Awaitable[None]]) -> None:
    """Serve, and set the event it is given once SIGTERM or SIGINT comes."""
    stop = anyio.Event()
    await _listening({signal.SIGTERM: stop.set, signal.SIGINT: stop.set}, partial(serve, stop))


async def _listening(
    words: Mapping[signal.Signals, Callable[[], None]], serve: Callable[[], Awaitable[None]]
) -> None:
    """Serve, and do what a signal says when it comes."""

    async def listen() -> None:
        with anyio.open_signal_receiver(*words) as received:
            async for number in received:
                words[number]()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        await serve()
        tasks.cancel_scope.cancel()


def _guard() -> Guard | None:
    """Have our process group ended with us, where we lead one: an engine's processes outlive a kill."""
    if os.getpgrp() != os.getpid():
        return None
    guard = Guard()
    guard.add(os.getpgrp())
    return guard


def _run(main: Callable[[], Awaitable[Any]]) -> None:
    anyio.run(main, backend_options={"use_uvloop": True})
