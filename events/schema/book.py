"""The book: kept for ever, each event with its own id."""

from typing import Annotated

import msgspec

from events.schema.shapes import Account, Amount, Digest, Event, Limit, Natural, Percent, Period, Plan, Shape


class BookEvent(Event, frozen=True, kw_only=True, omit_defaults=True):
    """A permanent fact. Readers drop a repeated `id`."""

    id: str


class AccountOpened(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    account: Account


class KeyIssued(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Only the SHA-256 of the whole key is stored, as lower-case hex."""

    key: str
    account: Account
    sha256: str
    scopes: tuple[str, ...] = ("inference", "usage")
    models: tuple[str, ...] | None = None
    expires_at_ns: Natural | None = None


class KeyRevoked(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    key: str
    account: Account


class Price(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """Nano-USD a token: 0.10 USD per million tokens is 100."""

    model: str
    prompt_nanousd: Natural
    output_nanousd: Natural
    cached_prompt_nanousd: Natural | None = None
    second_nanousd: Natural | None = None


class PricePublished(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """A whole price list. It holds from its position in the book until the next version."""

    version: Annotated[int, msgspec.Meta(ge=1)]
    prices: tuple[Price, ...]


class Limits(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """What is asked for in a minute and at once; absent is unlimited. Over a whole installation."""

    account: Account
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent: Limit | None = None


class LimitsSet(Limits, frozen=True, kw_only=True, omit_defaults=True):
    """All limits of an account. The budget is for a calendar month (UTC); `queue_share_percent` of a model's
    queue may be the account's, absent is the default."""

    plan: Plan = "per_token"
    budget_nanousd: Natural | None = None
    queue_share_percent: Percent | None = None


class KeyLimitsSet(Limits, frozen=True, kw_only=True, omit_defaults=True):
    """All limits of a key, within those of its account. An event of its own: a reader that knew no limits of
    keys must not take them for the account's, and with them its plan."""

    key: str


class CreditGranted(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Prepaid. An account that was ever granted credit spends nothing beyond it."""

    account: Account
    nanousd: Natural
    reason: str = ""


class CreditHeld(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """An allowance: what one gateway's lane may spend for the account until it is settled."""

    account: Account
    shard: Natural
    lane: str
    nanousd: Natural


class CreditSettled(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """What of an allowance (`hold` is its id) was spent; the rest is free again."""

    account: Account
    hold: str
    nanousd: Natural


class UsageCorrected(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Added to the account's invoice of the period it is stored in; negative in the account's favour."""

    account: Account
    nanousd: Amount
    reason: str
    request: str | None = None
    model: str | None = None


class PeriodClosed(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """A month's invoices are final: they hold what stands up to `positions` (the last sequence of each
    stream). `roots` are the archive's manifests that end there; `digest` is over every invoice line. Every
    customer sees this event, so it names no sum."""

    period: Period
    positions: dict[str, Natural]
    roots: dict[str, Digest]
    digest: Digest


class SegmentSealed(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Sequences `first` to `last` of a stream are archived under the manifest with this SHA-256."""

    stream: str
    first: Natural
    last: Natural
    manifest: Digest


class RecordQuarantined(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """A record that no reader can read: from now on all pass over it alike."""

    stream: str
    sequence: Natural
    reason: str
