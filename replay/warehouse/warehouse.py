"""The DuckDB file: facts of the fold, the position they reach, and answers to SQL. The one door to DuckDB.

One process has the file open, and one thread at a time applies to it. Facts and position commit in
one transaction, so that a process may die anywhere: the next one goes on where the file stands. The
file holds nothing that the log does not say: deleting it costs the time to fold the log again.
"""

import hashlib
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, Self

import duckdb
import msgspec
from msgspec.structs import astuple

from events.lifecycle import Life
from events.log import Stored
from replay.archive import parquet
from replay.errors import ReplayError
from replay.facts import fold
from replay.facts.fold import Batch, Changes, Fold, Position, Stop
from replay.facts.rows import AttemptRow, PriceRow, RequestRow, Row
from replay.warehouse.queries import ROWS_MAX, TIME_MAX_S, Queries, Question
from replay.warehouse.result import QueryResult

# In the order in which they are made: each may read those before it.
RELATIONS = (
    *("requests", "attempts", "replicas", "decisions", "usage", "latency", "itl_bounds", "demand"),
    *("prices", "accounts", "keys", "limits", "corrections", "periods", "segments", "charges"),
    *("invoice_lines", "balances", "elections", "unit_economics", "lag"),
)

# What the rows mean. Raise it when the fold changes and the tables do not: older files are then refused.
FOLD_VERSION = 2

# What a rebuild from the same log must give again, to the last byte: requests, money and the book. Not `lag`
# and `replicas`, which say how things are, nor `demand` and `decisions`, which say why.
DIGESTED = (
    *("requests", "attempts", "usage", "latency", "prices", "accounts", "keys", "limits", "corrections"),
    *("periods", "charges", "invoice_lines", "balances"),
)

# The elections and decisions that count, in the order of the log.
COURSE = """
with told as (
    select epoch, control, null as model, null as replicas, position from facts.held_elections where counts
    union all
    select epoch, null, model, to_replicas, position from facts.scale_decisions where counts
)
select epoch, control, model, replicas, split_part(split_part(position, ':', 2), '.', 1)::bigint as sequence
from told
order by sequence, split_part(position, '.', 2)::bigint
"""

# A pivot over more columns takes memory that no limit counts.
PIVOT_MAX = 1_000

CONFIG: parquet.Config = parquet.CONFIG | {
    "enable_external_access": False,
    "python_enable_replacements": False,
    "allow_community_extensions": False,
    "pivot_limit": PIVOT_MAX,
    "lock_configuration": True,
}


class WarehouseError(ReplayError):
    """The file cannot be used; the message names it and what to do."""


class WarehouseBusy(WarehouseError):
    """Another process has the file open."""


class ProjectionStopped(ReplayError):
    """A record cannot be folded. Everything before it is, and nothing behind it will be."""

    def __init__(self, stream: str, stop: Stop) -> None:
        super().__init__(f"the projection stopped at {stream}:{stop.sequence}: {stop.why}")
        self.stream = stream
        self.stop = stop


def sql(name: str) -> str:
    """Return the text of one file of `replay/sql/`."""
    return (files("replay") / "sql" / f"{name}.sql").read_text(encoding="utf-8")


def checks() -> list[str]:
    """Return the names of the queries that must find nothing."""
    found = (file.name for file in (files("replay") / "sql").iterdir())
    return sorted(name.removesuffix(".sql") for name in found if name.endswith(".check.sql"))


