"""Workloads: the reader of each format, and its errors for invalid files."""

import gzip
from pathlib import Path

import pytest

from replay.backtest import traces
from replay.backtest.simulator import TraceRequest
from replay.backtest.traces import InvalidTrace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
MOONCAKE = '{"timestamp": 1500, "input_length": 6758, "output_length": 500, "hash_ids": [0]}\n'
SERVEGEN = "t_s,client,input_tokens,output_tokens,reason_tokens\n0.500,23,274,395,331\n0.250,37,235,0,0\n"


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_each_format_is_read_in_order_of_time_from_its_first_request(tmp_path: Path) -> None:
    azure = written(tmp_path, "a.csv", AZURE + "2023-11-16 18:15:48.1805900,396,109\n")
    assert traces.guessed(azure) == "azure"
    assert traces.read(azure, "azure") == [
        TraceRequest(0.0, 374, 44),
        TraceRequest(pytest.approx(1.5), 396, 109),
    ]
    mooncake = written(tmp_path, "m.jsonl", MOONCAKE + MOONCAKE.replace("1500", "2000"))
    assert traces.guessed(mooncake) == "mooncake"
    assert traces.read(mooncake, "mooncake") == [TraceRequest(0.0, 6758, 500), TraceRequest(0.5, 6758, 500)]
    servegen = written(tmp_path, "s.csv.gz", SERVEGEN)
    assert traces.guessed(servegen) == "servegen"
    assert traces.read(servegen, "servegen") == [TraceRequest(0.0, 235, 1), TraceRequest(0.25, 274, 395)]


TIMES = ("2023-11-16 18:15:46.6805900", "2023-11-16 18:15:48.1805900")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        TIMES,
        ("2024-05-10 00:00:00+00:00", "2024-05-10 00:00:01.500000+00:00"),
        ("2024-05-10 00:00:00.0099300+00:00", "2024-05-10 00:00:01.5099300+00:00"),
        ("2024-05-10T00:00:00Z", "2024-05-10T00:00:01.5Z"),
        ("2024-05-10T02:00:00+02:00", "2024-05-10T00:00:01.5Z"),
        ("2024-05-10 02:00:00 +0200", "2024-05-10 00:00:01.5 UTC"),
        ("2024-05-10 00:00:00", "2024-05-10 00:00:01.5"),
    ],
)
def test_times_are_read_with_and_without_zone_and_fraction(tmp_path: Path, first: str, second: str) -> None:
    text = f"TIMESTAMP,ContextTokens,GeneratedTokens\n{first},374,44\n{second},396,109\n"
    assert traces.read(written(tmp_path, "a.csv", text), "azure") == [
        TraceRequest(0.0, 374, 44),
        TraceRequest(pytest.approx(1.5), 396, 109),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "TIMESTAMP,ContextTokens,GeneratedTokens\n{0},374,44\n{1},396,109",
        "\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\r\n{0},374,44\r\n{1},396,109\r\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\r{0},374,44\r{1},396,109\r",
        "\nTIMESTAMP,ContextTokens,GeneratedTokens\n\n{0},374,44\n , ,\n{1},396,109\n\n\n",
        '"TIMESTAMP","ContextTokens","GeneratedTokens"\n"{0}","374","44"\n"{1}","396","109"\n',
        "TIMESTAMP, ContextTokens , GeneratedTokens\n{0}, 374 , 44\n{1}, 396, 109\n",
        "timestamp;contexttokens;generatedtokens\n{0};374;44\n{1};396;109\n",
        "TIMESTAMP\tContextTokens\tGeneratedTokens\n{0}\t374.0\t44.0\n{1}\t396\t109\n",
        'note,GeneratedTokens,TIMESTAMP,ContextTokens\n"a\nb",44,{0},374\nx,109,{1},396\n',
    ],
)
def test_csv_is_read_as_common_programs_write_it(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, "A.CSV", text.format(*TIMES))
    assert traces.guessed(path) == "azure"
    assert traces.read(path, "azure") == [
        TraceRequest(0.0, 374, 44),
        TraceRequest(pytest.approx(1.5), 396, 109),
    ]


def test_a_comma_is_a_point_between_semicolons(tmp_path: Path) -> None:
    text = "t_s;client;input_tokens;output_tokens\n0,25;x;374;44\n1,75;x;396;109,0\n"
    path = written(tmp_path, "s.csv", text)
    assert traces.read(path, traces.guessed(path)) == [
        TraceRequest(0.0, 374, 44),
        TraceRequest(1.5, 396, 109),
    ]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_mark_may_say_that_the_text_is_utf_16(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"\ufeff{AZURE}".encode(encoding))
    assert traces.guessed(path) == "azure"
    assert traces.read(path, "azure") == traces.read(written(tmp_path, "b.csv", AZURE), "azure")


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz", "m.ndjson"])
def test_json_lines_are_read_as_common_programs_write_them(tmp_path: Path, name: str) -> None:
    text = (
        '\ufeff{"output_length": 500.0, "timestamp": 1500.0, "input_length": 6758, "extra": {}}\r\n\r\n'
        ' {"timestamp": "2000", "input_length": "6758", "output_length": "500"} \r\n \n'
    )
    path = written(tmp_path, name, text)
    assert traces.guessed(path) == "mooncake"
    assert traces.read(path, "mooncake") == [TraceRequest(0.0, 6758, 500), TraceRequest(0.5, 6758, 500)]


