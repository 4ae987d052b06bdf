"""Queries to the warehouse, each read-only on a connection of its own, bounded in rows, bytes and time.

This module does not depend on the meaning of a relation. DuckDB looks at its clock and its memory limit only
between chunks, so one function call can exceed both. A user's question therefore needs a process that can be
killed (`rift/control/sql/`).
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import duckdb

from events.contracts import REPLY_BYTES_MAX, SQL_ANSWER_S
from replay.warehouse.result import QueryRefused, QueryResult, plain

# A person or a script reads the answer: for more rows, use LIMIT or an aggregate.
ROWS_MAX = 100_000
TIME_MAX_S = SQL_ANSWER_S
# The JSON of an answer's columns and rows.
BYTES_MAX = REPLY_BYTES_MAX
# DuckDB's messages repeat values of the question, however long they are.
ERROR_CHARACTERS_MAX = 2000
# A chunk of DuckDB has 2,048 rows. This many become Python's objects at a time, so that a wide answer is
# refused before it takes memory.
FETCH_ROWS = 64
# Invoices and digests over ten million requests take a minute.
READ_MAX_S = 300.0


MEMORY = "the answer takes more memory than a question may use; ask for less"
ZONED = "times with a zone cannot be returned (the log's are integer nanoseconds); write them as ::varchar"

# Of DuckDB's functions that return rows, only these are answered. The others read files, change settings, run
# SQL that is hidden in a string, or show the machine's paths.
TABLE_FUNCTIONS = (
    *(
        "range",
        "generate_series",
        "unnest",
        "repeat",
        "repeat_row",
        "summary",
        "histogram",
        "histogram_values",
    ),
    *("json_each", "json_tree", "duckdb_columns", "duckdb_tables", "duckdb_views", "duckdb_schemas"),
    *("duckdb_functions", "duckdb_types", "duckdb_keywords", "duckdb_constraints", "duckdb_indexes"),
    *("pragma_table_info", "pragma_show", "pragma_version", "pg_timezone_names", "icu_calendar_names"),
)
# Scalar functions that write DuckDB's log or show the machine's paths.
FORBIDDEN_SCALARS = ("current_setting", "write_log", "nextval", "currval", "setval", "getenv")

# A name in DuckDB's JSON of a statement. Inside a string literal the quotes would be escaped.
_NAME = re.compile(r'"(?:function_name|table_name)":"([^"\\]*)"')
_FIRST_WORD = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(\w+)", re.DOTALL)

Question = tuple[str, Sequence[object] | Mapping[str, object]]
"""SQL of this package, and its parameters."""

Result = TypeVar("Result")


class Queries:
    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._cursors: set[duckdb.DuckDBPyConnection] = set()
        self._condition = threading.Condition()
        self._is_closed = False
        self._forbidden: frozenset[str] | None = None

    def close(self) -> None:
        """Interrupt running queries and refuse new ones; return when none runs."""
        with self._condition:
            self._is_closed = True
            for cursor in self._cursors:
                cursor.interrupt()
            self._condition.wait_for(lambda: not self._cursors)

    def query(self, text: str, allowed: str, rows_max: int, time_max_s: float) -> QueryResult:
        """Answer one SELECT of a user. Raises QueryRefused, which names what is `allowed`."""
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise QueryRefused("the query is not Unicode text")
        try:
            return self._ask(lambda cursor: self._answer(cursor, text, allowed, rows_max), time_max_s)
        except (duckdb.PermissionException, duckdb.TransactionException) as error:
            raise QueryRefused(f"{_first_line(error)}; {allowed}") from error
        except duckdb.Error as error:
            words = ZONED if "pytz" in str(error) else str(error)[:ERROR_CHARACTERS_MAX]
            raise QueryRefused(words) from error

    def read(self, questions: Iterable[Question]) -> list[QueryResult]:
        """Answer queries of this package, all as of the same moment. Raises QueryRefused."""
        return self._ask(lambda cursor: _answer_all(cursor, questions), READ_MAX_S)

    def digests(
        self, relations: Iterable[str], questions: Iterable[Question]
    ) -> tuple[dict[str, str], list[QueryResult]]:
        """Return a SHA-256 over each relation's rows, independent of their order, and answers as of the same
        moment. Raises QueryRefused."""

        def ask(cursor: duckdb.DuckDBPyConnection) -> tuple[dict[str, str], list[QueryResult]]:
            answers = _answer_all(cursor, questions)
            return {name: _digest(cursor, name) for name in relations}, answers

        return self._ask(ask, READ_MAX_S)

    def _answer(
        self, cursor: duckdb.DuckDBPyConnection, text: str, allowed: str, rows_max: int
    ) -> QueryResult:
        statements = cursor.extract_statements(text)
        if (problem := _statement_problem(statements)) is not None:
            raise QueryRefused(f"{problem}; {allowed}")
        self._check_names(cursor, text, allowed)
        cursor.execute("begin transaction read only")
        cursor.execute(statements[0])
        columns = cursor.description or []
        if any("WITH TIME ZONE" in str(kind) for _, kind, *_ in columns):
            raise QueryRefused(ZONED)
        names = [name for name, *_ in columns]
        size = len(json.dumps({"columns": names, "rows": []}, ensure_ascii=False).encode())
        return QueryResult(names, _rows(cursor, rows_max, size))

    def _check_names(self, cursor: duckdb.DuckDBPyConnection, text: str, allowed: str) -> None:
        """Raise QueryRefused if the statement names a function or a view that is not answered."""
        if self._forbidden is None:
            self._forbidden = forbidden_names(cursor)
        [(parsed,)] = cursor.execute("select json_serialize_sql(?)", [text]).fetchall()
        if not parsed.startswith('{"error":false,'):
            raise QueryRefused(
                f"DuckDB cannot list the names of this SELECT, so it is not answered; {allowed}"
            )
        for name in _NAME.findall(parsed):
            if name.lower() in self._forbidden:
                raise QueryRefused(f"{name} is not answered; {allowed}")

    def _ask(self, ask: Callable[[duckdb.DuckDBPyConnection], Result], time_max_s: float) -> Result:
        with self._condition:
            if self._is_closed:
                raise QueryRefused("the database is closed")
            cursor = self._connection.cursor()
            self._cursors.add(cursor)
        timer = threading.Timer(time_max_s, cursor.interrupt)
        timer.daemon = True
        timer.start()
        try:
            return ask(cursor)
        except duckdb.InterruptException as error:
            why = "the database was closed" if self._is_closed else f"not answered within {time_max_s:g} s"
            raise QueryRefused(f"{why}; ask again, or for less") from error
        except (duckdb.OutOfMemoryException, MemoryError) as error:
            raise QueryRefused(MEMORY) from error
        except RecursionError as error:
            raise QueryRefused("the question or its answer is nested too deeply; flatten it") from error
        except OverflowError as error:
            raise QueryRefused("the answer holds a value out of range; write it as ::varchar") from error
        finally:
            timer.cancel()
            timer.join()
            with self._condition:
                # DuckDB may keep computing a result that was not read to its end; interrupt it.
                cursor.interrupt()
                cursor.close()
                self._cursors.remove(cursor)
                self._condition.notify_all()


def _statement_problem(statements: Sequence[duckdb.Statement]) -> str | None:
    """Return why these statements are not one SELECT, None if they are."""
    if not statements:
        return "the question is empty"
    if len(statements) > 1:
        return f"the question has {len(statements)} statements; ask one at a time"
    try:
        kind = statements[0].type.name
    except ValueError:  # the enum of DuckDB's Python module lacks some kinds
        kind = ""
    if kind == "MULTI":
        # DuckDB would write the values into a table first.
        return (
            "PIVOT needs its values: write ON column IN (value, …), or count(*) FILTER (WHERE …) in a SELECT"
        )
    if kind != "SELECT":
        word = _FIRST_WORD.match(statements[0].query)
        return f"{word[1].upper() if word else 'this statement'} is not answered"
    return None


def forbidden_names(cursor: duckdb.DuckDBPyConnection) -> frozenset[str]:
    """Return the functions and the built-in views that no user's question may name."""
    cursor.execute(
        "select distinct lower(function_name) from duckdb_functions() "
        "where internal and function_type in ('table', 'table_macro', 'pragma')"
    )
    functions = {name for (name,) in cursor.fetchall()} - {*TABLE_FUNCTIONS} | {*FORBIDDEN_SCALARS}
    cursor.execute("select view_name, lower(sql) from duckdb_views() where internal")
    views = {view for view, text in cursor.fetchall() if functions & {*re.findall(r"(\w+)\(", text)}}
    return frozenset(functions | views)


