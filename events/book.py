"""The book as its readers hold it: accounts, keys, prices and credit, folded from RIFT_BOOK in log order."""

import hashlib
import hmac

from events import codec
from events.credit import Credits
from events.log import Log, Stored
from events.schema import AccountOpened, KeyIssued, KeyRevoked, Price, PricePublished
from events.subjects import BOOK


class Book:
    """`position` is the last sequence folded, `at_ns` the largest stored time; an event id that came before
    is dropped."""

    def __init__(self) -> None:
        self.position = 0
        self.at_ns = 0
        self.accounts: set[str] = set()
        self.keys: dict[str, KeyIssued] = {}
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
                    self.accounts.add(event.account)
                case KeyIssued():
                    self.keys[event.key] = event
                case KeyRevoked():
                    self.keys.pop(event.key, None)
                case PricePublished() if event.version == self.price_version + 1:
                    self.price_version = event.version
                    listed = self._prices[event.version] = {}
                    for price in event.prices:
                        # Of a model that is listed twice the first price, as for the bill.
                        listed.setdefault(price.model, price)
                case _:
                    self.credits.fold(event, at_ns=self.at_ns)
        self.credits.see(stored.subject, stored.sequence)
        self.position = stored.sequence

    def has(self, id: str) -> bool:
        """Say whether an event of this id counts already."""
        return id in self._seen

    def authenticate(self, key: str) -> KeyIssued | None:
        """Return the key's entry if this exact key was issued, in constant time once it is found."""
        parts = key.split("_")
        issued = self.keys.get(parts[1]) if len(parts) == 3 else None
        digest = key_digest(key)
        matches = hmac.compare_digest(digest, issued.sha256 if issued else "")
        return issued if matches else None

    def price(self, model: str, version: int | None = None) -> Price | None:
        """Return a model's price in a version of the list, or in the one in force."""
        return self._prices[self.price_version if version is None else version].get(model)

    def prices(self) -> dict[str, Price]:
        """The list in force, by model."""
        return dict(self._prices[self.price_version])


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
