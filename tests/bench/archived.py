"""Writes an archive of many requests with SQL, equal to one by `Archive.seal`, including the hashes.

Each request is accepted in its own record. Its start, tokens and end are in records with one event for each
request of an engine's batch. Batches overlap, so requests cross the borders of segments.
"""

from collections.abc import Callable
from pathlib import Path

import duckdb

from events import codec, merkle
from events.log import Stored
from events.schema import Price, PricePublished
from events.subjects import BOOK
from replay.archive import parquet
from replay.archive.archive import Archive
from replay.archive.manifest import VERSION, Manifest, create, file_name, measure
from replay.sql_files import sql

STREAM = "RIFT_0"
BATCH = 28
# Token events of one request, and tokens in each.
EVENTS = 4
TOKENS = 8
# Batches that begin between two steps of the same batch.
APART = 10
# One batch begins in each tick, and a tick holds one step of each running batch.
RECORDS_A_TICK = BATCH + 2 + EVENTS
STEPS = 2 + EVENTS
SEGMENT_TICKS = 50_000 // RECORDS_A_TICK
START_NS = 1_790_000_000_000_000_000
STEP_NS = 200_000

# The requests of the batches that begin in a range of ticks.
REQUESTS = f"""
with batches as (select unnest(generate_series($first, $last)) as batch),
requests as (
    select
        batch,
        place,
        batch * {BATCH} + place as number,
        translate(md5(number::varchar), '0189', 'ghij') as letters,
        greatest(batch * {RECORDS_A_TICK} - 20, 0) as floor,
        concat('lanebench', chr(97 + (batch % 8)::integer)) as lane
    from batches, generate_series(0, {BATCH - 1}) places(place)
),
named as (
    select
        *,
        concat('req_0_', lane, '_tiny-1_', floor, '_', letters[:16], '_', letters[17:29]) as request,
        concat('att_', translate(md5(concat('a', number)), '0189', 'ghij')[:16]) as attempt
    from requests
),
"""
EVENTS_SQL = f"""
{REQUESTS}
stepped as (select *, batch + step * {APART} as tick from named, generate_series(0, {STEPS}) steps(step)),
placed as (
    select
        * exclude (place),
        tick * {RECORDS_A_TICK} + 1 + case when step = 0 then place else {BATCH} - 1 + step end as sequence,
        case when step = 0 then 0 else place end as place,
        {START_NS} + sequence * {STEP_NS} as at_ns
    from stepped
    where tick between $from and $to and batch between 0 and $batches - 1
)
select
    'RequestAccepted' as type, sequence, place, at_ns, request, concat('account-', number % 73) as account,
    concat('key', number % 211) as key, 'tiny:1' as model, 'inference' as kind,
    '{{"temperature":0.2,"max_tokens":300}}' as parameters, true as stream, 8192 as prompt_tokens_max,
    600000 as deadline_ms, 1 as price_version, 1 as book,
    case when number % 10 = 0 then sha256(number::varchar) end as idempotency_hash,
    case when number % 10 = 0 then true end as detached
from placed where step = 0
union all by name
select
    'AttemptStarted' as type, sequence, place, at_ns, request, attempt, 0 as resume_index,
    concat('worker-', batch % 16) as worker, 20 + number % 900 as prompt_tokens,
    at_ns - 3000000 as accepted_at_ns, 'vllm' as engine, sha256('model') as model_digest,
    concat('$JS.ACK.RIFT_0.model_tiny-1.1.', sequence, '.', number, '.', at_ns, '.0') as delivery
from placed where step = 1
union all by name
select
    'TokensGenerated' as type, min(sequence) as sequence, any_value(place) as place, min(at_ns) as at_ns,
    attempt,
    min(step - 2) * {TOKENS} as token_index, count(*) * {TOKENS} as tokens,
    case when count(*) > 1 then list(sequence order by step) end as sequences,
    case when count(*) > 1 then list(place order by step) end as places,
    case when count(*) > 1 then list(at_ns order by step) end as times,
    case when count(*) > 1 then list((step - 2) * {TOKENS} order by step) end as indexes
from placed where step between 2 and {STEPS - 1} group by attempt
union all by name
select
    'RequestFinished' as type, sequence, place, at_ns, request, attempt, 'stop' as reason,
    {EVENTS * TOKENS} as output_tokens, concat('account-', number % 73) as account, 'tiny:1' as model,
    1 as price_version, 20 + number % 900 as prompt_tokens, 1000 + number % 7919 as engine_ns,
    50000000 + number % 7919 as first_token_ns, 500000000 + number % 104729 as finished_ns
from placed where step = {STEPS}
"""
RECORDS_SQL = f"""
with hashed as (
    select sequence, string_agg(sha256(bare), '' order by place) as hashes, count(*) as events
    from exploded($events)
    group by sequence
),
placed as (
    select tick, step, tick * {RECORDS_A_TICK} + 1 + step as sequence
    from generate_series($from, $to) ticks(tick), generate_series(0, {RECORDS_A_TICK - 1}) steps(step)
),
records as (
    select
        sequence,
        {START_NS} + sequence * {STEP_NS} as at_ns,
        concat('rift.0.', case when step < {BATCH} then 'request' else 'work' end, '.lanebench',
            chr(97 + ((tick + 8 * {APART * STEPS} - greatest(step - {BATCH} + 1, 0) * {APART}) % 8)::integer),
            '.tiny-1') as subject,
        case when step < {BATCH} then 'gateway-1' else 'worker-1' end as writer,
        sha256(sequence::varchar) as content,
        coalesce(events, 0)::integer as events,
        coalesce(hashes, '-') as hashes
    from placed
    left join hashed using (sequence)
)
select * exclude (hashes),
    sha256(concat_ws(' ', '{STREAM}', sequence, at_ns, content, hashes, subject, writer)) as hash
from records
order by sequence
"""


