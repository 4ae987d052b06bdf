"""Price lists, read from a file or made from the catalogue.

    version = 2                        # optional: the next version
    [prices."deepseek-v3"]
    prompt_usd = "0.15"                # USD per million tokens, as strings: money is never a float
    output_usd = "0.40"
    cached_prompt_usd = "0.05"         # optional: without it cached tokens cost as much as others
    second_usd = "0.0005"              # optional: USD per second, for accounts with plan per_second

Models that a file does not name keep their prices. A named model gets exactly the prices in the file.
"""

from codecs import BOM_UTF8
from pathlib import Path
from typing import Annotated, Any

import msgspec

from events.book import Book
from events.money import InvalidMoney, nanousd
from events.schema import Price, PricePublished
from rift import catalogue
from rift.catalogue import Catalogue, InvalidCatalogue, ModelName
from rift.errors import RiftError

# Each field of a model's price, and whether it is required.
FIELDS = {"prompt_usd": True, "output_usd": True, "cached_prompt_usd": False, "second_usd": False}


class InvalidPrices(RiftError):
    """A price list is invalid; the message names the model, the field and the valid values."""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    prices: dict[ModelName, dict[str, Any]]
    version: Annotated[int, msgspec.Meta(ge=1)] | None = None


def load(file: Path, book: Book) -> PricePublished:
    """Return the next price list: the prices in force, updated by the file. Raises InvalidPrices."""
    try:
        content = msgspec.toml.decode(file.read_bytes().removeprefix(BOM_UTF8), type=_File)
    except OSError as error:
        raise InvalidPrices(f"{file} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidPrices(f"{file}: {error}") from error
    version = book.price_version + 1
    if content.version not in (None, version):
        raise InvalidPrices(
            f"{file}: version must be {version}, the one after the list in force, got {content.version}"
        )
    if not content.prices:
        raise InvalidPrices(f"{file}: must price at least one model")
    prices = {name: _price(name, entry, file) for name, entry in content.prices.items()}
    return _list(version, {**book.prices(), **prices})


def default(models: Catalogue, book: Book) -> PricePublished | None:
    """Return a list that adds prices for unpriced models of the catalogue, or None if all have prices."""
    missing = [name for name in models if book.price(name) is None]
    if not missing:
        return None
    prices = {name: _catalogue_price(name, models) for name in missing}
    return _list(book.price_version + 1, {**book.prices(), **prices})


def _list(version: int, prices: dict[str, Price]) -> PricePublished:
    return PricePublished(id=f"price.{version}", version=version, prices=tuple(prices.values()))


def _price(name: str, entry: dict[str, Any], file: Path) -> Price:
    where = f"{file}: prices.{name}"
    if unknown := sorted(entry.keys() - FIELDS):
        raise InvalidPrices(f"{where}: unknown field {unknown[0]!r}; known fields: {', '.join(FIELDS)}")
    for field, is_required in FIELDS.items():
        if is_required and field not in entry:
            raise InvalidPrices(f"{where}: {field} is missing")
        if field in entry and not isinstance(entry[field], str):
            raise InvalidPrices(
                f'{where}.{field}: must be a string, like "0.15", because money is never a float, '
                f"got {entry[field]!r}"
            )
        if entry.get(field, "").startswith("-"):
            raise InvalidPrices(f"{where}.{field}: must not be negative, got {entry[field]!r}")
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
