"""Headers for browsers on pages and answers. `tests/pages` uses a real browser."""

import re
from importlib.resources import files

import httpx
import pytest

from rift.gateway.asgi import static_files
from tests.scripted import MODEL, Served

FOLDER = files("rift.gateway.asgi") / "static"
ASK = {"access-control-request-method": "POST", "origin": "https://elsewhere.example"}
# Both pages must load over slow connections.
PAGE_BYTES_MAX = {"index": 25_000, "docs": 16_000}


@pytest.mark.parametrize("path", static_files.PAGES)
def test_a_page_is_served_without_a_key_under_a_strict_policy(served: Served, path: str) -> None:
    with httpx.Client(base_url=served.url) as client:
        response = client.get(path)
        assert response.status_code == 200
        assert response.content == (FOLDER / static_files.PAGES[path][0]).read_bytes()
        policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in response.headers
        again = client.get(path, headers={"if-none-match": f'W/"other", {response.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == response.headers["etag"]
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(response.content))
        assert client.post(path).status_code == 405


def test_pages_are_small_and_comply_with_the_policy() -> None:
    texts = {name: (FOLDER / name).read_text() for name, _ in static_files.PAGES.values()}
    for page, most in PAGE_BYTES_MAX.items():
        assert sum(len(texts[name]) for name in (f"{page}.html", f"{page}.js", "style.css")) <= most
    for name, text in texts.items():
        assert not re.search(r"innerHTML|insertAdjacent|document\.write|\beval\b", text), name
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script>|https?://(?!www\.w3\.org)", text), name


@pytest.mark.parametrize("path", ["/v1/inference", "/v1/models", "/v1/nowhere", "/openapi.json"])
def test_pages_of_any_origin_may_call_the_api(served: Served, path: str) -> None:
    with served.client() as client:
        leave = client.options(path, headers=ASK)
        assert leave.status_code == 204
        assert leave.headers["access-control-allow-origin"] == "*"
        assert leave.headers["access-control-allow-methods"] == "GET, POST, DELETE"
        allowed = leave.headers["access-control-allow-headers"].split(", ")
        assert {"authorization", "content-type", "idempotency-key", "last-event-id", "*"} <= set(allowed)
        assert "access-control-allow-credentials" not in leave.headers
        for answer in (client.get(path), client.get(path, headers={"authorization": "Bearer no"})):
            assert answer.headers["access-control-allow-origin"] == "*"
            assert answer.headers["access-control-expose-headers"] == "*"
        assert client.options(path).status_code in (404, 405), "nobody asked for leave"


def test_other_paths_send_no_cors_headers(served: Served) -> None:
    with served.client() as client:
        assert client.options("/health", headers=ASK).status_code == 405
        for path in ("/health", "/", "/v1"):
            assert "access-control-allow-origin" not in client.get(path).headers


def test_server_timing_has_the_durations_known_so_far(served: Served) -> None:
    body = {"model": MODEL, "prompt": "hi"}
    with served.client() as client:
        whole = client.post("/v1/inference", json=body)
        later = client.get(f"/v1/inference/{whole.json()['id']}")
        stream = client.post("/v1/inference", json=body | {"stream": True})
        resumed = client.get(f"/v1/inference/{whole.json()['id']}/events")
        chat = client.post("/v1/chat/completions", json={"model": MODEL, "messages": [said]})
        refused = client.post("/v1/inference", json={})
    for answer in (whole, later, chat):
        assert timing(answer).keys() == {"app", "queue", "ttft", "total"}
    told = whole.json()["timing"]
    assert {f"{name}_ms": ms for name, ms in timing(whole).items() if name != "app"} == pytest.approx(
        told, abs=0.051
    )
    assert {"app", "queue"} <= timing(stream).keys()
    assert "app" in timing(resumed)
    assert timing(refused).keys() == {"app"}


said = {"role": "user", "content": "hi"}


def timing(response: httpx.Response) -> dict[str, float]:
    found = re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"])
    return {name: float(ms) for name, ms in found}
