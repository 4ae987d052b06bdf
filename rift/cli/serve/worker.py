"""`rift worker`: one worker process."""

import os
import secrets
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial

from events import subjects
from events.schema import ReplicaStarting
from rift.broker import roles
from rift.cli import signals
from rift.cli.arguments import Commands, add_command, add_engine, add_metrics
from rift.cli.connection import connected_role, role_settings
from rift.control.scaling_config import unfilled_max
from rift.engines.start import start_engine
from rift.logs.setup import VLLM_JSON, VLLM_VARIABLE
from rift.supervisor import RETIRE, Guard
from rift.worker import process
from rift.worker.shutdown import Shutdown


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    parser = add_command(commands, "worker", worker, "run one worker process for a model", has_json=False)
    add_engine(parser)
    add_metrics(parser)
    parser.add_argument("--replica", help="name of this replica (default: random)")
    parser.add_argument("--pod", help="name of its pod; each start becomes another replica of the pod")


def worker(options: Namespace) -> None:
    settings = role_settings(options)
    if settings.log_format == "json":
        # Before vLLM is imported, and for the processes that it starts.
        os.environ.setdefault(VLLM_VARIABLE, str(VLLM_JSON))
    prefix = options.pod or subjects.slug(settings.model)
    replica = options.replica or f"{prefix}-{secrets.token_hex(4)}"
    model = settings.catalogue()[settings.model]
    profile = settings.catalogue_profile(settings.model)
    starting = ReplicaStarting(
        replica=replica,
        model=settings.model,
        engine=settings.engine,
        hardware=settings.hardware,
        gpus=profile.gpus,
        hour_nanousd=profile.hour_nanousd,
    )
    role = roles.worker(subjects.slug(settings.model))
    guard = _guard()
    shutdown = Shutdown()

    async def serve() -> None:
        async with connected_role(options, settings, replica, role) as log:
            start = partial(start_engine, settings.engine, settings.model, model, profile)
            await process.serve(
                log,
                start,
                starting,
                shutdown,
                metrics=settings.worker_metrics,
                unfilled_max=unfilled_max(settings, settings.model),
            )

    handlers: dict[signal.Signals, Callable[[], None]] = {
        signal.SIGTERM: partial(shutdown.drain, settings.drain_s),
        signal.SIGINT: partial(shutdown.drain, settings.drain_s),
        RETIRE: shutdown.retire,
    }
    try:
        signals.run(partial(signals.with_signals, handlers, serve))
    finally:
        if guard is not None:
            guard.dismiss()


def _guard() -> Guard | None:
    """Return a guard for our process group, if we lead one: an engine's processes survive our kill -9."""
    if os.getpgrp() != os.getpid():
        return None
    guard = Guard()
    guard.add(os.getpgrp())
    return guard
