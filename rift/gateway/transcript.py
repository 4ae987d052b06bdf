"""One request read back from the log: the same fold as live, from the id's floor to its last event."""

from events import codec, subjects
from events.book import Book
from events.ids import RequestId
from events.lives import Lives
from events.log import Log
from events.schema import RequestAccepted
from rift.gateway.answer import Answer


async def read(log: Log, request: RequestId, book: Book) -> Answer | None:
    """Return the answer so far, or None where the log has no such request. Raises LogError."""
    at = request.at
    stream = subjects.shard_stream(at.shard)
    target = max([await log.last_sequence(stream, subject) for subject in subjects.history(at)])
    lives = Lives()
    lives.follow(request.text)
    answer: Answer | None = None
    async for batch in log.scan(stream, subjects.history(at), first=request.floor, target=target):
        for stored in batch:
            where = subjects.parse(stored.subject)
            for event in codec.decode(stored.data)[1]:
                if where is None or (counted := lives.fold(event, where)) is None:
                    continue
                if isinstance(event, RequestAccepted):
                    price = book.price(event.model, event.price_version)
                    assert price is not None, "an accepted request has a price"
                    answer = Answer(event, price, keep_text=True)
                if answer is not None:
                    answer.add(event, counted[1], stored.stored_at_ns)
    return answer
