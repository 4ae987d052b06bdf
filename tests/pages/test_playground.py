"""The playground in a real browser: used, interrupted, and compared with the log."""

import os
import signal
from decimal import Decimal
from itertools import pairwise

import pytest

from tests.pages.chromium import Tab
from tests.pages.conftest import SLEEPY
from tests.rift.test_launcher import role
from tests.rift.test_limits import key_of
from tests.service import Service, until

pytestmark = pytest.mark.slow

# The page's status messages, in order.
LISTEN = """
globalThis.told = [];
for (const id of ["status", "left"]) {
  const place = document.getElementById(id);
  new MutationObserver(() => told.push(place.textContent))
    .observe(place, { childList: true, characterData: true, subtree: true });
}
"""
ENDED = "document.getElementById('send').disabled === false"
PROMPT = "Explain quantum computing to a 12-year-old."


def enter(tab: Tab, service: Service) -> None:
    """Use only the keyboard: the focus is on the key's field first, then on the prompt."""
    tab.open(service.url + "/")
    tab.until("document.activeElement.id === 'key'")
    tab.type(service.key)
    tab.press("Enter")
    tab.until("document.activeElement.id === 'prompt'")
    tab.until("!document.getElementById('simulated').hidden")
    tab.js(LISTEN)


def charged(service: Service, request: str) -> dict[str, object]:
    return until(
        service,
        "select state, charge_nanousd, prompt_tokens, output_tokens from requests "
        f"where request_id = '{request}' and state not in ('queued', 'running')",
    )


def shows_the_bill(tab: Tab, service: Service) -> dict[str, object]:
    """Compare the answer and its charge on the page with the log, and return the bill's row."""
    request = tab.text("#request")
    row = charged(service, request)
    assert Decimal(tab.text("#charge").removeprefix("$")) * 10**9 == row["charge_nanousd"]
    assert tab.text("#used") == f"{row['prompt_tokens']} / {row['output_tokens']}"
    with service.client() as client:
        whole = client.get(f"/v1/inference/{request}").json()["output"]
    assert tab.text("#text") == whole.lstrip()
    return row


def test_a_sleeping_model_wakes_and_a_killed_gateway_costs_no_token(service: Service, tab: Tab) -> None:
    enter(tab, service)
    tab.type(PROMPT)
    tab.press("Tab")
    assert tab.focused() == "model"
    for letter in "sl":
        tab.press(letter)
    tab.until(f"document.getElementById('model').value === '{SLEEPY}'")
    tab.press("Tab", shift=True)
    tab.js("shifted = 0")
    tab.press("Enter", control=True)
    tab.until("document.getElementById('text').textContent.length > 100", within_s=30)
    told = tab.js("told")
    assert "Starting the model" in told
    assert told.index("Starting the model") < told.index("Running")
    left = [int(words.split()[1]) for words in told if words.startswith("about")]
    # A replica that begins late, on a busy machine, raises the estimate.
    assert any(after < before for before, after in pairwise(left)), f"it counts down: {told}"
    assert "Connection lost" not in told

    (gateway,) = [pid for pid in service.processes() if role(pid) == "gateway"]
    os.kill(gateway, signal.SIGKILL)
    tab.until("told.includes('Connection lost')")
    tab.until(ENDED, within_s=40)
    assert tab.text("#status") == "Finished: max tokens reached"
    assert shows_the_bill(tab, service)["output_tokens"] == 300
    assert tab.js("shifted") < 0.001, "the page lies still while an answer streams"
    assert tab.text("#ttft").endswith(" ms")
    assert tab.text("#speed").endswith(" tokens/s")


def test_stop_ends_the_request_and_shows_what_it_costs(service: Service, tab: Tab) -> None:
    enter(tab, service)
    tab.type(PROMPT)
    while tab.focused() != "send":
        tab.press("Tab")
    tab.press("Enter")
    tab.until("document.activeElement.id === 'stop'")
    tab.until("document.getElementById('text').textContent.length > 20")
    tab.press(" ")
    tab.until(ENDED)
    assert tab.text("#status") == "Stopped"
    assert tab.focused() == "send", "the focus is not lost with the button"
    row = shows_the_bill(tab, service)
    assert row["state"] == "cancelled"
    assert 0 < int(str(row["output_tokens"])) < 300


