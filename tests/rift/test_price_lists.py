"""Price lists: valid files, invalid files, and their order in the book."""

from pathlib import Path
from typing import Any

import anyio
import pytest

from events import book as books
from events import memory
from events.book import Book
from events.log import Conflict
from events.memory import MemoryBroker
from events.schema import Price
from rift import book_admin, catalogue, price_lists
from rift.price_lists import InvalidPrices

V3 = '[prices."deepseek-v3"]\nprompt_usd = "0.15"\noutput_usd = "0.40"\n'


def load(tmp_path: Path, text: str, book: Book | None = None) -> Any:
    file = tmp_path / "list.toml"
    file.write_text(text)
    return price_lists.load(file, book or Book())


def test_a_list_in_whole_nano_usd(tmp_path: Path) -> None:
    published = load(tmp_path, V3 + 'cached_prompt_usd = "0.015"\nsecond_usd = "0.0005"\n')
    assert published.version == 1
    assert published.prices == (
        Price(
            model="deepseek-v3",
            prompt_nanousd=150,
            output_nanousd=400,
            cached_prompt_nanousd=15,
            second_nanousd=500_000,
        ),
    )


WRONG = {
    "a float": (
        V3.replace('"0.15"', "0.15"),
        r"prices.deepseek-v3.prompt_usd: must be a string.*never a float, got 0.15",
    ),
    "an integer": (V3.replace('"0.15"', "1"), "prompt_usd: must be a string.*, got 1"),
    "negative": (
        V3.replace("0.15", "-0.15"),
        "prices.deepseek-v3.prompt_usd: must not be negative, got '-0.15'",
    ),
    "a negative second": (V3 + 'second_usd = "-1"\n', "second_usd: must not be negative, got '-1'"),
    "too fine": (V3.replace("0.15", "0.0001"), "prompt_usd: must be USD per million.*got '0.0001'"),
    "words": (V3 + 'second_usd = "cheap"\n', "prices.deepseek-v3: 'cheap' is not an amount"),
    "half": (V3.replace('output_usd = "0.40"\n', ""), "prices.deepseek-v3: output_usd is missing"),
    "more": (V3 + 'image_usd = "1"\n', "unknown field 'image_usd'; known fields: prompt_usd"),
    "twice": (V3 + V3, "list.toml: "),
    "a version that is in force": (
        "version = 1\n" + V3,
        "version must be 2, .*got 1",
    ),
    "a gap": ("version = 3\n" + V3, "version must be 2, .*got 3"),
    "no model": ("[prices]\n", "must price at least one model"),
    "no prices": ("", "missing required field `prices`"),
    "no TOML": ("[", "list.toml: "),
    "something else": (V3 + "[models]\n", "unknown field `models`"),
    "a name that is none": (V3.replace("deepseek-v3", "Deep Seek"), "list.toml: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_lists_are_refused(case: str, tmp_path: Path) -> None:
    text, message = WRONG[case]
    book = Book()
    book.price_version = 1
    book._prices[1] = {}
    with pytest.raises(InvalidPrices, match=message):
        load(tmp_path, text, book)


def test_a_byte_order_mark_is_not_part_of_a_list(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + V3) == load(tmp_path, V3)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidPrices, match=r"nothing.toml cannot be read: No such file"):
        price_lists.load(tmp_path / "nothing.toml", Book())


@pytest.mark.anyio
async def test_versions_are_consecutive_and_models_keep_their_price(tmp_path: Path) -> None:
    async with anyio.create_task_group() as tasks:
        log = memory.connect(MemoryBroker(tasks, lambda: 1))
        shipped = price_lists.default(catalogue.shipped(), Book())
        assert shipped is not None
        await book_admin.publish_prices(log, Book(), shipped)
        book = await books.read(log)
        assert book.price("llama4:maverick") == Price(
            model="llama4:maverick", prompt_nanousd=100, output_nanousd=350
        )
        assert price_lists.default(catalogue.shipped(), book) is None, "a priced model keeps its price"
        cheaper = load(tmp_path, V3.replace("0.15", "0.10"), book)
        await book_admin.publish_prices(log, book, cheaper)
        with pytest.raises(Conflict, match="nothing was stored: repeat the command"):
            await book_admin.publish_prices(log, book, cheaper)
        book = await books.read(log)
        assert (book.price_version, book.prices().keys()) == (2, catalogue.shipped().keys())
        v3, before = book.price("deepseek-v3"), book.price("deepseek-v3", 1)
        assert v3 is not None
        assert before is not None
        assert (v3.prompt_nanousd, before.prompt_nanousd) == (100, 150)
        tasks.cancel_scope.cancel()
