"""The metrics of a control process. A standby shows what it reads and projects; only a leader has duties."""

from collections.abc import Callable, Mapping, Sequence

from events.clock import now_s
from events.contracts import SECOND_NS
from rift.control.leader import Leadership
from rift.control.leader_duties import Duties
from rift.control.projection.warehouse_host import Projection
from rift.control.samples import Samples
from rift.metrics.families import Collector, Figure, Values, process

STATES = ("starting", "ready", "draining")
NANOUSD = 1_000_000_000

Read = Callable[[], float | Mapping[Values, float]]


def collectors(
    leadership: Leadership, projection: Projection, duties: Duties, samples: Samples
) -> Sequence[Collector]:
    """Return the collectors of a control process."""
    return [
        process(),
        *_of_leadership(leadership),
        *_of_fleet(leadership),
        *_of_projection(projection, samples),
        *_of_duties(projection, duties),
        *_of_disks(samples),
    ]


def _of_leadership(leadership: Leadership) -> Sequence[Collector]:
    return [
        _gauge("leader", "1 if this process leads, 0 if it stands by.", lambda: leadership.leads),
        _gauge(
            "epoch", "The latest election, as far as this process has read.", lambda: leadership.fleet.epoch
        ),
        _gauge(
            "standbys",
            "Processes that stand by, as the leader knows them.",
            lambda: leadership.standbys if leadership.leads else {},
        ),
    ]


def _of_fleet(leadership: Leadership) -> Sequence[Collector]:
    fleet = leadership.fleet
    counts = leadership.counts

    def replicas() -> Mapping[Values, float]:
        models = {*fleet.replicas, *fleet.wanted}
        return {(model, state): fleet.count(model, state) for model in models for state in STATES}

    def start_s() -> Mapping[Values, float]:
        times_ns = {model: fleet.start_ns(model) for model in fleet.starts}
        return {(model,): took_ns / SECOND_NS for model, took_ns in times_ns.items() if took_ns is not None}

    return [
        _gauge("replicas", "Live replicas by state.", replicas, ("model", "state")),
        _gauge(
            "replicas_wanted",
            "Replicas as last decided.",
            lambda: {(model,): wanted for model, wanted in fleet.wanted.items()},
            ("model",),
        ),
        _gauge(
            "failed_starts",
            "Starts that failed since one succeeded.",
            lambda: {(model,): starts.failed for model, starts in fleet.starts.items()},
            ("model",),
        ),
        _gauge("start_seconds", "The median time of the last five starts.", start_s, ("model",)),
        _count(
            "decisions",
            "Scaling decisions by direction: from_zero, up, down, to_zero.",
            lambda: dict(counts.decisions),
            ("model", "direction"),
        ),
        _count("replica_starts", "Replicas that began to start.", lambda: dict(counts.starts), ("model",)),
        _count(
            "replicas_lost",
            "Replicas that ended unasked or fell silent, by cause: host or engine.",
            lambda: dict(counts.lost),
            ("model", "cause"),
        ),
    ]


def _of_projection(projection: Projection, samples: Samples) -> Sequence[Collector]:
    def behind() -> Mapping[Values, float]:
        return {
            (stream,): max(0, heads.last - projection.applied.get(stream, 0))
            for stream, heads in samples.heads.items()
        }

    def behind_s() -> Mapping[Values, float]:
        return {
            (stream,): heads.waited_s(projection.applied.get(stream, 0), now_s())
            for stream, heads in samples.heads.items()
        }

    def charged() -> Mapping[Values, float]:
        nanousd = dict(projection.warehouse.totals.charged_nanousd)
        return {model: charge / NANOUSD for model, charge in nanousd.items()}

    return [
        _gauge(
            "projection_lag_records",
            "Records that the log had at the last sample and that are not applied.",
            behind,
            ("stream",),
        ),
        _gauge(
            "projection_lag_seconds",
            "How long the oldest of them has been known. Some seconds are normal.",
            behind_s,
            ("stream",),
        ),
        _gauge("projection_stopped", "1 if a record cannot be applied.", lambda: projection.is_stopped),
        _gauge(
            "projection_blocked",
            "1 if the disk of the DuckDB file refuses writes.",
            lambda: projection.problem is not None,
        ),
        _count(
            "requests",
            "Requests that ended, by the reason of their end.",
            lambda: dict(projection.warehouse.totals.ended),
            ("model", "reason"),
        ),
        _count(
            "prompt_tokens",
            "Prompt tokens of ended requests.",
            lambda: dict(projection.warehouse.totals.prompt_tokens),
            ("model",),
        ),
        _count(
            "output_tokens",
            "Output tokens of ended requests.",
            lambda: dict(projection.warehouse.totals.output_tokens),
            ("model",),
        ),
        _count(
            "charged_usd",
            "Charges of ended requests of plan per_token, without corrections.",
            charged,
            ("model",),
        ),
    ]


