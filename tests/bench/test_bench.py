"""Short runs of every benchmark: each ends, and has its figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rift.catalogue import Profile
from tests.bench import servers
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
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_log_against_the_client_library() -> None:
    result = bench("log", "--appends", "128", "--rounds", "1")
    assert set(result["ratios"]) == {"append", "append_64", "follow", "scan"}
    assert all(ratio > 0 for ratio in result["ratios"].values())


def test_appends_to_several_shards() -> None:
    result = bench("log", "--shards", "2", "--writers", "3", "--seconds", "0.3")
    assert [(row["servers"], row["shards"]) for row in result["ratios"]] == [(1, 2), (3, 2)]
    for row in result["ratios"]:
        assert row["appends_per_s"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["per_first"] == 1


def test_a_warehouse_from_the_archive() -> None:
    result = bench("replay", "--requests", "50000", "--log-requests", "500")
    assert result["segments"] == 3
    assert result["events"] > 50_000 * 7
    assert result["ratios"]["rebuild_per_table"] > 0
    assert result["ratios"]["peak_bytes"] < 2_500_000_000
    assert result["log"]["events"] == 500 * 43
    assert result["ratios"]["log_events_per_s"] > 0


def test_every_bill_of_a_trace_is_audited(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{number / 10},{number % 3},{100 + number},{number % 50}" for number in range(300)]
    trace.write_text("t_s,client,input_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    result = bench("bill", "--trace", str(trace))
    assert (result["accounts"], result["audited_equal"]) == (3, 3)
    assert result["total_nanousd"] == result["by_the_trace_nanousd"] > 0


def test_scaling_policies_with_present_and_absent_traces(tmp_path: Path) -> None:
    rows = [f"2023-11-16 18:{number // 60:02}:{number % 60:02}.0000000,500,200" for number in range(1800)]
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows)
    (tmp_path / "azure_llm_2023_conv.csv").write_text(text)
    only = ("--only", "bursty", "--only", "chat", "--only", "day")
    result = bench("scale", "--trace-folder", str(tmp_path), "--hours", "0.5", "--starts", "15,60", *only)
    rows = [(row["trace"], row["start_s"]) for row in result["ratios"]]
    assert rows == [("bursty", 15), ("bursty", 60), ("bursty, share 95", 60), ("chat", 15), ("chat", 60)]
    assert result["absent"] == ["servegen_deepseekr1_day.csv.gz"]
    for row in result["measured"]:
        assert row["gpu_seconds_per_knative"] > 0
        assert row["fixed"]["slo_attainment"] >= 0.98
        other = "static:16" if row["start_s"] == 15 else "oracle"
        assert len({row[policy]["requests"] for policy in ("default", "knative", other, "fixed")}) == 1


def test_a_gateways_streams() -> None:
    result = bench("gateway", "--streams", "20", "--seconds", "1")
    (row,) = result["held"]
    assert (row["streams"], row["errors"]) == (20, 0)
    assert 150 < row["tokens_per_s"] < 250
    assert 0 < row["delay_p50_ms"] < 1000
    assert result["slow_readers"]["errors"] == 0
    assert result["large_bodies"]["bodies"] > 0


def test_growth_with_open_requests() -> None:
    result = bench("growth", "--open", "4,8", "--fed", "200", "--seconds", "1")
    assert [(row["open"], row["errors"]) for row in result["open"]] == [(4, 0), (8, 0)]
    assert {row["role"] for row in result["ratios"]} == {"gateway", "worker", "nats-server", "control"}
    assert all(row["us_per_token"]["gateway"] > 0 for row in result["open"])
    assert 0 < result["fed"]["control_cores"] < 1


def test_a_server_without_syncs(tmp_path: Path) -> None:
    served = servers.Served(tmp_path, 4096, Profile())
    with servers.rift(served, tmp_path / "rift", durable=False, options=["--engine", "sim"]) as running:
        assert running.key
        configuration = (tmp_path / "rift" / "data" / "nats" / "nats.conf").read_text()
    assert "jetstream" in configuration
    assert "sync_interval" not in configuration


@pytest.mark.engine
def test_rift_against_the_engines_own_server_with_a_paced_engine() -> None:
    """The contended mode differs only in the engine's arguments."""
    arguments = ["--rounds", "1", "--seconds", "0.5", "--streams", "2", "--output-tokens", "8"]
    result = bench("serve", "--paced", "mi300x-llama4-maverick", *arguments)
    assert (result["mode"], result["profile"]) == ("paced", "mi300x-llama4-maverick")
    loads = [(row["output_tokens"], row["streams"]) for row in result["ratios"]]
    assert loads == [(8, 2)]
    for row in result["ratios"]:
        assert row["errors"] == 0
        assert row["tokens_per_s"] > 0
        assert row["front_cpu_per_token"] > 0
        assert row["native_ttft_p50"] > 0
    assert {cell["route"] for cell in result["rift"]} == {"completions", "inference"}
    for cell in result["rift"] + result["peer"]:
        assert cell["itl_p50_ms"] > 9.0
        # A step with two requests takes 9.9 ms, which the engine sleeps.
        assert 0 < cell["cpu_s_per_million"]["engine"] < 4_500
