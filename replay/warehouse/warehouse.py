"""The DuckDB file: the facts of the fold, the position they reach, and answers to SQL.

One process has the file open, and one thread at a time writes to it. Facts and position commit in one
transaction, so the process may die at any time and the next one continues where the file ends. The file
holds nothing that the log does not, so deleting it costs only the time to fold the log again.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, Self

import duckdb

from events.log import Stored
from replay.archive import parquet
from replay.errors import ReplayError
from replay.facts import fold
from replay.facts.fold import Batch, Changes, Stop
from replay.sql_files import checks, sql
from replay.warehouse.fact_tables import FactTables
from replay.warehouse.queries import ROWS_MAX, TIME_MAX_S, Queries, Question
from replay.warehouse.result import QueryResult

# In the order of creation: each may read those before it.
RELATIONS = (
    *("requests", "attempts", "replicas", "decisions", "usage", "latency", "itl_bounds", "demand"),
    *("prices", "accounts", "keys", "limits", "corrections", "periods", "segments", "charges"),
    *("invoice_lines", "balances", "elections", "unit_economics", "lag"),
)

# The meaning of the rows. Raise it when the fold changes without a change of the SQL, so that older files are
# refused.
FOLD_VERSION = 2

# Relations that a rebuild from the same log must reproduce to the byte: requests, money and the book. `lag`
# and `replicas` describe the present, `demand` and `decisions` explain; they are left out.
DIGESTED = (
    *("requests", "attempts", "usage", "latency", "prices", "accounts", "keys", "limits", "corrections"),
    *("periods", "charges", "invoice_lines", "balances"),
)

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
    text = "\n".join(sql(name) for name in ("tables", *RELATIONS))
    return f"{FOLD_VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Warehouse:
    """Open it with `Warehouse.open`. Any thread may query; one thread at a time may write."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._writer = connection.cursor()
        self._lock = threading.Lock()
        self._is_closed = False
        self._queries = Queries(connection, parquet.MEMORY_MAX)
        self._tables = FactTables(self._writer)

    @classmethod
    def open(cls, path: Path, *, reading: Path | None = None) -> Self:
        """Open or create the file; its folder must exist. SQL may read files in `reading` and no others.

        Raises WarehouseError, WarehouseBusy.
        """
        try:
            connection = _connected(path, reading)
        except duckdb.Error as error:
            if "Conflicting lock" in str(error):
                raise WarehouseBusy(f"{path} is open in another process; stop that process first") from error
            raise WarehouseError(f"{path} cannot be opened: {error}") from error
        try:
            _create_or_check(connection, path)
            return cls(connection)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Refuse the queries that are running, then close the file."""
        self._queries.close()
        with self._lock:
            self._is_closed = True
            self._writer.close()
            self._connection.close()

    # --- writing ---------------------------------------------------------------------------------

    def positions(self) -> dict[str, int]:
        """Return by stream the sequence up to which it is applied; a stream without records is missing."""
        return {stream: position.sequence for stream, position in self._tables.fold.positions.items()}

    def quarantined(self, stream: str) -> Set[int]:
        """Return the records of a stream that are skipped if they cannot be read."""
        return self._tables.fold.quarantined(stream)

    def apply(self, stream: str, messages: Sequence[Stored]) -> None:
        """Fold messages of one stream, in its order; skip those that were applied before.

        Raises ProjectionStopped at a record that cannot be folded, after committing everything before it;
        raises BookBehind without any change.
        """
        self.apply_batch(fold.read(stream, messages, self.quarantined(stream)))

    def apply_batch(self, batch: Batch) -> None:
        """Apply decoded records as `apply` does."""
        known = self._tables.look_up(batch)
        with self.transaction() as tables:
            changes = tables.apply(batch, known)
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

    @contextmanager
    def transaction(self) -> Iterator[FactTables]:
        """Commit everything that the block does to the tables and the fold, or nothing if it raises."""
        with self._lock:
            self._writer.begin()
            try:
                yield self._tables
                self._writer.commit()
            except BaseException:
                self._writer.rollback()
                self._tables.restore()
                raise

    # --- querying --------------------------------------------------------------------------------

    def query(self, text: str, *, rows_max: int = ROWS_MAX, time_max_s: float = TIME_MAX_S) -> QueryResult:
        """Answer a user's SELECT as of now, on a connection of its own. Raises QueryRefused."""
        return self._queries.query(
            text, f"allowed is one SELECT over {', '.join(RELATIONS)}", rows_max, time_max_s
        )

    def read(self, *questions: Question) -> list[QueryResult]:
        """Answer several queries as of the same moment. Raises QueryRefused."""
        return self._queries.read(questions)

    def failed_checks(self) -> Iterator[str]:
        """Yield what is wrong in the file, by the `.check.sql` files. Raises QueryRefused."""
        for check in checks():
            for problem, subject in self.query(sql(check)).rows:
                yield f"{check}: {problem}: {subject}"

    def digests(self, *questions: Question) -> tuple[dict[str, str], list[QueryResult]]:
        """Return a SHA-256 over each relation's rows, independent of their order, and the answers to
        `questions` as of the same moment. Raises QueryRefused."""
        return self._queries.digests(DIGESTED, questions)


def applied_marks(path: Path) -> dict[str, tuple[int, int]]:
    """Return by stream the last applied sequence and the largest stored time up to it, of any version's file.

    The result is empty if the file is missing or cannot be read, for example because it is open elsewhere:
    `Warehouse.open` gives the reason.
    """
    if not path.exists():
        return {}
    try:
        with duckdb.connect(str(path), read_only=True, config=CONFIG) as connection:
            rows = connection.execute("select stream, sequence, stored_at_ns from facts.applied").fetchall()
    except duckdb.Error:
        return {}
    return {stream: (sequence, stored_at_ns) for stream, sequence, stored_at_ns in rows if sequence}


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


def _create_or_check(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
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
        message = f"{path} was made by {made_by}, and this is schema {wanted}: delete the file. "
        raise (WarehouseError if found is None else WarehouseOutdated)(f"{message}The log rebuilds it.")
