"""`rift backtest`: its output and its errors."""

import importlib.util
import json
from pathlib import Path

import msgspec
import pytest

from replay.backtest.run import Result
from rift.cli import main
from tests.service import Service

PROFILE = ("--profile", "mi300x-deepseek-r1")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rows = [f"{number},{number % 3},500,{50 + number % 100}" for number in range(600)]
    path = tmp_path / "trace.csv"
    path.write_text("t_s,client,input_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    return path


def test_every_field_as_json(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backtest", "--trace", str(trace), *PROFILE, "--start-s", "30", "--json"]) == 0
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert list(found) == [field.name for field in msgspec.structs.fields(Result)]
    assert (found["policy"], found["requests"]) == ("default", 600)
    assert 0.9 < found["slo_attainment"] < 1
    assert error == "", "no progress bar without a terminal"


def test_the_frontier_lists_and_draws_every_policy(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["backtest", "--trace", str(trace), *PROFILE, "--frontier", "--start-s", "15"]
    assert main([*arguments, "--after-s", "60", "--max", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    policies = [one["policy"] for one in found]
    assert policies[:2] == ["default, share 0", "default, share 90"]
    assert {"knative:70", "static:1", "oracle"} <= set(policies)
    assert {one["requests"] for one in found} == {540}
    if importlib.util.find_spec("matplotlib") is not None:
        assert main([*arguments, "--plot", str(tmp_path / "x.png")]) == 0
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        assert "knative:70" in capsys.readouterr().out


def test_text_output_is_a_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backtest", "--trace", str(trace), *PROFILE, "--policy", "knative"]) == 0
    assert "slo_attainment" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--trace", "TRACE", "--profile", "h100"), "no hardware profile is called 'h100'; there are mi300x"),
        (("--trace", "TRACE", *PROFILE, "--policy", "hpa"), "the policy 'hpa' is unknown"),
        (("--trace", "TRACE", *PROFILE, "--policy", "none.toml"), "none.toml"),
        (("--trace", "TRACE", *PROFILE, "--policy", "static:0"), "600 requests wait, and the policy starts"),
        (("--trace", "TRACE", *PROFILE, "--trace-format", "mooncake"), "trace.csv:1: "),
        (("--trace", "TRACE", *PROFILE, "--trace-format", "log"), "reads Rift's own log"),
        (("--trace", "TRACE", *PROFILE, "--thin", "0"), "--thin: must be 1"),
        (("--trace", "TRACE", *PROFILE, "--start-s", "-1"), "--start-s"),
        (("--trace", "TRACE", *PROFILE, "--ttft-ms", "0"), "--ttft-ms"),
        (("--trace", "TRACE", *PROFILE, "--share", "101"), "--share must be from 0 to 100"),
        (("--trace", "TRACE", *PROFILE, "--max", "0"), "--max at least 1"),
        (("--trace", "TRACE", *PROFILE, "--after-s", "9999"), "--after-s must be from 0 to"),
        (("--trace", "nowhere.csv", *PROFILE), "nowhere.csv"),
        (PROFILE, "--model, or a file with --trace"),
        ((*PROFILE, "--trace-format", "azure"), "name it with --trace"),
    ],
)
def test_errors_name_the_invalid_input(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert main(["backtest", *(str(trace) if one == "TRACE" else one for one in arguments)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_requests_can_come_from_the_log(tmp_path: Path) -> None:
    service = Service(tmp_path / ".rift", "--engine", "sim").start()
    try:
        with service.client() as client:
            for _ in range(3):
                body = {"model": "smollm2:135m", "prompt": "Hello", "parameters": {"max_tokens": 8}}
                assert client.post("/v1/inference", json=body).status_code == 200
        named = ("backtest", "--profile", "cpu-smollm2-135m", "--model")
        done = service.rift(*named, "smollm2:135m", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["requests"] == 3
        none = service.rift(*named, "o'hara")
        assert (none.returncode, "it contains no request" in none.stderr) == (1, True)
    finally:
        service.stop()
