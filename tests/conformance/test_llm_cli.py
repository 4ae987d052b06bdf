"""Simon Willison's `llm`, unmodified, with Rift configured as a model."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripted import MODEL, Served

pytestmark = pytest.mark.slow

MODELS = """
- model_id: rift
  model_name: "{model}"
  api_base: "{url}/v1"
  api_key_name: rift
  supports_schema: true
  supports_tools: true
"""


@pytest.fixture
def folder(tmp_path: Path, served: Served) -> Path:
    if importlib.util.find_spec("llm") is None:
        pytest.skip("the llm package is not installed")
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(model=MODEL, url=served.url))
    return tmp_path


def llm(folder: Path, key: str, *arguments: str) -> str:
    environment = {**os.environ, "LLM_USER_PATH": str(folder), "LLM_LOAD_PLUGINS": ""}
    command = [sys.executable, "-m", "llm", *arguments, "-m", "rift", "--key", key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_a_prompt(folder: Path, served: Served, options: list[str]) -> None:
    assert llm(folder, served.key, "prompt", "hi", "-s", "be brief", *options) == "Hello, world 🌊!"
    assert [turn.role for turn in served.accepted[0].input] == ["system", "user"]  # type: ignore[union-attr]


def test_a_conversation_continues(folder: Path, served: Served) -> None:
    llm(folder, served.key, "prompt", "hi")
    llm(folder, served.key, "prompt", "and now?", "-c")
    assert len(served.accepted[1].input) == 3


def test_a_schema(folder: Path, served: Served) -> None:
    said = llm(folder, served.key, "prompt", "hi", "--schema", "city, people int")
    assert said == '{"city": "Paris", "people": 2}'


def test_a_tool(folder: Path, served: Served) -> None:
    function = "def weather(city: str) -> str:\n    return 'rain in ' + city\n"
    said = llm(folder, served.key, "prompt", "hi", "--functions", function)
    assert "Hello, world 🌊!" in said
    assert served.accepted[0].parameters.tools[0].name == "weather"
