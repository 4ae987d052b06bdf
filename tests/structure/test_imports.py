"""The direction of imports, the doors of third parties, and the layers of the gateway."""

import ast
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.structure.syntax import OURS, ROOT, Module, Rule, imports, modules, parse, problems

# The direction of imports: the packages of ours that each package may import.
MAY_IMPORT = {"events": {"events"}, "replay": {"events", "replay"}, "rift": set(OURS)}
# These answer clients and run models; code that only derives data from the log must not slow or break them.
WITHOUT_REPLAY = ("rift.gateway", "rift.worker", "rift.engines")
# The doors: where a third party may be imported. One that is not named here may be imported nowhere.
ENGINE = (
    "rift/engines/vllm.py",
    "rift/engines/vllm_stats.py",
    "rift/engines/chat.py",
    "rift/engines/prepare.py",
)
DOORS: dict[str, tuple[str, ...]] = {
    "anyio": ("events/", "replay/", "rift/"),
    "cryptography": ("events/encryption.py", "replay/archive/signatures.py", "replay/auditor.py"),
    "duckdb": ("replay/warehouse/warehouse.py", "replay/warehouse/queries.py", "replay/archive/parquet.py"),
    "h11": ("rift/gateway/asgi/strict_parser.py",),
    "httpx": ("rift/cli/calibrate.py", "rift/cli/log/collector.py", "rift/fleet/cluster.py"),
    "hypercorn": ("rift/gateway/asgi/server.py",),
    "jinja2": ("rift/engines/tokens.py",),
    "matplotlib": ("replay/backtest/plot.py",),
    "prometheus_client": ("rift/metrics/",),
    "msgspec": ("events/", "replay/", "rift/"),
    "nats": ("events/jetstream/",),
    "nats_server": ("rift/nats_server.py",),
    "psutil": ("rift/engines/vllm.py",),
    "tokenizers": ("rift/engines/tokens.py",),
    "torch": ENGINE,
    "transformers": ENGINE,
    "uvloop": ("rift/",),
    "vllm": ENGINE,
    "zmq": ("rift/engines/engine_socket.py",),
}
# Inside these packages each folder or module imports only those before it.
LAYERS: dict[str, tuple[str, ...]] = {
    "rift.gateway": (
        "state",
        "bounds",
        "exchange",
        "asgi",
        "completion",
        "choices",
        "dialects",
        "streams",
        "admission",
        "submission",
        "api",
        "metrics",
        "app",
        "process",
    ),
}
# Handed to customers as one file: it runs on the oldest Python they may have, alone, and is read by them.
AUDITOR = "replay/auditor.py"
AUDITOR_PYTHON = (3, 9)


def directions(module: Module) -> Iterator[str]:
    package = module.path.partition("/")[0]
    for line, name in imports(module):
        top = name.partition(".")[0]
        if name.startswith("."):
            yield f"{line}: write the import of {name} with its full name"
        elif top in OURS and top not in MAY_IMPORT[package]:
            yield f"{line}: {package} must not import {top}; imports go events <- replay <- rift"


def doors(module: Module) -> Iterator[str]:
    for line, name in imports(module):
        top = name.partition(".")[0]
        if top and top not in OURS and top not in sys.stdlib_module_names:
            allowed = DOORS.get(top, ())
            if not module.path.startswith(allowed):
                where = " and ".join(allowed) or "nothing: give it a door"
                yield f"{line}: {top} is imported only in {where}"


def layers(module: Module) -> Iterator[str]:
    for package, order in LAYERS.items():
        own = _layer(module.name, package)
        if own not in order:
            continue
        for line, name in imports(module):
            other = _layer(name, package)
            if other in order and order.index(other) > order.index(own):
                yield f"{line}: {own} must not import {other}; the order is {' <- '.join(order)}"


def _layer(name: str, package: str) -> str:
    return name.removeprefix(f"{package}.").partition(".")[0] if name.startswith(f"{package}.") else ""


