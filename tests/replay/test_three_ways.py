"""One bill by three hands: SQL over the fold, a plain reckoning, and the auditor over an export; and the same
rows whatever way they came, with any cuts, from the log or from the archive, on any hash seed."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import subjects
from events.schema import AccountOpened
from replay import audit, auditor
from replay.archive import Archive
from replay.fold import BookBehind
from replay.invoice import closing, invoice
from replay.rebuild import rebuild
from replay.warehouse import Warehouse
from tests.replay import reckoning
from tests.replay.months import ACCOUNTS, Months
from tests.service import ROOT


def history_of(seed: int, steps: int) -> Months:
    history = Months(random.Random(seed))
    for account in ACCOUNTS:
        history.scribe.book(AccountOpened(id=f"account.{account}", account=account))
    history.write(steps)
    return history


def folded(path: Path, streams: Any, dice: random.Random | None = None) -> Warehouse:
    """Fold all of it; with dice, in random batches, and in another process's place now and then."""
    warehouse = Warehouse.open(path)
    while unapplied := [s for s in streams if warehouse.positions().get(s, 0) < len(streams[s])]:
        stream = dice.choice(unapplied) if dice else min(unapplied, key=lambda name: name != subjects.BOOK)
        done = warehouse.positions().get(stream, 0)
        end = done + dice.randint(1, 30) if dice else None
        try:
            warehouse.apply(stream, streams[stream][done:end])
        except BookBehind:
            continue
        if dice and dice.random() < 0.2:
            warehouse.close()
            warehouse = Warehouse.open(path)
    return warehouse


def sealed(folder: Path, streams: Any, dice: random.Random) -> Archive:
    archive = Archive(folder, key=b"k")
    for stream, messages in streams.items():
        cuts = sorted({dice.randint(1, len(messages)) for _ in range(2)} | {len(messages)})
        for cut in cuts:
            archive.seal(stream, messages[archive.last(stream) : cut], last=cut)
    return archive


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_sql_bills_as_the_plain_reckoning_does(seed: int) -> None:
    history = history_of(seed, 120)
    streams = history.scribe.streams
    warehouse = folded(Path(":memory:"), streams)
    for period in sorted(history.months()):
        for account in ACCOUNTS:
            found = msgspec.to_builtins(invoice(warehouse.read, account, period))
            assert found == reckoning.invoice(streams, account, period)
        assert closing(warehouse.read, period).digest == reckoning.digest(streams, period)
    warehouse.close()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_way_gives_the_same_digests(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, dice = tmp_path_factory.mktemp("ways"), random.Random(seed)
    streams = history_of(seed, 80).scribe.streams
    whole = folded(folder / "whole", streams)
    cut = folded(folder / "cut", streams, dice)
    rebuild(sealed(folder / "archive", streams, dice), folder / "archived")
    archived = Warehouse.open(folder / "archived")
    assert whole.digests()[0] == cut.digests()[0] == archived.digests()[0]
    for warehouse in (whole, cut, archived):
        warehouse.close()


@pytest.mark.parametrize("seed", range(3))
def test_an_export_of_the_archive_is_equal_to_the_bill_in_sql(seed: int, tmp_path: Path) -> None:
    history = history_of(seed, 120)
    streams = history.scribe.streams
    warehouse = folded(Path(":memory:"), streams)
    archive = sealed(tmp_path / "archive", streams, random.Random(seed))
    # The history closes its months with the heads of an archive of its own.
    closed = reckoning.closes(streams)
    for period in sorted(history.months() - closed.keys()):
        for account in ACCOUNTS:
            found = invoice(warehouse.read, account, period)
            folder = tmp_path / f"{account}-{period}"
            audit.export(
                archive, msgspec.to_builtins(found), reckoning.requests(streams, account, period), folder
            )
            audited = auditor.Audit(folder)
            assert audited.check()["total_nanousd"] == found.total_nanousd
            assert [wrong for wrong in audited.wrong if "was closed with another log" not in wrong] == []
    warehouse.close()


DIGESTS = """
import sys
from pathlib import Path
from tests.replay.test_three_ways import folded, history_of
for relation, digest in folded(Path(":memory:"), history_of(7, 80).scribe.streams).digests()[0].items():
    print(digest, relation)
"""


@pytest.mark.slow
def test_another_hash_seed_gives_the_same_digests() -> None:
    def told(hash_seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(
            [sys.executable, "-c", DIGESTS], capture_output=True, text=True, timeout=60, env=environment
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert len({told(seed) for seed in ("0", "1", "4242")}) == 1
