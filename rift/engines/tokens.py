"""A model's tokenizer: plain prompts to ids, output ids to text.

Must not live here: tools, parsers, requests, and vLLM. vLLM has a tokenizer of its own, so two threads
never share one.
"""

from typing import Any

from events.schema import Message
from rift.engines import InvalidRequest, PromptTooLong
from rift.engines.prompt_limits import check_bytes, check_tokens, param_of

# A UTF-8 character has at most 4 bytes, so 32 ids without a character are garbage. Each further id would make
# the tokenizer decode all of them again.
UNFINISHED_IDS_MAX = 32

PIECE_CHARACTERS = 64 * 1024


class Tokenizer:
    """The model's tokenizer and chat template, separate from vLLM's: safe to call from threads."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend = tokenizer.backend_tokenizer
        # A tokenizer file may turn on truncation or padding; both would change the prompt.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.silent_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self.bytes_max = longest_token(tokenizer.backend_tokenizer)
        self._hf = tokenizer
        self._template = str(tokenizer.chat_template or "")

    def decoder(self, *, special: bool = False) -> "VllmDecoder":
        return VllmDecoder(self.backend, frozenset() if special else self.silent_ids, special=special)

    def is_templated(self, prompt: str | tuple[Message, ...], *, raw: bool) -> bool:
        """Return whether the prompt goes through the chat template."""
        return not isinstance(prompt, str) or (bool(self._template) and not raw)

    def encode(self, prompt: str | tuple[Message, ...], *, raw: bool, tokens_max: int) -> list[int]:
        """Return the ids of a prompt whose turns have only a role and text. Takes seconds for 1 MB."""
        templated = self.is_templated(prompt, raw=raw)
        param = param_of(prompt)
        if isinstance(prompt, str):
            turns = [{"role": "user", "content": prompt}]
        else:
            turns = [{"role": message.role, "content": message.content} for message in prompt]
        try:
            text = self._render(turns) if templated else turns[0]["content"]
            size = len(text.encode())  # raises for half a surrogate pair
            check_bytes(size, param, tokens_max=tokens_max, token_bytes_max=self.bytes_max)
            # A template writes its own special tokens.
            ids = self._ids(text, param, special=not templated, tokens_max=tokens_max)
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{param} is not valid text: {error.reason}", code="invalid_text", param=param
            ) from error
        if not ids:
            raise InvalidRequest(f"{param} is empty: it has no tokens", code="empty_prompt", param=param)
        return ids

    def check_pieces(self, text: str, param: str, *, tokens_max: int) -> None:
        """Raise PromptTooLong if a text has more than `tokens_max` tokens beyond doubt, in little memory.

        The text is encoded in pieces. A cut can change some tokens beside it, but never double their number.
        """
        count = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            count += self._count(piece)
            if count > 2 * tokens_max:
                raise PromptTooLong(-(-count // 2), param, tokens_max=tokens_max)

    def _count(self, text: str) -> int:
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=False)
        return len(encoding)

    def _ids(self, text: str, param: str, *, special: bool, tokens_max: int) -> list[int]:
        """Return the ids of a text that has at most `tokens_max` tokens. Raises PromptTooLong."""
        # The batch form releases the interpreter.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=special)
        if (count := len(encoding)) > tokens_max:
            # A list of millions of ids would hold the interpreter for a part of a second. The error's frames
            # can live long, and an encoding takes a hundred times the memory of its text.
            del encoding
            check_tokens(count, param, tokens_max=tokens_max)
        ids: list[int] = encoding.ids
        return ids

    def _render(self, turns: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        if not self._template:
            raise InvalidRequest(
                "this model has no chat template: send a prompt instead of messages",
                code="no_chat_template",
                param="messages",
            )
        try:
            text: str = self._hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            reason = template_words(error) or "it cannot be rendered with them"
            raise InvalidRequest(
                f"this model's chat template rejects these messages: {reason}",
                code="invalid_messages",
                param="messages",
            ) from error
        return text


def longest_token(backend: Any) -> int:
    """Return the bytes of text that the vocabulary's longest token stands for.

    A byte-level vocabulary writes each byte as one character, except in added tokens.
    """
    is_byte_level = "ByteLevel" in repr(backend.decoder)
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    longest = max((len(token) if is_byte_level else len(token.encode()) for token in vocabulary), default=1)
    return max([longest, *(len(token.content.encode()) for token in added.values())])


def template_words(error: BaseException) -> str | None:
    """Return what a chat template says when it rejects a request; None if the template itself fails."""
    from jinja2 import TemplateError

    # Its subclasses are about syntax and unknown variables.
    return str(error) if type(error) is TemplateError else None


class VllmDecoder:
    """The incremental decoder of the tokenizers library, by default without special tokens.

    Its pieces and `flush` together equal the text of all ids decoded at once. There are two exceptions, and
    in both the text still depends on the ids alone: a byte-fallback tokenizer, like Llama 2's, fed with
    invalid UTF-8, and UNFINISHED_IDS_MAX ids without a whole character.
    """

    def __init__(self, backend: Any, silent_ids: frozenset[int], *, special: bool = False) -> None:
        self._backend = backend
        self._silent_ids = silent_ids
        self._special = special
        self._unfinished: list[int] = []
        self._restart()

    def feed(self, token_id: int) -> str:
        if token_id in self._silent_ids:
            return ""
        try:
            text: str | None = self._stream.step(self._backend, token_id)
        except Exception as error:
            if not str(error).startswith("Invalid prefix"):
                raise
            # The bytes turned out not to be a character: continue after them, as vLLM does.
            return self._restart() + self.feed(token_id)
        self._unfinished.append(token_id)
        if text is None:
            return self._restart() if len(self._unfinished) >= UNFINISHED_IDS_MAX else ""
        self._unfinished.clear()
        return text

    def flush(self) -> str:
        text: str = self._backend.decode(self._unfinished, skip_special_tokens=not self._special)
        return text

    def _restart(self) -> str:
        from tokenizers.decoders import DecodeStream

        text = self.flush()
        self._unfinished.clear()
        self._stream = DecodeStream(skip_special_tokens=not self._special)
        return text
