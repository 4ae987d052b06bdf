"""The data folder: its archive key, its retention settings and its version."""

import hashlib
import hmac
from pathlib import Path

import pytest

from rift import settings
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