def test_the_key_is_kept_in_the_tab_alone_and_forgotten(service: Service, tab: Tab) -> None:
    enter(tab, service)
    assert tab.js("Object.values(sessionStorage)") == [service.key]
    assert tab.js("localStorage.length + document.cookie.length") == 0
    assert service.key not in str(tab.js("document.documentElement.outerHTML"))
    tab.open(service.url + "/")
    tab.until("document.activeElement.id === 'prompt'")
    tab.js("document.getElementById('forget').click()")
    assert tab.focused() == "key"
    assert tab.js("sessionStorage.length") == 0


def test_refusals_show_the_services_message(service: Service, tab: Tab) -> None:
    tab.open(service.url + "/")
    tab.until("document.activeElement.id === 'key'")
    tab.type("<b>not-a-key</b>")
    tab.press("Enter")
    tab.until("document.getElementById('refused').textContent === 'this API key is not valid here'")
    tab.js("document.getElementById('key').value = ''")
    enter(tab, service)
    tab.type(PROMPT)
    tab.js("document.getElementById('tokens').value = '99999'")
    tab.press("Enter", control=True)
    tab.until("!document.getElementById('problem').hidden")
    assert tab.text("#problem").startswith("This model's maximum context length is 8192 tokens")
    assert tab.text("#status") == "Failed"


def test_earlier_requests_can_be_read_again(service: Service, tab: Tab) -> None:
    with service.client() as client:
        asked = client.post(
            "/v1/inference",
            json={"model": "smollm2:135m", "prompt": "Hi", "parameters": {"max_tokens": 9}},
        ).json()
    enter(tab, service)
    tab.until("document.getElementById('recent').childElementCount > 0")
    tab.js(f"document.querySelector('#recent [title=\"{asked['id']}\"]').click()")
    tab.until(ENDED)
    tab.until("document.getElementById('charge').textContent !== '–'")
    assert tab.text("#text") == asked["output"].lstrip()
    assert tab.text("#request") == asked["id"]


def test_text_that_no_header_can_hold_is_rejected_as_a_key(service: Service, tab: Tab) -> None:
    tab.open(service.url + "/")
    tab.until("document.activeElement.id === 'key'")
    tab.type(service.key + "\N{EN DASH}")
    tab.press("Enter")
    tab.until("!document.getElementById('refused').hidden")
    assert tab.text("#refused").startswith("This is not a key; one begins with rift_")


# A proxy sets its own x-request-id. The first event arrives after `release()`, or never after `lose()`.
NAMED = """
const { get } = Headers.prototype;
Headers.prototype.get = function (name) {
  return name === "x-request-id" ? "proxy-1" : get.call(this, name);
};
const { getReader } = ReadableStream.prototype;
ReadableStream.prototype.getReader = function (...given) {
  const reader = getReader.apply(this, given);
  const read = reader.read.bind(reader);
  reader.read = () => released.then(read);
  return reader;
};
globalThis.ended = [];
globalThis.released = new Promise((done, lost) => { globalThis.release = done; globalThis.lose = lost; });
released.catch(() => {});
const direct = fetch;
globalThis.fetch = (path, options = {}) => {
  if (options.method === "DELETE") ended.push(path);
  return direct(path, options);
};
"""


def test_an_id_set_by_a_proxy_is_not_taken_for_the_requests(service: Service, tab: Tab) -> None:
    enter(tab, service)
    tab.js(NAMED)
    tab.type(PROMPT)
    tab.press("Enter", control=True)
    tab.until("document.activeElement.id === 'prompt' && !document.getElementById('stop').disabled")
    tab.js("new Promise((done) => setTimeout(done, 500))")
    tab.js("document.getElementById('stop').click()")
    assert (tab.text("#request"), tab.js("ended")) == ("–", [])
    tab.js("release()")
    tab.until(ENDED)
    assert tab.text("#status") == "Stopped"
    assert tab.js("ended") == [f"/v1/inference/{tab.text('#request')}"]
    shows_the_bill(tab, service)


def test_a_connection_that_breaks_before_there_is_an_id_is_not_resumed(service: Service, tab: Tab) -> None:
    enter(tab, service)
    tab.js(NAMED)
    tab.type(PROMPT)
    tab.press("Enter", control=True)
    tab.js("lose()")
    tab.until("!document.getElementById('problem').hidden")
    assert tab.text("#problem").startswith("The connection broke before the request had an id.")
    assert tab.text("#status") == "Failed"


