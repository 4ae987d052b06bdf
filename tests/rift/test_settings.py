"""Settings: served models with their replica bounds, and errors that name the setting."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from rift.launcher import share
from rift.settings import InvalidSettings, Scale, Settings, load

DEFAULT = "smollm2:135m"


def settings(tmp_path: Path, toml: str, **overrides: Any) -> Settings:
    file = tmp_path / "rift.toml"
    file.write_text(toml)
    return load(file, overrides)


@pytest.mark.parametrize(
    ("workers", "bounds"),
    [("3", (3, 3)), ('"3"', (3, 3)), ('"0..4"', (0, 4)), ('"2..2"', (2, 2)), ("64", (64, 64))],
)
def test_the_default_model_has_the_configured_workers(
    tmp_path: Path, workers: str, bounds: tuple[int, int]
) -> None:
    (scale,) = settings(tmp_path, f"workers = {workers}").scales().values()
    assert (scale.min, scale.max) == bounds


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8222",
        "https://nats:8222",
        "nats://nats:8222",
        "http://",
        "http://user:secret@nats:8222",
        "http://nats:0",
        "http://nats:65536",
        "http://nats:8222/varz?a=b",
        "http://nats:8222/ HTTP/1.1",
    ],
)
def test_a_monitoring_url_that_cannot_be_read_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidSettings, match=f"nats_monitor: must be http://HOST:PORT .*{re.escape(url)}"):
        settings(tmp_path, f'nats_monitor = "http://nats-0:8222,{url}"')


@pytest.mark.parametrize(
    ("toml", "option", "message"),
    [
        ('port = "x"', {"port": 0}, "port"),
        ("port = 70000", {"port": 0}, "port"),
        ("host = 1", {"host": "::1"}, "host"),
        ("host = ''", {"host": "::1"}, "host"),
        ('engine = "tpu"', {"engine": "sim"}, "engine"),
        ('model = "none"', {"model": "deepseek-v3"}, "model 'none' is not in the catalogue"),
        ('workers = "4..1"', {"workers": "2"}, "workers: must be N or MIN..MAX"),
        ('workers = "x"', {"workers": "2"}, "workers: must be N or MIN..MAX"),
        ("", {"workers": "0..4..5"}, "workers: must be N or MIN..MAX"),
        ('models = ["smollm2:135m"]', {}, "models: must be tables"),
        ("log_bytes_max = 9000000000000000000", {}, "log_bytes_max"),
    ],
)
def test_an_option_does_not_hide_an_invalid_setting(
    tmp_path: Path, toml: str, option: dict[str, Any], message: str
) -> None:
    """The processes of an installation do not all get the option, so another one would refuse the file."""
    with pytest.raises(InvalidSettings, match=message):
        settings(tmp_path, toml, **option)


def test_hardware_without_a_profile_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"hardware: .*'h100'; known: cpu, mi300x; .*profiles\.h100"):
        settings(tmp_path, 'hardware = "h100"')
    assert settings(tmp_path, 'hardware = "mi300x"').hardware == "mi300x"
    own = 'hardware = "h100"\n[models."m:1"]\nsource = "a/b"\ncontext_tokens = 512\nprompt_usd = "1"\n'
    own += 'output_usd = "1"\n[models."m:1".profiles.h100]\ngpus = 1\n'
    assert settings(tmp_path, own).hardware == "h100"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("10.1.2.3", "http://10.1.2.3:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("fe80::1", "http://[fe80::1]:8000"),
    ],
)
def test_the_url_of_a_gateway_on_all_addresses_is_one_that_clients_can_open(host: str, url: str) -> None:
    assert Settings(host=host).url() == url
    assert Settings(host=host).url(80) == url.replace("8000", "80")


def test_a_pipe_is_refused_instead_of_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "rift.toml")
    with pytest.raises(InvalidSettings, match=f"{pipe} is a pipe"):
        load(pipe, {})


def test_a_byte_order_mark_is_not_part_of_the_settings(tmp_path: Path) -> None:
    (file := tmp_path / "rift.toml").write_text("port = 1\n", encoding="utf-8-sig")
    assert load(file, {}).port == 1


def test_a_missing_file_is_named_without_the_numbers_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"none\.toml cannot be read: No such file or directory$"):
        load(tmp_path / "none.toml", {})


def test_each_server_of_a_cluster_has_its_monitoring_url(tmp_path: Path) -> None:
    assert Settings().monitors() == []
    urls = ["http://nats-0.nats:8222", "http://[::1]:8222/base"]
    assert settings(tmp_path, f'nats_monitor = "{", ".join(urls)},"').monitors() == urls


def test_by_default_one_worker_serves_the_default_model() -> None:
    assert load(None, {}).scales() == Settings().scales() == {DEFAULT: Scale(min=1, max=1)}


def test_scale_tables_serve_further_models(tmp_path: Path) -> None:
    toml = """
    workers = 2
    [scale."deepseek-r1"]
    max = 3
    idle_s = 60
    ttft_ms = 5000
    hour_usd_max = "47.76"
    [scale."llama4:maverick"]
    """
    served = settings(tmp_path, toml).scales()
    assert list(served) == [DEFAULT, "deepseek-r1", "llama4:maverick"]
    assert served["deepseek-r1"].hour_nanousd_max == 47_760_000_000
    assert served["llama4:maverick"] == Scale(min=0, max=1, idle_s=300, ttft_ms=2000)
    assert served["llama4:maverick"].hour_nanousd_max is None


def test_the_default_models_table_refines_or_replaces_workers(tmp_path: Path) -> None:
    rest = settings(tmp_path, f'[scale."{DEFAULT}"]\nidle_s = 5', workers="0..2")
    assert rest.scales() == {DEFAULT: Scale(min=0, max=2, idle_s=5)}
    whole = settings(tmp_path, f'[scale."{DEFAULT}"]\nmin = 1\nmax = 2')
    assert whole.scales() == {DEFAULT: Scale(min=1, max=2)}


def test_nothing_is_served_without_replicas_or_with_manual_workers(tmp_path: Path) -> None:
    assert settings(tmp_path, "workers = 0").scales() == {}
    assert settings(tmp_path, 'workers = 2\nfleet = "none"').scales() == {}


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("workers = 65", "$.workers"),
        ('workers = "x"', "workers: must be N or MIN..MAX"),
        (f"a = {'[' * 5000}", "recursion"),
        (f"port = {'9' * 5000}", "digits"),
        (
            'workers = "4..2"',
            "workers: must be N or MIN..MAX with MIN <= MAX <= 64, like 2 or \"0..4\", got '4..2'",
        ),
        ('workers = "0..65"', "got '0..65'"),
        ('[scale."gpt"]\nmax = 1', 'scale."gpt": no such model in the catalogue'),
        (
            '[scale."deepseek-r1"]\nmin = 2',
            'scale."deepseek-r1": min must not exceed max, got 2 and 1',
        ),
        ('[scale."deepseek-r1"]\nmost = 2', "most"),
        ('[scale."deepseek-r1"]\nhour_usd_max = "much"', "scale.\"deepseek-r1\".hour_usd_max: 'much'"),
        ('[scale."deepseek-r1"]\nhour_usd_max = "-1"', "must not be negative"),
        ('fleet = "cloud"', "$.fleet"),
        ("replicas = 3\nlog_replicas = 3", "the old name of log_replicas"),
        ("replicas = 9", "$.log_replicas"),
    ],
)
def test_errors_name_the_invalid_setting(tmp_path: Path, toml: str, words: str) -> None:
    with pytest.raises(InvalidSettings) as raised:
        settings(tmp_path, toml)
    assert words in str(raised.value)


def test_the_old_name_of_log_replicas_still_works(tmp_path: Path) -> None:
    assert settings(tmp_path, "replicas = 3") == settings(tmp_path, "log_replicas = 3")
    assert settings(tmp_path, "replicas = 3").log_replicas == 3


def test_two_settings_for_one_value_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="leave one of them out"):
        settings(tmp_path, f'[scale."{DEFAULT}"]\nmin = 1', workers="0..2")


@pytest.mark.parametrize(
    ("cores", "places", "wanted"),
    [([0, 1], 2, [[0], [1]]), ([4, 5, 6, 7], 2, [[4, 6], [5, 7]]), ([0, 1], 3, [[0], [1], [0]])],
)
def test_workers_of_one_machine_get_their_own_cores(
    cores: list[int], places: int, wanted: list[list[int]]
) -> None:
    assert [share(cores, place, places) for place in range(places)] == wanted
