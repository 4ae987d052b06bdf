"""Which headers are a trace context, by the standard, and the ids that follow from a request."""

import pytest

from events.schema import Parameters, RequestAccepted
from rift.gateway.asgi.trace_context import TraceContext, read, traceparent

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
GIVEN = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (GIVEN, GIVEN),
        (f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-00"),
        # Flags without a meaning are dropped, and a later version is read as far as it is known.
        (f"00-{TRACE}-{SPAN}-fb", f"00-{TRACE}-{SPAN}-03"),
        (f"cc-{TRACE}-{SPAN}-01", GIVEN),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", GIVEN),
        (f"cc-{TRACE}-{SPAN}-01.what", None),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (GIVEN.upper(), None),
        (GIVEN[:-1], None),
        (f"{GIVEN}\n", None),
        ("", None),
    ],
)
def test_a_traceparent_is_kept_if_it_is_valid(sent: str, kept: str | None) -> None:
    assert read([sent], []) == (TraceContext(kept, None) if kept else None)


def test_one_traceparent_is_valid_at_most() -> None:
    assert read([], ["a=1"]) is None
    assert read([GIVEN, GIVEN], []) is None


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (["a=1", " tenant@vendor=x y ,,b=2"], "a=1,tenant@vendor=x y,b=2"),
        (["a=" + "1" * 256, "b=" + "1" * 251], f"a={'1' * 256},b={'1' * 251}"),
        (["a=" + "1" * 256, "b=" + "1" * 252], None),
        ([",".join(f"k{number}=1" for number in range(33))], None),
        (["a=1,=2"], None),
        (["a=\xff"], None),
        (["A=1"], None),
        ([" , "], None),
    ],
)
def test_a_tracestate_is_kept_if_it_is_valid_and_short(sent: list[str], kept: str | None) -> None:
    assert read([GIVEN], sent) == TraceContext(GIVEN, kept)


def test_a_request_has_a_span_of_its_own_in_the_clients_trace_or_its_own() -> None:
    def accepted(request: str, given: str | None, group: str | None = None) -> RequestAccepted:
        return RequestAccepted(
            request=request, account="a", key="k", model="m", kind="chat", input="", parameters=Parameters(),
            stream=True, prompt_tokens_max=1, deadline_ms=1, price_version=1, traceparent=given, group=group,
        )  # fmt: skip

    continued = traceparent(accepted("req_1", GIVEN))
    own = traceparent(accepted("req_1", None))
    assert read([own], []) == TraceContext(own, None)
    assert continued == f"00-{TRACE}-{own[36:52]}-01"
    assert continued != GIVEN
    assert own[3:35] not in (TRACE, traceparent(accepted("req_2", None))[3:35])
    choices = [traceparent(accepted(one, None, "req_1")) for one in ("req_1", "req_2")]
    assert [one[:35] for one in choices] == [own[:35]] * 2
    assert len({one[36:52] for one in choices}) == 2
