"""Answers for OpenAI's clients, byte for byte, to scripted worker events."""

import json
import threading
import time
from typing import Any

import httpx
import pytest

from events.schema import Logprob, Problem, RequestAccepted, ToolCallDelta
from tests.scripted import MODEL, End, Pause, Served, Tokens, by_request, chunks, hello

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def ask(
    served: Served, path: str = CHAT, *, headers: dict[str, str] | None = None, **more: Any
) -> httpx.Response:
    given: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
    if path == "/v1/completions":
        given = {"prompt": "hi"}
    with served.client() as client:
        return client.post(path, json={"model": MODEL, **given, **more}, headers=headers)


def streamed(served: Served, path: str = CHAT, **more: Any) -> list[dict[str, Any]]:
    response = ask(served, path, stream=True, **more)
    assert response.status_code == 200, response.text
    return chunks(response.text)  # type: ignore[return-value]


def deltas(found: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    choices = [choice for chunk in found for choice in chunk["choices"] if choice["index"] == index]
    return [choice["delta"] for choice in choices]


# --- text ------------------------------------------------------------------------------------------------


def test_a_chat_chunk_to_the_byte(served: Served) -> None:
    served.script = lambda accepted: [Tokens("Hi"), Tokens(""), Tokens(" 🌊"), End()]
    text = ask(served, stream=True).text
    request = served.accepted[0].request
    created = json.loads(text[6:].partition("\n")[0])["created"]
    head = f'{{"id":"{request}","object":"chat.completion.chunk","created":{created},"model":"{MODEL}",'
    choice = f'data: {head}"choices":[{{"index":0,'
    assert text == (
        f'{choice}"delta":{{"role":"assistant","content":"Hi"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
        f'{choice}"delta":{{"content":" 🌊"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
        f'{choice}"delta":{{}},"logprobs":null,"finish_reason":"stop"}}]}}\n\n'
        "data: [DONE]\n\n"
    )


@pytest.mark.parametrize("pieces", [[], ["{"], ['{"city', '": "Par']])
def test_a_call_that_is_cut_has_only_the_arguments_that_were_written(
    served: Served, pieces: list[str]
) -> None:
    call = ToolCallDelta(index=0, id="call_0", name="weather")
    parts = [ToolCallDelta(index=0, arguments=piece) for piece in pieces]
    script = [Tokens(tool_calls=(one,)) for one in (call, *parts)]
    served.script = lambda accepted: [*script, End("length")]
    (choice,) = ask(served).json()["choices"]
    function = {"name": "weather", "arguments": "".join(pieces)}
    assert (choice["message"]["tool_calls"][0]["function"], choice["finish_reason"]) == (function, "length")
    found = streamed(served)
    shown = [
        one["function"].get("arguments") for delta in deltas(found) for one in delta.get("tool_calls", ())
    ]
    assert ("".join(shown), found[-1]["choices"][0]["finish_reason"]) == ("".join(pieces), "length")
    with served.client() as client:
        answer = client.post("/v1/responses", json={"model": MODEL, "input": "hi"}).json()
    (item,) = answer["output"]
    assert (item["arguments"], item["status"], answer["status"]) == ("".join(pieces), *["incomplete"] * 2)


def test_an_answer_without_text_still_has_a_role(served: Served) -> None:
    served.script = lambda accepted: [Tokens(""), End()]
    found = streamed(served)
    assert deltas(found) == [{"role": "assistant", "content": ""}]
    assert ask(served).json()["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_usage_is_sent_where_requested(served: Served, path: str) -> None:
    served.script = hello
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert ask(served, path).json()["usage"] == usage
    assert not any("usage" in chunk for chunk in streamed(served, path))
    *others, last = streamed(served, path, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]) == ([], usage)
    assert all(chunk["usage"] is None for chunk in others)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *others, last = streamed(served, path, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in others] == [1, 2, 3, 4, 5, 5]
    assert last["usage"] == usage


def test_logprobs_of_a_chat_and_of_a_completion(served: Served) -> None:
    top = (Logprob(token="a", logprob=-0.5), Logprob(token="é", logprob=-1.0))
    first = Logprob(token="a", logprob=-0.5, top=top)
    second = Logprob(token="\ufffd", logprob=-2.0, top=top)
    served.script = lambda accepted: [Tokens("a", logprobs=(first,)), Tokens("", logprobs=(second,)), End()]
    whole = ask(served, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    assert [each["token"] for each in whole["content"]] == ["a", "\ufffd"]
    assert whole["content"][0]["top_logprobs"][1] == {"token": "é", "logprob": -1.0, "bytes": [195, 169]}
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed(served, logprobs=True, top_logprobs=2)]
    assert [part["content"] for part in parts[:2]] == [whole["content"][:1], whole["content"][1:]]
    assert parts[2] is None
    shown = ask(served, "/v1/completions", logprobs=2).json()["choices"][0]["logprobs"]
    assert shown == {
        "tokens": ["a", "\ufffd"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"a": -0.5, "é": -1.0}, {"\ufffd": -2.0, "a": -0.5, "é": -1.0}],
        "text_offset": [0, 1],
    }
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed(served, "/v1/completions", logprobs=2)]
    assert parts[1]["text_offset"] == [1]


