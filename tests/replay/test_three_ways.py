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
from replay import auditor
from replay.archive.archive import Archive
from replay.billing.invoice import closing, invoice
from replay.facts.fold import BookBehind
from replay.warehouse.rebuild import rebuild
from replay.warehouse.warehouse import Warehouse
from rift.cli.log.audit import export_of, write_export
from rift.cli.output import CommandFailed
from tests.replay import reckoning
from tests.replay.conftest import ListLog, Scribe
from tests.replay.months import ACCOUNTS, Months
from tests.replay.seconds import NEXT, PERIOD, SECONDS, runs_of
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
        first = archive.last(stream) + 1
        cuts = sorted({dice.randint(first, len(messages)) for _ in range(2)} | {len(messages)})
        for cut in cuts:
            archive.seal(stream, messages[archive.last(stream) : cut], last=cut)
    return archive


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_sql_bills_as_the_plain_reckoning_does(seed: int) -> None:
    history = history_of(seed, 120)
    streams = history.scribe.streams
    warehouse = folded(Path(":memory:"), streams)
    for period in sorted(history.months()):
        for account in ACCOUNTS:
            bill = msgspec.to_builtins(invoice(warehouse.read, account, period))
            assert bill == reckoning.invoice(streams, account, period)
        assert closing(warehouse.read, period).digest == reckoning.digest(streams, period)
    warehouse.close()


@settings(max_examples=5, deadline=None)
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
            folder = tmp_path / f"{account}-{period}"
            bill = export_of(archive, warehouse, account, period, folder)
            audited = auditor.Audit(folder)
            assert audited.check()["total_nanousd"] == bill.total_nanousd
            assert [wrong for wrong in audited.wrong if "was closed with another log" not in wrong] == []
    warehouse.close()


@pytest.mark.parametrize("name", SECONDS)
def test_an_export_has_who_paid_for_the_seconds_before(name: str, scribe: Scribe, tmp_path: Path) -> None:
    runs_of(scribe, name)
    warehouse = folded(Path(":memory:"), scribe.streams)
    archive = sealed(tmp_path / "archive", scribe.streams, random.Random(1))
    for period in (PERIOD, NEXT):
        bill = export_of(archive, warehouse, "dev", period, tmp_path / period)
        audited = auditor.Audit(tmp_path / period)
        assert (audited.check()["total_nanousd"], audited.wrong) == (bill.total_nanousd, [])
    warehouse.close()


def test_an_export_reaches_no_further_than_its_warehouse(scribe: Scribe, tmp_path: Path) -> None:
    """Control seals while the export is made."""
    scribe.book(AccountOpened(id="account.dev", account="dev"))
    scribe.prices()
    scribe.finished_request()
    warehouse = folded(Path(":memory:"), scribe.streams)
    sealed(tmp_path / "archive", scribe.streams, random.Random(1))
    reached = warehouse.positions()
    scribe.prices(2)
    scribe.finished_request(price_version=2)
    archive = sealed(tmp_path / "archive", scribe.streams, random.Random(1))
    bill = export_of(archive, warehouse, "dev", PERIOD, tmp_path / "export")
    assert (bill.positions, [line.requests for line in bill.lines]) == (reached, [1])
    assert auditor.main(str(tmp_path / "export")) == 0
    warehouse.close()


@pytest.mark.anyio
async def test_an_export_of_less_of_the_book_than_of_a_shard(scribe: Scribe, tmp_path: Path) -> None:
    """Between the two, control sealed a request of a newer price list: the next try has both."""
    scribe.book(AccountOpened(id="account.dev", account="dev"))
    scribe.prices()
    book = [*scribe.streams[subjects.BOOK]]
    scribe.prices(2)
    scribe.finished_request(price_version=2)
    archive = Archive(tmp_path / "archive", key=b"k")
    archive.seal(subjects.BOOK, book, last=len(book))
    archive.seal("RIFT_0", scribe.streams["RIFT_0"], last=len(scribe.streams["RIFT_0"]))
    log: Any = ListLog(scribe.streams)
    with pytest.raises(CommandFailed, match=r"RIFT_BOOK:3, not folded yet; repeat the command"):
        await write_export(log, archive, "dev", PERIOD, tmp_path / "export")
    archive.seal(subjects.BOOK, scribe.streams[subjects.BOOK][len(book) :], last=3)
    bill = await write_export(log, archive, "dev", PERIOD, tmp_path / "export")
    assert [line.price_version for line in bill.lines] == [2]


DIGESTS = """
import sys
from pathlib import Path
from tests.replay.test_three_ways import folded, history_of
for relation, digest in folded(Path(":memory:"), history_of(7, 80).scribe.streams).digests()[0].items():
    print(digest, relation)
"""


@pytest.mark.slow
def test_another_hash_seed_gives_the_same_digests() -> None:
    def digests_of(hash_seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(
            [sys.executable, "-c", DIGESTS], capture_output=True, text=True, timeout=60, env=environment
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert len({digests_of(seed) for seed in ("0", "1", "4242")}) == 1
