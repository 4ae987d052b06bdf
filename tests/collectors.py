"""A collector that keeps what it receives and answers as it is told."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, NamedTuple

Answer = tuple[int, dict[str, str], bytes]
ACCEPTED: Answer = (200, {}, b"{}")


class Received(NamedTuple):
    path: str
    headers: dict[str, str]
    message: Any


class Collecting:
    """`answers` are for the next messages. Any other message is accepted."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: list[Answer] = []
        self.received: list[Received] = []


@contextmanager
def collecting() -> Iterator[Collecting]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            collector.received.append(Received(self.path, headers, json.loads(body)))
            status, more, answer = collector.answers.pop(0) if collector.answers else ACCEPTED
            self.send_response(status)
            for name, value in (more | {"content-length": str(len(answer))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    collector = Collecting(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
