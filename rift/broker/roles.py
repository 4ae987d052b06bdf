"""The permission table: each role's subjects to publish and to subscribe to.

A role is a user of the broker. There is one worker role for each model: a worker can neither take nor answer
requests for a model of another role. A role that may read a stream reads all prompts in it.
"""

from collections.abc import Iterable, Sequence

import msgspec

from events.subjects import SECRETS

GATEWAY = "gateway"
CONTROL = "control"
SUPERVISOR = "supervisor"
OPERATOR = "operator"
READER = "reader"
BACKUP = "backup"
# For repairs by hand and for a restore. No process that serves uses it.
ADMIN = "admin"

# The roles besides the workers'.
ROLES = (GATEWAY, CONTROL, SUPERVISOR, OPERATOR, READER, BACKUP, ADMIN)

MAKES_STREAMS = (CONTROL, SUPERVISOR)

# All that reading takes: streams and their states, records, consumers of one's own, and flow control.
READ = (
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.INFO.*",
    "$JS.API.STREAM.MSG.GET.*",
    # With its name in the subject: without it, the request itself could name any consumer.
    "$JS.API.CONSUMER.CREATE.*.>",
    "$JS.API.CONSUMER.DELETE.*.*",
    "$JS.API.CONSUMER.MSG.NEXT.*.*",
    "$JS.FC.>",
)
CHANGE_STREAMS = ("$JS.API.STREAM.CREATE.*", "$JS.API.STREAM.UPDATE.*")
# API calls that read the keys of sealed content.
READ_SECRETS = (
    f"STREAM.MSG.GET.{SECRETS}",
    f"CONSUMER.CREATE.{SECRETS}.>",
    f"CONSUMER.MSG.NEXT.{SECRETS}.*",
)
# The subjects of a shard's number also match those of other streams, which have fewer parts or other kinds.
OF_NO_SHARD = (
    "rift.book.*.*.>",
    "rift.book.lane.*",
    *(f"rift.{other}.*.>" for other in ("fleet", "keys", "secret", "ask")),
)
# A backup only reads.
SAVE_STREAMS = ("$JS.API.STREAM.SNAPSHOT.*", "$JS.SNAPSHOT.ACK.>")
ERASE_KEYS = f"$JS.API.STREAM.MSG.DELETE.{SECRETS}"

REMOVE_RECORDS = "STREAM.PURGE.*"
# API calls that do harm without a body. The broker sends an answer to any subject that the asker names,
# also to one that the asker may not publish to, and an answer can be empty. So these names lead nowhere,
# and a role that may make such a call puts a secret of the role into the name.
HIDDEN = (
    REMOVE_RECORDS,
    "STREAM.DELETE.*",
    "STREAM.LEADER.STEPDOWN.*",
    "CONSUMER.LEADER.STEPDOWN.*.*",
    "CONSUMER.PAUSE.*.*",
    "CONSUMER.RESET.*.*",
)

# Questions to control that change nothing.
ASK_STATUS = tuple(f"rift.ask.{topic}" for topic in ("status", "leader", "problems", "lanes", "shards"))
ASK_BILLS = tuple(f"rift.ask.{topic}" for topic in ("invoice", "invoices", "usage", "requests"))

PUBLISH: dict[str, Sequence[str]] = {
    GATEWAY: (
        "rift.*.request.*.*",
        "rift.*.cancel.*.*",
        "rift.*.lane.*",
        "rift.book.credit.*",
        "rift.keys.*",
        "rift.secret.*",
        ERASE_KEYS,
        *ASK_STATUS,
        *ASK_BILLS,
    ),
    CONTROL: (
        "rift.*.request.*.*",
        "rift.*.work.*.*",
        "rift.*.cancel.*.*",
        "rift.*.lane.*",
        "rift.fleet.*",
        *(f"rift.book.{kind}.*" for kind in ("credit", "correction", "segment", "period", "shard")),
        ERASE_KEYS,
        *CHANGE_STREAMS,
        *ASK_STATUS,
    ),
    SUPERVISOR: ("rift.book.*.*", *CHANGE_STREAMS),
    OPERATOR: ("rift.book.*.*", "rift.ask.*"),
    READER: ("rift.ask.sql", *ASK_STATUS, *ASK_BILLS),
    BACKUP: SAVE_STREAMS,
}


class Permissions(msgspec.Struct, frozen=True):
    """Subjects with wildcards. A denied subject is refused even if it is allowed.

    `hidden` are the API calls of HIDDEN, without `$JS.API.`, that the role may make under its secret name.
    """

    publish: Sequence[str]
    subscribe: Sequence[str]
    denied: Sequence[str] = ()
    hidden: Sequence[str] = ()
    answers: bool = False


def worker(model: str) -> str:
    """Return the role of a model's workers. `model` is the model's slug."""
    return f"worker-{model}"


def inbox(role: str) -> str:
    """Return the prefix of the subjects at which a role receives answers and records."""
    return f"_INBOX.{role}"


def table(models: Iterable[str]) -> dict[str, Permissions]:
    """Return the permissions of every role of an installation that serves these models (slugs)."""
    models = sorted(models)
    permissions = {role: _permissions(role, models) for role in ROLES if role != ADMIN}
    permissions |= {worker(model): _worker(model, models) for model in models}
    hidden = [*HIDDEN, *(f"CONSUMER.DELETE.*.{worker(model)}" for model in models)]
    return permissions | {ADMIN: Permissions((">",), (">",), hidden=hidden, answers=True)}


def _permissions(role: str, models: Sequence[str]) -> Permissions:
    denied = [*OF_NO_SHARD, *_jobs(models)]
    if role in (OPERATOR, READER):
        denied += [f"$JS.API.{path}" for path in READ_SECRETS]
    publish = [*READ, *PUBLISH[role]]
    subscribe = [f"{inbox(role)}.>"]
    if role == CONTROL:
        publish += [f"$JS.ACK.*.{worker(model)}.>" for model in models]
        subscribe.append("rift.ask.*")
    elif role == SUPERVISOR:
        publish += [f"rift.fleet.{model}" for model in models]
    hidden = [REMOVE_RECORDS] if role == CONTROL else []
    return Permissions(publish, subscribe, denied, hidden, answers=role == CONTROL)


def _worker(model: str, models: Sequence[str]) -> Permissions:
    publish = (*READ, f"rift.*.work.*.{model}", f"rift.fleet.{model}", f"$JS.ACK.*.{worker(model)}.>")
    others = [other for other in models if other != model]
    return Permissions(publish, [f"{inbox(worker(model))}.>"], [*OF_NO_SHARD, *_jobs(others)])


def _jobs(models: Iterable[str]) -> list[str]:
    """Return what hands out or takes away requests of models: the consumers named after their workers."""
    return [
        f"$JS.API.CONSUMER.{path}"
        for model in models
        for path in (
            f"CREATE.*.{worker(model)}",
            f"CREATE.*.{worker(model)}.>",
            f"DELETE.*.{worker(model)}",
            f"MSG.NEXT.*.{worker(model)}",
        )
    ]