def test_reasoning_has_both_names_and_is_not_content(served: Served) -> None:
    served.script = lambda accepted: [
        Tokens(reasoning="Hm", count=3), Tokens(reasoning="."), Tokens("Yes"), End()
    ]  # fmt: skip
    answer = ask(served).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["reasoning_content"], message["content"]) == ("Hm.", "Hm.", "Yes")
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    assert deltas(streamed(served)) == [
        {"role": "assistant", "content": None, "reasoning": "Hm", "reasoning_content": "Hm"},
        {"reasoning": ".", "reasoning_content": "."},
        {"content": "Yes"},
        {},
    ]


def test_tool_calls_are_separate_and_complete(served: Served) -> None:
    last = ToolCallDelta(index=0, arguments=' "Oslo"}')
    other = ToolCallDelta(index=1, id="call_b", name="weather", arguments="{}")
    served.script = lambda accepted: [
        Tokens(tool_calls=(ToolCallDelta(index=0, id="call_a", name="weather"),)),
        Tokens(tool_calls=(ToolCallDelta(index=0, arguments='{"city":'),)),
        Tokens(tool_calls=(last, other)),
        End("tool_calls"),
    ]
    choice = ask(served, tools=[TOOL]).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    calls = [(call["id"], call["type"], call["function"]) for call in choice["message"]["tool_calls"]]
    assert calls == [
        ("call_a", "function", {"name": "weather", "arguments": '{"city": "Oslo"}'}),
        ("call_b", "function", {"name": "weather", "arguments": "{}"}),
    ]
    found = deltas(streamed(served, tools=[TOOL]))
    assert found[0]["tool_calls"] == [
        {"index": 0, "id": "call_a", "type": "function", "function": {"name": "weather", "arguments": ""}}
    ]
    assert found[1] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]}
    assert [call["index"] for call in found[2]["tool_calls"]] == [0, 1]


# --- groups ------------------------------------------------------------------------------------------------


