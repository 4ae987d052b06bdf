"""Drive one tab of Chromium over the DevTools protocol, and collect its complaints."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
START_S, WAIT_S = 30.0, 20.0

# Codes of keys that type no character.
CODES = {"Tab": 9, "Enter": 13}

# The layout shift as browsers measure it, except for an answer that scrolls.
SHIFTS = """
globalThis.shifted = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) {
    const moved = entry.sources.filter(({ node }) => !node?.parentElement?.closest("#output"));
    if (!entry.hadRecentInput && moved.length) shifted += entry.value;
  }
}).observe({ type: "layout-shift", buffered: true });
"""


class Tab:
    """`complaints` has the messages of the console and the browser, including policy violations."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._said, self._session = socket, 0, ""
        self.complaints: list[str] = []
        self.refused: list[str] = []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.do(f"{domain}.enable")
        self.do("Page.addScriptToEvaluateOnNewDocument", source=SHIFTS)

    def do(self, method: str, **params: Any) -> Any:
        self._said += 1
        message = {"id": self._said, "method": method, "params": params}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            heard = json.loads(self._socket.recv(timeout=WAIT_S))
            if heard.get("id") == self._said:
                assert "error" not in heard, (method, heard["error"])
                return heard["result"]
            self._hear(heard.get("method"), heard.get("params", {}))

    def _hear(self, method: str | None, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(params["args"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if (entry := params["entry"])["level"] in ("error", "warning"):
                # Network errors are expected: a test kills the gateway.
                found = self.refused if entry["source"] == "network" else self.complaints
                found.append(f"{entry['text']} {entry.get('url', '')}")

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """Evaluate and await an expression. The page's policy does not apply to it."""
        found = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({json.dumps(selector)}).textContent"))

    def until(self, expression: str, within_s: float = WAIT_S) -> Any:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if found := self.js(expression):
                return found
            time.sleep(0.02)
        raise AssertionError(f"not within {within_s} s: {expression}\n{self.js('document.body.innerText')}")

    def type(self, text: str) -> None:
        self.do("Input.insertText", text=text)

    def press(self, key: str, *, control: bool = False, shift: bool = False) -> None:
        modifiers = (2 if control else 0) | (8 if shift else 0)
        code = CODES.get(key) or ord(key.upper())
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        more = {"text": text} if text and not control else {}
        self.do("Input.dispatchKeyEvent", type="keyDown", **about, **more)
        self.do("Input.dispatchKeyEvent", type="keyUp", **about)

    def focused(self) -> str:
        return str(self.js("document.activeElement.id || document.activeElement.textContent.trim()"))

    def look(self, *, width: int, height: int, scheme: str = "light", motion: str = "no-preference") -> None:
        """Set the window's size and its user's preferences."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.do("Emulation.setDeviceMetricsOverride", **size)
        preferred = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        features = [{"name": name, "value": value} for name, value in preferred.items()]
        self.do("Emulation.setEmulatedMedia", features=features)

    def picture(self, file: Path) -> None:
        shot = self.do("Page.captureScreenshot", format="png", captureBeyondViewport=False)
        file.write_bytes(base64.b64decode(shot["data"]))

    def controls(self) -> list[tuple[str, str]]:
        """Return role and name of every focusable element, as a screen reader sees them."""
        found = []
        for node in self.do("Accessibility.getFullAXTree")["nodes"]:
            about = {one["name"]: one["value"].get("value") for one in node.get("properties", [])}
            if not node.get("ignored") and about.get("focusable"):
                found.append((node["role"]["value"], node.get("name", {}).get("value", "")))
        return [(role, name) for role, name in found if role not in ("RootWebArea", "MenuListPopup")]


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """Start Chromium with a profile in `folder`, or skip the test if it is not installed."""
    client = pytest.importorskip("websockets.sync.client", reason="the websockets package is not installed")
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip("Chromium is not installed (on Debian: apt-get install chromium)")
    options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--disable-gpu"]
    options += ["--no-first-run", "--disable-dev-shm-usage", "--disable-background-networking"]
    # Chromium's sandbox does not run as root.
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    with (folder / "log").open("wb") as log:
        browser = subprocess.Popen(
            [binary, *options, "about:blank"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        port, path = _listens(folder, browser)
        with client.connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as socket:
            yield Tab(socket)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()


def _listens(folder: Path, browser: "subprocess.Popen[bytes]") -> list[str]:
    deadline = time.monotonic() + START_S
    file = folder / "DevToolsActivePort"
    while time.monotonic() < deadline and browser.poll() is None:
        if file.exists() and len(lines := file.read_text().splitlines()) == 2:
            return lines
        time.sleep(0.05)
    raise AssertionError((folder / "log").read_text())
