"""Questions to the control process, as NATS request-reply on `rift.ask.*`. No stream stores them.

Questions and answers are JSON. If control cannot answer, it replies `{"error": …}`. This module has the
questions and asks them; `control/rpc/` answers them.
"""

import json
from typing import Any, ClassVar

import anyio
import msgspec

from events.contracts import SQL_TIMEOUT_S
from events.log import Log, LogError, NoResponders
from rift.errors import RiftError

# Control mostly answers in milliseconds, but an invoice over ten million requests takes some seconds, and one
# question of the same kind may be answered before it.
TIMEOUT_S = 25.0
# A leader that hangs is replaced within this time (`control/leader.py`). Meanwhile ask this often who leads.
TAKEOVER_S = 6.0
LEADER_TIMEOUT_S = 0.5
# A standby leads some 1.5 s after a leader was killed (`control/leader.py`), or twice that on a busy machine.
# Meanwhile nobody answers.
NO_LEADER_S = 4.0
NO_LEADER_POLL_S = 0.25
# How often a client that waits for an answer asks whether the same process still leads. A leader that
# reconnects to the broker may be missing once.
WATCH_S = 1.0
MISSING_MAX = 2
# Rebuilds, closings and digests read the whole warehouse.
LONG_TIMEOUT_S = 1800.0


class QuestionRefused(RiftError):
    """Control rejects the question; the message gives the reason and the valid questions."""


class AnswerFailed(QuestionRefused):
    """The question is valid, but control could not answer it; the message gives the reason."""


class ProjectionBlocked(AnswerFailed):
    """Control cannot apply every stored record now, so the answer would lack some; the message says why."""


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question; `topic` is the subject it is sent to, and `timeout_s` how long to wait for its answer."""

    topic: ClassVar[str]
    timeout_s: ClassVar[float] = TIMEOUT_S


class Sql(Question, frozen=True, forbid_unknown_fields=True):
    """Ask an operator's question in SQL; a process of its own answers it."""

    topic = "rift.ask.sql"
    timeout_s = SQL_TIMEOUT_S

    sql: str


class AskStatus(Question, frozen=True, forbid_unknown_fields=True):
    """Ask for queues, the speed of the last minute, replicas and lag, as far as control's own projection is,
    and for what holds scaling back."""

    topic = "rift.ask.status"


class AskInvoice(Question, frozen=True, forbid_unknown_fields=True):
    topic = "rift.ask.invoice"

    account: str
    period: str


class AskInvoices(Question, frozen=True, forbid_unknown_fields=True):
    """Ask for an account's newest invoices without their lines, older than the month `after`."""

    topic = "rift.ask.invoices"

    account: str
    limit: int
    after: str | None = None


class AskUsage(Question, frozen=True, forbid_unknown_fields=True):
    topic = "rift.ask.usage"

    account: str
    first_day: str
    last_day: str
    group_by: tuple[str, ...] = ()


class AskRequests(Question, frozen=True, forbid_unknown_fields=True):
    """Ask for an account's newest requests, older than the request `after`."""

    topic = "rift.ask.requests"

    account: str
    limit: int
    after: str | None = None


class ClosePeriod(Question, frozen=True, forbid_unknown_fields=True):
    topic = "rift.ask.close"

    period: str


class SealSegment(Question, frozen=True, forbid_unknown_fields=True):
    """Archive immediately all that is projected."""

    topic = "rift.ask.seal"


class Digests(Question, frozen=True, forbid_unknown_fields=True):
    """Ask for the warehouse's positions, the digest of each relation, and every invoice line."""

    topic = "rift.ask.digests"


class Rebuild(Question, frozen=True, forbid_unknown_fields=True):
    """Fold everything again into a fresh file, and switch to it."""

    topic = "rift.ask.rebuild"


