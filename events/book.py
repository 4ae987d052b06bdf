"""The book as its readers hold it: accounts, keys, limits, prices and credit, folded from RIFT_BOOK in log
order."""

import hashlib
import hmac

import msgspec

from events import codec
from events.credit import Credits
from events.log import Log, Stored
from events.schema import (
    AccountOpened,
    KeyIssued,
    KeyLimitsSet,
    KeyRevoked,
    Limits,
    LimitsSet,
    Price,
    PricePublished,
)
from events.subjects import BOOK


class HeldKey(msgspec.Struct):
    """A key that was issued, and what became of it. Times are stored times."""

    event: KeyIssued
    issued_at_ns: int
    revoked_at_ns: int | None = None
    limits: KeyLimitsSet | None = None

    def state(self, now_ns: int) -> str:
        """`now_ns` is the broker's time."""
        if self.revoked_at_ns is not None:
            return "revoked"
        expires = self.event.expires_at_ns
        return "expired" if expires is not None and now_ns >= expires else "valid"


class Book:
    """`position` is the last sequence folded, `at_ns` the largest stored time; an event id that came before
    is dropped. `revoked` holds the ids of the revoked keys, in the order of their revocation."""

    def __init__(self) -> None:
        self.position = 0
        self.at_ns = 0
        self.accounts: dict[str, int] = {}
        self.keys: dict[str, HeldKey] = {}
        self.limits: dict[str, LimitsSet] = {}
        self.revoked: list[str] = []
        self.credits = Credits()
        self.price_version = 0
        self._prices: dict[int, dict[str, Price]] = {0: {}}
        self._seen: set[str] = set()

    def fold(self, stored: Stored) -> None:
        """Raises codec.RecordUnreadable: a reader that cannot read the book must not go on."""
        self.at_ns = max(self.at_ns, stored.stored_at_ns)
        for event in codec.decode(stored.data)[1]:
            if isinstance(event, codec.Unreadable):
                raise codec.RecordUnreadable(f"book sequence {stored.sequence}: {event.problem}")
            if (entry := getattr(event, "id", None)) is None or entry in self._seen:
                continue
            self._seen.add(entry)
            match event:
                case AccountOpened():
                    self.accounts.setdefault(event.account, self.at_ns)
                case KeyIssued():
                    # What was issued again is what it was, revoked or not.
                    self.keys.setdefault(event.key, HeldKey(event, self.at_ns))
                case KeyRevoked():
                    self._revoked(event)
                case KeyLimitsSet() if (held := self.keys.get(event.key)) is not None:
                    held.limits = event
                case PricePublished():
                    if prices := prices_by_model(event, last_version=self.price_version):
                        self.price_version = event.version
                        self._prices[event.version] = prices
                case _:
                    if isinstance(event, LimitsSet):
                        self.limits[event.account] = event
                    self.credits.fold(event, at_ns=self.at_ns)
        self.credits.see(stored.subject, stored.sequence)
        self.position = stored.sequence

    def _revoked(self, event: KeyRevoked) -> None:
        held = self.keys.get(event.key)
        if held is not None and held.event.account == event.account and held.revoked_at_ns is None:
            held.revoked_at_ns = self.at_ns
            self.revoked.append(event.key)

    def has(self, id: str) -> bool:
        """Say whether an event of this id counts already."""
        return id in self._seen

    def authenticate(self, key: str) -> HeldKey | None:
        """Return the key's entry if this exact key was issued, in constant time once it is found; also one
        that is revoked or expired."""
        parts = key.split("_")
        held = self.keys.get(parts[1]) if len(parts) == 3 else None
        digest = key_digest(key)
        matches = hmac.compare_digest(digest, held.event.sha256 if held else "")
        return held if matches else None

    def limits_of(self, account: str, key: str) -> dict[str, Limits]:
        """Return the limits that hold for a request, by whose they are: the account's, and its key's."""
        held = self.keys.get(key)
        found = {f"account {account}": self.limits.get(account), f"key {key}": held.limits if held else None}
        return {whose: limits for whose, limits in found.items() if limits is not None}

    def price(self, model: str, version: int | None = None) -> Price | None:
        """Return a model's price in a version of the list, or in the one in force."""
        return self._prices[self.price_version if version is None else version].get(model)

    def prices(self) -> dict[str, Price]:
        """The list in force, by model."""
        return dict(self._prices[self.price_version])


def prices_by_model(event: PricePublished, *, last_version: int) -> dict[str, Price]:
    """Return the prices of a list that counts, empty for one that does not.

    A list counts if it has a price and its version follows the last one that counts. If it prices a model
    twice, the first price counts.
    """
    prices: dict[str, Price] = {}
    if event.version == last_version + 1:
        for price in event.prices:
            prices.setdefault(price.model, price)
    return prices


def key_digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


async def read(log: Log) -> Book:
    """Return the book as it is now. Raises LogError."""
    book = Book()
    target = await log.last_sequence(BOOK)
    async for batch in log.scan(BOOK, ["rift.book.>"], first=1, target=target):
        for stored in batch:
            book.fold(stored)
    return book
