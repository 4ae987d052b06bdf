"""A group: the choices of one request with `n` > 1, each accepted and answered as a request of its own.

The first choice's id makes the others': who has one of a group can name them all, from any gateway. What must
not live here: what a client sees of a group (`openai.py`), or what it costs (`metered.py`).
"""

import hashlib
import hmac

from msgspec.structs import replace

from events import ids
from events.schema import RequestAccepted

# A request, or all choices of one group: they are covered, accepted, followed and spent together.
Choices = tuple[RequestAccepted, ...]

SEED_MAX = 2**63 - 1


def of(first: RequestAccepted, choices: int, *, secret: bytes) -> Choices:
    """Return `first` alone, or the group of so many choices that it begins."""
    if choices == 1:
        return (first,)
    named = [first.request, *(_sibling(first, choice, secret) for choice in range(1, choices))]
    return tuple(
        replace(
            first,
            request=request,
            group=first.request,
            choice=choice,
            parameters=replace(first.parameters, seed=_seed(first.parameters.seed, choice)),
        )
        for choice, request in enumerate(named)
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
    """Each choice has a seed of its own, or all would be the same; the first has what the client said."""
    if seed is None:
        return None
    return seed + choice if seed <= SEED_MAX - choice else seed - choice
