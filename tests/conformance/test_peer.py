"""Rift compared with vLLM's own OpenAI server: same model, same arguments, chunk by chunk.

This test lists the differences; the gateway's README explains them. Rift starts its engine at the first
request, while the other server starts, and ends it once it is idle.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from rift.catalogue import Profile
from tests import tiny_model
from tests.bench import servers
from tests.bench.servers import MODEL, Running
from tests.service import environment, frames, joined, running

pytestmark = pytest.mark.engine

# Fields that only vLLM has. They are null if a request uses only OpenAI's fields.
# Rift omits reasoning and tool calls if there are none.
DIFFERENCES = {
    "message": {"annotations", "audio", "function_call", "tool_calls", "reasoning"},
    "choice": {"stop_reason", "token_ids", "prompt_logprobs", "prompt_token_ids", "routed_experts"},
    "answer": {
        "service_tier", "system_fingerprint", "prompt_logprobs", "prompt_token_ids", "prompt_text",
        "kv_transfer_params", "ec_transfer_params", "metrics", "prompt_routed_experts",
    },
}  # fmt: skip
# Fields that only Rift has, as OpenAI does: details of usage, and null usage in earlier chunks.
OURS = {
    "usage": {"prompt_tokens_details", "completion_tokens_details"},
    "message": {"refusal"},
    "answer": {"usage"},
}

PROFILE = Profile(
    args={"dtype": "bfloat16", "enforce_eager": True, "max_num_seqs": 8},
    env={"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"},
)
LEVEL = {"type": "object", "properties": {"level": {"enum": ["low", "high"]}}, "required": ["level"]}
LEVEL["additionalProperties"] = False
SCHEMA = {"type": "json_schema", "json_schema": {"name": "level", "schema": LEVEL, "strict": True}}
TOOL = {"type": "function", "function": {"name": "set_level", "parameters": LEVEL, "strict": True}}
NAMED = {"type": "function", "function": {"name": "set_level"}}
CHAT = "/v1/chat/completions", {"messages": [{"role": "user", "content": "one two three"}]}
TEXT = "/v1/completions", {"prompt": "one two three"}
TWO = "/v1/completions", {"prompt": ["one two three", "four five"]}
CASES: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any]]] = {
    "chat": (CHAT, {"max_tokens": 12}),
    "chat, its newer limit": (CHAT, {"max_completion_tokens": 5}),
    "completion": (TEXT, {"max_tokens": 12}),
    "one token": (TEXT, {"max_tokens": 1}),
    "two choices": (CHAT, {"max_tokens": 6, "n": 2, "seed": 3, "temperature": 0.9}),
    "two texts": (TEXT, {"max_tokens": 6, "n": 2, "seed": 3, "temperature": 0.9}),
    "two prompts": (TWO, {"max_tokens": 6}),
    "two prompts with two choices": (TWO, {"max_tokens": 6, "n": 2, "seed": 3, "temperature": 0.9}),
    "logprobs of a chat": (CHAT, {"max_tokens": 6, "logprobs": True, "top_logprobs": 2}),
    "logprobs of a text": (TEXT, {"max_tokens": 6, "logprobs": 2}),
    "a schema": (CHAT, {"max_tokens": 60, "response_format": SCHEMA}),
    "a schema for a text": (TEXT, {"max_tokens": 60, "response_format": SCHEMA}),
    "a schema as vLLM has it": (TEXT, {"max_tokens": 60, "structured_outputs": {"json": LEVEL}}),
    "a named tool": (CHAT, {"max_tokens": 60, "tools": [TOOL], "tool_choice": NAMED}),
    "a required tool": (CHAT, {"max_tokens": 90, "tools": [TOOL], "tool_choice": "required"}),
    "penalties": (TEXT, {"max_tokens": 12, "presence_penalty": 1.0, "frequency_penalty": 0.5}),
}


# The requests to Rift follow each other faster than this.
IDLE_S = 5
SCALE = f"[scale.{MODEL}]\nidle_s = {IDLE_S}\n"
# A decision every 2 s, the idle time, and the end of the engine.
ZERO_S = 40.0


class Started(NamedTuple):
    rift: Running
    peer: Running
    folder: Path
    was_ready: bool
    first: list[dict[str, Any]]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    folder = tmp_path_factory.mktemp("peer")
    model = tiny_model.make(folder / "model")
    served = servers.Served(model, tiny_model.CONTEXT_TOKENS, PROFILE, tool_parser="hermes")
    with ExitStack() as stack:
        from_zero = servers.rift(served, folder / "rift", options=["--workers", "0..1"], settings=SCALE)
        rift = stack.enter_context(from_zero)
        was_ready = is_ready(rift)
        peer_is_ready = threading.Event()
        first = stack.enter_context(ThreadPoolExecutor(1)).submit(keep_asking, rift, peer_is_ready)
        stack.callback(peer_is_ready.set)
        peer = stack.enter_context(servers.peer(served, folder / "peer"))
        peer_is_ready.set()
        yield Started(rift, peer, folder / "rift", was_ready, first.result())


@pytest.fixture(scope="module")
def both(started: Started) -> tuple[Running, Running]:
    return started.rift, started.peer


def keep_asking(rift: Running, enough: threading.Event) -> list[dict[str, Any]]:
    """Return the events of the first answer."""
    body = {"model": MODEL, "prompt": "one two three", "parameters": {"max_tokens": 8}, "stream": True}
    headers = {"Authorization": f"Bearer {rift.key}"}
    with httpx.stream(
        "POST", f"{rift.url}/v1/inference", json=body, headers=headers, timeout=servers.READY_S
    ) as answer:
        events = list(frames(answer))
    while not enough.wait(1):
        post(rift, TEXT[0], TEXT[1] | {"max_tokens": 1})
    return events


def is_ready(rift: Running) -> bool:
    listed = httpx.get(f"{rift.url}/v1/models/{MODEL}", headers={"Authorization": f"Bearer {rift.key}"})
    return bool(listed.json()["ready"])


def engine_processes(folder: Path) -> list[str]:
    """Return Rift's worker and the processes of its engine, which write to its log, also when it has died."""
    found = []
    for pid, line in running():
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/1") == str(folder / "data" / "logs" / "worker-0.log"):
                found.append(line)
    return found


