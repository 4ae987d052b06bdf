"""The samples of CLIENTS.md, as they are written there, against Rift."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rift import gateway
from tests.conformance import node
from tests.scripted import MODEL, End, Pause, Served, Tokens

pytestmark = pytest.mark.slow

PAGE = (Path(next(iter(gateway.__path__))) / "CLIENTS.md").read_text(encoding="utf-8")
HELLO = "Hello, world 🌊!"


def sample(section: str, at: int, served: Served) -> str:
    """Return a sample, with this server's address and model."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0] if section else PAGE
    block = re.findall(r"```(?:sh|python|js)\n(.*?)```", text, re.DOTALL)[at]
    assert isinstance(block, str)
    return block.replace("http://127.0.0.1:8000", served.url).replace("smollm2:135m", MODEL)


def run(folder: Path, served: Served, *command: str) -> str:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RIFT_KEY": served.key,
        "LLM_USER_PATH": str(folder),
        "LLM_LOAD_PLUGINS": "",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the {package} package is not installed")


def test_the_page_has_no_other_samples() -> None:
    found = re.findall(r"^## (.*)|^```(\w+)$", PAGE, re.MULTILINE)
    assert [title or language for title, language in found] == [
        "sh", "curl, with resume", "sh", "sh", "OpenAI's SDK for Python", "python", "python",
        "OpenAI's SDK for JavaScript", "js", "LangChain", "python", "Traces", "llm", "sh",
    ]  # fmt: skip


def test_the_key_and_the_models(tmp_path: Path, served: Served) -> None:
    (tmp_path / ".rift").mkdir()
    (tmp_path / ".rift" / "dev.key").write_text(served.key)
    models = json.loads(run(tmp_path, served, "bash", "-ec", sample("", 0, served)))
    assert [model["id"] for model in models["data"]] == [MODEL]


def test_curl_resumes_a_stream(tmp_path: Path, served: Served) -> None:
    words = [f" {number}" for number in range(6)]
    served.script = lambda accepted: [*map(Tokens, words[:3]), Pause(1.5), *map(Tokens, words[3:]), End()]
    rest = run(tmp_path, served, "bash", "-ec", sample("curl, with resume", 0, served))
    first = (tmp_path / "events.txt").read_text(encoding="utf-8")
    assert rest.startswith("lost\n")
    assert "event: done" not in first
    assert "event: done" in rest
    # Each token once.
    assert re.findall(r'"delta":"(.*?)"', first) == words[:3]
    assert re.findall(r'"delta":"(.*?)"', rest) == words[3:]
    assert len(served.accepted) == 1


def test_curl_repeats_a_request_that_runs_once(tmp_path: Path, served: Served) -> None:
    answers = [
        json.loads(run(tmp_path, served, "bash", "-ec", sample("curl, with resume", 1, served)))
        for _ in range(2)
    ]
    assert answers[0]["choices"][0]["message"]["content"] == HELLO
    assert answers[0]["id"] == answers[1]["id"]
    assert len(served.accepted) == 1


def test_openai_for_python(tmp_path: Path, served: Served) -> None:
    needs("openai")
    said = run(tmp_path, served, sys.executable, "-c", sample("OpenAI's SDK for Python", 0, served))
    assert said == f"{HELLO}\n12 tokens\n"
    said = run(tmp_path, served, sys.executable, "-c", sample("OpenAI's SDK for Python", 1, served))
    assert said == f"completed {HELLO}\n"


def test_openai_for_javascript(served: Served) -> None:
    script = sample("OpenAI's SDK for JavaScript", 0, served)
    assert node.run_text(script, {"RIFT_KEY": served.key}) == HELLO


def test_langchain(tmp_path: Path, served: Served) -> None:
    needs("langchain_openai")
    assert run(tmp_path, served, sys.executable, "-c", sample("LangChain", 0, served)) == HELLO


def test_llm(tmp_path: Path, served: Served) -> None:
    needs("llm")
    assert run(tmp_path, served, "bash", "-ec", sample("llm", 0, served)) == f"{HELLO}\n"
