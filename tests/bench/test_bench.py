"""The benchmark itself, run for moments: that it ends, and that its figures are there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.service import ROOT

pytestmark = pytest.mark.slow


def bench(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "ops" / "bench"), *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_log_beside_the_client_library() -> None:
    found = bench("log", "--appends", "128", "--rounds", "1")
    assert set(found["ratios"]) == {"append", "append_64", "follow", "scan"}
    assert all(ratio > 0 for ratio in found["ratios"].values())


def test_a_warehouse_from_the_archive() -> None:
    found = bench("replay", "--requests", "50000", "--log-requests", "500")
    assert found["segments"] == 3
    assert found["events"] > 50_000 * 7
    assert found["ratios"]["rebuild_per_table"] > 0
    assert found["ratios"]["peak_bytes"] < 2_500_000_000
    assert found["log"]["events"] == 500 * 43
    assert found["ratios"]["log_events_per_s"] > 0


def test_every_bill_of_a_trace_is_audited(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{number / 10},{number % 3},{100 + number},{number % 50}" for number in range(300)]
    trace.write_text("t_s,client,input_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    found = bench("bill", "--trace", str(trace))
    assert (found["accounts"], found["audited_equal"]) == (3, 3)
    assert found["total_nanousd"] == found["by_the_trace_nanousd"] > 0


def test_scaling_policies_on_a_trace_that_is_there_and_on_none(tmp_path: Path) -> None:
    rows = [f"2023-11-16 18:{number // 60:02}:{number % 60:02}.0000000,500,200" for number in range(1800)]
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows)
    (tmp_path / "azure_llm_2023_conv.csv").write_text(text)
    found = bench("scale", "--trace-folder", str(tmp_path), "--hours", "1", "--starts", "15")
    assert [(row["trace"], row["start_s"]) for row in found["ratios"]] == [("bursty", 15), ("chat", 15)]
    assert set(found["absent"]) == {"servegen_deepseekr1_day.csv.gz"}
    for row in found["measured"]:
        assert row["gpu_seconds_per_knative"] > 0
        assert row["default"]["requests"] == row["knative"]["requests"] == row["oracle"]["requests"]


def test_what_a_gateway_holds() -> None:
    found = bench("gateway", "--streams", "20", "--seconds", "1")
    (held,) = found["held"]
    assert (held["streams"], held["errors"]) == (20, 0)
    assert 150 < held["tokens_per_s"] < 250
    assert 0 < held["delay_p50_ms"] < 1000
    assert found["slow_readers"]["errors"] == 0
    assert found["large_bodies"]["bodies"] > 0


@pytest.mark.engine
def test_rift_beside_the_engines_own_server() -> None:
    found = bench("serve", "--rounds", "1", "--seconds", "1", "--streams", "1,4", "--not-durable")
    assert [row["streams"] for row in found["ratios"]] == [1, 4]
    for row in found["ratios"]:
        assert row["errors"] == 0
        assert row["tokens_per_s"] > 0
        assert row["front_cpu_per_token"] > 0
    assert {cell["route"] for cell in found["rift"]} == {"completions", "inference"}
    assert all("engine" in cell["cpu_s_per_million"] for cell in found["rift"] + found["peer"])
