"""The DuckDB file: the facts of the fold, the position they reach, and answers to SQL.

One process has the file open, and one thread at a time writes to it. Facts and position commit in one
transaction, so the process may die at any time and the next one continues where the file ends. The file
holds nothing that the log does not, so deleting it costs only the time to fold the log again.

When the disk is full or read-only, a write raises DiskRefused and leaves no trace. DuckDB invalidates a
database whose checkpoint failed: the file is closed then, and the next use opens it again.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn, Self

import duckdb

from events.log import Stored
from replay.archive import parquet
from replay.archive.parquet import DISK_ERRORS
from replay.disk import naming, refusal
from replay.errors import ReplayError
from replay.facts import fold
from replay.facts.fold import Batch, Changes, Position, Stop
from replay.sql_files import checks, sql
from replay.warehouse.fact_tables import FactTables
from replay.warehouse.queries import ROWS_MAX, TIME_MAX_S, Queries, Question
from replay.warehouse.result import QueryRefused, QueryResult
from replay.warehouse.totals import Totals

# In the order of creation: each may read those before it.
RELATIONS = (
    *("requests", "attempts", "replicas", "decisions", "plans", "latency", "itl_bounds", "demand", "prices"),
    *("accounts", "keys", "limits", "corrections", "periods", "segments", "charges", "invoice_lines"),
    *("shares", "usage", "balances", "elections", "refusals", "unit_economics", "lag"),
)

# What makes a file, in order. The macros read relations.
SCHEMA = ("tables", *RELATIONS, "macros")

# The meaning of the rows. Raise it when the fold changes without a change of the SQL, so that older files are
# refused.
FOLD_VERSION = 2

# Relations that a rebuild from the same log must reproduce to the byte: requests, money and the book. `lag`
# and `replicas` describe the present, `demand` and `decisions` explain; they are left out.
DIGESTED = (
    *("requests", "attempts", "usage", "latency", "prices", "accounts", "keys", "limits", "corrections"),
    *("periods", "charges", "invoice_lines", "shares", "balances"),
)

# A DuckDB file begins with three headers of 4 KiB, the first with a checksum and this mark.
HEADERS_BYTES = 3 * 4096
MARK = b"DUCK"
MARK_AT = 8

# A pivot over more columns takes memory that DuckDB's limit does not cover.
PIVOT_MAX = 1_000

CONFIG: parquet.Config = parquet.CONFIG | {
    "enable_external_access": False,
    "python_enable_replacements": False,
    "allow_community_extensions": False,
    "pivot_limit": PIVOT_MAX,
    "lock_configuration": True,
}


class WarehouseError(ReplayError):
    """The file cannot be used; the message names the file and the remedy."""


class WarehouseBusy(WarehouseError):
    """Another process has the file open."""


class WarehouseOutdated(WarehouseError):
    """Another version of Rift made the file. The log and the archive hold everything in it."""


class ProjectionStopped(ReplayError):
    """A record cannot be folded. Everything before it is applied, and nothing after it will be."""

    def __init__(self, stream: str, stop: Stop) -> None:
        super().__init__(f"the projection stopped at {stream}:{stop.sequence}: {stop.why}")
        self.stream = stream
        self.stop = stop


def schema_version() -> str:
    """Return the version of the file format: a file of another version cannot be continued."""
    text = "\n".join(sql(name) for name in SCHEMA)
    return f"{FOLD_VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class _Opened(NamedTuple):
    """The open file: its connection, the writer's cursor, the fold and the queries."""

    connection: duckdb.DuckDBPyConnection
    writer: duckdb.DuckDBPyConnection
    tables: FactTables
    queries: Queries

    def close(self) -> None:
        """Refuse the queries that are running, then close the file."""
        self.queries.close()
        self.writer.close()
        self.connection.close()


