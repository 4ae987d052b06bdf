"""A model's tokenizer: plain prompts to ids, output ids to text.

Must not live here: tools, parsers, requests, and vLLM. vLLM has a tokenizer of its own, so two threads
never share one.
"""

from typing import Any

from events.schema import Message
from rift.engines import InvalidRequest

# A UTF-8 character has at most 4 bytes, so 32 ids without a character are garbage. Each further id would make
# the tokenizer decode all of them again.
UNFINISHED_IDS_MAX = 32


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
        self._hf = tokenizer
        self._template = str(tokenizer.chat_template or "")

    def decoder(self, *, special: bool = False) -> "VllmDecoder":
        return VllmDecoder(self.backend, frozenset() if special else self.silent_ids, special=special)

    def is_templated(self, prompt: str | tuple[Message, ...], *, raw: bool) -> bool:
        """Return whether the prompt goes through the chat template."""
        return not isinstance(prompt, str) or (bool(self._template) and not raw)

    def encode(self, prompt: str | tuple[Message, ...], *, raw: bool) -> list[int]:
        """Return the ids of a prompt whose turns have only a role and text. Takes 1 s for 1 MB."""
        templated = self.is_templated(prompt, raw=raw)
        if isinstance(prompt, str):
            param = "prompt"
            turns = [{"role": "user", "content": prompt}]
        else:
            param = "messages"
            turns = [{"role": message.role, "content": message.content} for message in prompt]
        try:
            text = self._render(turns) if templated else turns[0]["content"]
            text.encode()  # raises for half a surrogate pair
            # The batch form releases the interpreter; a template writes its own special tokens.
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=not templated)
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{param} is not valid text: {error.reason}", code="invalid_text", param=param
            ) from error
        if not encoding.ids:
            raise InvalidRequest(f"{param} is empty: it has no tokens", code="empty_prompt", param=param)
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
            raise InvalidRequest(
                f"this model's chat template rejects these messages: {error}",
                code="invalid_messages",
                param="messages",
            ) from error
        return text


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
