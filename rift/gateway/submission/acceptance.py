"""Acceptances of new requests, built from a parsed body and the book. `acceptance_writer.py` appends them."""

from events import ids, subjects
from events.book import Book
from events.contracts import DEADLINE_S
from events.schema import KeyIssued, RequestAccepted
from events.subjects import Address
from rift.gateway import choices as groups
from rift.gateway.choices import Choices
from rift.gateway.dialects.sampling import ParsedRequest
from rift.gateway.state import GatewayConfig
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.submission.idempotency import KeyEntry


class AcceptanceBuilder:
    """`lane` is the own lane, whose position goes into each new id."""

    def __init__(self, book: Book, config: GatewayConfig, lane: LaneReader) -> None:
        self._book = book
        self._config = config
        self._lane = lane

    def entry(
        self, parsed: ParsedRequest, account: str, client_id: str | None, *, body: str = ""
    ) -> KeyEntry:
        """Return what the first try of a request fixes: its ids, and the book and prices in force."""
        config = self._config
        request = ids.new_request_id(
            secret=config.secret,
            account=account,
            at=Address(config.shard, config.lane, subjects.slug(parsed.model)),
            floor=self._lane.position,
            entropy=config.entropy(ids.RANDOM_BYTES),
        )
        return KeyEntry(
            request,
            body,
            nonce=config.entropy(ids.RANDOM_BYTES).hex(),
            price_version=self._book.price_version,
            book=self._book.position,
            plan=self._book.credits.of(account).plan,
            account=account,
            client_request_id=client_id,
        )

    def build(
        self, parsed: ParsedRequest, issued: KeyIssued, entry: KeyEntry, *, digest: str | None = None
    ) -> Choices:
        """Return the acceptance of each choice. `digest` names the idempotency key."""
        trace = parsed.trace
        context = self._config.models[parsed.model].context_tokens
        first = RequestAccepted(
            request=entry.request,
            account=issued.account,
            key=issued.key,
            model=parsed.model,
            kind=parsed.kind,
            input=parsed.input,
            parameters=parsed.parameters,
            stream=parsed.stream,
            prompt_tokens_max=min(context, parsed.prompt_tokens_max or context),
            deadline_ms=int(DEADLINE_S * 1000),
            price_version=entry.price_version,
            plan=entry.plan,
            book=entry.book,
            idempotency_hash=digest,
            sealed=entry.sealed,
            detached=parsed.background or digest is not None,
            metadata=parsed.metadata,
            client_request_id=entry.client_request_id,
            traceparent=trace.traceparent if trace else None,
            tracestate=trace.tracestate if trace else None,
        )
        return groups.of(first, parsed.more, choices=parsed.choices, secret=self._config.secret)
