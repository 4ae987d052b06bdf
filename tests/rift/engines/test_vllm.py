"""The real engine: vLLM with a tiny model, once for all tests, and once more to see it die."""

import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.schema import Message, Parameters
from rift.catalogue import Profile
from rift.engines import Engine, EngineFailed, Invalid, Step
from rift.engines.prepare import digest_of
from rift.engines.vllm import UNFINISHED_IDS_MAX, VllmDecoder, VllmEngine, _Tokenizer
from tests.rift.engines.conftest import MODEL, start, stop

psutil = pytest.importorskip("psutil")  # it comes with vLLM
pytestmark = [pytest.mark.engine, pytest.mark.anyio]

EOS = 2
GREEDY = Parameters(temperature=0.0, ignore_eos=True)


async def steps(
    engine: Engine,
    prompt: Sequence[int],
    output: Sequence[int] = (),
    parameters: Parameters = GREEDY,
    *,
    max_tokens: int = 16,
    salt: str = "account",
    attempt: str = "attempt",
) -> list[Step]:
    found: list[Step] = []

    def emit(step: Step) -> bool:
        found.append(step)
        return True

    await engine.generate(attempt, prompt, output, parameters, max_tokens=max_tokens, salt=salt, emit=emit)
    return found


def ids_of(got: list[Step]) -> list[int]:
    return [token_id for step in got for token_id in step.token_ids]


async def assert_idle(engine: VllmEngine) -> None:
    """Nothing is left here nor, after it had time to read the abort, in vLLM's core."""
    assert engine._core.running == 0
    with anyio.fail_after(2):
        await engine._llm.pause_generation(mode="wait")
    await engine._llm.resume_generation()


# --- answers -------------------------------------------------------------------------------------


async def test_it_says_what_it_is(engine: VllmEngine, tiny: Path) -> None:
    assert (engine.name, engine.simulated, engine.slots) == ("vllm", False, 64)
    assert engine.context_tokens == MODEL.context_tokens
    assert engine.model_digest == digest_of(tiny)


async def test_it_runs_to_max_tokens_and_only_the_last_step_has_a_finish(engine: VllmEngine) -> None:
    got = await steps(engine, [5, 6, 7], max_tokens=40)
    assert len(ids_of(got)) == 40
    assert [step.finish for step in got] == [None] * (len(got) - 1) + ["length"]


async def test_a_continuation_follows_prompt_and_logged_ids(engine: VllmEngine) -> None:
    prompt, output = [5, 6, 7], [300, 301, 302]
    continued = ids_of(await steps(engine, prompt, output))
    assert continued == ids_of(await steps(engine, prompt + output))
    assert continued != ids_of(await steps(engine, prompt))
    assert len(continued) == 16


async def test_the_end_of_sequence_stops_an_answer_unless_it_is_ignored(engine: VllmEngine) -> None:
    answers: dict[bool, list[list[Step]]] = {True: [], False: []}

    async def ask(number: int, ignore_eos: bool) -> None:
        parameters = Parameters(temperature=2.0, seed=number, ignore_eos=ignore_eos)
        got = await steps(
            engine, [number + 9], (), parameters, max_tokens=300, attempt=f"{number}{ignore_eos}"
        )
        answers[ignore_eos].append(got)

    async with anyio.create_task_group() as group:
        for number in range(32):
            group.start_soon(ask, number, True)
            group.start_soon(ask, number, False)
    assert [len(ids_of(got)) for got in answers[True]] == [300] * 32
    stopped = [got for got in answers[False] if got[-1].finish == "stop"]
    assert stopped
    assert all(ids_of(got)[-1] == EOS and EOS not in ids_of(got)[:-1] for got in stopped)


async def test_a_seed_repeats_an_answer(engine: VllmEngine) -> None:
    async def ask(seed: int) -> list[int]:
        return ids_of(
            await steps(engine, [5, 6], (), Parameters(temperature=1.5, seed=seed, ignore_eos=True))
        )

    assert await ask(1) == await ask(1) != await ask(2)