def schema_version() -> str:
    """What has to be equal for a file to be gone on with: every relation, and what the fold means."""
    text = "\n".join(sql(name) for name in ("tables", *RELATIONS))
    return f"{FOLD_VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Warehouse:
    """Open it with `Warehouse.open`. `apply` is for one thread at a time, `query` for any."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._writer = connection.cursor()
        self._writing = threading.Lock()
        self._is_closed = False
        self._asking = Queries(connection, parquet.MEMORY_MAX)
        self._fold = self._restored()

    @classmethod
    def open(cls, path: Path, *, reading: Path | None = None) -> Self:
        """Open or create the file; its folder must exist. SQL may read files in `reading`, and no others.

        Raises WarehouseError, WarehouseBusy.
        """
        try:
            connection = _connected(path, reading)
        except duckdb.Error as error:
            if "Conflicting lock" in str(error):
                raise WarehouseBusy(f"{path} is open in another process") from error
            raise WarehouseError(f"{path} cannot be opened: {error}") from error
        try:
            _make_or_refuse(connection, path)
            return cls(connection)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Close the file; what is being asked ends first, refused."""
        self._asking.close()
        with self._writing:
            self._is_closed = True
            self._writer.close()
            self._connection.close()

    # --- applying --------------------------------------------------------------------------------

    def positions(self) -> dict[str, int]:
        """Return the sequence up to which each stream was applied; a stream not named, none."""
        return {stream: position.sequence for stream, position in self._fold.positions.items()}

    def apply(self, stream: str, messages: Sequence[Stored]) -> None:
        """Fold messages of one stream, in its order; those applied before are passed over.

        Raises ProjectionStopped at a record that cannot be folded, with everything before it
        committed, and BookBehind with nothing done.
        """
        self.apply_batch(fold.read(stream, messages, self._fold.quarantined(stream)))

    def quarantined(self, stream: str) -> Set[int]:
        """Return the records of a stream that are passed over if they cannot be read."""
        return self._fold.quarantined(stream)

    def apply_batch(self, batch: Batch) -> None:
        """As `apply`, of records that are decoded."""
        ended = self._ended(self._fold.new_requests(batch))
        charged = self._charged(self._fold.groups(batch))
        with self._transaction():
            changes = self._fold.apply(batch, ended=ended, charged=charged)
            self._write(batch.stream, changes)
        if changes.stop is not None:
            raise ProjectionStopped(batch.stream, changes.stop)

    def stop(self, stream: str, stop: Stop) -> NoReturn:
        """Write down why a stream cannot go on, and raise ProjectionStopped."""
        with self._transaction():
            self._write(stream, Changes(self._fold.position(stream), [], set(), stop))
        raise ProjectionStopped(stream, stop)

    def note_heads(self, heads: Mapping[str, tuple[int, int]]) -> None:
        """Say for relation `lag` where streams end that are not applied so far: sequence, stored time."""
        if self._is_closed:
            return
        with self._transaction():
            self._writer.execute("delete from facts.heads")
            for stream, head in heads.items():
                self._writer.execute("insert into facts.heads values (?, ?, ?)", [stream, *head])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block or nothing, in the file and in the fold."""
        with self._writing:
            self._writer.begin()
            try:
                yield
                self._writer.commit()
            except BaseException:
                self._writer.rollback()
                self._fold = self._restored()
                raise

    def _ended(self, floors: dict[str, int]) -> frozenset[str]:
        """Return which of these requests ended before. Only rows behind the lowest floor are looked at."""
        if not floors:
            return frozenset()
        found = self._writer.execute(
            "select request_id from facts.ended_requests"
            " where accepted_sequence > ? and request_id in (select unnest(?))",
            [min(floors.values()), list(floors)],
        )
        return frozenset(request for (request,) in found.fetchall())

    def _charged(self, groups: set[str]) -> list[str]:
        """Return which of these groups were charged their prompt."""
        if not groups:
            return []
        found = self._writer.execute(
            "select distinct group_id from facts.ended_requests"
            " where billed_output_tokens > 0 and group_id in (select unnest(?))",
            [sorted(groups)],
        )
        return [group for (group,) in found.fetchall()]

    def _write(self, stream: str, changes: Changes) -> None:
        by_table: dict[str, list[Row]] = defaultdict(list)
        for row in changes.rows:
            by_table[row.table].append(row)
        for table, rows in by_table.items():
            self._append(table, rows)
        if changes.touched:
            self._replace_open(changes.touched)
        position = changes.position
        stop = changes.stop
        stopped = (stop.sequence, stop.why) if stop is not None else (None, None)
        self._writer.execute("delete from facts.applied where stream = ?", [stream])
        self._writer.execute(
            "insert into facts.applied values (?, ?, ?, ?, ?)",
            [stream, position.sequence, position.stored_at_ns, *stopped],
        )

    def _replace_open(self, touched: set[str]) -> None:
        for table in ("open_requests", "open_attempts"):
            self._writer.execute(
                f"delete from facts.{table} where request_id in (select unnest(?))", [sorted(touched)]
            )
        still = [(request, self._fold.open[request]) for request in sorted(touched & self._fold.open.keys())]
        lives = [_encode_life(self._fold.lives[request]) for request, _ in still]
        self._append("open_requests", [under_way.row for _, under_way in still], lives)
        self._append("open_attempts", [u.attempt for _, u in still if u.attempt is not None])

    def _append(self, table: str, rows: Sequence[Row], lives: Sequence[str] | None = None) -> None:
        if not rows:
            return
        columns = list(rows[0].__struct_fields__)
        tuples: Iterable[tuple[Any, ...]] = map(astuple, rows)
        if lives is not None:
            columns.append("life")
            tuples = ((*row, life) for row, life in zip(tuples, lives, strict=True))
        appender = self._writer.appender(f"facts.{table}", columns=columns)
        appender.append_rows(tuples)
        appender.flush()

    def _restored(self) -> Fold:
        """The fold as the file holds it."""
        restored = Fold()
        applied = self._writer.execute("select stream, sequence, stored_at_ns from facts.applied").fetchall()
        restored.positions = {stream: Position(sequence, at_ns) for stream, sequence, at_ns in applied}
        ids = self._writer.execute("select id from facts.book_entries").fetchall()
        periods = self._writer.execute("select period from facts.closed_periods").fetchall()
        restored.restore_book(
            (entry for (entry,) in ids),
            map(_row(PriceRow), self._rows(PriceRow)),
            (period for (period,) in periods),
        )
        for stream, sequence in self._writer.execute(
            "select stream, sequence from facts.quarantined_records"
        ).fetchall():
            restored.quarantine(stream, sequence)
        for epoch, control, model, replicas, sequence in self._writer.execute(COURSE).fetchall():
            if model is None:
                restored.course.elect(epoch, control)
            else:
                restored.course.take(model, replicas, sequence)
        attempts = {row[1]: row for row in self._rows(AttemptRow, "open_attempts")}
        for *row, life in self._rows(RequestRow, "open_requests", "life"):
            attempt = attempts.get(row[0])
            restored.restore_request(
                RequestRow(*row), _decode_life(life), AttemptRow(*attempt) if attempt is not None else None
            )
        return restored

    def _rows(self, kind: type[Row], table: str | None = None, *more: str) -> list[tuple[Any, ...]]:
        columns = ", ".join((*kind.__struct_fields__, *more))
        return self._writer.execute(
            f"select {columns} from facts.{table or kind.table} order by rowid"
        ).fetchall()

    # --- answering -------------------------------------------------------------------------------

    def query(self, text: str, *, rows_max: int = ROWS_MAX, time_max_s: float = TIME_MAX_S) -> QueryResult:
        """Answer one SELECT, as of now, on a connection of its own. Raises QueryRefused."""
        return self._asking.query(
            text, f"allowed is one SELECT over {', '.join(RELATIONS)}", rows_max, time_max_s
        )

    def read(self, *questions: Question) -> list[QueryResult]:
        """Answer questions of our own, all as of one moment. Raises QueryRefused."""
        return self._asking.read(questions)

    def digests(self, *questions: Question) -> tuple[dict[str, str], list[QueryResult]]:
        """Return the SHA-256 of each relation's rows, whatever their order, and answers as of the same
        moment. Raises QueryRefused."""
        return self._asking.digests(DIGESTED, questions)


def _connected(path: Path, reading: Path | None) -> duckdb.DuckDBPyConnection:
    if reading is None:
        return duckdb.connect(str(path), config=CONFIG)
    closing = ("enable_external_access", "lock_configuration")
    connection = duckdb.connect(str(path), config={k: v for k, v in CONFIG.items() if k not in closing})
    folder = str(reading).replace("'", "''")
    connection.execute(f"set allowed_directories = ['{folder}']")
    for name in closing:
        connection.execute(f"set {name} = {str(CONFIG[name]).lower()}")
    return connection


def _make_or_refuse(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    wanted = schema_version()
    tables = connection.execute("select schema_name || '.' || table_name from duckdb_tables()").fetchall()
    if not tables:
        connection.begin()
        for name in ("tables", *RELATIONS):
            connection.execute(sql(name))
        connection.execute("insert into facts.made_by values (?)", [wanted])
        connection.commit()
        return
    found = None
    if ("facts.made_by",) in tables:
        found = connection.execute("select version from facts.made_by").fetchone()
    if found != (wanted,):
        made_by = f"schema {found[0]}" if found is not None else "something else"
        raise WarehouseError(
            f"{path} was made by {made_by}, and this is schema {wanted}: delete the file. "
            "It is only a fold, and is built again from the log."
        )


_lives = msgspec.json.Encoder(order="deterministic")
_life = msgspec.json.Decoder(Life)


def _encode_life(life: Life) -> str:
    return _lives.encode(life).decode()


def _decode_life(text: str) -> Life:
    return _life.decode(text)


def _row(kind: type[PriceRow]) -> Any:
    return lambda row: kind(*row)