class Warehouse:
    """Open it with `Warehouse.open`. Any thread may query; one thread at a time may write. `totals` has what
    was applied since."""

    config: ClassVar[parquet.Config] = CONFIG

    def __init__(self, path: Path, *, reading: Path | None = None) -> None:
        """Open nothing yet: `ensure_open` does, and the first use."""
        self.totals = Totals()
        self._path = path
        self._reading = reading
        self._lock = threading.Lock()
        self._is_closed = False
        self._opened: _Opened | None = None
        # The committed positions while the file is not open.
        self._positions: dict[str, Position] = {}

    @classmethod
    def open(cls, path: Path, *, reading: Path | None = None) -> Self:
        """Open or create the file; its folder must exist. SQL may read files in `reading` and no others.

        Raises WarehouseError, WarehouseBusy, DiskRefused.
        """
        warehouse = cls(path, reading=reading)
        warehouse.ensure_open()
        return warehouse

    @property
    def is_open(self) -> bool:
        return self._opened is not None

    def ensure_open(self) -> None:
        """Open or create the file unless it is open. Raises as `open`."""
        with self._lock:
            self._open_once()

    def _open_once(self) -> _Opened:
        """As `ensure_open`, for a caller that holds the lock."""
        if self._is_closed:
            raise WarehouseError(f"{self._path} is closed")
        if self._opened is None:
            opened = _open(self._path, self.config, self._reading)
            positions = opened.tables.fold.positions
            for stream, before in self._positions.items():
                if stream not in positions or positions[stream].sequence < before.sequence:
                    opened.close()
                    raise WarehouseError(
                        f"{self._path} has lost what it had applied of {stream} up to {before.sequence}; "
                        "restart control, and it continues from what the file holds"
                    )
            self._opened = opened
        return self._opened

    def close(self) -> None:
        """Refuse the queries that are running, then close the file."""
        if self._opened is not None:
            self._opened.queries.close()
        with self._lock:
            self._is_closed = True
            if self._opened is not None:
                self._opened.close()

    # --- writing ---------------------------------------------------------------------------------

    def positions(self) -> dict[str, int]:
        """Return by stream the sequence up to which it is applied; a stream without records is missing."""
        opened = self._opened
        positions = self._positions if opened is None else opened.tables.fold.positions
        return {stream: position.sequence for stream, position in positions.items()}

    def quarantined(self, stream: str) -> Set[int]:
        """Return the records of a stream that are skipped if they cannot be read."""
        opened = self._opened
        return frozenset() if opened is None else opened.tables.fold.quarantined(stream)

    def apply(self, stream: str, messages: Sequence[Stored]) -> None:
        """Fold messages of one stream, in its order; skip those that were applied before.

        Raises ProjectionStopped at a record that is missing or cannot be folded, after committing everything
        before it; raises BookBehind and DiskRefused without any change. After DiskRefused the messages may be
        applied nevertheless, and can be applied again.
        """
        self.ensure_open()
        after = self.positions().get(stream, 0)
        self.apply_batch(fold.read(stream, messages, self.quarantined(stream), after=after))

    def apply_batch(self, batch: Batch) -> None:
        """Apply decoded records as `apply` does."""
        with self._writing() as opened:
            known = opened.tables.look_up(batch)
        with self.transaction() as tables:
            changes = tables.apply(batch, known)
        self.totals.add(changes.rows)
        if changes.stop is not None:
            raise ProjectionStopped(batch.stream, changes.stop)

    def stop(self, stream: str, stop: Stop) -> NoReturn:
        """Record why a stream cannot continue, and raise ProjectionStopped."""
        with self.transaction() as tables:
            tables.write(stream, Changes(tables.fold.position(stream), [], set(), stop))
        raise ProjectionStopped(stream, stop)

    def note_heads(self, heads: Mapping[str, tuple[int, int]]) -> None:
        """Store for relation `lag` the last sequence and stored time of streams that are behind."""
        if self._is_closed:
            return
        with self.transaction() as tables:
            tables.write_heads(heads)

    def checkpoint(self) -> None:
        """Write everything into the file itself, so that it can be moved: closing it may leave a part in the
        log beside it without a word. Raises DiskRefused."""
        with self._writing() as opened:
            opened.writer.execute("checkpoint")

    @contextmanager
    def transaction(self) -> Iterator[FactTables]:
        """Commit everything that the block does to the tables and the fold, or nothing if it raises.

        Raises DiskRefused if the file system refuses the write.
        """
        with self._writing() as opened:
            opened.writer.begin()
            try:
                yield opened.tables
                opened.writer.commit()
            except BaseException:
                # A commit that failed has rolled back already.
                with suppress(duckdb.TransactionException):
                    opened.writer.rollback()
                opened.tables.restore()
                raise

    @contextmanager
    def _writing(self) -> Iterator[_Opened]:
        """Yield the open file to its only writer. Close it if DuckDB has invalidated the database, which
        happens when a checkpoint fails: the next use opens it again. Raises DiskRefused."""
        with self._lock, naming(self._path, *DISK_ERRORS):
            opened = self._open_once()
            before = dict(opened.tables.fold.positions)
            try:
                yield opened
            except duckdb.FatalException:
                self._positions = before
                self._opened = None
                opened.close()
                raise

    # --- querying --------------------------------------------------------------------------------

    def query(self, text: str, *, rows_max: int = ROWS_MAX, time_max_s: float = TIME_MAX_S) -> QueryResult:
        """Answer a user's SELECT as of now, on a connection of its own. Raises QueryRefused."""
        allowed = f"allowed is one SELECT over {', '.join(RELATIONS)}"
        return self._queries().query(text, allowed, rows_max, time_max_s)

    def read(self, *questions: Question) -> list[QueryResult]:
        """Answer several queries as of the same moment. Raises QueryRefused."""
        return self._queries().read(questions)

    def failed_checks(self) -> Iterator[str]:
        """Yield what is wrong in the file, by the `.check.sql` files. Raises QueryRefused."""
        for check in checks():
            for problem, subject in self.query(sql(check)).rows:
                yield f"{check}: {problem}: {subject}"

    def digests(self, *questions: Question) -> tuple[dict[str, str], list[QueryResult]]:
        """Return a SHA-256 over each relation's rows, independent of their order, and the answers to
        `questions` as of the same moment. Raises QueryRefused."""
        return self._queries().digests(DIGESTED, questions)

    def _queries(self) -> Queries:
        """Raises QueryRefused if the file is closed or cannot be opened."""
        try:
            return (self._opened or self._reopened()).queries
        except ReplayError as error:
            raise QueryRefused(str(error)) from error

    def _reopened(self) -> _Opened:
        with self._lock:
            return self._open_once()