def test_a_group_is_one_answer_of_several_requests(served: Served) -> None:
    answer = ask(served, n=3, seed=5, max_tokens=5).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"][-1] for choice in answer["choices"]] == ["0", "1", "2"]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (7, 15)
    group = sorted(served.accepted, key=lambda accepted: accepted.choice)
    assert {accepted.group for accepted in group} == {answer["id"]} == {group[0].request}
    assert [accepted.parameters.seed for accepted in group] == [5, 6, 7]
    with served.client() as client:
        assert client.get(f"/v1/inference/{group[2].request}").json()["output"] == "Hello, world 🌊! 2"


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_answered_in_the_order_of_their_index(served: Served, stream: bool) -> None:
    def script(accepted: RequestAccepted) -> list[Any]:
        # The second prompt ends last, and the third has no output.
        pause = Pause(0.5 if accepted.input == "b" else 0.02)
        tokens = [pause, Tokens(f"{accepted.input}{accepted.choice}")]
        return [End()] if accepted.input == "c" else [*tokens, End()]

    served.script = script
    sent = {"prompt": ["a", "b", "c", "a"], "n": 2, "seed": 5, "logprobs": 0, "stream": stream}
    response = ask(served, "/v1/completions", stream_options={"include_usage": True}, **sent)
    found = chunks(response.text) if stream else [response.json()]
    texts = [""] * 8
    for choice in (choice for chunk in found for choice in chunk["choices"]):  # type: ignore[attr-defined]
        texts[choice["index"]] += choice["text"]
    assert texts == ["a0", "a1", "b2", "b3", "", "", "a6", "a7"]
    if not stream:
        assert float(response.headers["server-timing"].partition("total;dur=")[2]) > 400
        assert [choice["index"] for choice in found[0]["choices"]] == list(range(8))  # type: ignore[attr-defined]
    usage: Any = found[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (28, 6, 34)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 12
    group = sorted(served.accepted, key=lambda accepted: accepted.choice)
    assert {chunk["id"] for chunk in found} == {group[0].request} == {response.headers["x-request-id"]}
    assert [accepted.group for accepted in group] == [group[at - at % 2].request for at in range(8)]
    assert [accepted.parameters.seed for accepted in group] == [5, 6] * 4


def test_a_groups_chunks_carry_their_choice_and_end_once(served: Served) -> None:
    found = streamed(served, n=2, stream_options={"include_usage": True})
    for index in (0, 1):
        first, *rest = deltas(found, index)
        assert first["role"] == "assistant"
        assert "".join(delta.get("content", "") for delta in [first, *rest]) == f"Hello, world 🌊! {index}"
    ends = [chunk["choices"][0]["finish_reason"] for chunk in found if chunk["choices"]]
    assert [end for end in ends if end] == ["stop", "stop"]
    assert found[-1]["usage"]["completion_tokens"] == 10
    assert len({chunk["id"] for chunk in found}) == 1


def test_a_group_for_an_unknown_model_is_refused(served: Served) -> None:
    for model in ("", "Ä", "no such"):
        response = ask(served, model=model, n=2)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_if_one_choice_fails_the_answer_fails_and_the_rest_is_free(
    served: Served, stream: bool, keyed: bool
) -> None:
    def script(accepted: RequestAccepted) -> list[Any]:
        if accepted.choice == 1:
            pause = Pause(1.5 if stream else 0.1)
            return [Tokens("some"), pause, End("failed", Problem(code="engine", message="broken"))]
        return [Tokens("more"), Pause(10), End()]

    served.script = script
    headers = {"Idempotency-Key": f"a group that fails {stream}"} if keyed else {}
    response = ask(served, n=3, stream=stream, headers=headers)
    if stream:
        last = json.loads(response.text.split("\n\n")[-3].removeprefix("data: "))
        assert last["error"]["code"] == "engine"
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine")
    wait_for(lambda: len(served.cancelled) == 2)
    assert {cancel.why for cancel in served.cancelled} == {"unanswered"}
    failed = next(accepted.request for accepted in served.accepted if accepted.choice == 1)
    assert failed not in {cancel.request for cancel in served.cancelled}


def test_a_client_that_disconnects_cancels_every_choice(served: Served) -> None:
    served.script = lambda accepted: [Tokens("a"), Pause(10), End()]
    sent = {"model": MODEL, "prompt": "hi", "n": 3, "stream": True}
    with served.client() as client, client.stream("POST", "/v1/completions", json=sent) as response:
        next(response.iter_lines())
    wait_for(lambda: len(served.cancelled) == 3)
    assert {cancel.why for cancel in served.cancelled} == {"disconnect"}
    assert {cancel.request for cancel in served.cancelled} == {each.request for each in served.accepted}


def test_a_key_stands_for_the_whole_group(served: Served) -> None:
    served.script = lambda accepted: [Tokens("a"), Pause(0.5), Tokens(f"{accepted.choice}"), End()]
    found: list[httpx.Response] = []

    def post() -> None:
        sent = {"model": MODEL, "prompt": "hi", "n": 2}
        with served.client() as client:
            found.append(client.post("/v1/completions", json=sent, headers={"idempotency-key": "group"}))

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    post()
    assert [response.status_code for response in found] == [200] * 5, found[0].text
    assert len({json.dumps(response.json()["choices"]) for response in found}) == 1
    assert len({response.json()["id"] for response in found}) == 1
    assert len({accepted.request for accepted in served.accepted}) == 2


# --- failures, headers ------------------------------------------------------------------------------------


def test_a_failure_is_a_status_before_the_first_byte_and_a_chunk_after_it(served: Served) -> None:
    prompt = [{"role": "user", "content": "fail at once"}]
    for stream in (False, True):
        response = ask(served, messages=prompt, stream=stream)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
    response = ask(served, messages=[{"role": "user", "content": "too long"}], stream=True)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    late = Problem(code="prompt_too_long", message="late", param="messages")
    served.script = lambda accepted: [Pause(1.2), End("invalid", late)]
    response = ask(served, messages=prompt, stream=True)
    error, done, _ = response.text.removeprefix(": keep-alive\n\n").split("\n\n")
    shown = json.loads(error.removeprefix("data: "))["error"]
    assert (shown["code"], done) == ("context_length_exceeded", "data: [DONE]")
    served.script = by_request
    response = ask(served, messages=[{"role": "user", "content": "fail late"}], stream=True)
    assert response.status_code == 200
    *_, error, done, _ = response.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the engine failed"
    assert done == "data: [DONE]"


def test_a_request_that_stopped_its_engine_three_times_must_not_be_retried(served: Served) -> None:
    served.script = lambda accepted: [End("poison")]
    assert ask(served).headers["x-should-retry"] == "false"
    served.script = lambda accepted: [End("failed")]
    assert "x-should-retry" not in ask(served).headers


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        *(("abc-123", True), ("!~", True), ('<x>"\\', True), ("a" * 128, True), ("a" * 129, False)),
        *(("a b", False), ("a\tb", False), ("", False), (None, False)),
    ],
)
def test_a_visible_request_id_is_stored_and_echoed(served: Served, sent: str | None, kept: bool) -> None:
    served.script = hello
    headers = {} if sent is None else {"x-request-id": sent.encode("latin-1")}
    with served.client() as client:
        body = {"model": MODEL, "prompt": "hi"}
        answers = [
            client.post("/v1/completions", json=body, headers=headers),
            client.post("/v1/completions", json={}, headers=headers),
            client.get("/v1/models", headers=headers),
        ]
    assert served.accepted[0].client_request_id == (sent if kept else None)
    for answer in answers:
        assert (answer.headers["x-request-id"] == sent) == kept
        assert int(answer.headers["openai-processing-ms"]) >= 0
    assert ["rift-request-id" in answer.headers for answer in answers] == [True, False, False]
    assert answers[0].headers["rift-request-id"] == answers[0].json()["id"]
    if not kept:
        assert answers[0].headers["x-request-id"] == answers[0].json()["id"]
        assert len({answer.headers["x-request-id"] for answer in answers}) == 3


