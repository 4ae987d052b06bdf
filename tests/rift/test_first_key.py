"""The first key's file: valid keys are kept, invalid ones are moved aside, and nothing is overwritten. The
start says what it waits for."""

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.abc
import pytest

from events import book as books
from events import subjects
from events.log import Log
from rift import book_admin, startup
from rift.data_dir import DataDir, DataDirError
from rift.settings import Settings
from tests.contracts.twins import in_memory

pytestmark = pytest.mark.anyio


class Start:
    """Starts of one installation. `notes` is what the operator was shown."""

    def __init__(self, log: Log, folder: Path) -> None:
        self.log = log
        self.folder = DataDir(folder)
        self.folder.make()
        self.file = self.folder.first_key
        self.notes: list[str] = []

    async def key(self) -> str:
        return await startup.write_book(self.log, self.folder, Settings(), self.notes.append)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    async with in_memory() as twin:
        yield Start(twin.log, tmp_path)


async def test_a_valid_key_is_kept(start: Start) -> None:
    key = await start.key()
    assert start.file.read_text() == key + "\n"
    assert await start.key() == key
    assert start.notes == []


async def test_a_revoked_key_is_moved_aside(start: Start) -> None:
    old = await start.key()
    key_id = old.split("_")[1]
    await book_admin.revoke_key(start.log, await books.read(start.log), key_id)
    new = await start.key()
    assert new != old
    assert start.file.read_text() == new + "\n"
    assert start.file.with_name(f"dev.key.{key_id}").read_text() == old + "\n"
    assert start.notes == [
        f"the key in {start.file} is revoked: it is now in {start.file}.{key_id}, and another key is issued"
    ]


async def test_a_missing_file_is_named(start: Start) -> None:
    old = await start.key()
    start.file.unlink()
    assert await start.key() != old
    assert len(start.notes) == 1
    assert start.notes[0].startswith(f"{start.file} is missing, so another key is issued")


@pytest.mark.parametrize("text", ["", "rift_aaaaaaaa_bbbb", "\x00"])
async def test_a_key_of_another_log_is_refused_and_kept(start: Start, text: str) -> None:
    start.file.write_text(text)
    with pytest.raises(DataDirError, match="does not hold a key of the log"):
        await start.key()
    assert start.file.read_text() == text
    assert await start.log.last_sequence(subjects.BOOK) == 0, "nothing is written to the log"


async def test_a_link_to_nowhere_is_not_replaced(start: Start, tmp_path: Path) -> None:
    start.file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataDirError, match=r"dev.key cannot be read: No such file"):
        await start.key()
    assert start.file.is_symlink()


async def test_a_gateway_that_does_not_know_the_key_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts at once can find the same port free."""
    keys = {b"ours": b"200 OK", b"theirs": b"401 Unauthorized"}

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            request = await stream.receive()
            status = b"200 OK" if request.startswith(b"GET /readyz") else keys[request.split()[-1]]
            await stream.send(b"HTTP/1.1 %s\r\n\r\n" % status)

    monkeypatch.setattr(startup, "GATEWAY_WAIT_S", 0.2)
    waiting = anyio.Event()
    notes: list[str] = []

    def notify(note: str) -> None:
        notes.append(note)
        waiting.set()

    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, serve)
        url = f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
        await startup.gateway_ready(url, "ours", notify)
        assert notes == []
        tasks.start_soon(startup.gateway_ready, url, "theirs", notify)
        await waiting.wait()
        tasks.cancel_scope.cancel()
    assert "another installation's gateway answers" in notes[0]


async def test_an_operator_hears_that_no_worker_has_begun(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "MODEL_WAIT_S", 0.01)
    told = anyio.Event()

    def notify(note: str) -> None:
        start.notes.append(note)
        told.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(startup.model_ready, start.log, "acme:1", notify)
        await told.wait()
        tasks.cancel_scope.cancel()
    assert "no worker of acme:1 has begun" in start.notes[0]
