"""What an ended request costs: a pure function of its life and its price, in integers.

Nobody is charged for nothing: no output token, no charge; our failure, no charge; an answer that
nobody was there to receive because of us, no charge. What was recomputed after a failover never
shows here, since only counted tokens do.
"""

from events.lifecycle import Life
from events.schema import Price

CHARGEABLE = frozenset({"stop", "length", "tool_calls", "cancelled", "revoked", "expired"})


def is_chargeable(life: Life) -> bool:
    return (
        life.phase == "ended"
        and life.reason in CHARGEABLE
        and life.ender != "control"
        and life.wanted != "unanswered"
        and life.next_index > 0
    )


def charge_nanousd(life: Life, price: Price) -> int:
    """Nano-USD under the per-token plan; 0 for what is not charged."""
    if not is_chargeable(life):
        return 0
    return life.prompt_tokens * price.prompt_nanousd + life.next_index * price.output_nanousd
