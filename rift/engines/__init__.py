"""The engine interface: tokens and text of one model. Engines know nothing of requests, lanes or the log.

vllm           the real engine
vllm_stats     fills vLLM's own metrics
vllm_client    runs requests in vLLM's engine process
engine_socket  receives the output of that process
chat           chat templates, tools, reasoning and logprobs, all by vLLM's own code
engine_words   errors of the engine in a client's words
schemas        limits on JSON schemas
patterns       the number of states of a regular expression
prompt_limits  limits on the size of a prompt
tokens         token ids to text
sim            the simulated engine
start          starts the configured engine
start_errors   why an engine's process failed to start
prepare        models on disk
progress       the progress bar of a preparation
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from events.schema import Logprob, Message, Parameters, ToolCallDelta
from rift.errors import RiftError

# Encoding this much takes 65 ms and 5 MB of memory. Longer prompts are rendered and encoded one at a time.
LONG_BYTES = 64 * 1024


class InvalidRequest(RiftError):
    """This model cannot serve the input or a parameter; the client has to change it."""

    def __init__(self, message: str, *, code: str, param: str | None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param


class PromptTooLong(InvalidRequest):
    """The prompt has more than `tokens_max` tokens: `tokens`, or with `at_least` perhaps more."""

    def __init__(self, tokens: int, param: str, *, tokens_max: int, at_least: bool = True) -> None:
        least = "at least " if at_least else ""
        super().__init__(
            f"the prompt has {least}{tokens} tokens; the limit is {tokens_max}",
            code="prompt_too_long",
            param=param,
        )
        self.tokens = tokens
        self.at_least = at_least


class RequestAborted(RiftError):
    """The engine cannot finish this one request. Other requests continue."""


class EngineFailed(RiftError):
    """The engine cannot continue. The worker process has to exit."""


class Step(msgspec.Struct, frozen=True):
    """The engine's output since the last step: at least one token. `logprobs`, if requested, has one each."""

    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"] | None = None
    cached_tokens: int = 0
    logprobs: tuple[Logprob, ...] = ()


# Receives a step; returns whether the engine should continue.
Emit = Callable[[Step], bool]


class Rendered(msgspec.Struct, frozen=True):
    """A request as the engine reads it.

    With `grammar`, a grammar constrains the tokens from the first one, so another attempt cannot continue
    the answer. `private` belongs to the engine.
    """

    prompt_ids: Sequence[int]
    parameters: Parameters
    grammar: bool = False
    private: Any = None


class Delta(msgspec.Struct, frozen=True):
    """The text, reasoning and tool calls that some tokens add to an answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


# How an answer ends: the model ended it, or a limit or a stop string cut it.
End = Literal["complete", "cut"]


class Decoder(Protocol):
    """Turns output ids, fed one after the other, into text. A pure function of the ids fed so far."""

    def feed(self, token_id: int) -> str:
        """Return the text that this id completes, or "" inside an unfinished character."""

    def flush(self) -> str:
        """Return the rest of an unfinished character at the end of the answer."""


class Parser(Protocol):
    """Separates content, reasoning and tool calls of one answer.

    A pure function of its input, except for the ids of tool calls, which only mark where a call begins.
    `decoder` yields the text to feed: with special tokens, if the parser recognizes those.
    """

    decoder: Decoder

    def feed(self, text: str, token_ids: Sequence[int], end: End | None = None) -> Delta:
        """Return what the ids and their text add. `end` marks the last call. Never raises.

        Of a cut answer, nothing is shown that the model did not write.
        """

    def reasoning_tokens(self, output_ids: Sequence[int]) -> int:
        """Return how many of the answer's ids were reasoning."""


class Engine(Protocol):
    """One model on this process's hardware.

    `name` is "vllm" or "sim", `model_digest` identifies the weights, `slots` is the number of concurrent
    requests, and `context_tokens` bounds prompt and output together. No token of a prompt stands for more
    than `token_bytes_max` bytes of text. Once the output of a step was passed on for every request, each
    function in `after_step` is called.
    """

    name: str
    simulated: bool
    model_digest: str
    slots: int
    context_tokens: int
    token_bytes_max: int

    @property
    def after_step(self) -> list[Callable[[], None]]: ...

    def log_metrics(self) -> None:
        """Bring the metrics up to date that the engine's library keeps in this process, if it keeps any."""

    async def render(
        self, prompt: str | tuple[Message, ...], parameters: Parameters, *, raw: bool, tokens_max: int
    ) -> Rendered:
        """Encode the prompt. Raises InvalidRequest; PromptTooLong if it has more than `tokens_max` tokens.

        Messages go through the model's chat template. So does a str, as one user turn, unless `raw` or the
        model has no template. Long prompts are encoded one at a time, and short ones need not wait for them.
        """

    def decoder(self) -> Decoder:
        """Return a new decoder for an answer without a parser."""

    def parser(self, rendered: Rendered) -> Parser | None:
        """Return a new parser, or None if all of the answer's text is content."""

    async def generate(
        self,
        attempt: str,
        rendered: Rendered,
        output_ids: Sequence[int],
        *,
        max_tokens: int,
        salt: str,
        emit: Emit,
    ) -> None:
        """Pass each step after `output_ids` to `emit`, until one has a `finish` or `emit` returns False.

        `output_ids` are the logged ids of a continued answer. `max_tokens` bounds the new tokens; the caller
        handles stop strings. `salt` separates the prefix caches of accounts. `emit` runs where the engine's
        output is read, so it must be quick.

        Cancellation, or False from `emit`, aborts the request in the engine. A return without a `finish` or a
        False means that the engine aborted it. Raises InvalidRequest before the first step, RequestAborted
        and EngineFailed at any, and whatever `emit` raises.
        """

    async def close(self) -> None:
        """Stop the engine and every process it started."""
