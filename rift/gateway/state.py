"""Shared by the parts of one gateway: the state that it follows, and its configuration."""

from collections.abc import Callable, Collection

import msgspec

from events.book import Book
from events.fleet import Fleet
from events.log import Log
from rift.catalogue import NATIVE_PROMPT_TOKENS_MAX, Catalogue
from rift.gateway.histories import Histories
from rift.log_disk.reserve import Reserve
from rift.metrics.address import Address


class LogState(msgspec.Struct, frozen=True):
    """The log and the folds of it. `histories` reads over a connection of its own, so that a burst of
    clients that resume cannot slow live streams."""

    log: Log
    histories: Histories
    book: Book
    fleet: Fleet


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`lane` is the id of this process's lane. `served` names the models that are accepted even without a
    replica. With `seal_content` the content of every request is encrypted. `reserve` is that of the log's
    disk, None if the log is another installation's."""

    lane: str
    secret: bytes
    models: Catalogue
    served: Collection[str]
    seal_content: bool = False
    # Content keys are kept a day longer.
    retention_days: int = 7
    native_prompt_tokens_max: int = NATIVE_PROMPT_TOKENS_MAX
    shard: int = 0
    reserve: Reserve | None = None
    # Of this installation's workers, as pages and clients are told: "sim" answers mean nothing.
    engine: str = "vllm"
    # Where metrics are served, whether they name accounts, and the targets for first tokens.
    metrics: Address | None = None
    metrics_accounts: bool = False
    ttft_ms: Collection[int] = ()
    # Random bytes, for ids and keys.
    entropy: Callable[[int], bytes]
