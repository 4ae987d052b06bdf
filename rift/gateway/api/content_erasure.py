"""Erasing the content of a sealed request: its key is deleted, its facts stay."""

from events import encryption, ids, subjects
from events.publisher import Publisher
from events.schema import ContentErased, RequestAccepted
from rift.gateway.asgi.errors import FINAL, HTTPError
from rift.gateway.state import LogState

WRITER = "erasure"
APPEND_S = 5.0


async def erase_content(state: LogState, accepted: RequestAccepted) -> None:
    """Erase the key of a request's content, which is also that of the other requests of its body.

    Raises HTTPError (409) if the request is not sealed or has not ended; LogError.
    """
    if accepted.sealed is None:
        message = (
            "this request is not sealed, so its content is deleted with the log's retention; requests "
            "are sealed if they set `store` to false, or if the installation sets `seal_content`"
        )
        raise HTTPError(409, message, code="content_not_sealed", headers=FINAL)
    if (secret := await encryption.secret(state.log, accepted.sealed)) is None:
        return
    pasts = await state.histories.read_all([ids.parsed(each) for each in secret.requests])
    if any(past.life.phase == "open" for past in pasts):
        message = "the request has not ended; cancel it or wait for its end, then erase its content"
        raise HTTPError(409, message, code="request_not_ended")
    # First, so that no erased key comes back with a restored log.
    event = ContentErased(request=accepted.request, sealed=accepted.sealed)
    await Publisher(state.log, WRITER).publish(event, within_s=APPEND_S)
    await state.log.erase(subjects.SECRETS, accepted.sealed)
