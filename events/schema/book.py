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
    """Limits per minute and of concurrent requests, over all gateways.

    Without `log_bytes_per_minute` an account has a share of the log; every other absent limit is unlimited.
    """

    account: Account
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent: Limit | None = None
    log_bytes_per_minute: Limit | None = None


class LimitsSet(Limits, frozen=True, kw_only=True, omit_defaults=True):
    """All limits of an account. The budget is for a calendar month (UTC). `queue_share_percent` is the
    account's largest share of a model's queue. `idempotency_keys` and `content_keys` are the most keys that
    the log holds for it. If one of these is absent, its default applies."""

    plan: Plan = "per_token"
    budget_nanousd: Natural | None = None
    queue_share_percent: Percent | None = None
    idempotency_keys: Limit | None = None
    content_keys: Limit | None = None


class KeyLimitsSet(Limits, frozen=True, kw_only=True, omit_defaults=True):
    """All limits of a key, within those of its account. It is a separate event, so that a reader that does
    not know limits of keys cannot apply them, and their plan, to the account."""

    key: str


class CreditGranted(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Prepaid credit. An account that was ever granted credit cannot spend more than that."""

    account: Account
    nanousd: Natural
    reason: str = ""


class CreditHeld(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """An allowance: the sum that one lane may spend for the account until it is settled."""

    account: Account
    shard: Natural
    lane: str
    nanousd: Natural


class CreditSettled(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """The part of an allowance (`hold` is its id) that was spent; the rest is free again."""

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
    """A month's invoices are final: they cover the log up to `positions` (the last sequence of each stream).
    `roots` are the archive's manifests that end there; `digest` is over every invoice line, and `rules` the
    version of the billing rules that it follows. `signer` and `signature` are as in SegmentSealed. Every
    customer sees this event, so it contains no sum of money."""

    period: Period
    positions: dict[str, Natural]
    roots: dict[str, Digest]
    digest: Digest
    rules: Natural = 1
    signer: str = ""
    signature: str = ""


class SegmentSealed(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Sequences `first` to `last` of a stream are archived under the manifest with this SHA-256.
    `signature` is Ed25519 by the public key `signer`, both in hex; they are "" if control had no key."""

    stream: str
    first: Natural
    last: Natural
    manifest: Digest
    signer: str = ""
    signature: str = ""


class SigningKeyPublished(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Control signs with this Ed25519 key; `key` is the public key in hex."""

    key: Digest


class ShardOpened(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Another stream of requests exists. Shard 0 always does, each event opens the next number, and none is
    ever closed. From this entry on, new requests are accepted on shard `requests_from` and those after it
    only: the log was restored, and the lost end of an older shard may have held other records."""

    shard: Natural
    requests_from: Natural = 0


class RecordQuarantined(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """A record that readers cannot read; from this entry on, all of them skip it."""

    stream: str
    sequence: Natural
    reason: str
