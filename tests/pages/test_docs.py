"""`/docs` in a real browser, and the API from a page of another origin."""

import json

import pytest

from rift.gateway.api.error_codes import by_status
from rift.gateway.api.routes import ROUTES
from tests.pages.chromium import Tab
from tests.service import Service

pytestmark = pytest.mark.slow


def test_every_route_is_shown_with_its_fields_and_answers(service: Service, tab: Tab) -> None:
    tab.open(service.url + "/docs")
    tab.until("document.querySelectorAll('section').length > 10")
    for route in ROUTES:
        title = f"{route.method} {route.path}"
        shown = tab.js(f"document.querySelector('[aria-label={json.dumps(title)}]').innerText")
        for status in (*route.answers, *by_status(route.errors)):
            assert f"\n{status}\t" in shown, title
        # Each code has a line of its own.
        assert ("\nqueue_full: " in shown) == ("submit" in route.errors), title
        for parameter in route.parameters:
            assert parameter["name"] in shown, title
    assert '"prompt": "Explain' in tab.js("document.querySelector('section pre').innerText")
    assert "`" not in tab.js("document.body.innerText")
    assert "max_tokens" in tab.js("document.getElementById('type-NativeParameters').innerText")
    broken = "[...document.querySelectorAll('a[href^=\"#\"]')].filter((a) => !document.querySelector(a.hash))"
    assert tab.js(f"{broken}.map((a) => a.hash)") == []


def test_a_missing_document_is_reported(service: Service, tab: Tab) -> None:
    tab.do("Network.enable")
    tab.do("Network.setBlockedURLs", urls=["*/openapi.json"])
    tab.open(service.url + "/docs")
    tab.until("document.getElementById('about').textContent.includes('cannot be shown')")


def test_a_page_of_another_origin_can_call_the_api_with_a_key(service: Service, tab: Tab) -> None:
    tab.open(service.url.replace("127.0.0.1", "localhost") + "/version")
    ask = """(async () => {{
      const response = await fetch("{url}/v1/inference", {{
        method: "POST",
        headers: {{
          Authorization: "Bearer {key}", "Content-Type": "application/json", "X-Stainless-Lang": "js",
          "X-Request-Id": "mine",
        }},
        body: JSON.stringify({{ model: "smollm2:135m", prompt: "Hi", parameters: {{ max_tokens: 3 }} }}),
      }});
      const names = ["x-request-id", "server-timing", "openai-processing-ms"];
      return [response.status, (await response.json()).object, ...names.map((n) => response.headers.get(n))];
    }})()"""
    found = tab.js(ask.format(url=service.url, key=service.key))
    assert found[:3] == [200, "inference", "mine"]
    assert "total;dur=" in found[3]
    assert found[4].isdigit()
    refused = tab.js(ask.format(url=service.url, key="none").replace(".object", ".error.code"))
    assert refused[:2] == [401, "invalid_api_key"]
    silent = f"fetch('{service.url}/health').then(() => 'read', () => 'kept from it')"
    assert tab.js(silent) == "kept from it"
    # The browser must complain about the last call.
    assert len(tab.complaints) == 1
    tab.complaints.clear()
