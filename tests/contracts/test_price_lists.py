"""The book of the gateways and the fold of the bills hold the same price lists."""

import random

import pytest

from events import codec
from events.book import Book
from events.log import Stored
from events.schema import Price, PricePublished
from events.subjects import BOOK
from replay.facts.fold import Batch, FactFold, Read
from replay.facts.rows import PriceRow

MODELS = ("a", "b", "c")


def published(dice: random.Random, number: int) -> PricePublished:
    """Return a list that may repeat an id, skip a version, come late, be empty or price a model twice."""
    prices = [
        Price(model=dice.choice(MODELS), prompt_nanousd=dice.randint(1, 99), output_nanousd=1)
        for _ in range(dice.choice((0, 1, 2, 4)))
    ]
    entry = f"price.{dice.randint(1, number)}"
    return PricePublished(id=entry, version=dice.randint(1, 6), prices=tuple(prices))


def restarted(rows: list[PriceRow], ids: list[str]) -> FactFold:
    fold = FactFold()
    fold.restore_book(ids, rows)
    return fold


@pytest.mark.parametrize("seed", range(100))
def test_both_folds_hold_the_same_price_lists(seed: int) -> None:
    dice = random.Random(seed)
    book = Book()
    fold = FactFold()
    rows: list[PriceRow] = []
    ids: list[str] = []
    for sequence in range(1, 40):
        event = published(dice, sequence)
        stored = Stored("rift.book.price.list", sequence, sequence, codec.encode("test", [event]))
        book.fold(stored)
        changes = fold.apply(Batch(BOOK, [Read(stored, [event])]))
        rows += [row for row in changes.rows if isinstance(row, PriceRow)]
        ids.append(event.id)
        if dice.random() < 0.2:
            positions = fold.positions
            fold = restarted(rows, ids)
            fold.positions = positions
    billed = {(row.version, row.model): row.prompt_nanousd for row in rows}
    assert len(billed) == len(rows), "a model has one price in a version"
    metered = {
        (version, model): price.prompt_nanousd
        for version in range(1, 7)
        for model in MODELS
        if version <= book.price_version and (price := book.price(model, version)) is not None
    }
    assert billed == metered
    assert book.price_version == max((version for version, _ in billed), default=0)