async def test_the_prefix_cache_is_shared_within_a_salt_only(engine: VllmEngine) -> None:
    prompt = [3 + number % 400 for number in range(1500)]
    first = await steps(engine, prompt, salt="one")
    again = await steps(engine, prompt, salt="one")
    other = await steps(engine, prompt, salt="other")
    assert [first[0].cached_tokens, other[0].cached_tokens] == [0, 0]
    assert again[0].cached_tokens > 1000
    assert not any(step.cached_tokens for step in again[1:])


# --- parameters ----------------------------------------------------------------------------------


async def test_every_parameter_reaches_vllm(engine: VllmEngine) -> None:
    given_values = {
        "temperature": 0.5,
        "top_p": 0.8,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
    }
    callers_own = {"max_tokens", "stop", "raw"}
    assert set(Parameters.__struct_fields__) == set(given_values) | callers_own, "a new one needs a mapping"
    sampling = engine._sampling(msgspec.convert(given_values, Parameters), 40)
    assert {name: getattr(sampling, name) for name in given_values} == given_values
    assert (sampling.max_tokens, sampling.detokenize, sampling.stop) == (40, False, [])


async def test_what_a_request_leaves_open_is_the_models_own_default(engine: VllmEngine) -> None:
    assert engine._sampling(Parameters(), 4).temperature == 0.7
    assert engine._sampling(Parameters(temperature=0.0), 4).temperature == 0.0
    assert engine._sampling(Parameters(), 4).top_p == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 2**70),
        ("min_p", 1.5),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
    ],
)
async def test_a_value_out_of_range_is_invalid_by_its_name(
    engine: VllmEngine, name: str, value: float
) -> None:
    with pytest.raises(Invalid, match=name) as refused:
        await steps(engine, [5], (), msgspec.structs.replace(Parameters(), **{name: value}))
    assert (refused.value.code, refused.value.param) == ("invalid_value", name)


@pytest.mark.parametrize(
    "parameters",
    [
        Parameters(top_k=2**63 - 1),
        Parameters(seed=2**63 - 1),
        Parameters(seed=-(2**63)),
        Parameters(repetition_penalty=1e308, presence_penalty=-2.0, frequency_penalty=-2.0, top_k=1),
        Parameters(repetition_penalty=1e-308),
        Parameters(top_p=1e-300),
        Parameters(min_p=1.0, temperature=0.01),
    ],
)
async def test_extreme_but_valid_values_do_not_kill_it(engine: VllmEngine, parameters: Parameters) -> None:
    assert ids_of(await steps(engine, [5, 6], [7], parameters, max_tokens=4))
    assert len(ids_of(await steps(engine, [5, 6], max_tokens=4))) == 4


# --- limits --------------------------------------------------------------------------------------


async def test_a_prompt_that_leaves_no_room_is_invalid(engine: VllmEngine) -> None:
    for prompt, output in (([5] * MODEL.context_tokens, []), ([5] * (MODEL.context_tokens - 1), [5])):
        with pytest.raises(Invalid, match="16384 tokens") as refused:
            await steps(engine, prompt, output)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


async def test_the_end_of_the_context_ends_an_answer(engine: VllmEngine) -> None:
    got = await steps(engine, [5] * (MODEL.context_tokens - 3), max_tokens=16)
    assert len(ids_of(got)) == 3
    assert got[-1].finish == "length"


async def test_ids_that_the_model_does_not_have_are_invalid(engine: VllmEngine) -> None:
    for prompt in ([], [999_999], [-1]):
        with pytest.raises(Invalid):
            await steps(engine, prompt)


# --- ends before the end -------------------------------------------------------------------------


async def test_who_wants_no_more_has_the_request_aborted(engine: VllmEngine) -> None:
    found: list[Step] = []

    def emit(step: Step) -> bool:
        found.append(step)
        return len(found) < 3

    await engine.generate("unwanted", [5], [], GREEDY, max_tokens=16_000, salt="a", emit=emit)
    assert len(found) == 3
    await assert_idle(engine)