def test_every_answer_about_a_request_has_its_rift_id(served: Served) -> None:
    served.script = hello
    mine = {"x-request-id": "mine"}
    with served.client() as client:

        def rift_id(method: str, path: str, **body: Any) -> str | None:
            answer = client.request(method, path, headers=mine, **({"json": body} if body else {}))
            assert answer.headers["x-request-id"] == "mine"
            return answer.headers.get("rift-request-id")

        for path, prompt in (
            ("/v1/inference", {"prompt": "hi"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ("/v1/responses", {"input": "hi"}),
        ):
            for stream in (False, True):
                request = rift_id("POST", path, model=MODEL, stream=stream, **prompt)
                assert request is not None
                assert request.startswith("req_")
                for again in ("", "/events"):
                    assert rift_id("GET", f"/v1/inference/{request}{again}") == request
            response = request.replace("req_", "resp_")
            expected = request if path == "/v1/responses" else None
            assert rift_id("GET", f"/v1/responses/{response}") == expected
        assert rift_id("POST", f"/v1/responses/{response}/cancel") == request
        assert rift_id("DELETE", f"/v1/inference/{request}") == request
        group = rift_id("POST", "/v1/completions", model=MODEL, prompt="hi", n=2)
        assert rift_id("GET", f"/v1/inference/{group}") == group
        served.script = lambda accepted: [End("failed")]
        failed = rift_id("POST", "/v1/completions", model=MODEL, prompt="hi")
        assert rift_id("GET", f"/v1/inference/{failed}") == failed is not None
        assert rift_id("GET", "/v1/inference/req_x") is None


def wait_for(true: Any, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
