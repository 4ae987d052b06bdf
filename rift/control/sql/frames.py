"""How control and the SQL process talk over pipes: a kind, a length, and so many bytes.

control   SETUP (JSON) once, then QUESTION (text), one at a time
process   BEGUN when it has applied every record that was stored before the question, then REPLY;
          or REPLY at once, with an error
"""

import struct

import msgspec

from events.jetstream import Access
from rift.logs.formats import Format

HEADER = struct.Struct(">cI")

SETUP = b"S"
QUESTION = b"Q"
BEGUN = b"B"
REPLY = b"R"


class SqlSetup(msgspec.Struct, frozen=True):
    """Where the process finds log and files. Without a `url` it answers from the database file as it is."""

    database: str
    url: str = ""
    access: Access = Access()
    archive: str = ""
    archive_key: bytes = b""
    log_format: Format = "text"


def frame(kind: bytes, data: bytes = b"") -> bytes:
    return HEADER.pack(kind, len(data)) + data
