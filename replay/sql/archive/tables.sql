-- The temporary tables that one segment is written from.

-- One row per record, as it will be in the file.
create temp table sealed_records (
    sequence bigint not null,
    at_ns bigint not null,
    subject varchar not null,
    writer varchar not null,
    content varchar not null,
    events integer not null,
    hash varchar not null
);

-- One row per event, with its position and bare JSON.
create temp table sealed_events (
    sequence bigint not null,
    place integer not null,
    at_ns bigint not null,
    subject varchar not null,
    bare varchar not null
);

-- One row per record, if content is kept.
create temp table sealed_content (
    sequence bigint not null,
    data blob not null
);
