"""The tables of schema `facts`, and the fold that they restore.

`warehouse.py` manages transactions and locks.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import astuple

from events.lifecycle import Life
from replay.facts.fleet_rows import fleet_events
from replay.facts.fold import Batch, Changes, FactFold, Position
from replay.facts.rows import AttemptRow, PriceRow, RequestRow, Row
from replay.sql_files import sql

if TYPE_CHECKING:
    import duckdb

_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(Life)


class Known(msgspec.Struct, frozen=True):
    """The rows that the tables already have for the requests of a batch; see `FactFold.apply`."""

    ended: Set[str]
    charged: Sequence[str]


class FactTables:
    """Reads and writes on one cursor, in the transaction of the caller."""

    def __init__(self, cursor: "duckdb.DuckDBPyConnection") -> None:
        self._cursor = cursor
        self.fold = self._restored()

    def restore(self) -> None:
        """Make the fold again from the tables, after a transaction was rolled back."""
        self.fold = self._restored()

    def look_up(self, batch: Batch) -> Known:
        """Return what the fold must know to apply a batch. Raises BookBehind."""
        floors = self.fold.new_requests(batch)
        groups = self.fold.groups(batch)
        ended: Iterable[str] = ()
        charged: Iterable[str] = ()
        if floors:
            ended = self._column(
                sql("fold/ended_requests"), {"floor": min(floors.values()), "requests": list(floors)}
            )
        if groups:
            charged = self._column(sql("fold/charged_groups"), {"groups": sorted(groups)})
        return Known(frozenset(ended), list(charged))

    def apply(self, batch: Batch, known: Known) -> Changes:
        """Fold a batch, and write its rows."""
        changes = self.fold.apply(batch, ended=known.ended, charged=known.charged)
        self.write(batch.stream, changes)
        return changes

    def advance(self, stream: str, position: Position) -> None:
        """Move a stream's position past records whose rows are in the tables."""
        self.fold.positions[stream] = position
        self.write(stream, Changes(position, [], set()))

    def write(self, stream: str, changes: Changes) -> None:
        by_table: dict[str, list[Row]] = defaultdict(list)
        for row in changes.rows:
            by_table[row.table].append(row)
        for table, rows in by_table.items():
            self._append(table, rows)
        if changes.touched:
            self._replace_open(changes.touched)
        position = changes.position
        stopped = (changes.stop.sequence, changes.stop.why) if changes.stop is not None else (None, None)
        self._cursor.execute("delete from facts.applied where stream = ?", [stream])
        self._cursor.execute(
            "insert into facts.applied values (?, ?, ?, ?, ?)",
            [stream, position.sequence, position.stored_at_ns, *stopped],
        )

    def write_heads(self, heads: Mapping[str, tuple[int, int]]) -> None:
        self._cursor.execute("delete from facts.heads")
        for stream, head in heads.items():
            self._cursor.execute("insert into facts.heads values (?, ?, ?)", [stream, *head])

    def run(self, name: str, parameters: Mapping[str, Any] | None = None) -> None:
        """Run the statements of a file of `sql/`, each with those of the parameters that it names."""
        for statement in self._cursor.extract_statements(sql(name)):
            values = {key: (parameters or {})[key] for key in statement.named_parameters}
            self._cursor.execute(statement, values or None)

    def fetch(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        return self._cursor.execute(query, list(parameters)).fetchall()

    def rows(self, kind: type[Row], table: str | None = None, *more: str) -> list[tuple[Any, ...]]:
        """Return a table's rows in the order of their entry, as tuples of the fields of `kind` and `more`."""
        columns = ", ".join((*kind.__struct_fields__, *more))
        return self.fetch(f"select {columns} from facts.{table or kind.table} order by rowid")

    def _column(self, query: str, parameters: Mapping[str, object]) -> list[Any]:
        return [value for (value,) in self._cursor.execute(query, parameters).fetchall()]

    def _replace_open(self, touched: set[str]) -> None:
        for table in ("open_requests", "open_attempts"):
            self._cursor.execute(
                f"delete from facts.{table} where request_id in (select unnest(?))", [sorted(touched)]
            )
        still_open = sorted(touched & self.fold.open.keys())
        under_way = [self.fold.open[request] for request in still_open]
        lives = [encode_life(self.fold.lives[request]) for request in still_open]
        self._append("open_requests", [one.row for one in under_way], lives)
        self._append("open_attempts", [one.attempt for one in under_way if one.attempt is not None])

    def _append(self, table: str, rows: Sequence[Row], lives: Sequence[str] | None = None) -> None:
        if not rows:
            return
        columns = list(rows[0].__struct_fields__)
        tuples: Iterable[tuple[Any, ...]] = map(astuple, rows)
        if lives is not None:
            columns.append("life")
            tuples = ((*row, life) for row, life in zip(tuples, lives, strict=True))
        appender = self._cursor.appender(f"facts.{table}", columns=columns)
        appender.append_rows(tuples)
        appender.flush()

    def _restored(self) -> FactFold:
        fold = FactFold()
        for stream, sequence, at_ns in self.fetch("select stream, sequence, stored_at_ns from facts.applied"):
            fold.positions[stream] = Position(sequence, at_ns)
        fold.restore_book(
            (entry for (entry,) in self.fetch("select id from facts.book_entries")),
            (PriceRow(*row) for row in self.rows(PriceRow)),
            (period for (period,) in self.fetch("select period from facts.closed_periods")),
        )
        fold.restore_refusals(self.fetch(sql("fold/refusals")))
        for stream, sequence in self.fetch("select stream, sequence from facts.quarantined_records"):
            fold.quarantine(stream, sequence)
        for event in fleet_events(self.fetch(sql("scaling/fleet"))):
            fold.fleet.apply(*event)
        attempts = {row[1]: AttemptRow(*row) for row in self.rows(AttemptRow, "open_attempts")}
        for *row, life in self.rows(RequestRow, "open_requests", "life"):
            fold.restore_request(RequestRow(*row), _decoder.decode(life), attempts.get(row[0]))
        return fold


def encode_life(life: Life) -> str:
    return _encoder.encode(life).decode()
