"""A model's tokenizer: plain prompts to ids, output ids to text. What must not live here: tools, parsers,
requests; and vLLM, whose own tokenizer is another object, so that threads never meet in one.
"""

from typing import Any

from events.schema import Message
from rift.engines import InvalidRequest

# A UTF-8 character has at most 4 bytes, so 32 ids without one are no character in the making, and
# each further one would make the tokenizer decode all of them again.
UNFINISHED_IDS_MAX = 32


class Tokenizer:
    """The model's tokenizer and chat template, apart from vLLM's own: safe to call from threads."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend = tokenizer.backend_tokenizer
        # A tokenizer file may ask for truncation or padding; a prompt wants neither.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.silent_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self._hf = tokenizer
        self._template = str(tokenizer.chat_template or "")

    def decoder(self, *, special: bool = False) -> "VllmDecoder":
        return VllmDecoder(self.backend, frozenset() if special else self.silent_ids, special=special)

    def is_templated(self, prompt: str | tuple[Message, ...], *, raw: bool) -> bool:
        """Say whether the prompt goes through the chat template."""
        return not isinstance(prompt, str) or (bool(self._template) and not raw)

    def encode(self, prompt: str | tuple[Message, ...], *, raw: bool) -> list[int]:
        """Return the ids of a prompt whose turns are roles and words. Takes a second for 1 MB."""
        templated = self.is_templated(prompt, raw=raw)
        if isinstance(prompt, str):
            param = "prompt"
            turns = [{"role": "user", "content": prompt}]
        else:
            param = "messages"
            turns = [{"role": message.role, "content": message.content} for message in prompt]
        try:
            text = self._render(turns) if templated else turns[0]["content"]
            text.encode()  # half a surrogate pair is no text
            # The batch form releases the interpreter; a template writes its own special tokens.
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=not templated)
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{param} is not text: {error.reason}", code="invalid_text", param=param
            ) from error
        if not encoding.ids:
            raise InvalidRequest(f"{param} has no tokens", code="empty_prompt", param=param)
        ids: list[int] = encoding.ids
        return ids

    def _render(self, turns: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        if not self._template:
            raise InvalidRequest(
                "this model has no chat template; send a prompt instead of messages",
                code="no_chat_template",
                param="messages",
            )
        try:
            text: str = self._hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidRequest(
                f"this model's chat template refuses these messages: {error}",
                code="invalid_messages",
                param="messages",
            ) from error
        return text


class VllmDecoder:
    """The tokenizers library's own incremental decoder, without special tokens unless they are asked for.

    All that it returned and `flush` together are what decoding all ids at once gives. (Not where a
    byte-fallback tokenizer, like Llama 2's, is fed bytes that are no UTF-8, or after
    `UNFINISHED_IDS_MAX` ids without a whole character: there it stays a function of the ids alone.)
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
            if not str(error).startswith("InvalidRequest prefix"):
                raise
            # Bytes that were a character turn out to be none: go on behind them, as vLLM does.
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
