"""Chat by vLLM's own renderer and parsers: messages with tools to ids, an answer's text to its parts.

No template, grammar or tool notation is implemented here, so the result is what vLLM's server makes of the
same request. Must not live here: the engine itself, requests, the log.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from events.schema import Logprob, Message, Parameters, ToolCallDelta
from rift.catalogue import Model
from rift.engines import Decoder, Delta, End, InvalidRequest, PromptTooLong, Rendered
from rift.engines.engine_words import REFUSED, UNSUPPORTED, engine_words, without_message
from rift.engines.prompt_limits import check_text, check_tokens, param_of
from rift.engines.schemas import check_schemas
from rift.engines.tokens import Tokenizer, template_words

logger = logging.getLogger(__name__)

# vLLM's value for an impossible token, because JSON has no minus infinity.
LOGPROB_MIN = -9999.0
# vLLM looks this many ids back for the rest of a character when a token is only a part of one.
CONTEXT_IDS = 4
# vLLM has no limit, and one wrong id makes it list all of them in its error. OpenAI allows 300.
LOGIT_BIAS_MAX = 1024
LOGIT_BIAS = 100.0
# vLLM removes such a line from the start of a system message, so those messages are left to vLLM.
BILLING_HEADER = "x-anthropic-billing-header"
# vLLM's names of parameters, where Rift's differ.
PARAMS = {
    "top_logprobs": "logprobs",
    "chat_template_kwargs": "template",
    "structured_outputs": "response_format",
}


class RenderedChat(NamedTuple):
    """The private part of a `Rendered` request.

    `request` is vLLM's own request, if it was rendered as chat; `structured_outputs` is its grammar. The
    others are for the reasoning parser inside vLLM's engine.
    """

    request: Any = None
    structured_outputs: Any = None
    template_kwargs: dict[str, Any] | None = None
    reasoning_ended: bool | None = None


class Chat:
    """One model's chat. Made once, after vLLM is imported."""

    def __init__(self, llm: Any, model: Model, tokenizer: Tokenizer) -> None:
        from vllm.renderers.hf import resolve_chat_template_content_format
        from vllm.renderers.online_renderer import OnlineRenderer

        config = llm.vllm_config.model_config
        self._config = config
        self._tokenizer = tokenizer
        # vLLM's own, which threads may share.
        self.tokenizer = llm.renderer.get_tokenizer()
        self._renderer = OnlineRenderer(
            config,
            llm.renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
            enable_auto_tools=bool(model.tool_parser),
            tool_parser=model.tool_parser or None,
            reasoning_parser=model.reasoning_parser or None,
            tool_strict_level=model.tool_strict_level,
        )
        self._reasons = bool(model.reasoning_parser)
        content = resolve_chat_template_content_format(
            None, None, "auto", self.tokenizer, model_config=config
        )
        self._takes_strings = content == "string"

    def is_plain(self, prompt: str | tuple[Message, ...], parameters: Parameters) -> bool:
        """Return whether all turns have only a role and text: encoding them without vLLM is faster."""
        chat_only = (
            parameters.tools,
            parameters.tool_choice,
            parameters.response_format,
            parameters.template,
            parameters.reasoning_effort,
        )
        return not (self._reasons or any(chat_only)) and (
            isinstance(prompt, str) or (self._takes_strings and all(map(_is_plain, prompt)))
        )

    async def render(
        self, prompt: str | tuple[Message, ...], parameters: Parameters, *, tokens_max: int
    ) -> Rendered:
        """Render messages as vLLM's server does. Raises InvalidRequest."""
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.exceptions import VLLMClientError

        messages = (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt
        if parameters.response_format is not None:
            check_schemas(parameters)
        try:
            request = chat_request(messages, parameters)
            result = await self._renderer.render_chat(request)
        except (VLLMClientError, ValueError, TypeError, OverflowError, RecursionError) as error:
            check_text(prompt, parameters)
            if getattr(error, "parameter", None) in ("input_tokens", "input_text"):
                # vLLM stops counting once the prompt exceeds the context.
                raise PromptTooLong(tokens_max + 1, param_of(prompt), tokens_max=tokens_max) from error
            raise invalid(error, parameters) from error
        if isinstance(result, ErrorResponse):
            # The message may quote the request.
            logger.debug("vLLM refused a request: %s", result.error.message)
            is_template = "chat template" in result.error.message.lower()
            param = "template" if is_template else _likely_param(parameters)
            raise InvalidRequest(UNSUPPORTED.get(param or "", REFUSED), code="unsupported", param=param)
        (engine_input,) = result[1]
        ids = engine_input["prompt_token_ids"]
        check_tokens(len(ids), param_of(prompt), tokens_max=tokens_max)
        if (grammar := request.extract_structured_outputs()) is None:
            return Rendered(ids, parameters, private=RenderedChat(request))
        check_schemas(parameters)
        if not self._reasons:
            return Rendered(ids, parameters, grammar=True, private=RenderedChat(request, grammar))
        # vLLM's parser knows at which token the grammar begins to apply.
        ended = request.resolve_reasoning_ended(self._new_parser(request), ids)
        return Rendered(
            ids,
            parameters,
            grammar=True,
            private=RenderedChat(request, grammar, self._kwargs(request), ended),
        )

    def parser(self, rendered: Rendered) -> "VllmParser | None":
        request = (rendered.private or RenderedChat()).request
        if request is None or self._renderer.parser is None:
            return None
        if not (self._reasons or request.tools):
            return None
        decoder = self._tokenizer.decoder(special=not request.skip_special_tokens)
        return VllmParser(self._new_parser(request), request, rendered.prompt_ids, decoder)

    def logprobs(self, count: int, before: Sequence[int]) -> "LogprobReader":
        return LogprobReader(self.tokenizer, count, before)

    def _new_parser(self, request: Any) -> Any:
        return self._renderer.parser(
            self.tokenizer,
            request.tools,
            chat_template_kwargs=self._kwargs(request),
            model_config=self._config,
        )

    def _kwargs(self, request: Any) -> dict[str, Any]:
        kwargs: dict[str, Any] = self._renderer.effective_chat_template_kwargs(request)
        return kwargs


class VllmParser:
    """Implements `rift.engines.Parser` with one of vLLM's parsers.

    After an exception in it, the rest of the answer is content. vLLM's server would end the stream instead.
    """

    def __init__(self, parser: Any, request: Any, prompt_ids: Sequence[int], decoder: Decoder) -> None:
        self.decoder = decoder
        self._parser = parser
        self._request = request
        self._prompt_ids = list(prompt_ids)
        self._first_only = request.parallel_tool_calls is False
        self._has_reasoned = False
        self._is_broken = False

    def feed(self, text: str, token_ids: Sequence[int], end: End | None = None) -> Delta:
        delta = self._parse(text, token_ids, finished=end == "complete")
        if end == "cut":
            # At the end vLLM's parsers complete the arguments of a call that has begun, even to an empty
            # object. Only text that they withheld until now is the model's.
            withheld = self._parse("", (), finished=True)
            delta = Delta(delta.text + withheld.text, delta.reasoning + withheld.reasoning, delta.tool_calls)
        return delta

    def _parse(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta:
        if self._is_broken:
            return Delta(text)
        try:
            message = self._parser.parse_delta(
                delta_text=text,
                delta_token_ids=list(token_ids),
                request=self._request,
                prompt_token_ids=self._prompt_ids,
                finished=finished,
            )
        except Exception as error:
            # A model can write anything, and vLLM's parsers do not expect all of it.
            logger.warning(
                "%s failed; the rest of the answer is content",
                type(self._parser).__name__,
                exc_info=without_message(error),
            )
            self._is_broken = True
            return Delta(text)
        if message is None:
            return Delta()
        self._has_reasoned |= bool(message.reasoning)
        calls = [
            ToolCallDelta(
                index=call.index,
                id=call.id,
                name=call.function.name if call.function else None,
                arguments=_escaped((call.function.arguments if call.function else None) or ""),
            )
            for call in message.tool_calls
            if not (self._first_only and call.index)
        ]
        return Delta(message.content or "", message.reasoning or "", tuple(calls))

    def reasoning_tokens(self, output_ids: Sequence[int]) -> int:
        """Count the ids between the marks, as vLLM does.

        If the template wrote the first mark, or the model omitted it, vLLM counts none. Here the count then
        begins at the answer's first id.
        """
        ids = list(output_ids)
        start = getattr(self._parser.reasoning_parser, "start_token_id", None)
        if self._has_reasoned and start is not None and start not in ids:
            ids.insert(0, start)
        count: int = self._parser.count_reasoning_tokens(ids)
        return count


def _escaped(text: str) -> str:
    """Return text with each half of a surrogate pair escaped as in JSON: a parser reads such an escape of the
    model's and writes the half itself, which no record can hold."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


class LogprobReader:
    """Reads log probabilities with vLLM's code. `before` are the earlier ids, perhaps cut in a character."""

    def __init__(self, tokenizer: Any, count: int, before: Sequence[int]) -> None:
        from vllm.v1.engine.logprobs import LogprobsProcessor

        self._count = count
        self._processor = LogprobsProcessor(
            tokenizer=tokenizer,
            logprobs=[{token_id: None} for token_id in before[-CONTEXT_IDS:]],
            prompt_logprobs=None,
            cumulative_logprob=0.0,
            num_logprobs=count,
            num_prompt_logprobs=None,
        )

    def __call__(self, output: Any) -> tuple[Logprob, ...]:
        """Return for each id of an `EngineCoreOutput` its log probability and the likeliest tokens."""
        self._processor.update_from_output(output)
        entries = self._processor.logprobs
        new = [self._logprob(entry) for entry in entries[-len(output.new_token_ids) :]]
        del entries[:-CONTEXT_IDS]
        return tuple(new)

    def _logprob(self, by_id: dict[int, Any]) -> Logprob:
        sampled, *_ = entries = list(by_id.values())
        likeliest = sorted(entries, key=lambda entry: int(entry.rank))[: self._count]
        top = tuple(
            Logprob(token=entry.decoded_token, logprob=max(entry.logprob, LOGPROB_MIN)) for entry in likeliest
        )
        return Logprob(token=sampled.decoded_token, logprob=max(sampled.logprob, LOGPROB_MIN), top=top)


def chat_request(messages: Sequence[Message], parameters: Parameters) -> Any:
    """Return a chat as vLLM's own request, with the fields that its renderer and parsers read.

    Raises InvalidRequest, and vLLM's errors.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    fields: dict[str, Any] = {
        "messages": [_turn(message) for message in messages],
        "parallel_tool_calls": parameters.parallel_tool_calls,
        "reasoning_effort": parameters.reasoning_effort,
        # The worker limits the output itself.
        "max_completion_tokens": 0,
        "stream": True,
    }
    if parameters.tools:
        fields["tools"] = [
            {"type": "function", "function": _json_fields(tool, "parameters", "tools")}
            for tool in parameters.tools
        ]
    if parameters.tool_choice == "function":
        fields["tool_choice"] = {"type": "function", "function": {"name": parameters.tool_name}}
    elif parameters.tool_choice is not None:
        fields["tool_choice"] = parameters.tool_choice
    if parameters.template is not None:
        fields["chat_template_kwargs"] = _object(parameters.template, "template")
    if parameters.response_format is not None:
        fields["response_format"] = _response_format(parameters)
    return ChatCompletionRequest(**fields)


def structured_outputs(parameters: Parameters) -> Any:
    """Return the grammar of a request that is not a chat, or None. Raises InvalidRequest."""
    from vllm.sampling_params import StructuredOutputsParams

    response_format = parameters.response_format
    if parameters.tools:
        raise InvalidRequest(
            "tools are only supported with messages, not with a prompt", code="unsupported", param="tools"
        )
    if response_format is None:
        return None
    check_schemas(parameters)
    if response_format.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=_object(response_format.schema or "{}", "response_format"))


def logit_bias(parameters: Parameters) -> dict[int, float] | None:
    """Return the bias by token id, clamped as in vLLM. Raises InvalidRequest."""
    biases = parameters.logit_bias
    if not biases:
        return None
    if len(biases) > LOGIT_BIAS_MAX:
        raise _invalid_value(f"logit_bias may name {LOGIT_BIAS_MAX} tokens, got {len(biases)}", "logit_bias")
    # No token id has more digits, and int() is slow for very long strings.
    if any(not (key.isascii() and key.isdigit() and len(key) < 10) for key in biases):
        raise _invalid_value("logit_bias must have token ids as keys", "logit_bias")
    if not all(map(math.isfinite, biases.values())):
        raise _invalid_value("logit_bias values must be finite numbers", "logit_bias")
    return {int(key): max(-LOGIT_BIAS, min(LOGIT_BIAS, bias)) for key, bias in biases.items()}


def no_grammar(parameters: Parameters) -> InvalidRequest:
    """Return the error for a request that the engine aborted before its first token."""
    return InvalidRequest(
        "the engine cannot enforce this schema; simplify it: shorten counted repetitions in patterns, and "
        "remove schemas that only refer to themselves",
        code="schema_unsupported",
        param=_likely_param(parameters),
    )


def invalid(error: Exception, parameters: Parameters) -> InvalidRequest:
    """Translate vLLM's error. It names the parameter in a field, or only as the first word of its message."""
    from vllm.exceptions import VLLMClientError

    param = getattr(error, "parameter", None)
    message = str(error.args[0]) if error.args else ""
    if (errors := getattr(error, "errors", None)) is not None:  # pydantic's
        first = errors()[0]
        param = ".".join(map(str, first["loc"]))
        message = first["msg"]
    param = str(param or message.split(" ", 1)[0]).partition(".")[0]
    param = PARAMS.get(param, param)
    known = param in Parameters.__struct_fields__ or param == "messages"
    param = param if known else _likely_param(parameters)
    cause = error.__cause__
    is_for_clients = errors is not None or (
        isinstance(error, VLLMClientError) and (cause is None or template_words(cause) is not None)
    )
    words = engine_words(message, param, cause=cause, is_for_clients=is_for_clients)
    return _invalid_value(words, param)


def _likely_param(parameters: Parameters) -> str | None:
    """Return the likeliest parameter for an error that names none: one that leads to a grammar."""
    if parameters.tools and parameters.tool_choice not in (None, "none"):
        return "tools"
    for param in ("response_format", "tools", "template"):
        if getattr(parameters, param):
            return param
    return None


def _invalid_value(message: str, param: str | None) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_value", param=param)


def _is_plain(message: Message) -> bool:
    if message.role == "system":
        plain = not message.content.startswith(BILLING_HEADER)
    else:
        plain = message.role in ("user", "assistant")
    return plain and not (message.name or message.reasoning or message.tool_calls or message.tool_call_id)


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        turn["name"] = message.name
    if message.reasoning:
        turn["reasoning"] = message.reasoning
    if message.tool_calls:
        turn["content"] = message.content or None
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _response_format(parameters: Parameters) -> dict[str, Any]:
    response_format = parameters.response_format
    assert response_format is not None, "the caller checks"
    if response_format.type == "json_object":
        return {"type": "json_object"}
    schema = _object(response_format.schema or "{}", "response_format")
    return {
        "type": "json_schema",
        "json_schema": {
            "name": response_format.name or "answer",
            "schema": schema,
            "strict": response_format.strict,
        },
    }


def _json_fields(struct: msgspec.Struct, name: str, param: str) -> dict[str, Any]:
    """Return the struct's fields that are set; the one called `name` is decoded from JSON."""
    fields = {
        key: value for key, value in msgspec.structs.asdict(struct).items() if value not in (None, False)
    }
    if name in fields:
        fields[name] = _object(fields[name], param)
    return fields


def _object(text: str, param: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text, type=dict[str, Any])
        # On the way to its engine process, vLLM encodes what it got, and fails for integers beyond 64 bits.
        msgspec.msgpack.encode(value)
    except OverflowError as error:
        raise _invalid_value(f"{param} has an integer that does not fit 64 bits", param) from error
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise _invalid_value(f"{param} is not a JSON object: {error}", param) from error
    return value
