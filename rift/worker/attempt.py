"""One attempt: prompt to engine, ids to text, events to the lane's writer.

Must not live here: other attempts, deliveries, readers. The log decides whether an attempt counts.
"""

import anyio
import msgspec

from events.clock import now_s
from events.contracts import SECOND_NS
from events.request_history import RequestHistory
from events.schema import AttemptStarted, FinishReason, Problem, RequestFinished, Stamps, TokensGenerated
from rift.engines import Engine, EngineFailed, RequestAborted, Step
from rift.errors import RiftError
from rift.worker.attempt_output import AttemptOutput
from rift.worker.lane_writer import AttemptWriter
from rift.worker.prompt import PreparedRequest


class NotContinuable(RiftError):
    """The logged tokens cannot be continued honestly; the request fails, unbilled."""


class Attempt:
    """Generates the rest of one answer.

    `reason` is set once the end was put. `progressed_at_s` is when the last step came, by the loop's clock.
    """

    def __init__(
        self, prepared: PreparedRequest, started: AttemptStarted, *, engine: Engine, writer: AttemptWriter
    ) -> None:
        self.reason: FinishReason | None = None
        self._prepared = prepared
        self._started = started
        self._engine = engine
        self._writer = writer
        self._output = AttemptOutput(
            engine,
            prepared.rendered,
            request=started.request,
            attempt=started.attempt,
            index=started.resume_index,
        )
        self._scope = anyio.CancelScope()
        self._stop_reason: FinishReason | None = None
        self._is_silent = False
        self._began_at_s = now_s()
        self.progressed_at_s = self._began_at_s
        self._stamps = Stamps()

    @property
    def id(self) -> str:
        return self._started.attempt

    @property
    def finished(self) -> bool:
        return self.reason is not None

    @property
    def prompt_tokens(self) -> int:
        return len(self._prepared.prompt_ids)

    @property
    def fills_at_once(self) -> bool:
        """Whether the engine fills the prompt as soon as it can. A grammar is compiled first, for seconds."""
        return not self._prepared.rendered.grammar

    @property
    def tokens(self) -> int:
        """The tokens that the engine holds of the request: its prompt, and its output so far."""
        return self.prompt_tokens + self._output.index

    @property
    def new_tokens(self) -> int:
        """The tokens that the engine has returned to this attempt."""
        return self._output.index - self._started.resume_index

    def resume(self, past: RequestHistory) -> None:
        """Continue what the log holds of the answer. Raises NotContinuable."""
        tokens = [counted.event for counted in past.counted if isinstance(counted.event, TokensGenerated)]
        if not tokens:
            return
        parameters = self._prepared.accepted.parameters
        if parameters.presence_penalty or parameters.frequency_penalty:
            raise NotContinuable("penalties over output tokens cannot be continued")
        if self._prepared.rendered.grammar:
            raise NotContinuable("an answer that is held to a grammar cannot be continued")
        if not self._output.replay(tokens):
            raise NotContinuable("the logged ids decode to another answer here")

    async def run(self, deadline_s: float) -> None:
        """Generate to the end, to the deadline or until `stop`, and put the end.

        Raises EngineFailed. Cancelled from outside, it puts nothing more.
        """
        with anyio.move_on_after(deadline_s) as deadline, self._scope:
            await self._generate()
        if deadline.cancelled_caught:
            self.finish("expired")
        elif self._scope.cancelled_caught and self._stop_reason is not None:
            self.finish(self._stop_reason)

    def stop(self, reason: FinishReason | None) -> None:
        """End the attempt for a reason; with None silently, because the log has moved on without it."""
        self._stop_reason = reason
        self._is_silent = reason is None
        if not self.finished:
            self._scope.cancel()

    def finish(self, reason: FinishReason, error: Problem | None = None) -> None:
        """Put the end, unless it was put or the attempt is silent."""
        if not self.finished and not self._is_silent:
            self.reason = reason
            self._writer.put(self._end(reason, error))

    def refuse(self, reason: FinishReason, error: Problem) -> None:
        """Put the start and the end of an attempt that the engine never sees."""
        self.reason = reason
        self._writer.put(self._started, self._end(reason, error))

    async def _generate(self) -> None:
        room = self._prepared.max_tokens - len(self._output.logged_ids)
        if self._output.stopped or room <= 0:
            self.finish("stop" if self._output.stopped else "length")
            return
        self._stamps = Stamps(engine_ns=self._elapsed_ns())
        try:
            await self._engine.generate(
                self.id,
                self._prepared.rendered,
                self._output.logged_ids,
                max_tokens=room,
                salt=self._prepared.accepted.account,
                emit=self._emit,
            )
        except RequestAborted as error:
            self.finish("failed", Problem(code="engine_gave_up", message=str(error)))
            return
        if not self.finished and not self._is_silent:
            raise EngineFailed(f"{self.id} ended in the engine without a reason")

    def _emit(self, step: Step) -> bool:
        """Put a step's tokens; return whether the engine should continue."""
        if self._is_silent:
            return False
        self.progressed_at_s = now_s()
        if self._stamps.first_token_ns is None:
            self._stamps = msgspec.structs.replace(self._stamps, first_token_ns=self._elapsed_ns())
        assert self.reason is None, "nothing follows the end"
        tokens, reason = self._output.add(step)
        if reason is None:
            self._writer.add(tokens)
        else:
            # One entry, so a successor never finds the last tokens without the end.
            self.reason = reason
            self._writer.add(tokens, self._end(reason))
        return reason is None

    def _end(self, reason: FinishReason, error: Problem | None = None) -> RequestFinished:
        accepted = self._prepared.accepted
        return RequestFinished(
            request=self._started.request,
            attempt=self.id,
            reason=reason,
            output_tokens=self._output.index,
            error=error,
            account=accepted.account,
            model=accepted.model,
            price_version=accepted.price_version,
            prompt_tokens=self.prompt_tokens,
            reasoning_tokens=self._output.reasoning_tokens,
            stamps=msgspec.structs.replace(self._stamps, finished_ns=self._elapsed_ns()),
        )

    def _elapsed_ns(self) -> int:
        return int((now_s() - self._began_at_s) * SECOND_NS)
