"""`vllm bench serve`, unmodified, with its three backends for OpenAI's APIs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_model
from tests.scripted import MODEL, Served

pytestmark = pytest.mark.engine

# The `vllm` command of the CPU wheel does not start.
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
PROMPTS = 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [
        ("openai", "/v1/completions"),
        ("openai-chat", "/v1/chat/completions"),
        ("openai-responses", "/v1/responses"),
    ],
)
def test_a_benchmark_counts_every_token(
    served: Served, tokenizer: Path, tmp_path: Path, backend: str, endpoint: str
) -> None:
    options = [
        "--backend", backend, "--base-url", served.url, "--endpoint", endpoint, "--model", MODEL,
        "--tokenizer", str(tokenizer), "--dataset-name", "random", "--random-input-len", "16",
        "--random-output-len", "4", "--num-prompts", str(PROMPTS), "--ignore-eos", "--disable-tqdm",
        "--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json",
        "--percentile-metrics", "ttft,tpot,itl,e2el",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OPENAI_API_KEY": served.key,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", BENCH, *options], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["completed"], found["failed"]) == (PROMPTS, 0)
    assert found["total_output_tokens"] == 4 * PROMPTS
    assert found["mean_ttft_ms"] > 0
