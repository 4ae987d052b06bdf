"""How much of a queue one account may fill."""

from hypothesis import given
from hypothesis import strategies as st

from rift.gateway.admission.queue_share import may_wait


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 8), st.integers(1, 64), st.integers(1, 99))
def test_an_account_may_fill_its_share_of_the_queue(
    own: int, others: int, more: int, free: int, share: int
) -> None:
    """Requests of other accounts wait for at most one round of the slots, or for the share of the account."""
    fits = may_wait(own=own, waiting=own + others, more=more, free=free, share_percent=share)
    assert fits == (own == 0 or own + more <= free or (own + more) * (100 - share) <= share * others)


def test_a_share_of_100_percent_is_the_whole_queue() -> None:
    assert may_wait(own=900, waiting=900, more=1, free=16, share_percent=100)
