"""How many idempotency keys, and keys of sealed content, the log may hold for one account.

The log itself is the counter: a gateway folds the keys' streams, so its counts include those of other
gateways, and a restart loses none. Keys that are stored at the same moment may exceed a limit by as many.
"""

from collections import deque
from collections.abc import Iterator

import msgspec
from anyio import create_task_group

from events import stream_fold, subjects
from events.broker_clock import BrokerClock
from events.contracts import IDEMPOTENCY_S, SECOND_NS
from events.log import Log, Stored
from rift.gateway.admission.log_share import LogShare
from rift.gateway.asgi.errors import HTTPError, retry_after_ms
from rift.gateway.bounds import Bound
from rift.gateway.choices import Choices
from rift.gateway.state import GatewayConfig

DAY_S = 24 * 3600

# Keys are counted in this many steps of their lifetime, so that a hint is at most a minute late in 24 hours.
STEPS = 1440


class Owned(msgspec.Struct, frozen=True):
    """What this module reads of a key: older ones have no account, and count for none."""

    account: str = ""


_owned = msgspec.json.Decoder(Owned)


class KeyStep(msgspec.Struct):
    """Keys that were stored at about the same time."""

    number: int
    keys: int = 0


class StoredKeys(msgspec.Struct):
    """The keys of one account, oldest first."""

    total: int = 0
    steps: deque[KeyStep] = msgspec.field(default_factory=deque)


class KeyCounts:
    """A fold: the keys that each account has stored within `kept_s`."""

    def __init__(self, kept_s: float) -> None:
        self.position = 0
        self.newest_ns = 0
        self._kept_ns = int(kept_s * SECOND_NS)
        self._step_ns = self._kept_ns // STEPS
        self._accounts: dict[str, StoredKeys] = {}

    def fold(self, stored: Stored) -> None:
        self.position = stored.sequence
        self.newest_ns = max(self.newest_ns, stored.stored_at_ns)
        if account := _owned.decode(stored.data).account:
            keys = self._accounts.setdefault(account, StoredKeys())
            step = self.newest_ns // self._step_ns
            if not keys.steps or keys.steps[-1].number != step:
                keys.steps.append(KeyStep(step))
            keys.steps[-1].keys += 1
            keys.total += 1
            # Also at a gateway that is never asked about this account.
            self.count(account, self.newest_ns)

    def count(self, account: str, now_ns: int) -> int:
        """Return an account's keys that have not expired, and forget the others."""
        keys = self._accounts.get(account, StoredKeys())
        while keys.steps and self._expires_ns(keys.steps[0]) <= now_ns:
            keys.total -= keys.steps.popleft().keys
        return keys.total

    def total(self, now_ns: int) -> int:
        return sum(self.count(account, now_ns) for account in self._accounts)

    def wait_ns(self, account: str, now_ns: int, excess: int) -> int:
        """Return the time until `excess` keys have expired."""
        wait_ns = 0
        for step in self._accounts.get(account, StoredKeys()).steps:
            if excess <= 0:
                break
            excess -= step.keys
            wait_ns = self._expires_ns(step) - now_ns
        return wait_ns

    def _expires_ns(self, step: KeyStep) -> int:
        return (step.number + 1) * self._step_ns + self._kept_ns


class KeyLimits:
    """Implements `reservation.Limit`. A key is only stored after its request was reserved."""

    def __init__(self, config: GatewayConfig, share: LogShare, clock: BrokerClock) -> None:
        self._share = share
        self._clock = clock
        self._seals = config.seal_content
        self._idempotency = KeyCounts(IDEMPOTENCY_S)
        self._content = KeyCounts((config.retention_days + 1) * DAY_S)

    def bounds(self) -> Iterator[Bound]:
        now_ns = self._clock.now_ns()
        share = self._share
        if share.idempotency_keys_max > 0:
            yield Bound("idempotency_keys", share.idempotency_keys_max, self._idempotency.total(now_ns))
        if self._seals and share.content_keys_max > 0:
            yield Bound("content_keys", share.content_keys_max, self._content.total(now_ns))

    async def follow_log(self, log: Log) -> None:
        """Count keys until cancelled. Raises LogError."""
        async with create_task_group() as tasks:
            tasks.start_soon(_follow, log, subjects.KEYS, "rift.keys.>", self._idempotency)
            if self._seals:
                tasks.start_soon(_follow, log, subjects.SECRETS, subjects.SECRET_KEPT, self._content)

    async def reserve(self, choices: Choices) -> Choices:
        """Raises HTTPError (429) if the account may store no more keys of a kind that the request needs."""
        first = choices[0]
        if first.idempotency_hash is not None:
            excess, wait_ns = self._excess(
                self._idempotency, first.account, self._share.idempotency_keys(first.account)
            )
            if excess > 0:
                message = (
                    f"account {first.account} has used all its idempotency keys of 24 hours: send the "
                    f"request without the header Idempotency-Key, or try again in {wait_ns // SECOND_NS} s"
                )
                raise _refusal(message, "idempotency_keys", wait_ns)
        if self._seals and first.sealed is None:
            excess, wait_ns = self._excess(
                self._content, first.account, self._share.content_keys(first.account)
            )
            if excess > 0:
                message = (
                    f"the log holds as many keys of sealed content as account {first.account} may have: "
                    f"try again in {wait_ns // SECOND_NS} s, or ask for a larger limit"
                )
                raise _refusal(message, "content_keys", wait_ns)
        return choices

    def follow(self, choices: Choices) -> None:
        """Do nothing: a key stays when its request ends."""

    def release(self, choices: Choices) -> None:
        """Do nothing: only stored keys are counted."""

    def unknown(self, choices: Choices) -> None:
        """Do nothing: only stored keys are counted."""

    def _excess(self, counts: KeyCounts, account: str, limit: int | None) -> tuple[int, int]:
        """Return by how many keys one more would exceed the limit, and the time until it would not."""
        if limit is None:
            return 0, 0
        # A gateway that has just started learns the time with its first report.
        now_ns = max(self._clock.now_ns(), counts.newest_ns)
        excess = counts.count(account, now_ns) + 1 - limit
        return excess, counts.wait_ns(account, now_ns, excess)


async def _follow(log: Log, stream: str, topic: str, counts: KeyCounts) -> None:
    # What is there is read by pull: a large stream must not be pushed at a gateway that has just started.
    await stream_fold.read(log, stream, [topic], counts)
    await stream_fold.follow(log, stream, [topic], counts, changed=lambda: None)


def _refusal(message: str, code: str, wait_ns: int) -> HTTPError:
    return HTTPError(429, message, code=code, headers=retry_after_ms(-(-wait_ns // 1_000_000)))
