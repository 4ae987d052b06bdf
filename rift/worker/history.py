"""What the log says of one request: read when a worker takes a job that is not known to be fresh."""

import msgspec

from events import codec, subjects
from events.ids import RequestId
from events.lifecycle import NEW, Life
from events.lives import Lives
from events.log import Log
from events.schema import TokensGenerated


class Past(msgspec.Struct):
    """The request's life up to a position, with the ids and the text that count."""

    life: Life
    position: int
    token_ids: list[int]
    text: str


async def read(log: Log, request: RequestId) -> Past:
    """Read from the id's floor to the last event that its address has now. Raises LogError."""
    at = request.at
    stream = subjects.shard_stream(at.shard)
    target = max([await log.last_sequence(stream, subject) for subject in subjects.history(at)])
    past = Past(NEW, target, [], "")
    lives = Lives()
    lives.follow(request.text)
    text: list[str] = []
    async for batch in log.scan(stream, subjects.history(at), first=request.floor, target=target):
        for stored in batch:
            where = subjects.parse(stored.subject)
            for event in codec.decode(stored.data)[1]:
                counted = where and lives.fold(event, where)
                if counted and isinstance(event, TokensGenerated):
                    past.token_ids += event.token_ids
                    text.append(event.text)
    past.life, past.text = lives[request.text], "".join(text)
    return past
