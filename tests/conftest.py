"""A real nats-server for each test module that needs one, on a free port and in its own folder."""

import gc
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import hypothesis
import pytest

from rift import nats_server
from tests import scripted
from tests.scripted import Served

# An example's duration depends on the load of the machine, so it has no deadline.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": False}


class Server:
    """A nats-server that a test can kill and restart on the same port."""

    def __init__(self, folder: Path, models: Iterable[str] = ()) -> None:
        self.folder = folder
        self.address = nats_server.configure(folder, models)
        self.process: subprocess.Popen[bytes] | None = None
        # For processes that name the broker with `--nats`.
        self.environment = {"RIFT_NATS_CREDENTIALS": str(folder / "credentials")}

    def start(self) -> None:
        log = (self.folder / "log").open("ab")
        with closing(log):
            self.process = subprocess.Popen(nats_server.command(self.folder), stdout=log, stderr=log)
        port = int(self.address.url.rpartition(":")[2])
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        assert self.process is not None, "the server was never started"
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("nats"))
    running.start()
    yield running
    running.kill()


@pytest.fixture(scope="module")
def scripted_gateway() -> Iterator[Served]:
    with scripted.serving() as running:
        yield running


@pytest.fixture
def served(scripted_gateway: Served) -> Served:
    """A gateway over HTTP whose worker follows a script."""
    scripted_gateway.forget()
    return scripted_gateway


def _no_skips(report: pytest.TestReport | pytest.CollectReport) -> None:
    """With RIFT_NO_SKIPS set, as in .ci/run, fail a skipped test with the reason of the skip."""
    if os.environ.get("RIFT_NO_SKIPS") and report.skipped and not hasattr(report, "wasxfail"):
        why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"RIFT_NO_SKIPS is set, and this is skipped: {why}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _no_skips(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _no_skips(report)
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="the CPU engine is not installed (see ops/README.md)")
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(skip)


def pytest_unconfigure() -> None:
    """Empty DuckDB's modules.

    Hypothesis and vLLM's libraries hold modules to the very end of the interpreter, and with them DuckDB's
    types and functions. DuckDB's binding would list them all as leaked.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] in ("duckdb", "_duckdb")]:
        vars(sys.modules.pop(name)).clear()
    gc.collect()
