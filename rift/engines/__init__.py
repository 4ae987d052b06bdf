"""What a worker needs of an engine: tokens and text of one model. An engine knows nothing of requests, lanes
or the log.

    vllm         the real engine
    vllm_client  steps of vLLM's engine process as deltas
    chat         chat templates, tools, reasoning and logprobs, by vLLM's own parts
    schemas      limits on JSON schemas and patterns
    tokens       token ids to text
    sim          the simulated engine
    start        starts the configured engine
    prepare      models on disk
    progress     the progress bar of a preparation
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from events.schema import Logprob, Message, Parameters, ToolCallDelta
from rift.errors import RiftError


class InvalidRequest(RiftError):
    """The input or a parameter cannot be served by this model; the sender has to change it."""

    def __init__(self, message: str, *, code: str, param: str | None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param


class RequestAborted(RiftError):
    """The engine cannot finish this one request. Others go on."""


class EngineFailed(RiftError):
    """The engine cannot go on. The worker's process has to end."""


class Step(msgspec.Struct, frozen=True):
    """What the engine did since the last step: at least one new output token. `logprobs`, where they are
    wanted, are one a token."""

    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"] | None = None
    cached_tokens: int = 0
    logprobs: tuple[Logprob, ...] = ()


# Takes a step; says whether the next is wanted.
Emit = Callable[[Step], bool]


class Rendered(msgspec.Struct, frozen=True):
    """A request as the engine reads it. `grammar` says that its tokens are held to a grammar from the first
    on, so that nobody can begin in their midst; `own` is the engine's business."""

    prompt_ids: Sequence[int]
    parameters: Parameters
    grammar: bool = False
    own: Any = None


class Delta(msgspec.Struct, frozen=True):
    """What tokens add to an answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class Decoder(Protocol):
    """Text of output tokens, fed one id after the other. A pure function of the ids fed so far."""

    def feed(self, token_id: int) -> str:
        """Return the text that this id completes; "" while it is only a part of a character."""

    def flush(self) -> str:
        """Return what is left of an unfinished character at the end of the answer."""


class Parser(Protocol):
    """Tells content, reasoning and tool calls of one answer apart. A pure function of what it was fed, but
    for the ids of tool calls, which mean only where one begins.

    `decoder` gives the text that it reads: with special tokens, where its marks are such.
    """

    decoder: Decoder

    def feed(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta:
        """Return what the ids and their text add; `finished` with the answer's last. Never raises."""

    def reasoning_tokens(self, output_ids: Sequence[int]) -> int:
        """Return how many of the whole answer's ids were reasoning."""


class Engine(Protocol):
    """One model on this process's hardware.

    `name` is "vllm" or "sim"; `model_digest` identifies the weights served; `slots` is how many
    requests it runs at once; `context_tokens` bounds prompt and output together.
    """

    name: str
    simulated: bool
    model_digest: str
    slots: int
    context_tokens: int

    async def render(
        self, prompt: str | tuple[Message, ...], parameters: Parameters, *, raw: bool
    ) -> Rendered:
        """Encode the prompt. A str goes through the model's chat template as one user turn unless `raw`, or
        the model has none; messages always do. Raises InvalidRequest."""

    def decoder(self) -> Decoder:
        """Return a decoder for an answer that needs no parser."""

    def parser(self, rendered: Rendered) -> Parser | None:
        """Return a new parser, or None if the answer's text is all content."""

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
        """Hand each step after `output_ids` (empty at first; the logged ids on a continuation) to `emit`,
        until one has a finish or `emit` returns False. `max_tokens` bounds what is new. The parameters `stop`
        and `max_tokens` are the caller's business. `salt` separates the prefix caches of accounts.

        `emit` is called where the engine's output is read, with no task between, so it must be quick.
        Cancelled, or once `emit` returned False, the request is aborted in the engine. Returning without
        either means that the engine aborted it. Raises InvalidRequest before the first step,
        RequestAborted and EngineFailed at any, and whatever `emit` raises.
        """

    async def close(self) -> None:
        """Stop the engine and every process it started."""