def test_the_first_request_starts_an_engine(started: Started) -> None:
    assert not started.was_ready
    statuses = [event["data"]["status"] for event in started.first if event.get("event") == "status"]
    assert (statuses[0], statuses[-1]) == ("starting", "running")
    assert started.first[-1]["event"] == "done"
    assert joined(started.first)


def post(server: Running, path: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.key}"}
    sent = {"model": MODEL, "temperature": 0, **body}
    response = httpx.post(server.url + path, json=sent, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    return response


# Noise cuts its calls. vLLM's whole answer shows a cut call as content; both streams and Rift show a call.
WHOLE = [case for case in CASES if "tool" not in case]


@pytest.mark.parametrize("case", WHOLE)
def test_an_answer_has_the_same_fields_ends_and_usage(both: tuple[Running, Running], case: str) -> None:
    (path, given), more = CASES[case]
    ours, theirs = (post(server, path, given | more).json() for server in both)
    assert ours["object"] == theirs["object"]
    compare_fields(ours, theirs, "answer")
    compare_fields(ours["usage"], theirs["usage"], "usage")
    assert counts(ours["usage"]) == counts(theirs["usage"])
    for mine, other in zip(ours["choices"], theirs["choices"], strict=True):
        compare_fields(mine, other, "choice")
        if "message" in other:
            compare_fields(mine["message"], other["message"], "message")
        assert (mine["index"], mine["finish_reason"]) == (other["index"], other["finish_reason"])
        if "n" not in more:
            assert whole(text(mine)) == text(other)
            assert tokens([mine]) == tokens([other])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options", [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
def test_a_stream_has_the_same_chunks(
    both: tuple[Running, Running], case: str, options: dict[str, Any] | None
) -> None:
    (path, given), more = CASES[case]
    body = given | more | {"stream": True, "stream_options": options}
    ours, theirs = (chunks(post(server, path, body).text) for server in both)
    assert {chunk["object"] for chunk in ours} == {chunk["object"] for chunk in theirs}
    for chunk in ours:
        compare_fields(chunk, next(other for other in theirs if shape(other) == shape(chunk)), "answer")
    indexes = {choice["index"] for chunk in theirs for choice in chunk["choices"]}
    assert {choice["index"] for chunk in ours for choice in chunk["choices"]} == indexes
    for index in indexes:
        mine, other = of_choice(ours, index), of_choice(theirs, index)
        for choice in mine:
            compare_fields(choice, other[-1], "choice")
        assert ends(mine) == ends(other)
        if "n" not in more:
            assert whole("".join(map(text, mine))) == "".join(map(text, other))
            assert calls([choice.get("delta", {}) for choice in mine]) == calls(
                [choice.get("delta", {}) for choice in other]
            )
            assert tokens(mine) == tokens(other)
        if path == CHAT[0]:
            roles = [choice["delta"].get("role") for choice in mine]
            assert roles == ["assistant", *[None] * (len(mine) - 1)]
            # vLLM sends the role in a chunk before the first token, with empty content.
            assert other[0]["delta"] == {"role": "assistant", "content": ""}
    assert bool(ours[-1]["choices"]) == bool(theirs[-1]["choices"])
    if options:
        assert counts(ours[-1]["usage"]) == counts(theirs[-1]["usage"])
    if options and "continuous_usage_stats" in options:
        for index in indexes:
            last, others = (
                [chunk for chunk in found if chunk["choices"] and chunk["choices"][0]["index"] == index][-1]
                for found in (ours, theirs)
            )
            assert counts(last["usage"]) == counts(others["usage"])


def test_an_idle_engine_ends_with_all_its_processes(started: Started) -> None:
    post(started.rift, TEXT[0], TEXT[1] | {"max_tokens": 1})
    assert any("VLLM::" in line for line in engine_processes(started.folder))
    deadline = time.monotonic() + ZERO_S
    while time.monotonic() < deadline and (engine_processes(started.folder) or is_ready(started.rift)):
        time.sleep(0.3)
    assert (engine_processes(started.folder), is_ready(started.rift)) == ([], False)
    command = [sys.executable, "-m", "rift", "replay", "--verify", "--data", str(started.folder / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr


def compare_fields(ours: dict[str, Any], theirs: dict[str, Any], what: str) -> None:
    assert set(theirs) - set(ours) <= DIFFERENCES.get(what, set()), what
    assert set(ours) - set(theirs) <= OURS.get(what, set()), what


def shape(chunk: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether a chunk has a choice, and whether it has usage."""
    return bool(chunk["choices"]), bool(chunk.get("usage"))


def of_choice(found: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    return [choice for chunk in found for choice in chunk["choices"] if choice["index"] == index]


def ends(choices: list[dict[str, Any]]) -> list[str]:
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def text(choice: dict[str, Any]) -> str:
    said = choice.get("message") or choice.get("delta") or {}
    return choice.get("text") or said.get("content") or ""


def whole(said: str) -> str:
    """Compare texts: if an answer is cut within a character, only Rift's ends in U+FFFD."""
    return said.removesuffix("\ufffd")


def calls(said: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return each call's name and whole arguments, whether sent in one piece or in many."""
    found: dict[int, tuple[str, str]] = {}
    for message in said:
        for at, call in enumerate(message.get("tool_calls") or []):
            name, arguments = found.get(call.get("index", at), ("", ""))
            told = call["function"]
            found[call.get("index", at)] = (
                name or told.get("name") or "",
                arguments + (told.get("arguments") or ""),
            )
    return list(found.values())


def tokens(choices: list[dict[str, Any]]) -> list[str]:
    """Return the tokens that have logprobs, as text."""
    told = [choice.get("logprobs") or {} for choice in choices]
    return [
        each if isinstance(each, str) else each["token"]
        for one in told
        for each in one.get("tokens") or one.get("content") or []
    ]


def counts(usage: dict[str, Any]) -> list[int]:
    return [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]


def chunks(streamed: str) -> list[dict[str, Any]]:
    lines = [line for line in streamed.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]