def test_a_wrong_line_has_its_number_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'TIMESTAMP,ContextTokens,GeneratedTokens\n\n"x\ny",1,2\n')
    with pytest.raises(InvalidTrace, match=r"a\.csv:4: "):
        traces.read(path, "azure")
    for line in ("{", '{"hash_ids": ' + "[" * 5000):
        path = written(tmp_path, "m.jsonl", f"\n\n{line}")
        with pytest.raises(InvalidTrace, match=r"m\.jsonl:3: "):
            traces.read(path, "mooncake")


def test_the_logs_rows(tmp_path: Path) -> None:
    rows = [(7_000_000_000, 10, 20), (5_000_000_000, 1, 0)]
    assert traces.of_rows(rows) == [TraceRequest(0.0, 1, 1), TraceRequest(2.0, 10, 20)]


def test_thinning_keeps_whole_clients_and_the_same_ones(tmp_path: Path) -> None:
    lines = [f"{number}.0,{number % 40},{number % 40},5" for number in range(400)]
    path = written(tmp_path, "s.csv", "t_s,client,input_tokens,output_tokens\n" + "\n".join(lines))
    kept = traces.read(path, "servegen", thin=4)
    assert kept == traces.read(path, "servegen", thin=4)
    clients = {one.prompt_tokens for one in kept}
    assert clients == {client for client in range(40) if traces.keeps(str(client), 4)}
    assert 4 <= len(clients) <= 16
    assert len(kept) == 10 * len(clients)


@pytest.mark.parametrize(
    ("name", "kind", "text", "message"),
    [
        ("a.csv", "azure", AZURE + "yesterday,1,2\n", "a.csv:3: Invalid isoformat"),
        (
            "a.csv",
            "azure",
            AZURE + "2023-11-16 18:15:48,x,2\n",
            "a.csv:3: ContextTokens must be a whole number from 0 to 16777216, got 'x'",
        ),
        ("a.csv", "azure", AZURE + "2023-11-16 18:15:48,1\n", "a.csv:3: 2 values, expected are 3"),
        ("a.csv", "azure", "time,in,out\n", "a.csv:1: the columns are 'time,in,out'"),
        ("a.csv", "azure", AZURE.splitlines()[0], "a.csv: it contains no request"),
        ("m.jsonl", "mooncake", MOONCAKE + "{", "m.jsonl:2: Input data was truncated"),
        ("m.jsonl", "mooncake", '{"timestamp": 1}', "m.jsonl:1: .*input_length"),
        (
            "s.csv",
            "servegen",
            SERVEGEN + "-1,2,3,4\n",
            "s.csv:4: expected a time in seconds, got -1",
        ),
        (
            "s.csv",
            "servegen",
            SERVEGEN + "nan,2,3,4\n",
            "s.csv:4: expected a time in seconds, got nan",
        ),
        ("s.csv", "servegen", SERVEGEN + "1,2,-3,4\n", "s.csv:4: input_tokens must be .* from 0 to .*-3"),
        (
            "s.csv",
            "servegen",
            SERVEGEN + "1,2,3,1e20\n",
            "s.csv:4: output_tokens must be .* from 0 to .*1e20",
        ),
        ("s.csv.gz", "servegen", "", "s.csv.gz:1: the columns are ''"),
        ("x.csv", "parquet", "", "x.csv: the format 'parquet' is unknown; use one of azure"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(
    tmp_path: Path, name: str, kind: str, text: str, message: str
) -> None:
    with pytest.raises(InvalidTrace, match=message):
        traces.read(written(tmp_path, name, text), kind)


def test_a_broken_archive_and_text_that_is_none(tmp_path: Path) -> None:
    packed = written(tmp_path, "s.csv.gz", SERVEGEN)
    packed.write_bytes(packed.read_bytes()[:20])
    plain = tmp_path / "s.csv"
    plain.write_bytes(b"\xff\xfe\x00")
    wide = written(tmp_path, "wide.csv", f'"{"x" * 200_000}"')
    for path in (packed, plain, wide):
        with pytest.raises(InvalidTrace, match=rf"{path.name}: "):
            traces.read(path, "servegen")
        with pytest.raises(InvalidTrace, match=rf"{path.name}: "):
            traces.guessed(path)


def test_only_clients_can_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidTrace, match="names no clients"):
        traces.read(written(tmp_path, "a.csv", AZURE), "azure", thin=2)


def test_a_name_that_promises_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidTrace, match="--trace-format: azure"):
        traces.guessed(written(tmp_path, "trace.bin", ""))
