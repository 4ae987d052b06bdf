"""The book's fold, where its other readers must read the same."""

import pytest

from events import codec
from events.book import Book, key_digest
from events.log import Stored
from events.schema import AnyEvent, KeyIssued, KeyLimitsSet, KeyRevoked, LimitsSet, Price, PricePublished


def price(model: str, prompt: int) -> Price:
    return Price(model=model, prompt_nanousd=prompt, output_nanousd=prompt)


def test_of_a_list_that_prices_a_model_twice_the_first_price_holds() -> None:
    """As in `replay/facts/fold.py` and the auditor: gateways meter at the price that is billed."""
    book = Book()
    published = PricePublished(id="p", version=1, prices=(price("a", 1), price("b", 2), price("a", 9)))
    book.fold(Stored("rift.book.price.list", 1, 1, codec.encode("test", [published])))
    assert book.price("a") == price("a", 1)
    assert list(book.prices().values()) == [price("a", 1), price("b", 2)]


def told(book: Book, *events: AnyEvent) -> Book:
    book.fold(Stored("rift.book.any.k", book.position + 1, book.position + 1, codec.encode("test", events)))
    return book


def issued(id: str = "1", **more: int) -> KeyIssued:
    return KeyIssued(id=id, key="k", account="a", sha256=key_digest("rift_k_secret"), **more)  # type: ignore[arg-type]


def test_a_key_is_valid_until_it_is_revoked_or_expires() -> None:
    book = told(Book(), issued(expires_at_ns=10))
    assert book.authenticate("rift_k_other") is None
    assert book.authenticate("rift_x_secret") is None
    assert book.authenticate("k") is None
    held = book.authenticate("rift_k_secret")
    assert held is not None
    assert [held.state(now_ns) for now_ns in (9, 10)] == ["valid", "expired"]
    told(book, KeyRevoked(id="2", key="k", account="a"))
    assert (held.state(9), held.issued_at_ns, held.revoked_at_ns) == ("revoked", 1, 2)


def test_a_revoked_key_does_not_come_back_and_is_revoked_once() -> None:
    book = Book()
    told(book, issued())
    told(book, KeyRevoked(id="2", key="k", account="b"), KeyRevoked(id="3", key="x", account="a"))
    assert book.revoked == []
    told(book, KeyRevoked(id="4", key="k", account="a"), KeyRevoked(id="5", key="k", account="a"))
    told(book, issued(id="6"))
    held = book.authenticate("rift_k_secret")
    assert held is not None
    assert (held.state(0), book.revoked) == ("revoked", ["k"])


def test_a_record_that_is_missing_stops_the_book() -> None:
    """A damaged broker passes over a record. Without the end of a key, the key would be valid again."""
    book = told(Book(), issued())
    lost = codec.encode("test", [KeyIssued(id="3", key="x", account="a", sha256="")])
    with pytest.raises(codec.RecordUnreadable, match="the book's records from 2 to 2: restore"):
        book.fold(Stored("rift.book.key.x", 3, 3, lost))
    assert (book.position, "x" in book.keys) == (1, False)


def test_limits_of_a_key_are_not_its_accounts() -> None:
    of_account = LimitsSet(id="1", account="a", plan="per_second", budget_nanousd=5, concurrent=2)
    of_key = KeyLimitsSet(id="2", account="a", key="k", concurrent=1)
    book = told(Book(), issued(id="0"), of_account, of_key)
    assert book.limits_of("a", "k") == {"account a": of_account, "key k": of_key}
    assert book.limits_of("a", "other") == {"account a": of_account}
    assert book.limits_of("b", "x") == {}
    assert (book.credits.of("a").plan, book.credits.of("a").budget_nanousd) == ("per_second", 5)
