"""Queries to the warehouse, each read-only on a connection of its own, bounded in rows, time and memory.

This module checks no permissions, and does not depend on the meaning of a relation.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import duckdb

from replay.warehouse.result import QueryRefused, QueryResult, plain

# A person or a script reads the answer: for more rows, use LIMIT or an aggregate.
ROWS_MAX = 100_000
# A query must not occupy a core for longer than its client waits (25 s, `rift/rpc.py`).
TIME_MAX_S = 10.0
# Invoices and digests over ten million requests take a minute.
READ_MAX_S = 300.0


ZONED = "times with a zone cannot be returned (the log's are integer nanoseconds); write them as ::varchar"

Question = tuple[str, Sequence[object] | Mapping[str, object]]
"""SQL of this package, and its parameters."""

Result = TypeVar("Result")


class Queries:
    def __init__(self, connection: duckdb.DuckDBPyConnection, memory_max: str) -> None:
        self._connection = connection
        self._memory_max = memory_max
        self._cursors: set[duckdb.DuckDBPyConnection] = set()
        self._condition = threading.Condition()
        self._is_closed = False

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
            return self._ask(lambda cursor: _answer(cursor, text, allowed, rows_max), time_max_s)
        except (duckdb.PermissionException, duckdb.TransactionException) as error:
            raise QueryRefused(f"{_first_line(error)}; {allowed}") from error
        except duckdb.Error as error:
            raise QueryRefused(ZONED if "pytz" in str(error) else str(error)) from error

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
        except duckdb.OutOfMemoryException as error:
            why = f"the answer takes more than {self._memory_max} of memory; ask for less"
            raise QueryRefused(why) from error
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


def _answer(cursor: duckdb.DuckDBPyConnection, text: str, allowed: str, rows_max: int) -> QueryResult:
    statements = cursor.extract_statements(text)
    kinds = [statement.type.name for statement in statements]
    if kinds != ["SELECT"]:
        raise QueryRefused(f"{' and '.join(kinds) or 'nothing'} is not answered; {allowed}")
    cursor.execute("begin transaction read only")
    cursor.execute(statements[0])
    columns = cursor.description or []
    if any("WITH TIME ZONE" in str(kind) for _, kind, *_ in columns):
        raise QueryRefused(ZONED)
    rows = cursor.fetchmany(rows_max + 1)
    if len(rows) > rows_max:
        raise QueryRefused(f"the answer has more than {rows_max} rows; use LIMIT")
    return QueryResult([name for name, *_ in columns], [[plain(value) for value in row] for row in rows])


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
