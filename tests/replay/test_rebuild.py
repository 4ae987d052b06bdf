"""The rebuild from the archive: set-wise and through the fold, always the same rows."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import subjects
from events.log import Stored
from replay import rebuild as rebuilding
from replay.archive import Archive
from replay.rebuild import rebuild
from replay.warehouse import Warehouse
from tests.replay.test_archive import KEY, seal_all
from tests.replay.test_fold import apply_all, everything

Streams = dict[str, list[Stored]]


def assert_the_same(streams: Streams, archived: dict[str, int], folder: Path, dice: random.Random) -> None:
    """Archive the beginnings, rebuild from them, go on with the rest, and compare with one fold over all."""
    archive = Archive(folder / "archive", key=KEY)
    seal_all(archive, {s: messages[: archived[s]] for s, messages in streams.items()}, dice=dice)
    path = folder / "rebuilt.duckdb"
    rebuild(archive, path)
    again, whole = Warehouse.open(path), Warehouse.open(Path(":memory:"))
    try:
        assert again.positions() == {stream: last for stream, last in archived.items() if last}
        apply_all(whole, {s: messages[: archived[s]] for s, messages in streams.items() if archived[s]})
        assert everything(again) == everything(whole)
        for warehouse in (again, whole):
            apply_all(warehouse, streams)
        assert everything(again) == everything(whole)
    finally:
        again.close()
        whole.close()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_history(chaos: Any, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    dice = random.Random(seed)
    history = chaos(dice)
    for _ in range(dice.randint(0, 3)):
        history.write(dice.randint(0, 30))
        for _ in range(dice.randint(0, 6)):
            history.scribe.finished_request(tokens=dice.randint(0, 4), price_version=history.versions)
    streams = history.write(5)
    archived = {stream: dice.randint(0, len(messages)) for stream, messages in streams.items()}
    archived[subjects.BOOK] = len(streams[subjects.BOOK])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuilding, "WINDOW_BYTES", dice.choice((1, 60_000, 10**9)))
        patch.setattr(rebuilding, "BATCH_EVENTS", dice.choice((1, 7, 10_000)))
        assert_the_same(streams, archived, tmp_path_factory.mktemp("any"), dice)
