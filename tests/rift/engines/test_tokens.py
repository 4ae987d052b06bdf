"""Prompts to ids and ids to text, with a tiny model's tokenizer: no engine runs."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.schema import Message
from rift.engines import InvalidRequest, tokens
from rift.engines.tokens import UNFINISHED_IDS_MAX, Tokenizer, VllmDecoder

pytestmark = pytest.mark.engine


# --- prompts to ids ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def test_a_prompt_is_one_user_turn_of_the_chat_template(hf: Any) -> None:
    tokenizer = Tokenizer(hf)
    ids = tokenizer.encode("the log", raw=False, tokens_max=100_000)
    assert ids == hf.apply_chat_template(
        [{"role": "user", "content": "the log"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == tokenizer.encode((Message(role="user", content="the log"),), raw=True, tokens_max=100_000)
    assert hf.decode(ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.encode("the log", raw=True, tokens_max=100_000) == hf.encode("the log")


def test_a_template_writes_its_own_special_tokens_and_a_raw_prompt_gets_them(tiny: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tiny)
    begin = "<|endoftext|>"
    hf.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, 0)]
    )
    tokenizer = Tokenizer(hf)
    assert tokenizer.encode("the log", raw=True, tokens_max=100_000)[0] == 0
    assert 0 not in tokenizer.encode("the log", raw=False, tokens_max=100_000)


def test_the_longest_token_counts_bytes_of_text(tiny: Path) -> None:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tiny)
    vocabulary = hf.backend_tokenizer.get_vocab(with_added_tokens=False)
    texts = [hf.backend_tokenizer.decode([token_id]) for token_id in vocabulary.values()]
    longest = max(len(text.encode()) for text in texts if "\ufffd" not in text)
    assert max(longest, len("<|endoftext|>")) == Tokenizer(hf).bytes_max
    hf.add_tokens(["水" * 20])
    assert Tokenizer(hf).bytes_max == 60


def test_a_prompt_that_cannot_fit_is_not_encoded(tiny: Path) -> None:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tiny)
    mark = "<|a_special_token|>"
    hf.add_special_tokens({"additional_special_tokens": [mark]})
    tokenizer = Tokenizer(hf)
    assert tokenizer.bytes_max == len(mark)
    # A special token is one token, however long its text is.
    assert len(tokenizer.encode(mark * 50, raw=True, tokens_max=50)) == 50
    with pytest.raises(InvalidRequest, match="the prompt has 51 tokens; the limit is 50"):
        tokenizer.encode("x" * 51, raw=True, tokens_max=50)
    tokenizer.backend = None
    with pytest.raises(InvalidRequest, match="at least 51 tokens; the limit is 50"):
        tokenizer.encode(mark * 50 + "x", raw=True, tokens_max=50)


@pytest.mark.parametrize("text", ["x", "the log is the only truth; ", " ", "水", "🌊", "\n\n", "a1-"])
def test_pieces_refuse_only_what_a_whole_encoding_would_refuse(
    hf: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 7)
    tokenizer = Tokenizer(hf)
    prompt = text * 300
    count = len(tokenizer.encode(prompt, raw=True, tokens_max=10_000))
    tokenizer.check_pieces(prompt, "prompt", tokens_max=count)
    with pytest.raises(InvalidRequest, match=r"prompt has at least .* tokens") as refused:
        tokenizer.check_pieces(prompt, "prompt", tokens_max=count // 2 - 1)
    assert refused.value.code == "prompt_too_long"
    assert count // 2 <= refused.value.tokens <= count, "as many as there are beyond doubt"
    counted: list[str] = []
    monkeypatch.setattr(tokenizer, "_count", lambda piece: counted.append(piece) or len(piece))
    with pytest.raises(InvalidRequest):
        tokenizer.check_pieces("x" * 10_000, "prompt", tokens_max=7)
    assert counted == ["x" * 7] * 3, "in pieces, and no more of them than it takes"


def test_without_a_chat_template_a_prompt_is_raw_and_messages_are_invalid(tiny: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny)
    plain.chat_template = None
    tokenizer = Tokenizer(plain)
    assert tokenizer.encode("the log", raw=False, tokens_max=100_000) == tokenizer.encode(
        "the log", raw=True, tokens_max=100_000
    )
    with pytest.raises(InvalidRequest) as rejected:
        tokenizer.encode((Message(role="user", content="the log"),), raw=False, tokens_max=100_000)
    assert (rejected.value.code, rejected.value.param) == ("no_chat_template", "messages")


def test_a_template_that_rejects_is_an_invalid_request(tiny: Path) -> None:
    from transformers import AutoTokenizer

    strict = AutoTokenizer.from_pretrained(tiny)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="roles must alternate") as rejected:
        Tokenizer(strict).encode((Message(role="user", content="a"),), raw=False, tokens_max=100_000)
    assert rejected.value.code == "invalid_messages"


@pytest.mark.parametrize(("prompt", "code"), [("", "empty_prompt"), ("a\ud800", "invalid_text")])
def test_a_prompt_without_ids_is_invalid(hf: Any, prompt: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as rejected:
        Tokenizer(hf).encode(prompt, raw=True, tokens_max=100_000)
    assert (rejected.value.code, rejected.value.param) == (code, "prompt")


def test_threads_may_encode_prompts(hf: Any) -> None:
    tokenizer = Tokenizer(hf)
    prompts = [f"{number} prompt tokens, " * 2000 for number in range(8)]
    alone = [tokenizer.encode(prompt, raw=False, tokens_max=100_000) for prompt in prompts]
    with ThreadPoolExecutor(8) as threads:
        together = list(
            threads.map(lambda prompt: tokenizer.encode(prompt, raw=False, tokens_max=100_000), prompts * 4)
        )
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
def test_the_pieces_and_the_flush_are_the_whole_text(hf: Any, text: str) -> None:
    tokenizer = Tokenizer(hf)
    decoder = tokenizer.decoder()
    assert decoded(decoder, tokenizer.encode(text, raw=True, tokens_max=100_000)) == text


@given(ids=st.lists(st.integers(0, 520), max_size=UNFINISHED_IDS_MAX - 1))
def test_ids_decode_one_by_one_as_all_at_once(hf: Any, ids: list[int]) -> None:
    """The highest ids are unknown to this tokenizer and those below 3 are special: neither has text."""
    tokenizer = Tokenizer(hf)
    decoder = tokenizer.decoder()
    assert decoded(decoder, ids) == hf.decode(ids, skip_special_tokens=True)


def test_an_endless_unfinished_character_is_flushed(hf: Any) -> None:
    tokenizer = Tokenizer(hf)
    (token_id,) = tokenizer.backend.encode("\ufffd").ids[:1]
    decoder = tokenizer.decoder()
    pieces = [decoder.feed(token_id) for _ in range(10 * UNFINISHED_IDS_MAX)]
    assert sum(bool(piece) for piece in pieces) == 10
    assert "".join(pieces) + decoder.flush() == tokenizer.backend.decode([token_id] * 10 * UNFINISHED_IDS_MAX)


def test_a_byte_fallback_tokenizer_survives_invalid_utf_8() -> None:
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


def test_special_tokens_are_text_only_if_requested(hf: Any) -> None:
    tokenizer = Tokenizer(hf)
    ids = [1, *tokenizer.encode("water 水", raw=True, tokens_max=100_000), 2]
    assert decoded(tokenizer.decoder(), ids) == "water 水"
    assert decoded(tokenizer.decoder(special=True), ids) == "<|im_start|>water 水<|im_end|>"
