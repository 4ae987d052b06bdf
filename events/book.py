"""Accounts, keys, limits, prices and credit, folded from RIFT_BOOK in log order."""

import hashlib
import hmac

import msgspec

from events import codec, stream_fold
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
    ShardOpened,
)
from events.subjects import BOOK


class HeldKey(msgspec.Struct):
    """An issued key, its revocation and its limits. Times are stored times."""

    event: KeyIssued
    issued_at_ns: int
    revoked_at_ns: int | None = None
    limits: KeyLimitsSet | None = None

    def state(self, now_ns: int) -> str:
        """Return "valid", "revoked" or "expired" at `now_ns`, the broker's time."""
        if self.revoked_at_ns is not None:
            return "revoked"
        expires = self.event.expires_at_ns
        return "expired" if expires is not None and now_ns >= expires else "valid"


class Book:
    """The state of the book at `position`, the last sequence folded; `at_ns` is the largest stored time.

    A repeated event id is dropped. `revoked` holds the ids of revoked keys, in order of revocation, and
    `shards` is the number of open shards.
    """

    def __init__(self) -> None:
        self.position = 0
        self.at_ns = 0
        self.accounts: dict[str, int] = {}
        self.keys: dict[str, HeldKey] = {}
        self.limits: dict[str, LimitsSet] = {}
        self.revoked: list[str] = []
        self.credits = Credits()
        self.price_version = 0
        self.shards = 1
        self._prices: dict[int, dict[str, Price]] = {0: {}}
        self._seen: set[str] = set()

    def fold(self, stored: Stored) -> None:
        """Apply the next record. Raises codec.RecordUnreadable: no reader may skip an entry of the book."""
        if stored.sequence > (wanted := self.position + 1):
            # A broker with a damaged file passes over what it cannot read, such as the end of a key.
            raise codec.RecordUnreadable(
                f"the log has lost the book's records from {wanted} to {stored.sequence - 1}: restore it "
                "from a backup"
            )
        self.at_ns = max(self.at_ns, stored.stored_at_ns)
        for event in codec.decode(stored.data, stored.subject)[1]:
            if isinstance(event, codec.Unreadable):
                raise codec.RecordUnreadable(f"book sequence {stored.sequence}: {event.problem}")
            if (entry := getattr(event, "id", None)) is None or entry in self._seen:
                continue
            self._seen.add(entry)
            match event:
                case AccountOpened():
                    self.accounts.setdefault(event.account, self.at_ns)
                case KeyIssued():
                    # A key that is issued again stays as it is, revoked or not.
                    self.keys.setdefault(event.key, HeldKey(event, self.at_ns))
                case KeyRevoked():
                    self._revoked(event)
                case KeyLimitsSet() if (held := self.keys.get(event.key)) is not None:
                    held.limits = event
                case PricePublished():
                    if prices := prices_by_model(event, last_version=self.price_version):
                        self.price_version = event.version
                        self._prices[event.version] = prices
                case ShardOpened():
                    self.shards = max(self.shards, event.shard + 1)
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
        """Return whether the book has an event of this id."""
        return id in self._seen

    def authenticate(self, key: str) -> HeldKey | None:
        """Return the key's entry if this exact key was issued, even if it is revoked or expired.

        The comparison takes constant time once the entry is found.
        """
        parts = key.split("_")
        held = self.keys.get(parts[1]) if len(parts) == 3 else None
        digest = key_digest(key)
        matches = hmac.compare_digest(digest, held.event.sha256 if held else "")
        return held if matches else None

    def limits_of(self, account: str, key: str) -> dict[str, Limits]:
        """Return the limits that apply to a request: its account's and its key's, by name."""
        held = self.keys.get(key)
        limits = {f"account {account}": self.limits.get(account), f"key {key}": held.limits if held else None}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def price(self, model: str, version: int | None = None) -> Price | None:
        """Return a model's price in a version of the list, or in the one in force."""
        return self._prices[self.price_version if version is None else version].get(model)

    def prices(self) -> dict[str, Price]:
        """Return the list in force, by model."""
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
    await stream_fold.read(log, BOOK, ["rift.book.>"], book)
    return book
