"""Price lists: read from a file, compared with the one in force, published as an event of the book.

    version = 2                        # may be left out: the next one
    [prices."deepseek-v3"]
    prompt_usd = "0.15"                # USD per million tokens, as strings: money is never a float
    output_usd = "0.40"
    cached_prompt_usd = "0.05"         # may be left out: then cached tokens are prompt tokens
    second_usd = "0.0005"              # USD a second, for accounts of plan per_second; may be left out

Models that a file does not name keep their prices; of one that it names, all are replaced.
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec

from events import codec, subjects
from events.book import Book
from events.log import Conflict, Log
from events.money import InvalidMoney, nanousd
from events.schema import Price, PricePublished
from rift import catalogue
from rift.catalogue import Catalogue, InvalidCatalogue, ModelName
from rift.errors import RiftError

WRITER = "cli"
FIELDS = {"prompt_usd": True, "output_usd": True, "cached_prompt_usd": False, "second_usd": False}


class InvalidPrices(RiftError):
    """A price list cannot be used; the message names the model, the field and what to write instead."""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    prices: dict[ModelName, dict[str, Any]]
    version: Annotated[int, msgspec.Meta(ge=1)] | None = None


def load(file: Path, book: Book) -> PricePublished:
    """Return the next price list: a file's prices over those in force. Raises InvalidPrices."""
    try:
        told = msgspec.toml.decode(file.read_bytes(), type=_File)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidPrices(f"{file}: {error}") from error
    version = book.price_version + 1
    if told.version not in (None, version):
        raise InvalidPrices(
            f"{file}: version {told.version} overlaps another or leaves a gap: version {book.price_version} "
            f"is in force, and the next one is {version}"
        )
    if not told.prices:
        raise InvalidPrices(f"{file}: it prices no model")
    prices = {name: _price(name, entry, file) for name, entry in told.prices.items()}
    return _list(version, {**book.prices(), **prices})


def default(models: Catalogue, book: Book) -> PricePublished | None:
    """Return the list that prices the catalogue's models that have no price yet; None if all have one."""
    missing = [name for name in models if book.price(name) is None]
    if not missing:
        return None
    prices = {name: _catalogue_price(name, models) for name in missing}
    return _list(book.price_version + 1, {**book.prices(), **prices})


async def publish(log: Log, published: PricePublished) -> None:
    """Append a price list behind the one before. Raises InvalidPrices if there is a later one, LogError."""
    subject = subjects.book("price", "list")
    last = await log.last(subjects.BOOK, subject)
    before = 0
    if last is not None:
        before = max(e.version for e in codec.decode(last.data)[1] if isinstance(e, PricePublished))
    if before != published.version - 1:
        raise InvalidPrices(f"version {before} was published meanwhile; try again")
    try:
        await log.append(
            subjects.BOOK,
            subject,
            codec.encode(WRITER, [published]),
            expect_last=last.sequence if last is not None else 0,
        )
    except Conflict as error:
        raise InvalidPrices("another price list was published meanwhile; try again") from error


def _list(version: int, prices: dict[str, Price]) -> PricePublished:
    return PricePublished(id=f"price.{version}", version=version, prices=tuple(prices.values()))


def _price(name: str, entry: dict[str, Any], file: Path) -> Price:
    where = f"{file}: prices.{name}"
    if unknown := sorted(entry.keys() - FIELDS):
        raise InvalidPrices(f"{where}: {unknown[0]!r} is no price; known are {', '.join(FIELDS)}")
    for field, needed in FIELDS.items():
        if needed and field not in entry:
            raise InvalidPrices(f"{where}: {field} is missing")
        if field in entry and not isinstance(entry[field], str):
            raise InvalidPrices(
                f'{where}.{field}: {entry[field]!r} is a number; write it as a string, like "0.15": '
                "money is never a float"
            )
        if entry.get(field, "").startswith("-"):
            raise InvalidPrices(f"{where}.{field}: {entry[field]!r} is negative")
    try:
        tokens = {
            field: catalogue.nanousd_per_token(entry[field], where=f"{where}.{field}")
            for field in entry.keys() - {"second_usd"}
        }
        second = nanousd(entry["second_usd"]) if "second_usd" in entry else None
    except (InvalidCatalogue, InvalidMoney) as error:
        raise InvalidPrices(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
    return Price(
        model=name,
        prompt_nanousd=tokens["prompt_usd"],
        output_nanousd=tokens["output_usd"],
        cached_prompt_nanousd=tokens.get("cached_prompt_usd"),
        second_nanousd=second,
    )


def _catalogue_price(name: str, models: Catalogue) -> Price:
    model = models[name]
    return Price(
        model=name,
        prompt_nanousd=catalogue.nanousd_per_token(model.prompt_usd, where=f"models.{name}.prompt_usd"),
        output_nanousd=catalogue.nanousd_per_token(model.output_usd, where=f"models.{name}.output_usd"),
    )
