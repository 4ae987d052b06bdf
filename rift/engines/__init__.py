"""What a worker needs of an engine. `vllm.py` is the real one, `sim.py` the simulated one.

An engine knows tokens and text of one model. It knows nothing of requests, lanes or the log.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from events.schema import Message, Parameters


class Invalid(Exception):
    """The input or a parameter cannot be served by this model; the sender has to change it."""

    def __init__(self, message: str, *, code: str, param: str | None) -> None:
        super().__init__(message)
        self.message, self.code, self.param = message, code, param


class EngineFailed(Exception):
    """The engine cannot go on. The worker's process has to end."""


class Step(msgspec.Struct, frozen=True):
    """What the engine did since the last step: at least one new output token."""

    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"] | None = None
    cached_tokens: int = 0


# Takes a step; says whether the next is wanted.
Emit = Callable[[Step], bool]


class Decoder(Protocol):
    """Text of output tokens, fed one id after the other. A pure function of the ids fed so far."""

    def feed(self, token_id: int) -> str:
        """Return the text that this id completes; "" while it is only a part of a character."""

    def flush(self) -> str:
        """Return what is left of an unfinished character at the end of the answer."""


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

    def encode(self, prompt: str | tuple[Message, ...], *, raw: bool) -> list[int]:
        """Return the prompt's token ids. A str goes through the model's chat template as one user
        turn unless `raw`, or the model has none; messages always do. May take a second for 1 MB of text: call
        it in a thread. Raises Invalid."""

    def decoder(self) -> Decoder: ...

    async def generate(
        self,
        attempt: str,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        parameters: Parameters,
        *,
        max_tokens: int,
        salt: str,
        emit: Emit,
    ) -> None:
        """Hand each step after `output_ids` (empty at first; the logged ids on a continuation) to `emit`,
        until one has a finish or `emit` returns False. `max_tokens` bounds what is new. `parameters.stop`
        and `parameters.max_tokens` are the caller's business. `salt` separates the prefix caches of accounts.

        `emit` is called where the engine's output is read, with no task between, so it must be quick.
        Cancelled, or once `emit` returned False, the request is aborted in the engine. Returning without
        either means that the engine aborted it. Raises Invalid before the first step, EngineFailed at any,
        and whatever `emit` raises.
        """

    async def close(self) -> None:
        """Stop the engine and every process it started."""
