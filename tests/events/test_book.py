"""The book's fold, where its other readers must read the same."""

from events import codec
from events.book import Book
from events.log import Stored
from events.schema import Price, PricePublished


def price(model: str, prompt: int) -> Price:
    return Price(model=model, prompt_nanousd=prompt, output_nanousd=prompt)


def test_of_a_list_that_prices_a_model_twice_the_first_price_holds() -> None:
    """As in `replay/fold.py` and the auditor: what is metered is what is billed."""
    book = Book()
    published = PricePublished(id="p", version=1, prices=(price("a", 1), price("b", 2), price("a", 9)))
    book.fold(Stored("rift.book.price.list", 1, 1, codec.encode("test", [published])))
    assert book.price("a") == price("a", 1)
    assert list(book.prices().values()) == [price("a", 1), price("b", 2)]
