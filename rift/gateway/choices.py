"""The choices of one request with `n` > 1: a group, each choice accepted and answered as its own request.

The ids of all choices follow from the first, so any gateway can name the whole group. Frames and objects of a
group belong to `dialects/chat_response.py`, its cost to `admission/credit_hold.py`.
"""

import hashlib
import hmac

from msgspec.structs import replace

from events import ids
from events.schema import RequestAccepted

# One request, or all choices of one group. They are reserved, accepted, followed and charged together.
Choices = tuple[RequestAccepted, ...]

SEED_MAX = 2**63 - 1


def of(first: RequestAccepted, choices: int, *, secret: bytes) -> Choices:
    """Return `first` alone, or a group with this number of choices that begins with it."""
    if choices == 1:
        return (first,)
    requests = [first.request, *(_sibling(first, choice, secret) for choice in range(1, choices))]
    return tuple(
        replace(
            first,
            request=request,
            group=first.request,
            choice=choice,
            parameters=replace(first.parameters, seed=_seed(first.parameters.seed, choice)),
        )
        for choice, request in enumerate(requests)
    )


def _sibling(first: RequestAccepted, choice: int, secret: bytes) -> str:
    parsed = ids.parsed(first.request)
    digest = hmac.new(secret, f"choice\0{first.request}\0{choice}".encode(), hashlib.sha256).digest()
    return ids.new_request_id(
        secret=secret,
        account=first.account,
        at=parsed.at,
        floor=parsed.floor,
        entropy=digest[: ids.RANDOM_BYTES],
    )


def _seed(seed: int | None, choice: int) -> int | None:
    """Return a different seed for each choice, or all would be the same. The first has the client's."""
    if seed is None:
        return None
    return seed + choice if seed <= SEED_MAX - choice else seed - choice
