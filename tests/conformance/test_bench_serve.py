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

# The `vllm` command of the CPU wheel does not start. One process runs all backends: its imports take 10 s.
BENCH = """
import argparse, json, sys
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
for options in json.load(sys.stdin):
    main(parser.parse_args(options))
"""
PROMPTS = 12
ENDPOINTS = {
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
    "openai-responses": "/v1/responses",
}


@pytest.fixture(scope="module")
def results(scripted_gateway: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the result of each backend."""
    folder = tmp_path_factory.mktemp("results")
    tokenizer = tiny_model.make(folder / "model")
    runs = [
        [
            "--backend", backend, "--base-url", scripted_gateway.url, "--endpoint", endpoint,
            "--model", MODEL, "--tokenizer", str(tokenizer), "--dataset-name", "random",
            "--random-input-len", "16", "--random-output-len", "4", "--num-prompts", str(PROMPTS),
            "--ignore-eos", "--disable-tqdm", "--save-result", "--result-dir", str(folder),
            "--result-filename", f"{backend}.json", "--percentile-metrics", "ttft,tpot,itl,e2el",
        ]
        for backend, endpoint in ENDPOINTS.items()
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OPENAI_API_KEY": scripted_gateway.key,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", BENCH],
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("backend", ENDPOINTS)
def test_a_benchmark_counts_every_token(results: Path, backend: str) -> None:
    found = json.loads((results / f"{backend}.json").read_text())
    assert (found["completed"], found["failed"]) == (PROMPTS, 0)
    assert found["total_output_tokens"] == 4 * PROMPTS
    assert found["mean_ttft_ms"] > 0