def _of_duties(projection: Projection, duties: Duties) -> Sequence[Collector]:
    def archived() -> Mapping[Values, float]:
        return {(stream,): last for stream, last in _archived(duties).items()}

    def unarchived() -> Mapping[Values, float]:
        applied = projection.applied
        return {(stream,): max(0, applied.get(stream, 0) - n) for stream, n in _archived(duties).items()}

    def questions() -> Mapping[Values, float]:
        sql = duties.sql
        return {} if sql is None else {("answered",): sql.answered, ("refused",): sql.refused}

    return [
        _gauge("archived_sequence", "The last archived record of each stream.", archived, ("stream",)),
        _gauge("archive_lag_records", "Applied records that are not archived.", unarchived, ("stream",)),
        _gauge(
            "archive_failures",
            "Streams whose last archiving failed.",
            lambda: {} if duties.archiver is None else len(duties.archiver.problems),
        ),
        _count(
            "janitor_actions",
            "What was done for requests that could not end by themselves.",
            lambda: {(action,): n for action, n in dict(duties.acted).items()},
            ("action",),
        ),
        _gauge(
            "sql_questions_running",
            "Questions in SQL that are answered or wait for it.",
            lambda: {} if duties.sql is None else duties.sql.asked,
        ),
        _count("sql_questions", "Questions in SQL by their outcome.", questions, ("outcome",)),
    ]


def _archived(duties: Duties) -> Mapping[str, int]:
    return {} if duties.archiver is None else duties.archiver.archived


def _of_disks(samples: Samples) -> Sequence[Collector]:
    def optional(read: Callable[[], int | bool | None]) -> Read:
        def figures() -> float | Mapping[Values, float]:
            figure = read()
            return {} if figure is None else figure

        return figures

    return [
        _gauge(
            "log_room_bytes",
            "Bytes that each stream can still take.",
            lambda: {(stream,): room for stream, room in samples.room_bytes.items()},
            ("stream",),
        ),
        _gauge(
            "brokers",
            "1 for the state of each server of a cluster, the worst over all streams.",
            lambda: dict.fromkeys(samples.servers.items(), 1),
            ("server", "state"),
        ),
        _gauge(
            "log_disk_free_bytes",
            "Free bytes of the embedded broker's disk, without the reserve.",
            optional(lambda: samples.disk.free_bytes),
        ),
        _gauge(
            "log_disk_reserve_whole",
            "0 if the reserve of the embedded broker's disk was used: new requests are refused.",
            optional(lambda: samples.disk.reserve_is_whole),
        ),
        _gauge(
            "database_bytes", "Bytes of the DuckDB file and of its log.", lambda: samples.disk.database_bytes
        ),
        _gauge(
            "sample_age_seconds", "Age of the figures that are asked for every 10 s.", lambda: samples.age_s
        ),
    ]


def _gauge(name: str, help: str, read: Read, labels: Sequence[str] = ()) -> Figure:
    return Figure(f"rift_control_{name}", help, read, labels)


def _count(name: str, help: str, read: Read, labels: Sequence[str] = ()) -> Figure:
    return Figure(f"rift_control_{name}_total", help, read, labels, kind="counter")
