"""Requests of every kind with marks in all that is a customer's secret, for a search of the logs."""

import os
import signal
import socket
from pathlib import Path
from typing import Any

import httpx

from tests.service import MODEL, Service

# In prompts, parameters, answers, bodies that are refused, headers, paths and keys.
MARK = "canary7f3a"

SCHEMA = {
    "type": "object",
    "properties": {"x": {"const": MARK}},
    "required": ["x"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": MARK, "schema": SCHEMA}}
MESSAGES = [{"role": "system", "content": MARK}, {"role": "user", "content": MARK}]
TOOL = {
    "type": "function",
    "function": {
        "name": MARK,
        "description": MARK,
        "parameters": {"type": "object", "properties": {MARK: {"type": "string"}}},
    },
}
CHAT = {"model": MODEL, "messages": MESSAGES, "user": MARK, "metadata": {"x": MARK}, "max_tokens": 3}
NATIVE = {"model": MODEL, "prompt": MARK, "parameters": {"max_tokens": 3, "stop": [MARK]}}
HEADERS = {"idempotency-key": MARK, "cookie": MARK, "user-agent": MARK, "x-canary": MARK}

VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/inference", NATIVE),
    ("/v1/inference", NATIVE | {"stream": True}),
    ("/v1/completions", {"model": MODEL, "prompt": MARK, "max_tokens": 3, "stop": MARK, "user": MARK}),
    ("/v1/chat/completions", CHAT | {"stop": MARK, "stream": True}),
    ("/v1/chat/completions", CHAT | {"response_format": FORMAT, "max_tokens": 60}),
    ("/v1/chat/completions", CHAT | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}),
    ("/v1/responses", {"model": MODEL, "input": MARK, "metadata": {"x": MARK}, "max_output_tokens": 3}),
]
INVALID: list[tuple[str, Any]] = [
    ("/v1/inference", NATIVE | {"model": MARK}),
    ("/v1/inference", NATIVE | {MARK: MARK}),
    ("/v1/inference", {"model": MODEL, "prompt": [MARK]}),
    ("/v1/inference", NATIVE | {"parameters": {"temperature": MARK}}),
    ("/v1/inference", {"model": MODEL, "prompt": f"{MARK} " * 9000}),
    ("/v1/chat/completions", CHAT | {"tool_choice": {"type": "function", "function": {"name": MARK}}}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": MARK, "content": MARK}]}),
    ("/v1/chat/completions", MARK),
]
RAW = (
    f"GET /{MARK} HTTP/2.0\r\n\r\n",
    f"GET /{MARK}%00 HTTP/1.1\r\nhost: x\r\n\r\n",
    f"GET / HTTP/1.1\r\nhost: x\r\nauthorization: Bearer\x01{MARK}\r\n\r\n",
    f"{MARK}\r\n\r\n",
    f"GET /{MARK} HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    f"POST /v1/inference HTTP/1.1\r\nhost: x\r\nx: {MARK * 4000}\r\n\r\n",
)


def send_all(service: Service) -> None:
    """Send requests that are answered, refused, cancelled and lost, and kill a worker under one."""
    with service.client() as client:
        answers = [client.post(path, json=body).text for path, body in VALID]
        assert sum(MARK in answer for answer in answers) >= 2, "answers have the mark too"
        once = client.post("/v1/inference", json=NATIVE, headers=HEADERS)
        other = NATIVE | {"prompt": f"{MARK} again"}
        again = client.post("/v1/inference", json=other, headers=HEADERS)
        assert (once.status_code, again.status_code) == (200, 422)
        for path, wrong in INVALID:
            assert client.post(path, json=wrong).status_code >= 400, wrong
        assert client.post("/v1/inference", content=f'{{"{MARK}'.encode()).status_code >= 400
        for path in (
            f"/v1/models/{MARK}",
            f"/{MARK}?{MARK}",
            f"/v1/inference/{MARK}",
            f"/v1/invoices/{MARK}",
        ):
            assert client.get(path).status_code in (400, 404), path
        cancel(client)
        lose_a_worker(service, client)
    for key in (f"rift_{MARK}_{MARK}", MARK, service.key[:-1], f"{service.key}{MARK}"):
        with service.client(key) as stranger:
            assert stranger.post("/v1/inference", json=NATIVE).status_code == 401
    address = httpx.URL(service.url)
    for head in RAW:
        with socket.create_connection((address.host, address.port or 80)) as connection:
            connection.sendall(head.encode())
            connection.settimeout(5)
            assert connection.recv(100), head[:40]


def cancel(client: httpx.Client) -> None:
    """Leave a stream of each kind at its begin, and delete a request that runs."""
    long = {"model": MODEL, "max_tokens": 900, "stream": True}
    for path, body in (
        ("/v1/chat/completions", long | {"messages": MESSAGES}),
        ("/v1/inference", NATIVE | {"parameters": {"max_tokens": 900}, "stream": True}),
    ):
        with client.stream("POST", path, json=body) as response:
            next(response.iter_bytes())
    background = NATIVE | {"parameters": {"max_tokens": 900}, "background": True}
    request = client.post("/v1/inference", json=background).json()["id"]
    assert client.delete(f"/v1/inference/{request}").status_code < 300


def lose_a_worker(service: Service, client: httpx.Client) -> None:
    """Kill the worker while it answers, and read the answer to its end from the next one."""
    (worker,) = [pid for pid in service.processes() if b"\0worker\0" in commandline(pid)]
    body = NATIVE | {"parameters": {"max_tokens": 20, "stop": [MARK]}, "stream": True}
    with client.stream("POST", "/v1/inference", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("event: token") and worker:
                os.kill(worker, signal.SIGKILL)
                worker = 0
        assert line == "", "the stream has ended"


def commandline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def secrets(service: Service) -> dict[str, bytes]:
    """Return what no log may have, by its name: the mark, the key and the broker's passwords."""
    files = [service.folder / "secret", *(service.folder / "nats" / "credentials").iterdir()]
    found = {"mark": MARK, "key": service.key.rpartition("_")[2]}
    found |= {file.name: file.read_text().strip() for file in files}
    return {name: text.encode() for name, text in found.items()}
