"""Clients that disconnect, resume, cancel, run in the background or use idempotency keys."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.collectors import collecting
from tests.service import Service, frames, joined, until

pytestmark = pytest.mark.slow

MODEL = "smollm2:135m"


def body(tokens: int = 40, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Tell me more.", "parameters": {"max_tokens": tokens}, **more}


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as opened:
        yield opened


def stream(client: httpx.Client, sent: dict[str, Any], path: str = "/v1/inference") -> list[dict[str, Any]]:
    with client.stream("POST", path, json=sent) as response:
        return list(frames(response))


def resume(client: httpx.Client, request: str, after: object) -> tuple[int, list[dict[str, Any]]]:
    headers = {"Last-Event-ID": str(after)}
    with client.stream("GET", f"/v1/inference/{request}/events", headers=headers) as response:
        return response.status_code, list(frames(response))


def without_retry(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in event.items() if name != "retry"} for event in events]


# --- resume ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(client: httpx.Client) -> str:
    """Return the id of a request whose client went away."""
    with client.stream("POST", "/v1/inference", json=body(2000, stream=True)) as response:
        return str(next(frames(response))["data"]["id"])


@pytest.mark.usefixtures("left")  # whose grace period passes during the tests of this file
def test_a_finished_stream_can_be_resumed_after_every_event(client: httpx.Client) -> None:
    events = without_retry(stream(client, body(12, stream=True)))
    request = events[0]["data"]["id"]
    for at, event in enumerate(events[:-1]):
        status, rest = resume(client, request, event["id"])
        assert (status, without_retry(rest)) == (200, events[at + 1 :])
        assert rest[0]["retry"] == "500"
    assert resume(client, request, events[-1]["id"]) == (204, [])
    assert without_retry(resume(client, request, 0)[1])[-len(events) :] == events
    by_query = client.get(f"/v1/inference/{request}/events?after={events[3]['id']}").text
    assert by_query.count("event: token") == sum(event["event"] == "token" for event in events[4:])


def test_a_dropped_client_resumes_and_its_request_continues(client: httpx.Client) -> None:
    seen: list[dict[str, Any]] = []
    with client.stream("POST", "/v1/inference", json=body(60, stream=True)) as response:
        for event in frames(response):
            seen.append(event)
            if len(seen) == 10:
                break
    request = seen[0]["data"]["id"]
    time.sleep(0.3)
    status, rest = resume(client, request, seen[-1]["id"])
    assert status == 200
    whole = client.get(f"/v1/inference/{request}").json()
    assert joined(seen + rest) == whole["output"]
    assert (whole["status"], whole["usage"]["output_tokens"]) == ("finished", 60)


def test_two_clients_read_one_stream(client: httpx.Client, service: Service) -> None:
    with client.stream("POST", "/v1/inference", json=body(50, stream=True)) as response:
        first = frames(response)
        request = next(first)["data"]["id"]
        with service.client() as other:
            _, events = resume(other, request, 0)
        rest = list(first)
    assert without_retry(events)[-len(rest) :] == without_retry(rest)


@pytest.mark.parametrize(("after", "status"), [("9999", 400), ("x", 400), ("-1", 400), ("1" * 30, 400)])
def test_an_unknown_event_id_is_rejected(client: httpx.Client, after: str, status: int) -> None:
    answer = client.post("/v1/inference", json=body(3)).json()
    assert resume(client, answer["id"], after)[0] == status


def test_an_openai_stream_is_cancelled_at_once(client: httpx.Client, service: Service) -> None:
    sent = {"model": MODEL, "prompt": "Hello", "max_tokens": 2000, "stream": True}
    with client.stream("POST", "/v1/completions", json=sent) as response:
        request = next(frames(response))["data"]["id"]
    row = until(service, f"select * from requests where request_id = '{request}' and state = 'cancelled'", 5)
    assert row["cancel_reason"] == "disconnect"
    assert row["output_tokens"] < 200


# --- cancel ------------------------------------------------------------------------------------------------


def test_cancelling_a_running_request_and_an_ended_one(client: httpx.Client, service: Service) -> None:
    events = []
    with client.stream("POST", "/v1/inference", json=body(2000, stream=True)) as response:
        for event in frames(response):
            events.append(event)
            if len(events) == 5:
                with service.client() as other:
                    request = event["data"]["id"]
                    assert other.delete(f"/v1/inference/{request}").status_code == 202
    assert events[-1]["event"] == "done"
    assert events[-1]["data"]["finish_reason"] == "cancelled"
    whole = client.get(f"/v1/inference/{request}").json()
    assert whole["output"] == joined(events)
    assert whole["usage"] == events[-1]["data"]["usage"]
    assert whole["usage"]["output_tokens"] < 1000
    again = client.delete(f"/v1/inference/{request}")
    assert again.status_code == 200
    assert again.json()["status"] == "cancelled"
    assert client.delete("/v1/inference/req_x").status_code == 404


# --- background --------------------------------------------------------------------------------------


def test_a_background_request_needs_no_client(client: httpx.Client) -> None:
    response = client.post("/v1/inference", json=body(30, background=True))
    assert response.status_code == 202
    request = response.json()["id"]
    _, events = resume(client, request, 0)
    assert events[-1]["event"] == "done"
    assert client.get(f"/v1/inference/{request}").json()["usage"]["output_tokens"] == 30
    refused = client.post("/v1/inference", json=body(background=True, stream=True))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "background")


# --- idempotency keys --------------------------------------------------------------------------------


def test_a_key_repeats_the_answer_with_one_charge(client: httpx.Client, service: Service) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    headers = {"Idempotency-Key": "one", "traceparent": parent}
    first = client.post("/v1/inference", json=body(5), headers=headers | {"X-Request-Id": "first"})
    later = {"X-Request-Id": "again", "traceparent": parent.replace("b7ad", "0000")}
    again = client.post("/v1/inference", json=body(5), headers=headers | later)
    assert [answer.headers["x-request-id"] for answer in (first, again)] == ["first", "again"]
    assert first.headers["rift-request-id"] == again.headers["rift-request-id"] == first.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == first.json()
    other = client.post("/v1/inference", json=body(6), headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"
    trace, span = first.headers["traceparent"].rsplit("-", 2)[:2]
    assert (trace, span == parent[36:52]) == (parent[:35], False)
    path = f"/v1/inference/{first.json()['id']}"
    read = [client.get(path), client.get(f"{path}/events"), client.delete(path)]
    for answer in (again, *read):
        assert answer.headers.get_list("traceparent") == [first.headers["traceparent"]], answer.request.url
    rows = service.sql(
        f"select client_request_id, trace_id from requests where request_id = '{first.json()['id']}'"
    )
    assert rows == [{"client_request_id": "first", "trace_id": parent[3:35]}]
    printed = service.rift("spans", "--json", "--since", "1h")
    found = [
        each
        for line in printed.stdout.splitlines()
        for each in json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]
    ]
    [own] = [each for each in found if each.get("parentSpanId") == parent[36:52]]
    assert (own["traceId"], own["spanId"]) == (parent[3:35], span)
    parts = {each["name"] for each in found if each.get("parentSpanId") == span}
    assert parts == {"admission", "queue", "prefill", "decode"}
    with collecting() as collector:
        sent = service.rift("spans", "--otlp", collector.url, "--account", "dev")
    assert f" requests to {collector.url}/v1/traces\n" in sent.stdout, sent.stderr
    assert own in collector.received[0].message["resourceSpans"][0]["scopeSpans"][0]["spans"]
    nobody = service.rift("spans", "--otlp", "http://127.0.0.1:1", "--account", "nobody")
    assert (nobody.returncode, "there is no account 'nobody'" in nobody.stderr) == (1, True)


def test_a_repeated_request_streams_from_the_first_token(client: httpx.Client, service: Service) -> None:
    headers = {"Idempotency-Key": "running"}
    with client.stream("POST", "/v1/inference", json=body(60, stream=True), headers=headers) as response:
        first = frames(response)
        head = [next(first) for _ in range(10)]
        with (
            service.client() as other,
            other.stream("POST", "/v1/inference", json=body(60, stream=True), headers=headers) as second,
        ):
            assert second.headers["idempotent-replayed"] == "true"
            events = list(frames(second))
        rest = list(first)
    whole = without_retry(head + rest)
    assert without_retry(events)[-len(whole) :] == whole


def test_a_request_with_a_key_continues_without_its_client(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "gone"}
    with client.stream("POST", "/v1/completions", json=openai(50), headers=headers) as response:
        next(frames(response))
    answer = client.post("/v1/completions", json=openai(50), headers=headers)
    assert answer.headers["idempotent-replayed"] == "true"
    events = list(frames(answer))
    assert events[-2]["data"]["choices"][0]["finish_reason"] == "length"


def openai(tokens: int) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Hello", "max_tokens": tokens, "stream": True}


def test_concurrent_requests_with_one_key_are_one_request(client: httpx.Client, service: Service) -> None:
    responses: list[httpx.Response] = []

    def post() -> None:
        with service.client() as mine:
            responses.append(mine.post("/v1/inference", json=body(10), headers={"Idempotency-Key": "many"}))

    threads = [threading.Thread(target=post) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {response.status_code for response in responses} == {200}
    assert len({response.json()["id"] for response in responses}) == 1
    assert sum("idempotent-replayed" not in response.headers for response in responses) == 1


def test_two_accounts_may_use_the_same_key(client: httpx.Client, service: Service) -> None:
    headers = {"Idempotency-Key": "shared"}
    key = service.rift("keys", "create", "--account", "neighbour").stdout.strip()
    mine = client.post("/v1/inference", json=body(5), headers=headers).json()
    with service.client(key) as neighbour:
        theirs = neighbour.post("/v1/inference", json=body(5), headers=headers)
        assert "idempotent-replayed" not in theirs.headers
        assert theirs.json()["id"] != mine["id"]
        assert resume(neighbour, mine["id"], 0)[0] == 404
        assert neighbour.delete(f"/v1/inference/{mine['id']}").status_code == 404


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_has_1_to_255_characters(client: httpx.Client, key: str) -> None:
    response = client.post("/v1/inference", json=body(5), headers={"Idempotency-Key": key})
    assert response.status_code == 400


# --- a client that left ------------------------------------------------------------------------------------


def test_a_client_away_for_the_grace_period_is_cancelled_and_charged_for_its_tokens(
    service: Service, left: str
) -> None:
    row = until(service, f"select * from requests where request_id = '{left}' and state = 'cancelled'", 25)
    assert 10 * 50 < row["output_tokens"] < 20 * 50
    assert row["charge_nanousd"] == row["prompt_tokens"] * 10 + row["output_tokens"] * 20
