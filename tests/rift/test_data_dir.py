"""The data folder: its version, its parts and their keys, and who may read them."""

import hashlib
import hmac
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from events.log import LogError
from rift import nats_server, settings
from rift.broker import secret_files
from rift.broker.credentials import CredentialUnusable
from rift.cli import sql
from rift.cli.connection import load_settings
from rift.cli.output import CommandFailed
from rift.data_dir import DataDir, DataDirError
from rift.settings import InvalidSettings


def test_the_archive_key_is_derived_from_the_secret(tmp_path: Path) -> None:
    found = DataDir(tmp_path / "data")
    with pytest.raises(DataDirError, match="there is no installation"):
        found.archive_key()
    found.make()
    assert found.archive == tmp_path / "data" / "archive"
    assert found.archive_key() == hmac.digest(found.secret(), b"archive content", hashlib.sha256)
    assert found.archive_key() == DataDir(tmp_path / "data").archive_key()
    other = DataDir(tmp_path / "other")
    other.make()
    assert other.archive_key() != found.archive_key()


@pytest.mark.parametrize(("toml", "days", "content"), [("", 7, False), ("retention_days = 0", 0, False)])
def test_retention_settings(tmp_path: Path, toml: str, days: int, content: bool) -> None:
    file = tmp_path / "rift.toml"
    file.write_text(toml)
    found = settings.load(file, {})
    assert (found.retention_days, found.archive_content) == (days, content)


@pytest.mark.parametrize("toml", ["retention_days = -1", 'retention_days = "7"', "archive_content = 1"])
def test_invalid_retention_settings_are_refused(tmp_path: Path, toml: str) -> None:
    file = tmp_path / "rift.toml"
    file.write_text(toml)
    with pytest.raises(InvalidSettings, match=toml.partition(" ")[0]):
        settings.load(file, {})


def test_the_first_start_writes_the_version(tmp_path: Path) -> None:
    old = DataDir(tmp_path / "old")
    old.folder.mkdir()
    (old.folder / "secret").write_text("00" * 32)
    old.check()
    old.make()
    assert (old.folder / "version").read_text() == "1\n"
    assert old.secret() == bytes(32), "a folder without a version has version 1 and keeps its secret"


@pytest.mark.parametrize("version", ["2", "0", "", "1.5", "\x00"])
def test_any_other_version_is_refused(tmp_path: Path, version: str) -> None:
    (tmp_path / "version").write_text(version)
    found = DataDir(tmp_path)
    for use in (found.check, found.make):
        with pytest.raises(DataDirError, match="another folder with --data"):
            use()
    assert [file.name for file in tmp_path.iterdir()] == ["version"]