def _open(path: Path, config: parquet.Config, reading: Path | None) -> _Opened:
    _remove_torn(path)
    with naming(path, *DISK_ERRORS):
        try:
            connection = _connected(path, config, reading)
        except duckdb.Error as error:
            raise _unopened(path, error) from error
        # A killed process leaves what it had spilled, and DuckDB removes it only when it spills again.
        shutil.rmtree(f"{path}.tmp", ignore_errors=True)
        try:
            _create_or_check(connection, path)
            writer = connection.cursor()
            return _Opened(connection, writer, FactTables(writer), Queries(connection))
        except BaseException as error:
            with suppress(duckdb.Error):
                connection.close()
            if isinstance(error, duckdb.Error):
                raise _unopened(path, error) from error
            raise


def _unopened(path: Path, error: duckdb.Error) -> Exception:
    """Return what to raise for an error of opening the file: the error itself if the disk caused it."""
    if "Conflicting lock" in str(error):
        return WarehouseBusy(f"{path} is open in another process; stop that process first")
    if refusal(path, error) is not None:
        return error
    return WarehouseError(
        f"{path} cannot be opened: {error}; move the file away, and the log and the archive rebuild it"
    )


def _remove_torn(path: Path) -> None:
    """Remove a file whose creation ended in its headers, on a full disk or by a kill: DuckDB takes it for
    damaged for ever, and it holds nothing."""
    with suppress(OSError):
        if path.stat().st_size < HEADERS_BYTES:
            with path.open("rb") as file:
                head = file.read(MARK_AT + len(MARK))
            if not head or head[MARK_AT:] == MARK:
                path.unlink()


def applied_marks(path: Path) -> dict[str, tuple[int, int]]:
    """Return by stream the last applied sequence, and the largest stored time up to it.

    The file may be another version's. The result is empty if it is missing. Raises WarehouseError,
    WarehouseBusy.
    """
    _remove_torn(path)
    if not os.path.lexists(path):
        return {}
    with naming(path, *DISK_ERRORS):
        try:
            with (
                duckdb.connect(str(path), read_only=True, config=CONFIG) as connection,
                suppress(duckdb.CatalogException),
            ):
                rows = connection.execute(
                    "select stream, sequence, stored_at_ns from facts.applied"
                ).fetchall()
                return {stream: (sequence, at_ns) for stream, sequence, at_ns in rows if sequence}
        except duckdb.Error as error:
            raise _unopened(path, error) from error
    return {}


def _connected(path: Path, config: parquet.Config, reading: Path | None) -> duckdb.DuckDBPyConnection:
    if reading is None:
        return duckdb.connect(str(path), config=config)
    closing = ("enable_external_access", "lock_configuration")
    connection = duckdb.connect(str(path), config={k: v for k, v in config.items() if k not in closing})
    folder = str(reading).replace("'", "''")
    connection.execute(f"set allowed_directories = ['{folder}']")
    for name in closing:
        connection.execute(f"set {name} = {str(config[name]).lower()}")
    return connection


def _create_or_check(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    wanted = schema_version()
    tables = connection.execute("select schema_name || '.' || table_name from duckdb_tables()").fetchall()
    if not tables:
        connection.begin()
        for name in SCHEMA:
            connection.execute(sql(name))
        connection.execute("insert into facts.made_by values (?)", [wanted])
        connection.commit()
        return
    found = None
    if ("facts.made_by",) in tables:
        found = connection.execute("select version from facts.made_by").fetchone()
    if found != (wanted,):
        made_by = f"schema {found[0]}" if found is not None else "something else"
        message = f"{path} was made by {made_by}, and this is schema {wanted}: delete the file. "
        raise (WarehouseError if found is None else WarehouseOutdated)(f"{message}The log rebuilds it.")
