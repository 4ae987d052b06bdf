"""Questions to the control process: asked on `rift.ask.*` by any other, in no stream.

A question and its answer are JSON; an answer that cannot be given is `{"error": …}`, never silence. What
lives here: the questions and how they are asked. The answers are in `control/answers.py`.
"""

import json
from typing import Any, ClassVar

import anyio
import msgspec

from events.log import Log, LogError, NoResponders
from rift.errors import RiftError

# Longer than an answer in SQL may take (10 s, `warehouse/queries.py`), and than one before it in the queue.
TIMEOUT_S = 25.0
# A leader that hangs has a successor within this (`control/leader.py`); and how long one look takes.
TAKEOVER_S = 6.0
LOOK_S = 0.5
# Rebuilding, closing and digests read everything there is.
LONG_TIMEOUT_S = 1800.0


class QuestionRefused(RiftError):
    """The control process does not answer this; the message says why, and what it would answer."""


class AnswerFailed(QuestionRefused):
    """The question was a good one, and control could not answer it; the message says why."""


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked; `topic` is the subject it is asked on."""

    topic: ClassVar[str]


class Sql(Question, frozen=True, forbid_unknown_fields=True):
    topic = "rift.ask.sql"

    sql: str


class AskInvoice(Question, frozen=True, forbid_unknown_fields=True):
    topic = "rift.ask.invoice"

    account: str
    period: str


class AskUsage(Question, frozen=True, forbid_unknown_fields=True):
    topic = "rift.ask.usage"

    account: str
    first_day: str
    last_day: str
    group_by: tuple[str, ...] = ()


class AskRequests(Question, frozen=True, forbid_unknown_fields=True):
    """An account's newest requests, behind the request `after`."""

    topic = "rift.ask.requests"

    account: str
    limit: int
    after: str | None = None


class ClosePeriod(Question, frozen=True, forbid_unknown_fields=True):
    topic = "rift.ask.close"

    period: str


class SealSegment(Question, frozen=True, forbid_unknown_fields=True):
    """Archive all that is projected, now."""

    topic = "rift.ask.seal"


class Digests(Question, frozen=True, forbid_unknown_fields=True):
    """What the warehouse comes to: positions, the digest of each relation, and every invoice line."""

    topic = "rift.ask.digests"


class Rebuild(Question, frozen=True, forbid_unknown_fields=True):
    """Fold everything again into a fresh file, and go on with that."""

    topic = "rift.ask.rebuild"


class AskLeader(Question, frozen=True, forbid_unknown_fields=True):
    """Which control process leads, and in which epoch."""

    topic = "rift.ask.leader"


class AskLanes(Question, frozen=True, forbid_unknown_fields=True):
    """Which gateways live, by lane, and for how many milliseconds each has been silent."""

    topic = "rift.ask.lanes"


AnyQuestion = (
    AskLeader
    | AskLanes
    | Sql
    | AskInvoice
    | AskUsage
    | AskRequests
    | ClosePeriod
    | SealSegment
    | Digests
    | Rebuild
)


async def ask_leader(log: Log, question: AnyQuestion, *, timeout_s: float = TIMEOUT_S) -> Any:
    """As `ask`, once there is a leader that answers: nothing shall wait long for one that hangs."""
    with anyio.move_on_after(TAKEOVER_S):
        while True:
            try:
                await ask(log, AskLeader(), timeout_s=LOOK_S)
                break
            except NoResponders:
                break
            except LogError:
                continue
    return await ask(log, question, timeout_s=timeout_s)


async def ask(log: Log, question: AnyQuestion, *, timeout_s: float = TIMEOUT_S) -> Any:
    """Return the answer as JSON's values. Raises QuestionRefused, AnswerFailed, LogError (nobody answers)."""
    topic = question.topic
    data = await log.ask(topic, msgspec.json.encode(question), timeout_s=timeout_s)
    try:
        # Not msgspec: sums of money may pass 64 bits.
        reply = json.loads(data)
    except ValueError as error:
        raise LogError(f"{topic} answered with something else: {error}") from error
    if not isinstance(reply, dict) or not reply.keys() & {"answer", "error"}:
        raise LogError(f"{topic} answered with something else: {data[:100]!r}")
    if "error" in reply:
        raise (AnswerFailed if reply.get("failed") else QuestionRefused)(reply["error"])
    return reply["answer"]
