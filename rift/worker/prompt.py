"""A request as its engine reads it: prompt ids and the limit of its output, or the reason to refuse it."""

import logging
from collections.abc import Sequence
from functools import partial

import msgspec

from events.schema import FinishReason, Problem, RequestAccepted
from rift.catalogue import OUTPUT_TOKENS_DEFAULT, context_overflow
from rift.engines import Engine, InvalidRequest, PromptTooLong, Rendered
from rift.engines.engine_words import without_message

logger = logging.getLogger(__name__)

CONTENT_REMOVED = Problem(
    code="content_removed", message="the request's content was removed before it was answered"
)

PROMPT_UNREADABLE = Problem(
    code="prompt_unreadable", message="the engine cannot read this prompt; the operator's log has the reason"
)


class PreparedRequest(msgspec.Struct, frozen=True):
    """`max_tokens` bounds the output of all attempts together. With a `refusal` nothing may be generated."""

    accepted: RequestAccepted
    rendered: Rendered
    max_tokens: int = 0
    refusal: tuple[FinishReason, Problem] | None = None

    @property
    def prompt_ids(self) -> Sequence[int]:
        return self.rendered.prompt_ids


async def prepare(engine: Engine, accepted: RequestAccepted) -> PreparedRequest:
    """Encode the prompt and check that prompt and output fit. Raises InvalidRequest."""
    context = engine.context_tokens
    limit = min(accepted.prompt_tokens_max, context - 1)
    max_tokens = accepted.parameters.max_tokens
    is_native = accepted.kind == "inference"
    own_limit = limit if is_native else context - 1
    fit = partial(context_overflow, max_tokens=max_tokens, context=context, limit=own_limit)
    raw = accepted.parameters.raw or accepted.kind == "completion"
    try:
        rendered = await engine.render(accepted.input, accepted.parameters, raw=raw, tokens_max=limit)
    except PromptTooLong as error:
        if (overflow := fit(error.tokens, at_least=error.at_least)) is None:
            raise
        raise InvalidRequest(overflow.message, code=error.code, param=error.param) from error
    count = len(rendered.prompt_ids)
    if (overflow := fit(count, at_least=False)) is not None:
        param = "parameters.max_tokens" if is_native else "max_tokens"
        raise InvalidRequest(overflow.message, code=overflow.code, param=param)
    room = context - count
    if max_tokens is None:
        max_tokens = min(OUTPUT_TOKENS_DEFAULT, room)
    return PreparedRequest(accepted, rendered, max_tokens)


async def prepare_or_refuse(engine: Engine, accepted: RequestAccepted) -> PreparedRequest:
    """Return the prepared request. If it cannot be prepared, `refusal` is set."""
    reason: FinishReason = "failed"
    if accepted.content:
        problem = CONTENT_REMOVED
    else:
        try:
            return await prepare(engine, accepted)
        except InvalidRequest as error:
            reason = "invalid"
            problem = Problem(code=error.code, message=error.message, param=error.param)
        except Exception as error:
            # A template or tokenizer that fails on this prompt must not take worker after worker with it.
            logger.error(
                "%s: the prompt cannot be prepared", accepted.request, exc_info=without_message(error)
            )
            problem = PROMPT_UNREADABLE
    return PreparedRequest(accepted, Rendered((), accepted.parameters), refusal=(reason, problem))