@pytest.mark.parametrize("name", ["a\\b", "why?", "line\n", "\x1b[2J", os.fsdecode(b"\xff")])
def test_a_path_that_a_part_of_rift_cannot_open_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataDirError, match=r"has '.{1,6}' in it.*another one with --data") as refused:
        DataDir(tmp_path / name / "data").make()
    assert str(refused.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_a_running_service_is_not_asked_past(used: DataDir) -> None:
    """While control starts again, its open file would be reported as the reason."""
    options = Namespace(data=used.folder, nats=None, select="select 1")
    silent = ExceptionGroup("", [LogError("no process answers")])
    used.lock()
    assert DataDir(used.folder).is_locked()
    with pytest.raises(CommandFailed, match="no process answers"):
        sql._query_file(options, "select 1", silent)


def test_a_silent_broker_of_ones_own_is_not_asked_past(
    used: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file beside it is in use, or does not say how old it is."""
    used.database.touch()
    monkeypatch.setenv("RIFT_NATS_URL", "nats://127.0.0.1:1")
    options = Namespace(data=used.folder, nats=None, select="select 1")
    with pytest.raises(CommandFailed, match="no process answers"):
        sql._query_file(options, "select 1", ExceptionGroup("", [LogError("no process answers")]))


# --- parts that belong together --------------------------------------------------------------------


@pytest.fixture
def used(tmp_path: Path) -> DataDir:
    """A folder as an installation leaves it."""
    folder = DataDir(tmp_path / "data")
    folder.make()
    (folder.nats / "store" / "jetstream").mkdir(parents=True)
    (folder.archive / "RIFT_0").mkdir(parents=True)
    for name in ("dev.key", "rift.duckdb"):
        (folder.folder / name).write_text("x")
    folder.make()
    return folder


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("lost", ["nats", "nats/store", "nats/store/jetstream", "secret"])
@pytest.mark.parametrize("kept", ["dev.key", "rift.duckdb", "archive"])
def test_a_folder_that_lacks_a_part_is_refused_unchanged(used: DataDir, lost: str, kept: str) -> None:
    remove(used.folder / lost)
    for other in {"dev.key", "rift.duckdb", "archive"} - {kept}:
        remove(used.folder / other)
    before = sorted(used.folder.rglob("*"))
    with pytest.raises(DataDirError) as refused:
        used.make()
    missing = used.folder / ("secret" if lost == "secret" else "nats/store")
    words = f"there is {used.folder / kept}, but {missing} is missing or empty: restore the whole folder"
    assert str(refused.value).startswith(words)
    assert sorted(used.folder.rglob("*")) == before


def test_a_secret_that_is_lost_beside_a_log_is_refused(used: DataDir) -> None:
    for name in ("dev.key", "rift.duckdb", "archive", "secret"):
        remove(used.folder / name)
    with pytest.raises(DataDirError, match=r"nats/store, but .*/secret is missing"):
        used.make()


def test_a_start_that_was_cut_off_continues(tmp_path: Path) -> None:
    folder = DataDir(tmp_path)
    (tmp_path / "version").write_text("1\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "archive").mkdir()
    (tmp_path / ".secret.123").write_text("a start that died left this")
    folder.make()
    assert len(folder.secret()) == 32


@pytest.mark.parametrize("text", ["", "\n", "00" * 31, "00" * 31 + "0", "zz" * 32])
def test_a_secret_that_is_cut_or_changed_is_never_replaced(used: DataDir, text: str) -> None:
    file = used.folder / "secret"
    file.write_text(text)
    for use in (used.make, used.secret, used.archive_key):
        with pytest.raises(
            DataDirError, match="secret does not hold 64 hex digits: restore the whole folder"
        ):
            use()
    assert file.read_text() == text


def test_a_password_that_is_empty_is_refused_and_one_that_is_missing_is_made(tmp_path: Path) -> None:
    address = nats_server.configure(tmp_path)
    file = tmp_path / "credentials" / "gateway"
    assert mode(file) == 0o600
    first = address.access("gateway").password
    assert nats_server.configure(tmp_path).access("gateway").password == first
    file.unlink()
    with pytest.raises(CredentialUnusable, match="gateway is missing, so this process cannot be gateway"):
        address.access("gateway")
    assert nats_server.configure(tmp_path).access("gateway").password != first
    for text in ("", " \n", "short", 'x" }' + "0" * 40, "é" * 40):
        file.write_text(text)
        with pytest.raises(CredentialUnusable, match="gateway does not hold the password"):
            nats_server.configure(tmp_path)


def test_a_folder_with_one_token_gets_roles(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    (tmp_path / "url").write_text("nats://127.0.0.1:1")
    address = nats_server.configure(tmp_path, ["tiny:1"])
    assert not (tmp_path / "token").exists()
    assert address.access("worker-tiny-1").user == "worker-tiny-1"


def test_a_secret_is_created_once_and_not_through_a_link(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    (tmp_path / f".secret.{os.getpid()}").symlink_to(elsewhere)
    secret_files.create_secret(file, "one")
    with pytest.raises(FileExistsError):
        secret_files.create_secret(file, "two")
    assert file.read_text() == "one\n"
    secret_files.write_secret(file, "three")
    assert file.read_text() == "three\n"
    assert elsewhere.read_text() == "kept"
    assert mode(file) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "elsewhere"}


def test_two_first_starts_at_once_agree_on_one_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = secret_files.create_secret

    def second(path: Path, text: str) -> None:
        create(path, "1" if path.name == "version" else "ab" * 32)
        create(path, text)

    monkeypatch.setattr(secret_files, "create_secret", second)
    folder = DataDir(tmp_path / "data")
    folder.make()
    assert folder.secret() == b"\xab" * 32


@pytest.mark.parametrize("name", ["archive", "nats", "nats/store"])
def test_a_part_that_is_no_folder_is_refused(used: DataDir, name: str) -> None:
    path = used.folder / name
    shutil.rmtree(path)
    for put in (path.touch, lambda: path.symlink_to("nowhere")):
        put()
        with pytest.raises(DataDirError, match=f"{path} is not a folder"):
            used.make()
        path.unlink()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_at_once(used: DataDir, make: Callable[[Path], None]) -> None:
    """A reader of a pipe would wait for ever, and a folder would be reported as a full disk."""
    kept = ["version", "secret", "dev.key", "rift.toml", "rift.duckdb", "rift.duckdb.wal"]
    made = [
        "lock",
        *(f"nats/{name}" for name in ("nats.conf", "authorization.conf", "url", "monitor", "reserve")),
    ]
    made += ["logs/nats.log", "nats/credentials/gateway"]
    (used.nats / "credentials").mkdir()
    for name in kept + made:
        path = used.folder / name
        aside = path.with_name("aside")
        if path.exists():
            path.rename(aside)
        make(path)
        remedy = "the next start makes it" if name in made else "restore the whole folder"
        with pytest.raises(DataDirError, match=f"{path} is not a file: .*{remedy}"):
            used.check()
        path.rmdir() if path.is_dir() else path.unlink()
        if aside.exists():
            aside.rename(path)
    used.check()


def test_settings_that_a_link_does_not_lead_to_are_not_left_out(used: DataDir) -> None:
    (used.folder / "rift.toml").symlink_to("nowhere")
    with pytest.raises(InvalidSettings, match="No such file or directory"):
        load_settings(Namespace(data=used.folder, config=None))


# --- who may use it --------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_an_open_folder_is_tightened_once(used: DataDir, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    foreign = used.folder / "notes"
    foreign.mkdir()
    (foreign / "mine.txt").touch()
    (used.logs / "control.log").touch()
    (used.logs / "link").symlink_to(outside / "file")
    (used.folder / "dev.key.abc").touch()
    (used.folder / "rift-sql.duckdb").touch()
    (used.folder / "rift.toml").symlink_to(outside / "file")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(used.logs / "socket"))
    os.mkfifo(used.logs / "pipe")
    for path in (*used.folder.rglob("*"), used.folder, *outside.rglob("*"), outside):
        if not path.is_symlink():
            path.chmod(0o777 if path.is_dir() else 0o666)
    assert used.tighten() > 10
    closed = [used.folder, used.logs, used.nats, used.nats / "store", used.archive / "RIFT_0"]
    assert {mode(path) for path in closed} == {0o700}
    names = ("secret", "dev.key", "dev.key.abc", "rift.duckdb", "rift-sql.duckdb", "version")
    files = [used.folder / name for name in names]
    assert {mode(path) for path in (*files, used.logs / "control.log", used.logs / "pipe")} == {0o600}
    assert (mode(foreign), mode(foreign / "mine.txt")) == (0o777, 0o666), "not ours to close"
    assert (mode(outside), mode(outside / "file")) == (0o777, 0o666), "links are not followed"
    assert used.tighten() == 0


def test_a_folder_that_others_use_is_not_closed_to_them(tmp_path: Path) -> None:
    shared, sticky, ours = (tmp_path / name for name in ("shared", "sticky", "ours"))
    for folder, bits in ((shared, 0o755), (sticky, 0o1777), (ours, 0o755)):
        folder.mkdir()
        folder.chmod(bits)
    (shared / "passwd").touch()
    (ours / "rift.toml").touch()
    for folder, words in ((shared, "open to other users and holds passwd"), (sticky, "open to other users,")):
        before = mode(folder)
        with pytest.raises(DataDirError, match=words):
            DataDir(folder).make()
        assert mode(folder) == before
    DataDir(ours).make()
    shared.chmod(0o700)
    DataDir(shared).make()


def give(path: Path, user: int) -> None:
    """Make a user the owner, which only root can."""
    sudo = () if os.geteuid() == 0 else ("sudo", "-n")
    subprocess.run([*sudo, "chown", "-h", str(user), path], check=True)


@pytest.mark.parametrize("name", ["", "nats", "nats/url", "nats/credentials", "nats/store", "dev.key"])
def test_a_folder_of_another_user_is_refused(used: DataDir, name: str) -> None:
    (used.nats / "url").touch()
    (used.nats / "credentials").mkdir()
    give(used.folder / name, 4321)
    with pytest.raises(DataDirError, match=r"belongs to user 4321, but Rift runs as .*: start Rift as 4321"):
        used.make()
    give(used.folder / name, os.geteuid())


def test_a_link_of_another_user_is_refused(used: DataDir, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(used.folder)
    DataDir(link).make()
    for path in (link, used.folder):
        give(path, 4321)
        with pytest.raises(DataDirError, match=f"{path.name} belongs to user 4321"):
            DataDir(link).make()
        give(path, os.geteuid())


def test_settings_may_be_roots(used: DataDir) -> None:
    file = used.folder / "rift.toml"
    file.touch()
    give(file, 0)
    used.make()
    give(file, 4321)
    with pytest.raises(DataDirError, match=r"rift.toml belongs to user 4321"):
        used.make()
    give(file, os.geteuid())


def test_a_parent_that_any_user_can_write_is_named(used: DataDir, tmp_path: Path) -> None:
    assert used.open_parent() is None
    tmp_path.chmod(0o777)
    assert used.open_parent() == tmp_path
    tmp_path.chmod(0o1777)
    assert used.open_parent() is None
    tmp_path.chmod(0o700)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, words in (
        ("file", "file is not a folder"),
        ("dangling", "dangling is in the way"),
        ("file/below", "below is not a folder"),
    ):
        with pytest.raises(DataDirError, match=words):
            DataDir(tmp_path / name).make()


def test_the_temporary_folder_cannot_be_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, again, other = DataDir(tmp_path / "a"), DataDir(tmp_path / "a"), DataDir(tmp_path / "b")
    assert first.temporary != again.temporary
    for folder in (first, other):
        folder.temporary.mkdir()
        (folder.temporary / "socket").touch()
    again.clear_temporary()
    assert not first.temporary.exists(), "an earlier start left it"
    assert other.temporary.exists()


@pytest.mark.parametrize("url", ["nats://[", "nats://a:99999", "nats://a:b", "nats://", "a,,b", "nats://a:0"])
def test_a_wrong_address_of_a_broker_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataDirError, match=r"NATS URL must be nats://\[TOKEN@\]HOST:PORT"):
        DataDir(tmp_path).log_address(url, {})


def test_the_token_in_a_wrong_address_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(DataDirError, match="got 'nats://…@a:b,…@c'"):
        DataDir(tmp_path).log_address("nats://token@a:b,user:password@c", {})