async def test_what_emit_raises_ends_its_own_request_only(engine: VllmEngine) -> None:
    others: list[list[Step]] = []

    def emit(step: Step) -> bool:
        raise ZeroDivisionError

    async def other(number: int) -> None:
        others.append(await steps(engine, [number], max_tokens=200, attempt=f"other-{number}"))

    async with anyio.create_task_group() as group:
        group.start_soon(other, 6)
        group.start_soon(other, 7)
        await anyio.sleep(0.02)
        with pytest.raises(ZeroDivisionError):
            await engine.generate("raises", [5], [], GREEDY, max_tokens=16_000, salt="a", emit=emit)
    assert [len(ids_of(found)) for found in others] == [200, 200]
    await assert_idle(engine)


async def test_cancelling_the_reader_aborts_the_request(engine: VllmEngine) -> None:
    for delay_s in (0.0, 0.0005, 0.002, 0.1):
        with anyio.move_on_after(delay_s) as scope:
            await steps(engine, [5], max_tokens=16_000, attempt=f"cancelled-{delay_s}")
        assert scope.cancelled_caught
    await assert_idle(engine)


async def test_a_killed_engine_fails_its_requests_and_leaves_no_process(tiny: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    doomed = await start(tiny)
    children = set(psutil.Process().children(recursive=True)) - before
    (core,) = (child for child in children if "EngineCore" in child.name())

    async def ask() -> None:
        with pytest.raises(EngineFailed):
            await steps(doomed, [5], max_tokens=16_000)

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await anyio.sleep(0.1)
        os.kill(core.pid, signal.SIGKILL)
    with pytest.raises(EngineFailed):
        await steps(doomed, [5])
    await stop(doomed)
    await doomed.close()
    left = [child for child in children if child.is_running() and "tracker" not in " ".join(child.cmdline())]
    assert left == []


async def test_an_engine_that_cannot_start_says_why(tiny: Path) -> None:
    with pytest.raises(EngineFailed, match="no_such_argument"):
        await VllmEngine.start(tiny, MODEL, Profile(args={"no_such_argument": 1}))


# --- prompts to ids ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def test_a_prompt_is_one_user_turn_of_the_chat_template(hf: Any) -> None:
    tokenizer = _Tokenizer(hf)
    ids = tokenizer.encode("the log", raw=False)
    assert ids == hf.apply_chat_template(
        [{"role": "user", "content": "the log"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == tokenizer.encode((Message(role="user", content="the log"),), raw=True)
    assert hf.decode(ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.encode("the log", raw=True) == hf.encode("the log")


def test_a_template_writes_its_own_special_tokens_and_a_raw_prompt_gets_them(tiny: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tiny)
    begin = "<|endoftext|>"
    hf.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, 0)]
    )
    tokenizer = _Tokenizer(hf)
    assert tokenizer.encode("the log", raw=True)[0] == 0
    assert 0 not in tokenizer.encode("the log", raw=False)


def test_a_role_that_the_template_does_not_know_is_not_lost(hf: Any) -> None:
    tokenizer = _Tokenizer(hf)
    developer = tokenizer.encode((Message(role="developer", content="be short"),), raw=False)
    assert developer == tokenizer.encode((Message(role="system", content="be short"),), raw=False)


def test_without_a_chat_template_a_prompt_is_raw_and_messages_are_invalid(tiny: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny)
    plain.chat_template = None
    tokenizer = _Tokenizer(plain)
    assert tokenizer.encode("the log", raw=False) == tokenizer.encode("the log", raw=True)
    with pytest.raises(Invalid) as refused:
        tokenizer.encode((Message(role="user", content="the log"),), raw=False)
    assert (refused.value.code, refused.value.param) == ("no_chat_template", "messages")


def test_a_template_that_refuses_is_the_senders_to_mend(tiny: Path) -> None:
    from transformers import AutoTokenizer

    strict = AutoTokenizer.from_pretrained(tiny)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(Invalid, match="roles must alternate") as refused:
        _Tokenizer(strict).encode((Message(role="user", content="a"),), raw=False)
    assert refused.value.code == "invalid_messages"


@pytest.mark.parametrize(("prompt", "code"), [("", "empty_prompt"), ("a\ud800", "invalid_text")])
def test_what_gives_no_ids_is_invalid(hf: Any, prompt: str, code: str) -> None:
    with pytest.raises(Invalid) as refused:
        _Tokenizer(hf).encode(prompt, raw=True)
    assert (refused.value.code, refused.value.param) == (code, "prompt")


def test_prompts_may_be_encoded_in_threads(hf: Any) -> None:
    tokenizer = _Tokenizer(hf)
    prompts = [f"{number} prompt tokens, " * 2000 for number in range(8)]
    alone = [tokenizer.encode(prompt, raw=False) for prompt in prompts]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda prompt: tokenizer.encode(prompt, raw=False), prompts * 4))
    assert together == alone * 4


