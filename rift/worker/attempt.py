"""One attempt: prompt to engine, ids to text, events to the lane's writer.

It knows nothing of other attempts, deliveries or readers: whether it counts is the worker's matter,
and the log's.
"""

import logging
from collections.abc import Sequence

import anyio
import msgspec

from events.request_history import RequestHistory
from events.schema import (
    AttemptStarted,
    FinishReason,
    Problem,
    RequestAccepted,
    RequestFinished,
    Stamps,
    TokensGenerated,
)
from rift.catalogue import OUTPUT_TOKENS_DEFAULT
from rift.engines import Delta, Engine, EngineFailed, GaveUp, Invalid, Rendered, Step
from rift.errors import RiftError
from rift.worker.detokenizer import Detokenizer
from rift.worker.lane_writer import Writer
from rift.worker.output_parser import OutputParser, joined, rest

logger = logging.getLogger(__name__)

NOTHING = Delta()

REMOVED = Problem(code="content_removed", message="the request's content was removed before it was answered")


class Prompt(msgspec.Struct, frozen=True):
    """The request as the engine reads it, and how many output tokens the whole answer may have."""

    rendered: Rendered
    max_tokens: int

    @property
    def ids(self) -> Sequence[int]:
        return self.rendered.prompt_ids


class NotContinuable(RiftError):
    """The logged tokens cannot be continued honestly; the request fails, unbilled."""


async def prepare(engine: Engine, accepted: RequestAccepted) -> Prompt:
    """Encode and count. Raises Invalid: the sender asked for what does not fit."""
    prompt = accepted.input
    raw = accepted.parameters.raw or accepted.kind == "completion"
    rendered = await engine.render(prompt, accepted.parameters, raw=raw)
    ids = rendered.prompt_ids
    param = "prompt" if isinstance(prompt, str) else "messages"
    limit = min(accepted.prompt_tokens_max, engine.context_tokens - 1)
    if len(ids) > limit:
        raise Invalid(
            f"the prompt has {len(ids)} tokens; the limit is {limit}", code="prompt_too_long", param=param
        )
    room = engine.context_tokens - len(ids)
    wanted = accepted.parameters.max_tokens
    if wanted is not None and wanted > room:
        raise Invalid(
            f"max_tokens is {wanted}, but {len(ids)} prompt tokens leave room for {room} in the model's "
            f"context of {engine.context_tokens}",
            code="max_tokens_too_large",
            param="parameters.max_tokens" if accepted.kind == "inference" else "max_tokens",
        )
    return Prompt(rendered, wanted or min(OUTPUT_TOKENS_DEFAULT, room))


async def prepare_or_refuse(
    engine: Engine, accepted: RequestAccepted
) -> tuple[Prompt, tuple[FinishReason, Problem] | None]:
    """Return the prompt, or why the attempt is over before it began."""
    nothing = Rendered((), accepted.parameters)
    if accepted.content:
        return Prompt(nothing, 0), ("failed", REMOVED)
    try:
        return await prepare(engine, accepted), None
    except Invalid as error:
        problem = Problem(code=error.code, message=error.message, param=error.param)
        return Prompt(nothing, 0), ("invalid", problem)
    except Exception as error:
        # A template or tokenizer that breaks on this prompt must not take worker after worker with it.
        logger.exception("%s: the prompt cannot be prepared", accepted.request)
        message = f"the prompt cannot be prepared: {type(error).__name__}"
        return Prompt(nothing, 0), ("failed", Problem(code="prompt_unreadable", message=message))