class AskLeader(Question, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Ask which control process leads, in which epoch, which others stand by, and where all of them serve
    metrics. A process that stands by names itself in `standby`, and its address in `metrics`."""

    topic = "rift.ask.leader"

    standby: str = ""
    metrics: str = ""


class AskProblems(Question, frozen=True, forbid_unknown_fields=True):
    """Ask what keeps the leader from projecting or archiving, a sentence each."""

    topic = "rift.ask.problems"


class AskLanes(Question, frozen=True, forbid_unknown_fields=True):
    """Ask which gateways are alive, by lane, and how many milliseconds each has been silent."""

    topic = "rift.ask.lanes"


class AskShards(Question, frozen=True, forbid_unknown_fields=True):
    """Ask which shards the leader supervises, how many live gateways each has, and where these serve metrics:
    a list of objects with `shard`, `gateways` and `metrics`, addresses by lane."""

    topic = "rift.ask.shards"


AnyQuestion = (
    AskLeader
    | AskLanes
    | AskShards
    | AskStatus
    | AskProblems
    | Sql
    | AskInvoice
    | AskInvoices
    | AskUsage
    | AskRequests
    | ClosePeriod
    | SealSegment
    | Digests
    | Rebuild
)


async def ask_leader(log: Log, question: AnyQuestion, *, timeout_s: float | None = None) -> Any:
    """As `ask`, but first wait for a leader: NO_LEADER_S if none answers, TAKEOVER_S if one hangs.

    Raises AnswerFailed also once another process leads, or none, and LogError if no leader answers.
    """
    until_s = anyio.current_time() + NO_LEADER_S
    while True:
        try:
            return await _ask_leader(log, question, timeout_s)
        except NoResponders:
            # No process has received the question, so asking again repeats nothing.
            if anyio.current_time() >= until_s:
                raise
            await anyio.sleep(NO_LEADER_POLL_S)


async def _ask_leader(log: Log, question: AnyQuestion, timeout_s: float | None) -> Any:
    leader = None
    with anyio.move_on_after(TAKEOVER_S):
        while leader is None:
            try:
                leader = await ask(log, AskLeader(), timeout_s=LEADER_TIMEOUT_S)
            except NoResponders:
                raise
            except LogError:
                continue
    if leader is None:
        raise LogError(
            f"the control process that leads has not answered for {TAKEOVER_S:g} s, and no other has taken "
            "over: it is frozen, or its machine is too busy"
        )
    outcome: Any = AnswerFailed("the control process stopped or lost the lead before it answered; ask again")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_watch, log, leader["epoch"], tasks.cancel_scope)
        try:
            outcome = await ask(log, question, timeout_s=timeout_s)
        except (QuestionRefused, LogError) as error:
            outcome = error
        tasks.cancel_scope.cancel()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


async def _watch(log: Log, epoch: int, question: anyio.CancelScope) -> None:
    """Cancel the question once the leader of this epoch, which received it, does not lead any more."""
    missing = 0
    while missing < MISSING_MAX:
        await anyio.sleep(WATCH_S)
        try:
            if (await ask(log, AskLeader(), timeout_s=WATCH_S))["epoch"] != epoch:
                break
            missing = 0
        except NoResponders:
            missing += 1
        except LogError:
            continue  # it hangs; another one soon leads
    question.cancel()


async def ask(log: Log, question: AnyQuestion, *, timeout_s: float | None = None) -> Any:
    """Return the answer as JSON values; wait `timeout_s`, or as long as such a question may take.

    Raises QuestionRefused, AnswerFailed, ProjectionBlocked, LogError if no process answers.
    """
    topic = question.topic
    data = await log.ask(topic, msgspec.json.encode(question), timeout_s=timeout_s or question.timeout_s)
    return answer_of(topic, data)


def answer_of(topic: str, data: bytes) -> Any:
    """Return the answer in a reply. Raises QuestionRefused, AnswerFailed, LogError if it is not a reply."""
    try:
        # msgspec cannot decode integers beyond 64 bits, and sums of money can be larger.
        reply = json.loads(data)
    except ValueError as error:
        raise LogError(f"{topic} answered with invalid JSON: {error}") from error
    if not isinstance(reply, dict) or not reply.keys() & {"answer", "error"}:
        raise LogError(f"{topic} answered with neither answer nor error: {data[:100]!r}")
    if reply.get("blocked"):
        raise ProjectionBlocked(reply["error"])
    if "error" in reply:
        raise (AnswerFailed if reply.get("failed") else QuestionRefused)(reply["error"])
    return reply["answer"]
