"""The HTTP API of a running installation, byte for byte where clients depend on it."""

import json
import subprocess
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import msgspec
import pytest

from rift.gateway.api.schemas import InferenceList
from rift.gateway.dialects.dialect import NATIVE
from tests.rift import canary
from tests.service import Service, frames, until

MODEL = "smollm2:135m"


def body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Say something.", "parameters": {"max_tokens": 8}, **more}


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as opened:
        yield opened


def problem(response: httpx.Response) -> dict[str, Any]:
    found = response.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return found["error"]


# --- the native route ---------------------------------------------------------------------------------


def test_an_answer_is_one_object(client: httpx.Client) -> None:
    response = client.post("/v1/inference", json=body())
    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == {
        "id", "object", "model", "created", "output", "finish_reason", "attempts", "usage", "charge",
        "timing", "simulated",
    }  # fmt: skip
    assert answer["object"] == "inference"
    assert answer["model"] == MODEL
    assert abs(answer["created"] - time.time()) < 60
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 4, "output_tokens": 8, "total_tokens": 12}
    assert answer["charge"]["nanousd"] == 4 * 10 + 8 * 20
    assert Decimal(answer["charge"]["usd"]) * 10**9 == answer["charge"]["nanousd"]
    assert 0 <= answer["timing"]["queue_ms"] <= answer["timing"]["ttft_ms"] <= answer["timing"]["total_ms"]
    assert answer["simulated"] is True
    assert len(answer["output"]) > 8


def test_a_stream_is_the_same_answer_token_by_token(client: httpx.Client) -> None:
    whole = client.post("/v1/inference", json=body()).json()
    with client.stream("POST", "/v1/inference", json=body(stream=True)) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        events = list(frames(response))
    assert events[0].pop("retry") == "500"
    assert all(set(event) == {"id", "event", "data"} for event in events)
    ids = [int(event["id"]) for event in events]
    assert ids == sorted(set(ids))
    assert [event["event"] for event in events] == ["status", *["token"] * (len(events) - 2), "done"]
    tokens = [event["data"] for event in events if event["event"] == "token"]
    assert all(set(token) == {"id", "index", "delta"} for token in tokens)
    assert tokens[0]["index"] == 0
    assert "".join(token["delta"] for token in tokens) == whole["output"]
    done = events[-1]["data"]
    assert set(done) == set(whole) - {"output"}
    assert done["usage"] == whole["usage"]
    assert len({event["data"]["id"] for event in events}) == 1


def test_a_request_can_be_read_again_and_only_by_its_account(client: httpx.Client, service: Service) -> None:
    answer = client.post("/v1/inference", json=body()).json()
    again = client.get(f"/v1/inference/{answer['id']}")
    assert again.status_code == 200
    assert again.json() == answer | {"status": "finished"}
    forged = answer["id"][:-1] + ("a" if answer["id"][-1] != "a" else "b")
    key = service.rift("keys", "create", "--account", "stranger").stdout.strip()
    with service.client(key) as stranger:
        answers = [
            client.get(f"/v1/inference/{forged}"),
            client.get("/v1/inference/req_1"),
            stranger.get(f"/v1/inference/{answer['id']}"),
        ]
    assert {response.status_code for response in answers} == {404}
    assert {problem(response)["code"] for response in answers} == {"request_not_found"}


