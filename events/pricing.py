"""Price an ended request: a pure function of its life and its price, in integers.

A request is not charged if it has no output token, if Rift failed, or if Rift could not deliver the answer.
Tokens that a failover computed again are not charged, since only counted tokens are. In a group (n > 1) only
one request is charged for the prompt.

Nothing is rounded: every price is a whole number of nano-USD per token.
"""

import msgspec

from events.lifecycle import Life
from events.schema import Price

CHARGEABLE = frozenset({"stop", "length", "tool_calls", "cancelled", "revoked", "expired"})


class Billed(msgspec.Struct, frozen=True):
    """Tokens that are charged. Cached prompt tokens are not among `prompt_tokens`; there are none if the
    price list has no price for them."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


NOTHING = Billed()


def is_chargeable(life: Life) -> bool:
    return (
        life.phase == "ended"
        and life.reason in CHARGEABLE
        and life.ender != "control"
        and life.wanted != "unanswered"
        and life.next_index > 0
    )


def billed(life: Life, price: Price, *, cached_tokens: int = 0, with_prompt: bool = True) -> Billed:
    """Return the tokens to charge; without the prompt's if another request of the group paid for them."""
    if not is_chargeable(life):
        return NOTHING
    if not with_prompt:
        return Billed(output_tokens=life.next_index)
    cached = min(cached_tokens, life.prompt_tokens) if price.cached_prompt_nanousd is not None else 0
    return Billed(life.prompt_tokens - cached, cached, life.next_index)


def cost_nanousd(tokens: Billed, price: Price) -> int:
    return (
        tokens.prompt_tokens * price.prompt_nanousd
        + tokens.cached_tokens * (price.cached_prompt_nanousd or 0)
        + tokens.output_tokens * price.output_nanousd
    )


def charge_nanousd(life: Life, price: Price, *, cached_tokens: int = 0, with_prompt: bool = True) -> int:
    """Return the nano-USD under the per-token plan; 0 if the request is not charged."""
    return cost_nanousd(billed(life, price, cached_tokens=cached_tokens, with_prompt=with_prompt), price)