def alone(module: Module) -> Iterator[str]:
    if module.path != AUDITOR:
        return
    for line, name in imports(module):
        # Signatures are checked if this package is there.
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "cryptography"}:
            yield f"{line}: {name}: the auditor has the standard library and nothing else"


def graph(known: Mapping[str, Module]) -> dict[str, set[str]]:
    """Which of our modules each of our modules imports; a package counts only if a name of it is meant."""
    edges: dict[str, set[str]] = {}
    for name, module in known.items():
        meant = [target for _, target in imports(module)]
        found = {t if t in known else t.rpartition(".")[0] for t in meant if t.partition(".")[0] in OURS}
        edges[name] = {target for target in found if target in known and target != name}
    return edges


def reached(edges: Mapping[str, set[str]], start: str) -> set[str]:
    """Everything that importing `start` imports in the end; itself only in a cycle."""
    seen: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen.add(name)
            waiting += edges[name]
    return seen


RULES: tuple[Rule, ...] = (
    directions,
    doors,
    layers,
    alone,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule) -> None:
    assert not (found := problems(rule)), "\n" + "\n".join(found)


def test_no_import_cycles() -> None:
    edges = graph(modules())
    assert [name for name in edges if name in reached(edges, name)] == []


def test_gateway_worker_and_engines_get_along_without_replay() -> None:
    edges = graph(modules())
    starts = [name for name in edges if name.startswith(WITHOUT_REPLAY)]
    found = {name: sorted(r for r in reached(edges, name) if r.startswith("replay")) for name in starts}
    assert not {name: targets for name, targets in found.items() if targets}


@pytest.mark.parametrize("name", OURS)
def test_the_imported_package_is_ours(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file, f"{name} has no __init__.py"
    assert Path(file).resolve() == ROOT / name / "__init__.py", "another package of that name is in the way"


def test_the_auditor_is_for_old_pythons() -> None:
    source = (ROOT / AUDITOR).read_text()
    ast.parse(source, feature_version=AUDITOR_PYTHON)
    with pytest.raises(SyntaxError):
        ast.parse("match 1:\n    case _: pass", feature_version=AUDITOR_PYTHON)


WRONG = [
    (directions, "events/x.py", "def f():\n    from rift.cli import main", "events must not import rift"),
    (directions, "replay/x.py", "import rift", "replay must not import rift"),
    (directions, "rift/x.py", "from . import y", "full name"),
    (
        doors,
        "rift/x.py",
        "import duckdb",
        "only in replay/warehouse/warehouse.py and replay/warehouse/queries.py and replay/archive/parquet.py",
    ),
    (doors, "rift/x.py", "from nats.aio import client", "only in events/jetstream/"),
    (doors, "rift/x.py", "import requests", "give it a door"),
    (layers, "rift/gateway/asgi/x.py", "from rift.gateway.app import Gateway", "asgi must not import app"),
    (alone, "replay/auditor.py", "from events import merkle", "standard library and nothing else"),
    (alone, "replay/auditor.py", "import msgspec", "standard library and nothing else"),
]


@pytest.mark.parametrize(("rule", "path", "source", "expected"), WRONG)
def test_rule_can_fail(rule: Rule, path: str, source: str, expected: str) -> None:
    assert expected in "\n".join(rule(parse(path, source)))


def test_doors_open() -> None:
    assert not list(doors(parse("replay/warehouse/warehouse.py", "import duckdb")))


def test_cycles_and_ways_are_found() -> None:
    sources = {
        "rift/gateway/a.py": "from rift import b",
        "rift/b.py": "from rift.c import x",
        "rift/c.py": "import rift.b",
    }
    edges = graph({module.name: module for module in (parse(*item) for item in sources.items())})
    assert [name for name in edges if name in reached(edges, name)] == ["rift.b", "rift.c"]
    assert reached(edges, "rift.gateway.a") == {"rift.b", "rift.c"}