# The next list of requests is `answer` once it exists; later lists come from the gateway.
LISTED = """
globalThis.answer = new Promise((done) => { globalThis.give = done; });
const real = fetch;
globalThis.fetch = (path, ...more) => {
  if (!path.startsWith("/v1/inference?")) return real(path, ...more);
  globalThis.fetch = real;
  return answer;
};
"""
ROW = "{ id: 'req_row', model: 'm', status: 'finished', created: 1, usage: null, charge: null }"
PAGE = f"give(Response.json({{ data: [{ROW}], has_more: true }}))"
BUSY = "give(Response.json({ error: { message: 'too busy' } }, { status: 503 }))"
MORE = "document.getElementById('more')"


def listed(tab: Tab, button: str, answer: str) -> None:
    tab.js(f"(() => {{ {LISTED} }})()")
    tab.js(f"document.getElementById('{button}').click()")
    tab.js(answer)


def test_a_failed_older_page_is_reported_and_can_be_retried(service: Service, tab: Tab) -> None:
    enter(tab, service)
    listed(tab, "again", PAGE)
    tab.until(f"!{MORE}.hidden")
    for answer, said in (
        (BUSY, "too busy"),
        ("give(Promise.reject(new TypeError()))", "The gateway cannot be reached."),
    ):
        listed(tab, "more", answer)
        tab.until(f"document.getElementById('note').textContent === '{said}'")
        assert tab.js(f"[document.getElementById('note').hidden, {MORE}.hidden]") == [False, False]
        assert tab.js("document.querySelectorAll('#recent [title=req_row]').length") == 1
    listed(tab, "more", PAGE)
    tab.until("document.querySelectorAll('#recent [title=req_row]').length === 2")
    assert tab.js("document.getElementById('note').hidden")


def test_a_list_that_comes_late_is_not_shown_to_the_next_key(service: Service, tab: Tab) -> None:
    other = key_of(service, "next")
    enter(tab, service)
    listed(tab, "again", "")
    tab.js("document.getElementById('forget').click()")
    tab.js("document.getElementById('note').textContent = ''")
    tab.type(other)
    tab.press("Enter")
    tab.until("document.getElementById('note').textContent === 'None yet.'")
    tab.js(PAGE)
    tab.js("new Promise((done) => setTimeout(done, 300))")
    assert tab.js("document.querySelectorAll('#recent [title=req_row]').length") == 0
    assert tab.text("#note") == "None yet."
    assert tab.js(f"{MORE}.hidden")


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_used_in_any_light_and_at_any_width(
    service: Service, tab: Tab, width: int, scheme: str
) -> None:
    tab.look(width=width, height=800, scheme=scheme, motion="reduce")
    for path in ("/", "/docs"):
        tab.open(service.url + path)
        if path == "/":
            enter(tab, service)
        else:
            tab.until("document.querySelectorAll('section').length > 10")
        assert tab.js("document.documentElement.scrollWidth") <= width, "nothing is cut at the side"
        assert tab.js("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
        colours = {name: tab.js(COLOUR.format(name=name)) for pair in READ for name in pair}
        for text, ground in READ:
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground, scheme)
        assert luminance(colours["paper"]) > 0.5 if scheme == "light" else luminance(colours["paper"]) < 0.05


# Each text colour and its background.
READ = [
    ("ink", "paper"), ("ink", "card"), ("soft", "paper"), ("soft", "card"), ("accent", "paper"),
    ("accent", "card"), ("on-accent", "accent"), ("bad", "bad-paper"),
]  # fmt: skip
COLOUR = """(() => {{
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--{name}");
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
}})()"""


def luminance(colour: list[int]) -> float:
    """Return the contrast as WCAG 2 defines it."""
    parts = [part / 255 for part in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[int], other: list[int]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_control_has_a_name_and_shows_that_it_has_the_focus(service: Service, tab: Tab) -> None:
    tab.open(service.url + "/")
    tab.until("document.activeElement.id === 'key'")
    assert ("textbox", "API key") in tab.controls()
    enter(tab, service)
    controls = tab.controls()
    assert {("textbox", "Prompt"), ("combobox", "Model"), ("button", "Send")} <= set(controls)
    assert all(name.strip() for _, name in controls), controls
    seen = []
    while (now := tab.focused()) not in seen:
        seen.append(now)
        assert tab.js("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2, now
        tab.press("Tab")
    assert {"prompt", "model", "temperature", "tokens", "send", "output", "again", "forget"} <= set(seen)
    tab.open(service.url + "/docs")
    tab.until("document.querySelectorAll('section').length > 10")
    assert all(name.strip() for _, name in tab.controls()), tab.controls()
