"""The shipped catalogue is valid, prices are exact integers, and vLLM knows every argument."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from events import subjects
from rift import catalogue
from rift.catalogue import InvalidCatalogue

PROFILES = [
    pytest.param(model, profile, id=f"{name}-{hardware}")
    for name, model in catalogue.shipped().items()
    for hardware, profile in model.profiles.items()
]


def entry(**fields: Any) -> dict[str, Any]:
    return {"source": "./model", "context_tokens": 4096, "prompt_usd": "0.10", "output_usd": "0.35"} | fields


def test_the_shipped_catalogue_has_the_published_prices() -> None:
    prices = {
        name: tuple(
            catalogue.nanousd_per_token(price, where=name) for price in (model.prompt_usd, model.output_usd)
        )
        for name, model in catalogue.shipped().items()
    }
    assert prices == {
        "smollm2:135m": (10, 20),
        "llama4:maverick": (100, 350),
        "deepseek-v3": (150, 400),
        "deepseek-r1": (150, 400),
    }


def test_every_shipped_model_has_a_profile() -> None:
    assert PROFILES
    assert all(model.profiles and model.title for model in catalogue.shipped().values())


@given(st.integers(0, 10**9 - 1), st.integers(0, 4))
def test_a_price_in_whole_nanousd_per_token_is_exact(nanousd: int, zeros: int) -> None:
    usd = f"{nanousd // 1000}.{nanousd % 1000:03}" + "0" * zeros
    assert catalogue.nanousd_per_token(usd, where="here") == nanousd


@given(st.decimals(min_value=0, max_value=999_999, places=6))
@example(Decimal("0.0005"))
def test_any_other_price_is_refused_and_never_rounded(usd: Decimal) -> None:
    try:
        nanousd = catalogue.nanousd_per_token(f"{usd:f}", where="here")
    except InvalidCatalogue:
        assert usd % Decimal("0.001")
    else:
        assert Decimal(nanousd) == usd * 1000


@pytest.mark.parametrize(
    "usd", ["", "free", "-0.10", "0,10", "0.0001", "NaN", "Infinity", "1e-9", "1e3", " 1", "1000000", "٣"]
)
def test_an_invalid_price_is_refused_with_its_path(usd: str) -> None:
    with pytest.raises(InvalidCatalogue, match=r"models\.mine\.prompt_usd"):
        catalogue.load({"mine": entry(prompt_usd=usd)})


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"UPPER": entry()}, "matching regex"),
        ({"a b": entry()}, "matching regex"),
        ({"": entry()}, "matching regex"),
        ({"mine": entry(context_tokens=8)}, "context_tokens"),
        ({"mine": entry(prompt_usd=0.1)}, "prompt_usd"),
        ({"mine": entry(profile={})}, "profile"),
        ({"mine": entry(profiles={"cpu": {"arguments": {}}})}, "arguments"),
        ({"mine": {"source": "./model"}}, "required"),
        ({"a.b": entry(), "a-b": entry()}, "share one subject"),
        ({"mine": entry(context_tokens=2**64)}, "context_tokens"),
        ({"mine": entry(profiles={"cpu": {"gpus": 2**63}})}, "gpus"),
        ({"mine": entry(profiles={"cpu": {"args": {"max_num_seqs": 10**20}}})}, "args"),
        ({"mine": entry(profiles={"cpu": {"sim": {"running_max": 10**20}}})}, "running_max"),
        ({"mine": entry(profiles={"cpu": {"gpus": 100, "gpu_hour_usd": "999999999"}})}, "the most is"),
    ],
)
def test_an_invalid_entry_is_refused(entries: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidCatalogue, match=words):
        catalogue.load(entries)


def test_the_default_of_a_sampling_parameter_keeps_its_type() -> None:
    """vLLM refuses `top_k` as a float."""
    sampling = {"top_k": 40, "temperature": 0.7}
    loaded = catalogue.load({"mine": entry(sampling=sampling)})["mine"].sampling
    assert {name: (type(value), value) for name, value in loaded.items()} == {
        "top_k": (int, 40),
        "temperature": (float, 0.7),
    }


@pytest.mark.parametrize(("name", "slug"), [("smollm2:135m", "smollm2-135m"), ("a.b_c", "a-b-c"), ("x", "x")])
def test_a_slug_is_one_token_of_a_subject(name: str, slug: str) -> None:
    assert subjects.slug(name) == slug


def flags(args: dict[str, catalogue.Argument]) -> list[str]:
    words = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")  # torch and vLLM, of one another, when they are imported
@pytest.mark.parametrize(("model", "profile"), PROFILES)
def test_vllm_accepts_every_argument_of_a_profile(
    model: catalogue.Model,
    profile: catalogue.Profile,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check with the parser of vLLM's command line, which knows types and choices, and as arguments."""
    # An engine that ran in this process before sets this, and vLLM would then look for the weights.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    wanted = {"max_model_len": model.context_tokens, "disable_log_stats": True, **profile.args}
    words = flags(dict(profile.args) | {"model": model.source, "max_model_len": model.context_tokens})
    try:
        parsed = AsyncEngineArgs.from_cli_args(parser.parse_args([*words, "--disable-log-stats"]))
    except SystemExit:
        pytest.fail(capsys.readouterr().err[-300:])
    direct = AsyncEngineArgs(model=model.source, **wanted)
    assert {name: getattr(direct, name) for name in wanted} == {
        name: getattr(parsed, name) for name in wanted
    }


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model", "profile"), PROFILES)
def test_vllm_knows_every_environment_variable_of_a_profile(
    model: catalogue.Model, profile: catalogue.Profile
) -> None:
    import vllm.envs

    del model
    others = {"TORCH_COMPILE_DISABLE"}
    assert {name for name in profile.env if name not in vllm.envs.environment_variables} <= others


def test_a_replica_costs_the_hourly_price_of_its_gpus() -> None:
    profile = catalogue.shipped()["deepseek-r1"].profiles["mi300x"]
    assert (profile.gpus, profile.hour_nanousd) == (8, 8 * 1_990_000_000)
    assert catalogue.shipped()["smollm2:135m"].profiles["cpu"].hour_nanousd == 0
    entry = {"source": "x", "context_tokens": 16, "prompt_usd": "1", "output_usd": "1"}
    for wrong in ("2 USD", "-1"):
        with pytest.raises(InvalidCatalogue) as raised:
            catalogue.load({"m": {**entry, "profiles": {"cpu": {"gpu_hour_usd": wrong}}}})
        assert str(raised.value).startswith("models.m.profiles.cpu.gpu_hour_usd: ")
