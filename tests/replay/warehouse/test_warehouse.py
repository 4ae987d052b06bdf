"""The warehouse file: errors, content it must not store, queries, and its documentation."""

import re
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from events import subjects
from replay.facts import rows
from replay.facts.fold import FactFold
from replay.sql_files import sql
from replay.warehouse import fact_tables, warehouse
from replay.warehouse.queries import FORBIDDEN_SCALARS, TABLE_FUNCTIONS
from replay.warehouse.result import QueryRefused
from replay.warehouse.warehouse import RELATIONS, Warehouse, WarehouseBusy, WarehouseError

SQL = sorted(path.name for path in (files("replay") / "sql").iterdir() if path.name.endswith(".sql"))
README = (files("replay") / "README.md").read_text(encoding="utf-8")


def filled(opened: Warehouse, scribe: Any) -> Warehouse:
    scribe.prices()
    scribe.finished_request()
    scribe.accept()
    for stream in (subjects.BOOK, "RIFT_0"):
        opened.apply(stream, scribe.streams[stream])
    return opened


# --- the file ------------------------------------------------------------------------------------


def test_a_file_of_another_schema_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rift.duckdb"
    Warehouse.open(path).close()
    made_by = warehouse.schema_version()
    Warehouse.open(path).close()
    monkeypatch.setattr(warehouse, "FOLD_VERSION", 99)
    with pytest.raises(
        WarehouseError, match=rf"rift.duckdb was made by schema {made_by}.*99-.*delete the file"
    ):
        Warehouse.open(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello " * 9_000)
    with pytest.raises(WarehouseError, match="text cannot be opened"):
        Warehouse.open(tmp_path / "text")
    with pytest.raises(WarehouseError, match="cannot be opened"):
        Warehouse.open(tmp_path / "no" / "folder")


def test_a_file_that_is_damaged_anywhere_is_named_with_the_remedy(tmp_path: Path) -> None:
    path, copy = tmp_path / "rift.duckdb", tmp_path / "copy"
    Warehouse.open(path).close()
    whole = path.read_bytes()
    refused = 0
    for opened in (lambda: Warehouse.open(copy).close(), lambda: warehouse.applied_marks(copy)):
        for at in range(50_000, len(whole), 100_000):
            copy.write_bytes(whole[:at])
            try:
                opened()
            except WarehouseError as error:
                assert "move the file away" in str(error)  # noqa: PT017  # some are not met by an opening
                refused += 1
    assert refused > 4


def test_a_file_open_elsewhere_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(*_: Any, **__: Any) -> None:
        raise warehouse.duckdb.IOException('Could not set lock on file "x": Conflicting lock is held in y')

    monkeypatch.setattr(warehouse.duckdb, "connect", held)
    with pytest.raises(WarehouseBusy, match="open in another process"):
        Warehouse.open(tmp_path / "x")


def test_no_content_reaches_the_file(tmp_path: Path, scribe: Any, canary: str) -> None:
    path = tmp_path / "rift.duckdb"
    opened = filled(Warehouse.open(path), scribe)
    assert any(canary.encode() in message.data for message in scribe.streams["RIFT_0"])
    file_bytes = path.read_bytes() + path.with_name("rift.duckdb.wal").read_bytes()
    request = opened.query("select request_id from requests limit 1").rows[0][0]
    assert request.encode() in file_bytes, "or this test looks in the wrong place"
    assert canary.encode() not in file_bytes
    opened.close()
    assert canary.encode() not in path.read_bytes()


def test_a_write_that_fails_changes_neither_file_nor_fold(
    tmp_path: Path, scribe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Warehouse.open(tmp_path / "db")
    filled(opened, scribe)
    before = opened.query("from requests").rows
    scribe.finished_request()
    with monkeypatch.context() as broken:
        broken.setattr(fact_tables, "encode_life", lambda _: 1 // 0)
        scribe.accept()
        with pytest.raises(ZeroDivisionError):
            opened.apply("RIFT_0", scribe.streams["RIFT_0"])
    assert opened.query("from requests").rows == before
    opened.apply("RIFT_0", scribe.streams["RIFT_0"])
    assert len(opened.query("from requests").rows) == len(before) + 2
    opened.close()


def test_an_empty_file_restores_an_empty_fold(tmp_path: Path) -> None:
    opened = Warehouse.open(tmp_path / "db")
    assert opened.positions() == FactFold().positions == {}
    opened.close()


# --- questions -----------------------------------------------------------------------------------

REFUSED = {
    "attach 'other.db'": "ATTACH is not answered; allowed is one SELECT over requests, ",
    "copy requests to 'x.csv'": "COPY is not answered",
    "copy (select 1) to '/tmp/x.csv'": "COPY is not answered",
    "export database 'x'": "EXPORT is not answered",
    "pragma database_list": "PRAGMA is not answered",
    "call pragma_version()": "CALL is not answered",
    "checkpoint": "CHECKPOINT is not answered",
    "select 1; select 2": "the question has 2 statements; ask one at a time; allowed is one SELECT",
    "select 1; drop table facts.applied": "the question has 2 statements; ask one at a time",
    "insert into facts.applied values ('a', 1, 1, null, null)": "INSERT is not answered",
    "update facts.applied set sequence = 0": "UPDATE is not answered",
    "create table x as select 1": "CREATE is not answered",
    "set threads = 1": "SET is not answered",
    "install httpfs": "INSTALL is not answered",
    "load json": "LOAD is not answered",
    "begin": "BEGIN is not answered",
    "explain analyze select 1": "EXPLAIN is not answered",
    "pivot requests on state using count(*)": r"PIVOT needs its values: write ON column IN \(value, …\), or",
    "with p as (pivot requests on state using count(*)) from p": "PIVOT needs its values",
    "/* x */ -- y\n vacuum": "VACUUM is not answered",
    "update extensions": "UPDATE is not answered",
    "": "the question is empty; allowed is one SELECT",
    "-- nothing": "the question is empty; allowed is one SELECT",
    "with x as (delete from facts.applied returning *) from x": "read-only.*; allowed is one SELECT",
    "from read_csv('/etc/hostname')": "read_csv is not answered; allowed is one SELECT",
    "from '/etc/hostname.csv'": "file system operations are disabled.*; allowed is one SELECT",
    "from '/etc/hostname'": "does not exist",
    "from README": "does not exist",
    "selec 1": "syntax error",
    "select now()": "write them as ::varchar",
    "select [now()]": "write them as ::varchar",
    "select interval 100000000 year": "write it as ::varchar",
    "select '\ud800'": "not Unicode",
    "from range(100001)": "more than 100000 rows; use LIMIT",
    "from range(1000000000000)": "more than 100000 rows; use LIMIT",
}


# Scalar functions that depend on more than their arguments, and change nothing that outlives their question.
HARMLESS = (
    *("current_connection_id", "current_database", "current_date", "current_query", "current_query_id"),
    *("current_schema", "current_schemas", "current_transaction_id", "error", "gen_random_uuid"),
    *(
        "get_current_time",
        "get_current_timestamp",
        "getvariable",
        "in_search_path",
        "now",
        "random",
        "setseed",
    ),
    *("sleep_ms", "stats", "today", "transaction_timestamp", "txid_current", "uuid", "uuidv4", "uuidv7"),
    "vector_type",
)


def test_functions_with_side_effects_are_refused(warehouse: Warehouse, tmp_path: Path) -> None:
    """Every function of DuckDB is one or the other: a newer DuckDB with others fails here."""
    catalogue = "select distinct function_name from duckdb_functions() where internal and function_type"
    tables = {name for (name,) in warehouse.query(f"{catalogue} in ('table', 'table_macro', 'pragma')").rows}
    assert {*TABLE_FUNCTIONS} <= tables
    assert {"checkpoint", "truncate_duckdb_logs", "query", "read_blob", "duckdb_settings"} <= tables
    for name in tables - {*TABLE_FUNCTIONS}:
        for question in (f'from "{name}"()', f'with x as (select * from "{name.upper()}"(1)) from x'):
            with pytest.raises(QueryRefused, match=f"(?i){name} is not answered; allowed is one SELECT"):
                warehouse.query(question)
    volatile = f"{catalogue} = 'scalar' and stability is distinct from 'CONSISTENT'"
    assert {name for (name,) in warehouse.query(volatile).rows} <= {*HARMLESS, *FORBIDDEN_SCALARS}
    for question in (
        "select current_setting('threads')",
        "select [write_log(x) for x in ['a']]",
        'from "PG_Settings"',
    ):
        with pytest.raises(QueryRefused, match="is not answered"):
            warehouse.query(question)
    assert warehouse.query("select 'from checkpoint()' as x").rows == [["from checkpoint()"]]


def test_no_view_shows_a_path_of_the_machine(warehouse: Warehouse, tmp_path: Path) -> None:
    answered = 0
    for schema, view in warehouse.query("select schema_name, view_name from duckdb_views()").rows:
        try:
            text = str(warehouse.query(f"from {schema}.{view}").rows)
        except QueryRefused:
            continue
        answered += 1
        assert str(tmp_path) not in text, view
    assert answered > 40


def test_an_error_does_not_repeat_a_long_value(warehouse: Warehouse) -> None:
    with pytest.raises(QueryRefused, match="Could not convert string 'xxx") as refused:
        warehouse.query("select repeat('x', 1000000)::int")
    assert len(str(refused.value)) <= 2000


def test_an_answer_is_bounded_while_it_is_fetched(warehouse: Warehouse) -> None:
    began = time.monotonic()
    for question in ("select range(300) from range(99999)", "select repeat('ä', 5000000) from range(2)"):
        with pytest.raises(QueryRefused, match="more than 8000000 bytes; use LIMIT or name fewer columns"):
            warehouse.query(question)
    assert time.monotonic() - began < 8, "139 MB were not fetched to the end"


@pytest.mark.parametrize("question", REFUSED)
def test_questions_that_are_refused(question: str, warehouse: Warehouse, scribe: Any) -> None:
    filled(warehouse, scribe)
    before = warehouse.query("from lag order by stream").rows
    with pytest.raises(QueryRefused, match=REFUSED[question]):
        warehouse.query(question)
    assert warehouse.query("from lag order by stream").rows == before


class SmallWarehouse(Warehouse):
    config = Warehouse.config | {"memory_limit": "200MB"}


def test_a_question_that_takes_too_much_memory_is_refused(tmp_path: Path) -> None:
    small = SmallWarehouse.open(tmp_path / "rift.duckdb")
    try:
        with pytest.raises(QueryRefused, match="more memory than a question may use"):
            small.query("select list(i) from range(10000000000) t(i)")
        assert small.query("select 1").rows == [[1]]
    finally:
        small.close()


def test_variables_of_the_process_are_no_tables(warehouse: Warehouse) -> None:
    secrets = [{"a": 1}]
    with pytest.raises(QueryRefused, match="secrets does not exist"):
        warehouse.query("from secrets")
    assert secrets


@pytest.mark.parametrize(
    "question",
    [
        "with recursive t(n) as (select 1 union all select n + 1 from t) select count(*) from t",
        "select count(*) from range(10000000000) a, range(10000000000) b",
        "select sleep_ms(60000)",
    ],
)
def test_a_question_without_end_is_ended(question: str, warehouse: Warehouse) -> None:
    began = time.monotonic()
    with pytest.raises(QueryRefused, match=r"not answered within 0.3 s"):
        warehouse.query(question, time_max_s=0.3)
    assert time.monotonic() - began < 5
    assert warehouse.query("select 1").rows == [[1]]


def test_an_answer_read_in_part_does_not_go_on_being_made(warehouse: Warehouse) -> None:
    """Repeat the query, because DuckDB keeps running only in some of the runs."""
    began = time.monotonic()
    for _ in range(25):
        with pytest.raises(QueryRefused, match="use LIMIT"):
            warehouse.query(
                "with recursive t(n) as (select 1 union all select n + 1 from t) from t", rows_max=10
            )
    assert time.monotonic() - began < 5


def test_values_of_every_kind_can_be_told(warehouse: Warehouse) -> None:
    answer = warehouse.query(
        "select sum(i), 1.50::decimal(4,2), date '2026-01-02', 'nan'::double, [1, null], {'a': true}, 'é'"
        " from (values (9223372036854775807), (9223372036854775807)) t(i)"
    )
    assert answer.rows == [[2 * (2**63 - 1), "1.50", "2026-01-02", "nan", [1, None], {"a": True}, "é"]]


def test_questions_and_writes_go_side_by_side(warehouse: Warehouse, scribe: Any) -> None:
    scribe.prices()
    warehouse.apply(subjects.BOOK, scribe.streams[subjects.BOOK])
    for _ in range(12):
        scribe.finished_request()
    wrong: list[Any] = []

    def ask() -> None:
        while not done.is_set():
            [[requests, events]] = warehouse.query("select count(*), sum(events) from requests").rows
            [[sequence]] = warehouse.query("select max(sequence) from lag where stream = 'RIFT_0'").rows or [
                [0]
            ]
            wrong.extend([requests] if (events or 0) > (sequence or 0) else [])

    done = threading.Event()
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for stored in scribe.streams["RIFT_0"]:
        warehouse.apply("RIFT_0", [stored])
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert warehouse.query("select count(*) from requests where state = 'finished'").rows == [[12]]


def test_closing_ends_what_is_being_asked(tmp_path: Path) -> None:
    opened = Warehouse.open(tmp_path / "db")
    refused: list[str] = []

    def ask() -> None:
        with pytest.raises(QueryRefused) as raised:
            opened.query("select sleep_ms(60000)")
        refused.append(str(raised.value))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    opened.close()
    thread.join()
    assert time.monotonic() - began < 5
    assert "the database was closed" in refused[0]
    with pytest.raises(QueryRefused, match="is closed"):
        opened.query("select 1")


def test_what_a_killed_process_had_spilled_is_removed(tmp_path: Path) -> None:
    spilled = tmp_path / "db.tmp" / "duckdb_temp_1_0_storage_DEFAULT-0.tmp"
    spilled.parent.mkdir()
    spilled.write_bytes(b"x" * 1000)
    opened = Warehouse.open(tmp_path / "db")
    assert not spilled.exists()
    opened.close()


def test_percentiles_of_gaps_are_the_bounds_of_their_buckets(warehouse: Warehouse) -> None:
    counts = [0, 0, 0, 90, 0, 9, 0, *[0] * 16, 1]
    for share, ms in {0: 4, 0.5: 4, 0.9: 4, 0.901: 8, 0.99: 8, 0.991: 8_192, 1: 8_192}.items():
        # Two requests of a group have the shares that each of them has.
        question = (
            f"select itl_percentile_ns(c, {share}) from (values ({counts}), (null), ({counts})) as t(c)"
        )
        assert warehouse.query(question).rows == [[ms * 1_000_000]], share
    assert warehouse.query("select itl_percentile_ns(null::bigint[], 0.5)").rows == [[None]]


@pytest.mark.parametrize(
    ("wrong", "last"),
    {
        "interval runs backwards": ("g", 3, 3, "a", "x", 1, "RIFT_0:2.0"),
        "refusals counted twice": ("g", 1, 3, "a", "x", 1, "RIFT_0:2.0"),
        "a count is not positive": ("g", 2, 3, "a", "x", 0, "RIFT_0:2.0"),
    }.items(),
)
def test_the_check_finds_wrong_refusals(wrong: str, last: tuple[object, ...], warehouse: Warehouse) -> None:
    for row in (("g", 0, 2, "a", "x", 1, "RIFT_0:1.0"), ("g", 0, 2, None, "x", 1, "RIFT_0:1.0"), last):
        assert warehouse.query(sql("refusals.check")).rows == []
        warehouse._reopened().writer.execute(
            "insert into facts.counted_refusals by name select"
            " ? as gateway, 0 as shard, ? as from_at_ns, ? as to_at_ns, ? as account, ? as reason,"
            " ? as count, ? as position, 1 as at_ns",
            row,
        )
    assert warehouse.query(sql("refusals.check")).rows == [[wrong, "RIFT_0:2.0"]]


# --- SQL and docs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SQL if name not in ("tables.sql", "macros.sql")])
def test_each_file_is_one_relation_or_its_checks(name: str) -> None:
    relation = name.removesuffix(".sql").removesuffix(".check")
    assert relation in RELATIONS
    text = sql(name.removesuffix(".sql"))
    assert text.startswith("-- No rows, unless " if ".check." in name else "-- One row per "), "grain first"
    assert re.sub(r"--[^\n]*", "", text).count(";") == 1
    if ".check." not in name:
        assert f"create view {relation} as\n" in text


@pytest.mark.parametrize("name", SQL)
def test_money_is_made_of_integers(name: str) -> None:
    code = re.sub(r"--[^\n]*", "", sql(name.removesuffix(".sql"))).replace("//", "")
    assert not re.search(r"/|\b(round|float|double|real|decimal|numeric|avg)\b", code)


def test_no_clock_is_read() -> None:
    for name in SQL:
        code = sql(name.removesuffix(".sql"))
        assert not re.search(r"\b(now|today|current_\w+|get_current_\w+)\b", code), name


@pytest.mark.parametrize("kind", rows.FACTS)
def test_rows_have_the_columns_of_their_table(kind: type[rows.Row], warehouse: Warehouse) -> None:
    described = warehouse.query(f"describe facts.{kind.table}").rows
    assert {column for column, *_ in described} == set(kind.__struct_fields__)


def test_every_column_is_explained() -> None:
    opened = Warehouse.open(Path(":memory:"))
    actual = {name: [row[0] for row in opened.query(f"describe {name}").rows] for name in RELATIONS}
    tables = {row[0] for row in opened.query("show tables").rows}
    opened.close()
    explained: dict[str, list[str]] = {}
    for line in README.splitlines():
        if match := re.match(r"## (\w+): ", line):
            explained[match[1]] = columns = []
        elif match := re.match(r"- (`\w+`(?:, `\w+`)*): \S", line):
            columns += re.findall(r"\w+", match[1])
    assert explained == actual
    assert set(actual) == tables
    assert len(README.splitlines()) <= 310


def test_each_relation_says_its_grain_in_the_readme_as_in_its_file() -> None:
    for name in RELATIONS:
        grain = sql(name).partition("\n")[0].removeprefix("-- ").partition(";")[0].rstrip(".")
        assert f"## {name}: {grain[0].lower()}{grain[1:]}" in README
