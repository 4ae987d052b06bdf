"""The output of one attempt: engine steps in, `TokensGenerated` out.

Must not live here: time, cancellation, and anything that knows the log or its writer.
"""

from collections.abc import Sequence

from events.schema import FinishReason, TokensGenerated
from rift.engines import Delta, Engine, Rendered, Step
from rift.worker.detokenizer import Detokenizer
from rift.worker.output_parser import OutputParser, joined, rest

NOTHING = Delta()


class AttemptOutput:
    """`index` counts the answer's tokens so far, those of earlier attempts included.

    `logged_ids` are the ids that earlier attempts logged.
    """

    def __init__(self, engine: Engine, rendered: Rendered, *, request: str, attempt: str, index: int) -> None:
        self.index = index
        self.logged_ids: Sequence[int] = ()
        self._attempt = attempt
        self._parameters = rendered.parameters
        self._unsent = NOTHING
        parser = engine.parser(rendered)
        decoder = engine.decoder() if parser is None else parser.decoder
        self._text = Detokenizer(decoder, rendered.parameters.stop)
        self._parser = None if parser is None else OutputParser(self._text, parser, request=request)

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._text.stopped

    @property
    def reasoning_tokens(self) -> int:
        return self._parser.reasoning_tokens if self._parser is not None else 0

    def replay(self, events: Sequence[TokensGenerated]) -> bool:
        """Bring decoder and parser to where the log ends; return whether they give what was logged."""
        self.logged_ids = [token_id for event in events for token_id in event.token_ids]
        logged = joined(Delta(event.text, event.reasoning, event.tool_calls) for event in events)
        if self._parser is None:
            replayed = Delta(self._text.feed(self.logged_ids)[1])
        else:
            _, replayed = self._parser.feed(self.logged_ids, None)
        if (unsent := rest(replayed, logged)) is None:
            return False
        if unsent != NOTHING:
            self._unsent = unsent
        return True

    def add(self, step: Step) -> tuple[TokensGenerated, FinishReason | None]:
        """Return the part of a step that belongs to the answer, and the reason if the answer ends with it."""
        tokens = self._tokens(step)
        self.index += len(tokens.token_ids)
        reason: FinishReason | None = "stop" if self._text.stopped else step.finish
        # As in vLLM's server: if the request named the tool, the model did not choose to call it.
        if (
            reason == "stop"
            and self._parser is not None
            and self._parser.has_called
            and self._parameters.tool_choice != "function"
        ):
            reason = "tool_calls"
        return tokens, reason

    def _tokens(self, step: Step) -> TokensGenerated:
        if self._parser is not None:
            used, delta = self._parser.feed(step.token_ids, step.finish)
        else:
            used, text = self._text.feed(step.token_ids)
            if step.finish and not self._text.stopped:
                text += self._text.flush()
            if self._unsent is NOTHING and not step.logprobs:
                # Nearly every token of nearly every answer.
                return TokensGenerated(
                    attempt=self._attempt,
                    index=self.index,
                    token_ids=step.token_ids[:used],
                    text=text,
                    cached_tokens=step.cached_tokens,
                )
            delta = Delta(text)
        if self._unsent is not NOTHING:
            delta = joined((self._unsent, delta))
            self._unsent = NOTHING
        return TokensGenerated(
            attempt=self._attempt,
            index=self.index,
            token_ids=step.token_ids[:used],
            text=delta.text,
            cached_tokens=step.cached_tokens,
            reasoning=delta.reasoning,
            tool_calls=delta.tool_calls,
            logprobs=step.logprobs[:used],
        )
