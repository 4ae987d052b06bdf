"""`rift broker config`: configuration and passwords of nats-servers that Rift does not start itself."""

import argparse
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NamedTuple

from events.subjects import slug
from rift.broker import credentials, roles
from rift.broker.configuration import AUTHORIZATION, Routes, Server, authorization
from rift.broker.secret_files import write_secret
from rift.cli.arguments import Commands, add_command, add_config, add_group, positive
from rift.cli.connection import load_settings
from rift.cli.output import CommandFailed
from rift.metrics.address import PORT_MAX

CLIENT_PORT = 4222
# nats-server's own ports for routes and monitoring are as far from its port for clients.
ROUTE = 2000
MONITOR = 4000

# A stream has at most five copies; more servers only add routes.
NODES_MAX = 9

IS_ADDRESS = re.compile(r"[0-9.]+$")

# The file with the password that lets a server into the cluster.
CLUSTER = "cluster"


class Node(NamedTuple):
    host: str
    port: int


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    actions = add_group(commands, "broker", "write the configuration of nats-servers")
    parser = add_command(
        actions, "config", config, "write configuration and passwords of nats-servers", has_json=False
    )
    add_config(parser)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write; passwords in it are kept")
    parser.add_argument(
        "--nodes",
        type=nodes,
        metavar="HOST[:PORT],…",
        default=[Node("127.0.0.1", CLIENT_PORT)],
        help=f"the servers, as the others reach them; routes use PORT + {ROUTE}, monitoring PORT + {MONITOR} "
        f"(default: 127.0.0.1:{CLIENT_PORT})",
    )
    parser.add_argument(
        "--tls",
        metavar="DIR",
        help="each server's folder with ca.pem, cert.pem, key.pem (default: no TLS)",
    )
    parser.add_argument(
        "--monitor-host",
        metavar="HOST",
        default="127.0.0.1",
        help="where monitoring listens; Rift's processes read it, so on other hosts a private address, or "
        "0.0.0.0 behind a firewall (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--store", metavar="DIR", default="/var/lib/rift-nats", help="data folder of each server"
    )
    parser.add_argument(
        "--store-gib",
        type=positive,
        metavar="GIB",
        default=64,
        help="most data of a server; less than its disk, whose rest is for indexes (default: 64)",
    )


def nodes(text: str) -> list[Node]:
    found = []
    for one in text.split(","):
        host, colon, port = one.strip().partition(":")
        number = int(port) if port.isdecimal() and port.isascii() else 0 if colon else CLIENT_PORT
        if not host or not host.isascii() or host.split() != [host] or not 0 < number <= PORT_MAX - MONITOR:
            raise argparse.ArgumentTypeError(
                f"must be HOST or HOST:PORT, with a port up to {PORT_MAX - MONITOR}, got {one!r}"
            )
        found.append(Node(host, number))
    if len(set(found)) < len(found) or len(found) > NODES_MAX:
        raise argparse.ArgumentTypeError(f"must be 1 to {NODES_MAX} different servers, got {text!r}")
    return found


def config(options: Namespace) -> None:
    settings = load_settings(options)
    folder: Path = options.folder
    granted = roles.table(map(slug, settings.catalogue()))
    try:
        passwords = credentials.ensure(folder / "credentials", [*granted, CLUSTER])
        write_secret(folder / AUTHORIZATION, authorization(granted, passwords))
        servers = [_server(options, node, passwords[CLUSTER]) for node in options.nodes]
        for server in servers:
            write_secret(folder / f"{server.name}.conf", server.text())
    except OSError as error:
        raise CommandFailed(f"{error.filename or folder}: {error.strerror}") from error
    urls = ",".join(f"nats://{node.host}:{node.port}" for node in options.nodes)
    monitors = ",".join(f"http://{node.host}:{node.port + MONITOR}" for node in options.nodes)
    tls = "RIFT_NATS_TLS=a folder with ca.pem\n" if options.tls else ""
    print(
        f"{folder}: {AUTHORIZATION}, {', '.join(f'{server.name}.conf' for server in servers)}, credentials/\n"
        f"Each server needs {AUTHORIZATION} beside its own file. Each of Rift's processes needs:\n"
        f"RIFT_NATS_URL={urls}\nRIFT_NATS_CREDENTIALS=a folder with the file of the process's role\n{tls}"
        f'rift.toml: nats_monitor = "{monitors}"'
    )


def _server(options: Namespace, node: Node, password: str) -> Server:
    peers: list[Node] = options.nodes
    share = len({peer.host for peer in peers}) < len(peers)
    # A server keeps its name for life: the others know it by that.
    name = node.host.partition(".")[0]
    if share or IS_ADDRESS.match(node.host):
        name = f"nats-{peers.index(node)}"
    anywhere = "127.0.0.1" if all(peer.host == "127.0.0.1" for peer in peers) else "0.0.0.0"
    routes = Routes(
        f"{anywhere}:{node.port + ROUTE}",
        [f"{peer.host}:{peer.port + ROUTE}" for peer in peers if peer != node],
        password,
    )
    return Server(
        name=name,
        listen=f"{anywhere}:{node.port}",
        monitor=f"{options.monitor_host}:{node.port + MONITOR}",
        store=f"{options.store}/{name}" if share else options.store,
        file_bytes=options.store_gib << 30,
        tls=options.tls or "",
        routes=routes if len(peers) > 1 else None,
    )