# --- ids to text ---------------------------------------------------------------------------------


def decoded(decoder: VllmDecoder, ids: Sequence[int]) -> str:
    return "".join(map(decoder.feed, ids)) + decoder.flush()


@pytest.mark.parametrize(
    "text",
    [
        " leading",
        "  two",
        "水は流れる",
        "🌊🙂",
        "👩\u200d👩\u200d👧",
        "e\u0301",
        "\ufffd",
        "a\n\n\tb ",
        "¿Dónde?",
    ],
)
def test_pieces_and_rest_are_the_whole_text(hf: Any, text: str) -> None:
    tokenizer = _Tokenizer(hf)
    decoder = VllmDecoder(tokenizer.backend, tokenizer.silent_ids)
    assert decoded(decoder, tokenizer.encode(text, raw=True)) == text


@given(ids=st.lists(st.integers(0, 520), max_size=UNFINISHED_IDS_MAX - 1))
def test_any_ids_decode_as_all_at_once_would(hf: Any, ids: list[int]) -> None:
    """The highest ids are none of this tokenizer; those below 3 are special. Neither has a text."""
    tokenizer = _Tokenizer(hf)
    decoder = VllmDecoder(tokenizer.backend, tokenizer.silent_ids)
    assert decoded(decoder, ids) == hf.decode(ids, skip_special_tokens=True)


def test_an_endless_unfinished_character_is_not_kept_for_ever(hf: Any) -> None:
    tokenizer = _Tokenizer(hf)
    (token_id,) = tokenizer.backend.encode("\ufffd").ids[:1]
    decoder = VllmDecoder(tokenizer.backend, tokenizer.silent_ids)
    pieces = [decoder.feed(token_id) for _ in range(10 * UNFINISHED_IDS_MAX)]
    assert sum(bool(piece) for piece in pieces) == 10
    assert "".join(pieces) + decoder.flush() == tokenizer.backend.decode([token_id] * 10 * UNFINISHED_IDS_MAX)


def test_a_byte_fallback_tokenizer_survives_bytes_that_are_no_text() -> None:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"<unk>": 0, "▁a": 1, "b": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    water = [3 + byte for byte in "水".encode()]
    assert decoded(VllmDecoder(backend, frozenset()), [1, 2, *water, 1]) == "ab水 a"
    assert decoded(VllmDecoder(backend, frozenset()), [1, *water, 3 + 0xFF, 2, 1]) == "a水\ufffdb a"
    assert decoded(VllmDecoder(backend, frozenset()), [1, *water, 3 + 0xFF]) == "a水\ufffd"


async def test_a_seed_and_a_prompt_of_several_steps_do_not_harm_the_engine(engine: VllmEngine) -> None:
    """vLLM reads a long prompt in steps of `max_num_batched_tokens`: 2,048 here, 256 by the catalogue."""
    prompt = [5 + at % 200 for at in range(5_000)]

    async def answer(seed: int, salt: str) -> list[int]:
        parameters = Parameters(seed=seed, temperature=1.0, ignore_eos=True)
        return ids_of(await steps(engine, prompt, [], parameters, max_tokens=12, salt=salt))

    first, again, other = await answer(1, "first"), await answer(1, "again"), await answer(2, "other")
    assert len(first) == 12
    assert first == again
    assert first != other