def test_a_stop_string_ends_the_answer_before_it(client: httpx.Client) -> None:
    whole = client.post("/v1/inference", json=body()).json()["output"]
    stop = whole.split()[3]
    parameters = {"max_tokens": 8, "stop": [stop]}
    answer = client.post("/v1/inference", json=body(parameters=parameters)).json()
    assert answer["finish_reason"] == "stop"
    assert answer["output"] == whole[: whole.index(stop)]
    assert answer["usage"]["output_tokens"] == 4


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status", "param"),
    [
        ({"model": MODEL}, 400, "prompt"),
        (body(prompt=""), 400, "prompt"),
        (body(prompt=7), 400, "prompt"),
        (body(parameters={"temperature": 9}), 400, "parameters.temperature"),
        (body(parameters={"temperature": "hot"}), 400, "parameters.temperature"),
        (body(parameters={"max_tokens": -1}), 400, "parameters.max_tokens"),
        (body(parameters={"max_tokens": 10_000}), 400, "parameters.max_tokens"),
        (body(parameters={"max_tokens": 8190}), 400, "parameters.max_tokens"),
        (body(parameters={"nonsense": 1}), 400, "parameters.nonsense"),
        (body(nonsense=1), 400, "nonsense"),
        (body(prompt="x" * 4 * 8192), 400, "prompt"),
        (body(model="gpt-9"), 404, "model"),
        (body(model="deepseek-r1"), 503, "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_names_its_field(
    client: httpx.Client, sent: dict[str, Any], status: int, param: str, stream: bool
) -> None:
    response = client.post("/v1/inference", json=sent | {"stream": stream})
    assert response.status_code == status
    assert problem(response)["param"] == param


def test_a_misplaced_parameter_names_its_place(client: httpx.Client) -> None:
    response = client.post("/v1/inference", json=body(max_tokens=3))
    assert problem(response)["message"].endswith("write it in `parameters`")


def test_a_prompt_too_long_names_limit_and_count_and_costs_nothing(
    client: httpx.Client, service: Service
) -> None:
    response = client.post("/v1/inference", json=body(prompt="x" * 4 * 9000))
    assert problem(response)["code"] == "prompt_too_long"
    assert "9000" in problem(response)["message"]
    assert "8192" in problem(response)["message"]
    row = until(
        service, "select * from requests where state = 'invalid' order by accepted_at_ns desc limit 1"
    )
    assert row["charge_nanousd"] == 0


def test_an_unknown_model_names_the_known_ones(client: httpx.Client) -> None:
    message = problem(client.post("/v1/inference", json=body(model="gpt-9")))["message"]
    assert all(name in message for name in ("smollm2:135m", "llama4:maverick", "deepseek-v3", "deepseek-r1"))


def test_a_model_without_replicas_is_unavailable(client: httpx.Client) -> None:
    response = client.post("/v1/inference", json=body(model="deepseek-v3"))
    assert problem(response)["code"] == "model_unavailable"
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer x", "Basic abc", "Bearer rift_abc_def"])
def test_no_key_or_a_wrong_one_is_401(service: Service, authorization: str | None) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    for call in (("POST", "/v1/inference"), ("GET", "/v1/models"), ("GET", "/v1/inference/x")):
        response = httpx.request(call[0], service.url + call[1], headers=headers)
        assert response.status_code == 401
        assert problem(response)["type"] == "authentication_error"


def test_other_refusals(client: httpx.Client) -> None:
    assert client.put("/v1/inference").status_code == 405
    assert client.put("/v1/inference").headers["allow"] == "GET, POST"
    for header, value in (("content-type", "text/plain"), ("content-encoding", "gzip")):
        sent = {"content-type": "application/json", header: value}
        refused = client.post("/v1/inference", content=b"{}", headers=sent)
        assert refused.status_code == 415
        assert header in problem(refused)["message"].lower()
    assert client.get("/nowhere").status_code == 404
    for broken in (b"", b"{", b'{"model":"\xff"}', b"[" * 100_000, b"[1]"):
        response = client.post("/v1/inference", content=broken, headers={"content-type": "application/json"})
        assert response.status_code == 400, broken[:20]
        problem(response)


def test_a_path_that_a_proxy_could_read_differently_is_refused(client: httpx.Client) -> None:
    for path in ("/v1%2Fmodels", "/v1/inference%2fx", "/v1/models/a%00", "/v1/models/a%5cb"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_http")
        assert answer.headers["connection"] == "close"
    # OpenAI's clients encode the slash in a model's name.
    assert client.get("/v1/models/org%2Fname").json()["error"]["code"] == "model_not_found"


def test_a_body_over_the_limit_is_413_and_the_next_request_is_served(client: httpx.Client) -> None:
    response = client.post("/v1/inference", json=body(prompt="x" * 9_000_000))
    assert response.status_code == 413
    assert f"limit is {NATIVE.body_bytes_max}" in problem(response)["message"]
    assert client.post("/v1/inference", json=body()).status_code == 200


# --- OpenAI's routes ---------------------------------------------------------------------------------


def test_a_completion_in_openais_shape(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"model": MODEL, "prompt": "Hello", "max_tokens": 3}).json()
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["text"]
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_chat_stream_in_openais_shape(client: httpx.Client, include_usage: bool) -> None:
    sent = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": include_usage},
        "some_new_field": 1,
    }
    whole = client.post("/v1/chat/completions", json=sent | {"stream": False}).json()
    with client.stream("POST", "/v1/chat/completions", json=sent) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    usage = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert usage == ([whole["usage"]] if include_usage else [])
    deltas = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert all("role" not in delta["delta"] for delta in deltas[1:])
    text = "".join(delta["delta"].get("content", "") for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    assert [delta["finish_reason"] for delta in deltas if delta["finish_reason"]] == ["length"]


def openai_bodies(prompt: str, max_tokens: int | None) -> dict[str, dict[str, Any]]:
    return {
        "/v1/completions": {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens},
        "/v1/chat/completions": {
            "model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens,
        },
        "/v1/responses": {"model": MODEL, "input": prompt, "max_output_tokens": max_tokens},
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("tokens", "max_tokens", "asked"),
    [
        (9000, None, "at least 9001 tokens (9000 in the prompt, 1 in the completion)"),
        (8000, 500, "8500 tokens (8000 in the prompt, 500 in the completion)"),
        (64 * 9000, None, "at least "),
    ],
    ids=["counted", "together", "by its bytes"],
)
def test_openais_clients_recognize_a_request_that_does_not_fit(
    client: httpx.Client, tokens: int, max_tokens: int | None, asked: str, stream: bool
) -> None:
    for path, sent in openai_bodies("x" * 4 * tokens, max_tokens).items():
        response = client.post(path, json=sent | {"stream": stream})
        assert response.status_code == 400
        refused = problem(response)
        assert (refused["code"], refused["type"]) == ("context_length_exceeded", "invalid_request_error")
        # Strands reads the code, LangChain finds it in the message, LangChain.js also the second phrase,
        # and LiteLLM and Cline the first one.
        begin = "This model's maximum context length is 8192 tokens. However, you requested "
        assert refused["message"].startswith(begin + asked)
        assert "exceeds the context window" in refused["message"]
        assert "context_length_exceeded" in refused["message"]
        fields = (
            {"prompt", "messages", "input"} if max_tokens is None else {"max_tokens", "max_output_tokens"}
        )
        assert refused["param"] in fields & set(sent)


def test_a_stored_response_that_did_not_fit_says_so(client: httpx.Client) -> None:
    sent = {"model": MODEL, "input": "x" * 4 * 9000, "background": True}
    id = client.post("/v1/responses", json=sent).json()["id"]
    until_s = time.monotonic() + 10
    while (shown := client.get(f"/v1/responses/{id}").json())["status"] != "failed":
        assert time.monotonic() < until_s
        time.sleep(0.05)
    error = shown["error"]
    assert (error["code"], error["type"], error["param"]) == (*["context_length_exceeded"] * 2, "input")
    with client.stream("GET", f"/v1/responses/{id}?stream=true") as response:
        last = list(frames(response))[-1]
    assert (last["event"], last["data"]["response"]["error"]) == ("response.failed", error)
    natively = client.get(f"/v1/inference/{id.replace('resp_', 'req_')}").json()
    assert natively["error"]["code"] == "prompt_too_long"


# --- models, health, the bill -------------------------------------------------------------------------------


def test_models_are_the_served_ones_or_all_known_ones(client: httpx.Client) -> None:
    served = client.get("/v1/models").json()
    assert [model["id"] for model in served["data"]] == [MODEL]
    known = [model["id"] for model in client.get("/v1/models?all=True").json()["data"]]
    assert known[0] == MODEL
    assert {"llama4:maverick", "deepseek-v3", "deepseek-r1", "wide:sim"} < set(known)
    one = client.get("/v1/models/deepseek-r1").json()
    assert (one["context_tokens"], one["price_nanousd"]) == (
        163_840,
        {"prompt_token": 150, "cached_prompt_token": 150, "output_token": 400, "second": None},
    )
    assert one["price_usd"] == {
        "million_prompt_tokens": "0.150000000",
        "million_cached_prompt_tokens": "0.150000000",
        "million_output_tokens": "0.400000000",
        "second": None,
    }


def test_health(service: Service) -> None:
    for path in ("/health", "/livez", "/readyz", "/version"):
        assert httpx.get(service.url + path).status_code == 200


def test_the_request_is_in_sql_within_a_second_with_its_charge(
    client: httpx.Client, service: Service
) -> None:
    answer = client.post("/v1/inference", json=body()).json()
    ended = time.monotonic()
    row = until(service, f"select * from requests where request_id = '{answer['id']}' and state = 'finished'")
    assert time.monotonic() - ended < 5, "a second, and the start of one python process or two"
    assert row["account"] == "dev"
    assert row["model"] == MODEL
    assert (row["prompt_tokens"], row["output_tokens"]) == (4, 8)
    assert row["charge_nanousd"] == answer["charge"]["nanousd"] == 4 * 10 + 8 * 20


def test_no_log_has_content_or_a_credential(service: Service) -> None:
    canary.send_all(service)
    logs = {file.name: file.read_bytes() for file in (service.folder / "logs").iterdir()}
    assert {"nats.log", "control.log", "gateway.log", "worker-0.log"} <= set(logs)
    logs["the screen"] = "".join(service.screen).partition("rift is ready")[0].encode()
    found = {
        name: (secret, text[at - 80 : at + 80])
        for name, text in logs.items()
        for secret, mark in canary.secrets(service).items()
        if (at := text.find(mark)) >= 0
    }
    assert not found
    ours = [log for name, log in logs.items() if name.startswith(("control", "gateway", "worker"))]
    assert all(json.loads(line)["time"] for log in ours for line in log.splitlines()), "log_format is json"


def test_an_account_lists_its_own_requests_newest_first_in_pages(
    client: httpx.Client, service: Service
) -> None:
    key = service.rift("keys", "create", "--account", "lister").stdout.strip()
    with service.client(key) as lister:
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "n": 2}
        made = [lister.post("/v1/inference", json=body()).json() for _ in range(3)]
        group = lister.post("/v1/chat/completions", json=chat).json()["id"]
        long = {"max_tokens": 2000}
        running = lister.post("/v1/inference", json=body(background=True, parameters=long)).json()["id"]
        whole = lister.get("/v1/inference")
        assert whole.status_code == 200
        shown = msgspec.convert(whole.json(), InferenceList)
        assert [each.id for each in shown.data[3:]] == [answer["id"] for answer in reversed(made)]
        assert (shown.data[0].id, shown.data[0].charge, shown.has_more) == (running, None, False)
        assert {each.group for each in shown.data[1:3]} == {group}
        assert [each.charge.nanousd for each in shown.data[3:] if each.charge] == [4 * 10 + 8 * 20] * 3
        assert shown.data[3].usage.output_tokens == 8
        pages, after = [], ""
        while True:
            page = lister.get(f"/v1/inference?limit=2{after}").json()
            pages += [each["id"] for each in page["data"]]
            if not page["has_more"]:
                break
            after = f"&after={pages[-1]}"
        assert pages == [each.id for each in shown.data]
        for wrong in ("limit=0", "limit=101", "limit=x", "after=req_1"):
            assert lister.get(f"/v1/inference?{wrong}").status_code == 400
        lister.delete(f"/v1/inference/{running}")
    assert client.get(f"/v1/inference?after={running}").status_code == 400, "another account's"


def test_the_curl_line_on_the_screen_works_when_pasted(service: Service) -> None:
    line = "".join(service.screen).partition("curl -N")
    done = subprocess.run(["bash", "-c", line[1] + line[2]], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("event: token") > 100
    assert done.stdout.count("event: done") == 1