def write(folder: Path, requests: int, say: Callable[[str], None]) -> Archive:
    """Return an archive of at least `requests` requests; the last batch is full."""
    archive = Archive(folder, key=b"bench")
    price = Price(model="tiny:1", prompt_nanousd=100, output_nanousd=350)
    book = codec.encode("bench", [PricePublished(id="prices", version=1, prices=(price,))])
    archive.seal(BOOK, [Stored("rift.book.any.list", 1, START_NS, book)], last=1)
    (folder / STREAM).mkdir()
    batches = -(-requests // BATCH)
    ticks = batches + APART * STEPS
    previous = None
    with duckdb.connect(config={"memory_limit": parquet.MEMORY_MAX}) as connection:
        connection.execute(sql("archive/macros"))
        connection.execute(sql("archive/tables"))
        for number, first in enumerate(range(0, ticks, SEGMENT_TICKS)):
            last = min(first + SEGMENT_TICKS, ticks) - 1
            previous = _segment(connection, folder / STREAM, (first, last, batches), previous)
            if number % 25 == 24:
                say(f"archived {first * BATCH} requests")
    return archive


def _segment(
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    ticks: tuple[int, int, int],
    previous: Manifest | None,
) -> Manifest:
    begin, end, batches = ticks
    first, last = begin * RECORDS_A_TICK + 1, (end + 1) * RECORDS_A_TICK
    events, records = (folder / file_name(first, suffix) for suffix in ("events", "records"))
    parameters = {"from": begin, "to": end, "batches": batches, "first": begin - APART * STEPS, "last": end}
    # The columns of a segment come from the statement that seals one.
    sealed = sql("archive/seal").rpartition("order by type")[0]
    connection.execute("create or replace temp table made as " + EVENTS_SQL, parameters)
    connection.execute(
        f"copy (({sealed}) union all by name from made order by type, sequence, place)"
        f" to '{events}' ({parquet.PARQUET})"
    )
    parameters = {"from": begin, "to": end, "events": str(events)}
    connection.execute("create or replace temp table sealed as " + RECORDS_SQL, parameters)
    connection.execute(f"copy (from sealed order by sequence) to '{records}' ({parquet.PARQUET})")
    rows = connection.execute("select hash, events, at_ns from sealed order by sequence").fetchall()
    manifest = Manifest(
        version=VERSION,
        stream=STREAM,
        first=first,
        last=last,
        at_ns=rows[-1][2],
        records=len(rows),
        events=sum(row[1] for row in rows),
        files={path.name: measure(path) for path in (records, events)},
        root=merkle.root([bytes.fromhex(row[0]) for row in rows]).hex(),
        previous=previous.sha256 if previous else "",
    )
    create(folder / file_name(first), manifest.encoded)
    return manifest