class Attempt:
    """Generates the rest of one answer. `progressed_at` is when it last moved, by the loop's clock."""

    def __init__(
        self,
        accepted: RequestAccepted,
        started: AttemptStarted,
        prompt: Prompt,
        *,
        engine: Engine,
        writer: Writer,
    ) -> None:
        self.request = started.request
        self.id = started.attempt
        self.scope = anyio.CancelScope()
        self.finished = False
        self._stopped_for: FinishReason | None = None
        self._silent = False
        self.progressed_at = self._began_at = anyio.current_time()
        self._accepted = accepted
        self._prompt = prompt
        self._engine = engine
        self._writer = writer
        self._started = started
        self._index = started.resume_index
        self._logged_ids: Sequence[int] = ()
        self._unsent = NOTHING
        self._stamps = Stamps()
        parser = engine.parser(prompt.rendered)
        decoder = engine.decoder() if parser is None else parser.decoder
        self._text = Detokenizer(decoder, accepted.parameters.stop)
        self._parsed = None if parser is None else OutputParser(self._text, parser, request=self.request)

    @property
    def tokens(self) -> int:
        """Prompt and output so far: what the engine holds of it."""
        return len(self._prompt.ids) + self._index

    def resume(self, past: RequestHistory) -> None:
        """Bring decoder and parser to where the log ends; what they say there must be what was logged.

        Raises NotContinuable.
        """
        tokens = [counted.event for counted in past.counted if isinstance(counted.event, TokensGenerated)]
        if not tokens:
            return
        parameters = self._accepted.parameters
        if parameters.presence_penalty or parameters.frequency_penalty:
            raise NotContinuable("penalties over output tokens cannot be continued")
        if self._prompt.rendered.grammar:
            raise NotContinuable("an answer that is held to a grammar cannot be continued")
        self._logged_ids = [token_id for event in tokens for token_id in event.token_ids]
        logged = joined(Delta(event.text, event.reasoning, event.tool_calls) for event in tokens)
        if self._parsed is None:
            again = Delta(self._text.feed(self._logged_ids)[1])
        else:
            _, again = self._parsed.feed(self._logged_ids, None)
        if (unsent := rest(again, logged)) is None:
            raise NotContinuable("the logged ids decode to another answer here")
        if unsent != NOTHING:
            self._unsent = unsent

    async def run(self, deadline_s: float) -> None:
        """Generate to the end, to the deadline or until `stop`; the last event put is the end.

        Raises EngineFailed. Cancelled from outside, it puts nothing more.
        """
        with anyio.move_on_after(deadline_s) as deadline, self.scope:
            await self._generate()
        if deadline.cancelled_caught:
            self.finish("expired")
        elif self.scope.cancelled_caught and self._stopped_for is not None:
            self.finish(self._stopped_for)

    def stop(self, reason: FinishReason | None) -> None:
        """End the attempt with a reason, or silently: the log has gone on without it."""
        self._stopped_for = reason
        self._silent = reason is None
        if not self.finished:
            self.scope.cancel()

    def finish(self, reason: FinishReason, error: Problem | None = None) -> None:
        """Put the end, unless there is one."""
        if not self.finished and not self._silent:
            self._put([self._end(reason, error)])

    def refuse(self, reason: FinishReason, error: Problem) -> None:
        """Put the start and the end of an attempt that the engine never sees."""
        self.finished = True
        self._writer.put(self._started, self._end(reason, error))

    async def _generate(self) -> None:
        room = self._prompt.max_tokens - len(self._logged_ids)
        if self._text.stopped or room <= 0:
            self.finish("stop" if self._text.stopped else "length")
            return
        self._stamps = Stamps(engine_ns=self._elapsed_ns())
        try:
            await self._engine.generate(
                self.id,
                self._prompt.rendered,
                self._logged_ids,
                max_tokens=room,
                salt=self._accepted.account,
                emit=self._emit,
            )
        except GaveUp as error:
            self.finish("failed", Problem(code="engine_gave_up", message=str(error)))
            return
        if not self.finished and not self._silent:
            raise EngineFailed(f"{self.id} ended in the engine without a reason")

    def _emit(self, step: Step) -> bool:
        """Put what a step says; say whether another is wanted."""
        if self._silent:
            return False
        self.progressed_at = anyio.current_time()
        if self._stamps.first_token_ns is None:
            self._stamps = msgspec.structs.replace(self._stamps, first_token_ns=self._elapsed_ns())
        tokens = self._tokens(step)
        self._index += len(tokens.token_ids)
        reason: FinishReason | None = "stop" if self._text.stopped else step.finish
        if reason == "stop" and self._parsed is not None:
            reason = self._stop_reason(self._parsed)
        # The last tokens and the end are one entry: a successor never finds one without the other.
        self._put([tokens, self._end(reason)] if reason else [tokens])
        return not self.finished

    def _tokens(self, step: Step) -> TokensGenerated:
        """Return what of the step belongs to the answer, and what it adds."""
        if self._parsed is not None:
            used, delta = self._parsed.feed(step.token_ids, step.finish)
        else:
            used, text = self._text.feed(step.token_ids)
            if step.finish and not self._text.stopped:
                text += self._text.flush()
            if self._unsent is NOTHING and not step.logprobs:
                # Nearly every token of nearly every answer.
                return TokensGenerated(
                    attempt=self.id,
                    index=self._index,
                    token_ids=step.token_ids[:used],
                    text=text,
                    cached_tokens=step.cached_tokens,
                )
            delta = Delta(text)
        if self._unsent is not NOTHING:
            delta = joined((self._unsent, delta))
            self._unsent = NOTHING
        return TokensGenerated(
            attempt=self.id,
            index=self._index,
            token_ids=step.token_ids[:used],
            text=delta.text,
            cached_tokens=step.cached_tokens,
            reasoning=delta.reasoning,
            tool_calls=delta.tool_calls,
            logprobs=step.logprobs[:used],
        )

    def _stop_reason(self, parsed: OutputParser) -> FinishReason:
        """As vLLM's server has it: who was told which tool to call has not called one by itself."""
        is_named = self._accepted.parameters.tool_choice == "function"
        return "tool_calls" if parsed.has_called and not is_named else "stop"

    def _put(self, events: Sequence[TokensGenerated | RequestFinished]) -> None:
        assert not self.finished, "nothing follows the end"
        self.finished = isinstance(events[-1], RequestFinished)
        self._writer.put(*events)

    def _end(self, reason: FinishReason, error: Problem | None = None) -> RequestFinished:
        accepted = self._accepted
        return RequestFinished(
            request=self.request,
            attempt=self.id,
            reason=reason,
            output_tokens=self._index,
            error=error,
            account=accepted.account,
            model=accepted.model,
            price_version=accepted.price_version,
            prompt_tokens=len(self._prompt.ids),
            reasoning_tokens=self._parsed.reasoning_tokens if self._parsed is not None else 0,
            stamps=msgspec.structs.replace(self._stamps, finished_ns=self._elapsed_ns()),
        )

    def _elapsed_ns(self) -> int:
        return int((anyio.current_time() - self._began_at) * 1e9)
