"""The rows of archived segments: Parquet files, written and read by a separate in-memory DuckDB.

This module converts events to rows and back (`sql/archive/`). `archive.py` lists and verifies segments.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import duckdb

from replay.disk import naming
from replay.errors import ReplayError
from replay.sql_files import sql

# DuckDB's default is 80 % of the machine, which the engine needs. Two gigabytes are enough to fold and
# aggregate ten million requests and to write a segment; larger operations spill to disk next to the file.
MEMORY_MAX = "2GB"
SPILL_MAX = "8GB"
# Rows per call to DuckDB: few enough to fit in memory, enough to make the cost of a call negligible.
ROWS = 10_000

Config = dict[str, str | bool | int | float | list[str]]

# Every connection uses these settings; the warehouse restricts its own further.
CONFIG: Config = {
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "memory_limit": MEMORY_MAX,
    "max_temp_directory_size": SPILL_MAX,
}
# zstd is half of snappy's size here and as fast to read; version 2 adds delta encodings. Events are ordered
# by type, so with small row groups a query for one type reads little of the others.
PARQUET = "format parquet, compression zstd, parquet_version v2, row_group_size 30720"

# DuckDB's RuntimeError in place of KeyboardInterrupt.
INTERRUPTED = "Query interrupted"

Record = tuple[int, int, str, str, str, int, str]
Event = tuple[int, int, int, str, str]


# DuckDB's errors when a file system refuses a write, or an earlier refusal invalidated the database. A failed
# commit is a TransactionException.
DISK_ERRORS = (
    duckdb.IOException,
    duckdb.FatalException,
    duckdb.TransactionException,
    duckdb.OutOfMemoryException,
)


class SegmentUnreadable(ReplayError):
    """A file of a segment cannot be read; the message is DuckDB's."""


class Segments:
    """One connection, for one thread at a time. It reads and writes only in its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._connection = duckdb.connect(
            ":memory:", config=CONFIG | {"temp_directory": str(folder / ".spill")}
        )
        for name, value in (
            ("allowed_directories", f"[{_quoted(folder)}]"),
            ("enable_external_access", "false"),
        ):
            self._connection.execute(f"set {name} = {value}")
        self._connection.execute("set lock_configuration = true")
        self._connection.execute(sql("archive/macros"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def begin(self) -> None:
        """Create the tables for the rows of one segment."""
        self._connection.execute(sql("archive/tables"))

    def add(self, records: list[Record], events: list[Event], content: list[tuple[int, bytes]]) -> None:
        for table, rows in (("records", records), ("events", events), ("content", content)):
            if rows:
                with naming(self._folder, *DISK_ERRORS):
                    appender = self._connection.appender(f"sealed_{table}")
                    appender.append_rows(rows)
                    appender.flush()

    def write(self, *, records: Path, events: Path, content: Path | None) -> None:
        """Write the added rows. Raises DiskRefused."""
        selects = {records: "from sealed_records order by sequence", events: sql("archive/seal")}
        if content is not None:
            selects[content] = "from sealed_content order by sequence"
        for path, select in selects.items():
            with naming(self._folder, *DISK_ERRORS):
                self._connection.execute(f"copy ({select}) to {_quoted(path)} ({PARQUET})")

    def wrong(self, stream: str, *, records: Path, events: Path) -> list[int]:
        """Return the records whose hash does not follow from their rows. Raises SegmentUnreadable."""
        parameters = {"stream": stream, "records": str(records), "events": str(events)}
        return [sequence for (sequence,) in self._rows("check", parameters)]

    def records(self, path: Path) -> Iterator[tuple[int, int, int, str]]:
        """Yield sequence, at_ns, number of events and hash of each record. Raises SegmentUnreadable."""
        return self._rows("records", {"records": str(path)})

    def events(
        self, *, records: Path, events: Path, first: int, last: int
    ) -> Iterator[tuple[int, int, str, str | None]]:
        """Yield sequence, at_ns, subject and bare JSON of each event in order.

        A record without events gives one row whose JSON is None. Raises SegmentUnreadable.
        """
        parameters = {"records": str(records), "events": str(events), "first": first, "last": last}
        return self._rows("read", parameters)

    def whole(
        self, *, records: Path, events: Path, sequences: Sequence[int] | None
    ) -> Iterator[tuple[int, int, str, str, str, str | None]]:
        """Yield rows like `events`, with the record's writer and content before the JSON.

        If `sequences` is given, only these records are yielded. Raises SegmentUnreadable.
        """
        parameters = {"records": str(records), "events": str(events), "sequences": sequences}
        return self._rows("event_rows", parameters)

    def own(self, *, events: Path, requests: Sequence[str], attempts: Sequence[str]) -> list[int]:
        """Return the sequences of records with events of these requests.

        `attempts` are attempts of the requests that started before this segment. Raises SegmentUnreadable.
        """
        parameters = {"events": str(events), "requests": requests, "attempts": attempts}
        return [sequence for (sequence,) in self._rows("records_of_requests", parameters)]

    def _rows(self, name: str, parameters: dict[str, Any]) -> Iterator[Any]:
        cursor = self._connection.cursor()
        try:
            with naming(self._folder, *DISK_ERRORS):
                cursor.execute(sql("archive/macros"))
                cursor.execute(sql(f"archive/{name}"), parameters)
                while rows := cursor.fetchmany(ROWS):
                    yield from rows
        except duckdb.Error as error:
            raise SegmentUnreadable(str(error).partition("\n")[0]) from error
        except RuntimeError as error:
            if str(error) == INTERRUPTED:
                raise KeyboardInterrupt from error
            raise
        finally:
            cursor.close()


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"
