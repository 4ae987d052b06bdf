"""Another account's id and an unknown id get the same answer, byte for byte, on every route."""

from typing import Any

import anyio
import httpx
import pytest

from rift import keys
from rift.gateway.api.routes import ROUTES
from tests.rift.gateway.admission.test_credit import World, live
from tests.rift.gateway.admission.test_rate_limits import OTHER, ask, key_of, whole
from tests.scripted import MODEL, Served
from tests.simulation.prepaid import ACCOUNT
from tests.simulation.processes import Engine

BODY = {"model": MODEL, "prompt": "hello"}
WAYS = [
    ("GET", "/v1/inference/{}", {}),
    ("DELETE", "/v1/inference/{}", {}),
    ("DELETE", "/v1/inference/{}/content", {}),
    ("GET", "/v1/inference/{}/events", {}),
    ("GET", "/v1/inference/{}/events?after=1", {}),
    ("GET", "/v1/inference/{}/events?after=99", {}),
    ("GET", "/v1/inference/{}/events", {"last-event-id": "2"}),
    ("GET", "/v1/responses/{}", {}),
    ("GET", "/v1/responses/{}?stream=true", {}),
    ("GET", "/v1/responses/{}?stream=true&starting_after=1", {}),
    ("POST", "/v1/responses/{}/cancel", {}),
    ("DELETE", "/v1/responses/{}", {}),
]
# Times and lengths differ between equal answers.
VARYING = ("date", "x-request-id", "openai-processing-ms", "content-length", "server-timing")
# Their ids name nothing that belongs to one account.
WITHOUT_ACCOUNT = ("/v1/models/{id}", "/v1/invoices/{id}")


def test_every_route_with_an_id_is_in_the_matrix() -> None:
    tried = {(method, path.partition("?")[0].replace("{}", "{id}")) for method, path, _ in WAYS}
    with_id = {(route.method, route.path) for route in ROUTES if "{id}" in route.path}
    assert {(method, path) for method, path in with_id if path not in WITHOUT_ACCOUNT} == tried


def ended_request(served: Served, key: str, route: str) -> str:
    """Run a request with a key, and return its id."""
    body = BODY if route == "/v1/inference" else {"model": MODEL, "input": "hello"}
    with served.client(key) as client:
        answer = client.post(route, json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])


def comparable(answer: httpx.Response, id: str) -> tuple[int, dict[str, str], str]:
    headers = {name: value for name, value in answer.headers.items() if name not in VARYING}
    return answer.status_code, headers, answer.text.replace(id, "ID")


@pytest.mark.parametrize(("method", "path", "headers"), WAYS, ids=[f"{m} {p}" for m, p, _ in WAYS])
@pytest.mark.parametrize("route", ["/v1/inference", "/v1/responses"])
def test_a_foreign_id_answers_like_an_unknown_one(
    served: Served, route: str, method: str, path: str, headers: dict[str, str]
) -> None:
    for owner, other in ((served.key, served.strangers_key), (served.strangers_key, served.key)):
        id = ended_request(served, owner, route)
        unknown = [id[:-1] + ("a" if id[-1] != "a" else "b"), id[:10] + "z" + id[11:], id + "x", "req_1", "x"]
        with served.client(other) as client:
            foreign = comparable(client.request(method, path.format(id), headers=headers), id)
            for one in unknown:
                assert comparable(client.request(method, path.format(one), headers=headers), one) == foreign
        assert foreign[0] == 404
        assert '"code":"request_not_found"' in foreign[2]
        assert not served.cancelled
        with served.client(owner) as client:
            own = client.request(method, path.format(id), headers=headers)
        assert (own.status_code != 404) == path.startswith(route), own.text


def test_two_accounts_can_use_the_same_idempotency_key(served: Served) -> None:
    ids = []
    for key in (served.key, served.strangers_key):
        with served.client(key) as client:
            first = client.post("/v1/inference", json=BODY, headers={"idempotency-key": "the same"})
            again = client.post("/v1/inference", json=BODY, headers={"idempotency-key": "the same"})
            other = client.post(
                "/v1/inference", json=BODY | {"prompt": "x"}, headers={"idempotency-key": "the same"}
            )
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
        assert (again.json()["id"], other.status_code) == (first.json()["id"], 422)
        ids.append(first.json()["id"])
    assert ids[0] != ids[1]


def test_errors_name_no_other_account(served: Served) -> None:
    id = ended_request(served, served.key, "/v1/inference")
    with served.client(served.strangers_key) as stranger:
        for method, path, headers in WAYS:
            assert "acme" not in stranger.request(method, path.format(id), headers=headers).text


@pytest.mark.parametrize("key", ["rift_x_y", "mistyped", "cut"])
def test_an_answer_does_not_distinguish_a_mistyped_key_from_an_unknown_one(
    served: Served, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    given = {"mistyped": served.key[:-1] + ("a" if served.key[-1] != "a" else "b"), "cut": served.key[:-9]}
    unknown = keys.new_key(bytes(keys.ID_BYTES + keys.SECRET_BYTES)).text
    with caplog.at_level("INFO"):
        answers = [
            httpx.get(f"{served.url}/v1/models", headers={"authorization": f"Bearer {text}"})
            for text in (given.get(key, key), unknown)
        ]
    assert comparable(answers[0], "-") == comparable(answers[1], "-")
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (401, "invalid_api_key")
    assert "this API key is not valid here" in answers[0].json()["error"]["message"]
    assert given.get(key, key) not in caplog.text


def test_the_prefix_cache_is_salted_with_the_account(monkeypatch: pytest.MonkeyPatch) -> None:
    salts: list[str] = []
    generate = Engine.generate

    async def noted(self: Engine, *given: Any, salt: str, **more: Any) -> None:
        salts.append(salt)
        await generate(self, *given, salt=salt, **more)

    monkeypatch.setattr(Engine, "generate", noted)

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        shown = [world.key, key_of(world, OTHER).text, key_of(world, ACCOUNT).text]
        await anyio.sleep(0.1)
        for key in shown:
            assert (await whole(ask(world, gateway, key)))[0] == 200

    live(test)
    assert salts == [ACCOUNT, OTHER, ACCOUNT]