def _rows(cursor: duckdb.DuckDBPyConnection, rows_max: int, size: int) -> list[list[Any]]:
    """Fetch the rows, of which the JSON may have BYTES_MAX less `size`. Raises QueryRefused."""
    rows: list[list[Any]] = []
    while fetched := cursor.fetchmany(FETCH_ROWS):
        for values in fetched:
            row = [plain(value) for value in values]
            size += len(json.dumps(row, ensure_ascii=False).encode()) + len(", ")
            if size > BYTES_MAX:
                raise QueryRefused(
                    f"the answer has more than {BYTES_MAX} bytes; use LIMIT or name fewer columns"
                )
            rows.append(row)
        if len(rows) > rows_max:
            raise QueryRefused(f"the answer has more than {rows_max} rows; use LIMIT")
    return rows


def _answer_all(cursor: duckdb.DuckDBPyConnection, questions: Iterable[Question]) -> list[QueryResult]:
    cursor.execute("begin transaction read only")
    answers = []
    for text, parameters in questions:
        cursor.execute(text, parameters if isinstance(parameters, Mapping) else list(parameters))
        rows = [[plain(value) for value in row] for row in cursor.fetchall()]
        answers.append(QueryResult([name for name, *_ in cursor.description or []], rows))
    return answers


def _digest(cursor: duckdb.DuckDBPyConnection, relation: str) -> str:
    digest = hashlib.sha256()
    cursor.execute(
        f"select sha256(whole::varchar) as row_digest from {relation} as whole order by row_digest"
    )
    while rows := cursor.fetchmany(10_000):
        digest.update("".join(row for (row,) in rows).encode())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
