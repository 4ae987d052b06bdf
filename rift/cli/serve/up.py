"""`rift up`: a whole installation on this machine."""

import json
import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from contextlib import suppress

from rift import launcher
from rift.cli import signals
from rift.cli.arguments import Commands, add_command, add_engine, add_listen, add_metrics, add_workers
from rift.cli.connection import installation, role_settings, settings_file
from rift.cli.output import CommandFailed
from rift.fleet.cluster import Cluster


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    parser = add_command(commands, "up", up, "run a whole installation on this machine")
    add_engine(parser)
    add_listen(parser)
    add_workers(parser)
    add_metrics(parser)


def up(options: Namespace) -> None:
    if options.nats:
        raise CommandFailed(
            "rift up starts a broker of its own: leave out --nats, or start the roles yourself"
        )
    settings = role_settings(options)
    if settings.fleet == "kubernetes":
        # Control would find this out at each of its starts, while the gateway accepts requests.
        Cluster.around(os.environ)
    folder = installation(options)
    folder.make()
    folder.lock()
    tightened = folder.tighten()

    def notify(text: str) -> None:
        # The output may be a file on a full disk, which must not end the installation.
        with suppress(OSError):
            print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    if tightened:
        notify(
            f"tightened the permissions of {tightened} files and folders in {folder.folder} to 0600 and 0700"
        )
    if (parent := folder.open_parent()) is not None:
        notify(
            f"any user can replace {folder.folder}, because {parent} is writable for all: chmod o-w {parent}"
        )

    def greet(url: str, key: str) -> None:
        if options.json:
            print(json.dumps({"url": url, "api_key": key, "data": str(folder.folder)}), flush=True)
        else:
            notify(launcher.greeting(url, key, settings.model))

    # The supervisor names what ended. That this process lost its own connection then adds nothing.
    for part in ("connection", "push_reader"):
        logging.getLogger(f"events.jetstream.{part}").setLevel(logging.ERROR)
    roles = launcher.role_options(settings, settings_file(options))
    serving = launcher.serving_options(settings, options.workers)
    signals.run(launcher.Launcher(folder, settings, roles, serving=serving, notify=notify, greet=greet).run)
