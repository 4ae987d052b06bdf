"""Requests with `store` false: answered as usual, encrypted in the log, readable until the key is erased."""

import pytest

from events import codec, subjects
from events.schema import Problem, RequestAccepted
from tests.scripted import MODEL, End, Pause, Served, Tokens, chunks, hello

pytestmark = pytest.mark.slow

PLANTED = "planted sentence"
BODIES = {
    "/v1/inference": {"model": MODEL, "prompt": PLANTED},
    "/v1/completions": {"model": MODEL, "prompt": PLANTED},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": PLANTED}]},
    "/v1/responses": {"model": MODEL, "input": PLANTED, "metadata": {"mine": PLANTED}},
}


def log_bytes(served: Served) -> bytes:
    return b"".join(stored.data for stored in served.broker.stream("RIFT_0").messages)


@pytest.fixture
def fresh(served: Served) -> Served:
    served.forget()
    served.script = hello
    stream = served.broker.stream("RIFT_0")
    stream.trim(stream.last_sequence)
    return served


@pytest.mark.parametrize("path", BODIES)
def test_content_is_encrypted_only_if_it_must_not_be_stored(fresh: Served, path: str) -> None:
    with fresh.client() as client:
        for store in (None, True, False):
            before = log_bytes(fresh).count(PLANTED.encode())
            shown = [
                client.post(path, json=BODIES[path] | {"store": store, "stream": stream}).text
                for stream in (False, True)
                if store is not None or path != "/v1/inference"
            ]
            assert all("Hello" in text and " world" in text for text in shown)
            assert (log_bytes(fresh).count(PLANTED.encode()) > before) is (store is not False and bool(shown))
        assert all(PLANTED in str(accepted.input) for accepted in fresh.accepted)
    assert log_bytes(fresh).count(b'"Hello"') < log_bytes(fresh).count(b"RequestFinished")


def test_a_group_shares_one_key(fresh: Served) -> None:
    body = BODIES["/v1/chat/completions"] | {"store": False, "n": 3, "stream": True}
    with fresh.client() as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert {chunk["choices"][0]["index"] for chunk in chunks(answer.text) if chunk["choices"]} == {0, 1, 2}  # type: ignore[index]
    assert len({accepted.sealed for accepted in fresh.accepted}) == 1
    assert PLANTED.encode() not in log_bytes(fresh)


def test_encrypted_content_is_readable_until_its_key_is_erased(fresh: Served) -> None:
    body = BODIES["/v1/inference"] | {"store": False}
    with fresh.client() as client:
        first = client.post("/v1/inference", json=body, headers={"Idempotency-Key": "sealed"}).json()
        again = client.post("/v1/inference", json=body, headers={"Idempotency-Key": "sealed"}).json()
        assert again == first
        at = f"/v1/inference/{first['id']}"
        assert client.get(at).json()["output"] == first["output"]
        assert '"Hello"' in client.get(f"{at}/events").text
        (sealed,) = {accepted.sealed for accepted in fresh.accepted}
        fresh.broker.stream(subjects.SECRETS).erase(sealed or 0)
        removed = [
            client.get(at),
            client.get(f"{at}/events"),
            client.post("/v1/inference", json=body, headers={"Idempotency-Key": "sealed"}),
        ]
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in removed] == [
        (410, "content_removed")
    ] * 3


def test_error_messages_are_encrypted(fresh: Served) -> None:
    fresh.script = lambda accepted: [End("invalid", Problem(code="wrong", message=f"no {PLANTED}"))]
    with fresh.client() as client:
        refused = client.post("/v1/inference", json=BODIES["/v1/inference"] | {"store": False})
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, f"no {PLANTED}")
    assert PLANTED.encode() not in log_bytes(fresh)


def test_logit_bias_is_encrypted(fresh: Served) -> None:
    body = BODIES["/v1/chat/completions"] | {"logit_bias": {"1234": -100}}
    with fresh.client() as client:
        for store in (True, False):
            client.post("/v1/chat/completions", json=body | {"store": store})
            assert (b"1234" in log_bytes(fresh)) is store
            assert fresh.accepted[-1].parameters.logit_bias == {"1234": -100}
            stream = fresh.broker.stream("RIFT_0")
            stream.trim(stream.last_sequence)


def test_an_idempotency_entry_names_the_content_key(fresh: Served) -> None:
    """A gateway that accepts the request again must encrypt it with the same key."""
    with fresh.client() as client:
        body = BODIES["/v1/inference"] | {"store": False}
        client.post("/v1/inference", json=body, headers={"Idempotency-Key": "twice"})
    stored = [
        stored for stored in fresh.broker.stream("RIFT_0").messages if b"RequestAccepted" in stored.data
    ]
    ((accepted,),) = (codec.decode(each.data)[1] for each in stored)
    assert isinstance(accepted, RequestAccepted)
    assert b'"sealed":%d' % (accepted.sealed or 0) in fresh.broker.stream(subjects.KEYS).messages[-1].data


def test_a_response_is_deleted_only_if_it_is_encrypted_ended_and_of_the_account(fresh: Served) -> None:
    body = BODIES["/v1/responses"]
    with fresh.client() as client, fresh.client(fresh.strangers_key) as stranger:
        stored = client.post("/v1/responses", json=body).json()["id"]
        sealed = client.post("/v1/responses", json=body | {"store": False}).json()["id"]
        inference = client.post("/v1/inference", json=BODIES["/v1/inference"] | {"store": False}).json()["id"]
        fresh.script = lambda accepted: [Tokens("Hello"), Pause(1.0), End()]
        running = client.post("/v1/responses", json=body | {"store": False, "background": True}).json()["id"]
        refused = [
            client.delete(f"/v1/responses/{stored}"),
            client.delete(f"/v1/responses/{running}"),
            stranger.delete(f"/v1/responses/{sealed}"),
            client.delete(f"/v1/responses/{inference.replace('req_', 'resp_')}"),
        ]
        codes = [(answer.status_code, answer.json()["error"]["code"]) for answer in refused[1:]]
        assert refused[0].status_code == 409
        assert codes == [(409, "request_not_ended"), *[(404, "request_not_found")] * 2]
        assert client.delete(f"/v1/responses/{sealed}").json() == {
            "id": sealed, "object": "response", "deleted": True
        }  # fmt: skip
        assert client.get(f"/v1/responses/{sealed}").status_code == 410
        assert client.get(f"/v1/responses/{sealed}?stream=true").status_code == 410
