"""Chat by vLLM's own renderer and parsers: messages with tools to ids, an answer's text to its parts.

Nothing of a template, a grammar or a tool's notation is written here, so that what vLLM's server makes of
the same request is what comes out. What must not live here: the engine itself, requests, the log.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from events.schema import Logprob, Message, Parameters, ToolCallDelta
from rift.catalogue import Model
from rift.engines import Decoder, Delta, InvalidRequest, Rendered
from rift.engines.schemas import check_schemas
from rift.engines.tokens import Tokenizer

logger = logging.getLogger(__name__)

# vLLM shows it where a token was impossible; minus infinity has no place in JSON.
LOGPROB_MIN = -9999.0
# vLLM looks so far back for the rest of a character of which a token is only a part.
CONTEXT_IDS = 4
# vLLM has no bound, and tells all ids at once if one is wrong. OpenAI's takes 300.
LOGIT_BIAS_MAX = 1024
LOGIT_BIAS = 100.0
# What vLLM leaves out of a system's turn, if it begins so; we leave the turn to vLLM.
BILLING_HEADER = "x-anthropic-billing-header"
# Its names, where ours differ.
PARAMS = {
    "top_logprobs": "logprobs",
    "chat_template_kwargs": "template",
    "structured_outputs": "response_format",
}


class Own(NamedTuple):
    """What vLLM's side knows of a rendered request: vLLM's own form of it, if it was rendered as chat, what
    its grammar is, and what the engine's own reasoning parser has to know."""

    request: Any = None
    structured_outputs: Any = None
    template_kwargs: dict[str, Any] | None = None
    reasoning_ended: bool | None = None


class Chat:
    """One model's chat. Made once, after vLLM was imported."""

    def __init__(self, llm: Any, model: Model, tokenizer: Tokenizer) -> None:
        from vllm.renderers.hf import resolve_chat_template_content_format
        from vllm.renderers.online_renderer import OnlineRenderer

        config = llm.vllm_config.model_config
        self._config = config
        self._tokenizer = tokenizer
        # vLLM's, which threads may share.
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
        """Say whether the prompt is only roles and words: its ids are the same without vLLM, and sooner."""
        asked = (
            parameters.tools,
            parameters.tool_choice,
            parameters.response_format,
            parameters.template,
            parameters.reasoning_effort,
        )
        return not (self._reasons or any(asked)) and (
            isinstance(prompt, str) or (self._takes_strings and all(map(_is_plain, prompt)))
        )

    async def render(self, prompt: str | tuple[Message, ...], parameters: Parameters) -> Rendered:
        """Raises InvalidRequest."""
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.exceptions import VLLMClientError

        messages = (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt
        if parameters.response_format is not None:
            check_schemas(parameters)
        try:
            request = chat_request(messages, parameters)
            result = await self._renderer.render_chat(request)
        except (VLLMClientError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise invalid(error, parameters) from error
        if isinstance(result, ErrorResponse):
            raise InvalidRequest(
                result.error.message, code="unsupported", param=result.error.param or _blamed(parameters)
            )
        (engine_input,) = result[1]
        ids = engine_input["prompt_token_ids"]
        if (grammar := request.extract_structured_outputs()) is None:
            return Rendered(ids, parameters, own=Own(request))
        check_schemas(parameters)
        if not self._reasons:
            return Rendered(ids, parameters, grammar=True, own=Own(request, grammar))
        # The engine's own parser says from which token on the grammar holds.
        ended = request.resolve_reasoning_ended(self._new_parser(request), ids)
        return Rendered(
            ids, parameters, grammar=True, own=Own(request, grammar, self._kwargs(request), ended)
        )

    def parser(self, rendered: Rendered) -> "VllmParser | None":
        own: Own = rendered.own or Own()
        if own.request is None or self._renderer.parser is None:
            return None
        if not (self._reasons or own.request.tools):
            return None
        decoder = self._tokenizer.decoder(special=not own.request.skip_special_tokens)
        return VllmParser(self._new_parser(own.request), own.request, rendered.prompt_ids, decoder)

    def logprobs(self, wanted: int, before: Sequence[int]) -> "Logprobs":
        return Logprobs(self.tokenizer, wanted, before)

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
    """Implements `rift.engines.Parser` by a parser of vLLM's. One that raises reads no more: what follows is
    content, where vLLM's server would break the stream off."""

    def __init__(self, parser: Any, request: Any, prompt_ids: Sequence[int], decoder: Decoder) -> None:
        self.decoder = decoder
        self._parser = parser
        self._request = request
        self._prompt_ids = list(prompt_ids)
        self._first_only = request.parallel_tool_calls is False
        self._has_reasoned = self._is_broken = False

    def feed(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta:
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
        except Exception:
            # A model may write anything.
            logger.exception("%s cannot read an answer", type(self._parser).__name__)
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
                arguments=(call.function.arguments if call.function else None) or "",
            )
            for call in message.tool_calls
            if not (self._first_only and call.index)
        ]
        return Delta(message.content or "", message.reasoning or "", tuple(calls))

    def reasoning_tokens(self, output_ids: Sequence[int]) -> int:
        """As vLLM counts them: between the marks. Where the template wrote the first mark, or the model left
        it out, vLLM counts none; here they are counted from the answer's first."""
        ids = list(output_ids)
        start = getattr(self._parser.reasoning_parser, "start_token_id", None)
        if self._has_reasoned and start is not None and start not in ids:
            ids.insert(0, start)
        count: int = self._parser.count_reasoning_tokens(ids)
        return count


class Logprobs:
    """vLLM's own reader of log probabilities, told the ids before, whose characters may be unfinished."""

    def __init__(self, tokenizer: Any, wanted: int, before: Sequence[int]) -> None:
        from vllm.v1.engine.logprobs import LogprobsProcessor

        self._wanted = wanted
        self._processor = LogprobsProcessor(
            tokenizer=tokenizer,
            logprobs=[{token_id: None} for token_id in before[-CONTEXT_IDS:]],
            prompt_logprobs=None,
            cumulative_logprob=0.0,
            num_logprobs=wanted,
            num_prompt_logprobs=None,
        )

    def __call__(self, output: Any) -> tuple[Logprob, ...]:
        """Read an `EngineCoreOutput`: for each id, its own and the likeliest, the likeliest first."""
        self._processor.update_from_output(output)
        said = self._processor.logprobs
        new = [self._shown(one) for one in said[-len(output.new_token_ids) :]]
        del said[:-CONTEXT_IDS]
        return tuple(new)

    def _shown(self, one: dict[int, Any]) -> Logprob:
        sampled, *_ = entries = list(one.values())
        likeliest = sorted(entries, key=lambda entry: int(entry.rank))[: self._wanted]
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
        # What is left for the answer is the worker's business.
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
    """Return the grammar of an answer to a prompt that is no chat, or None. Raises InvalidRequest."""
    from vllm.sampling_params import StructuredOutputsParams

    wanted = parameters.response_format
    if parameters.tools:
        raise InvalidRequest("tools need messages", code="unsupported", param="tools")
    if wanted is None:
        return None
    check_schemas(parameters)
    if wanted.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=_object(wanted.schema or "{}", "response_format"))


def logit_bias(parameters: Parameters) -> dict[int, float] | None:
    """Return the bias by id, bounded as vLLM does it. Raises InvalidRequest."""
    given = parameters.logit_bias
    if not given:
        return None
    if len(given) > LOGIT_BIAS_MAX:
        raise _wrong(f"logit_bias may name {LOGIT_BIAS_MAX} tokens, got {len(given)}", "logit_bias")
    # No id has more digits, and int() takes a long time for very many.
    if any(not (key.isascii() and key.isdigit() and len(key) < 10) for key in given):
        raise _wrong("logit_bias goes by token ids", "logit_bias")
    if not all(map(math.isfinite, given.values())):
        raise _wrong("a logit_bias is a number", "logit_bias")
    return {int(key): max(-LOGIT_BIAS, min(LOGIT_BIAS, bias)) for key, bias in given.items()}


def no_grammar(parameters: Parameters) -> InvalidRequest:
    """What the engine gave up before the first token."""
    return InvalidRequest(
        "the engine cannot hold an answer to this schema; a simpler one it may: shorter counted repetitions "
        "in patterns, no schema that refers to nothing but itself",
        code="schema_unsupported",
        param=_blamed(parameters),
    )


def invalid(error: Exception, parameters: Parameters) -> InvalidRequest:
    """vLLM names the parameter in a field of the error, or only as the first word of its message."""
    param = getattr(error, "parameter", None)
    message = str(error.args[0]) if error.args else type(error).__name__
    if (errors := getattr(error, "errors", None)) is not None:  # pydantic's
        first = errors()[0]
        param = ".".join(map(str, first["loc"]))
        message = first["msg"]
    param = str(param or message.split(" ", 1)[0]).partition(".")[0]
    if param in ("input_tokens", "input_text"):
        return InvalidRequest(message, code="context_length_exceeded", param="messages")
    param = PARAMS.get(param, param)
    known = param in Parameters.__struct_fields__ or param == "messages"
    return _wrong(message, param if known else _blamed(parameters))


def _blamed(parameters: Parameters) -> str | None:
    """Return what an error is about that names nothing: most likely a grammar."""
    if parameters.tools and parameters.tool_choice not in (None, "none"):
        return "tools"
    for param in ("response_format", "tools", "template"):
        if getattr(parameters, param):
            return param
    return None


def _wrong(message: str, param: str | None) -> InvalidRequest:
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
    wanted = parameters.response_format
    assert wanted is not None, "the caller looked"
    if wanted.type == "json_object":
        return {"type": "json_object"}
    schema = _object(wanted.schema or "{}", "response_format")
    return {
        "type": "json_schema",
        "json_schema": {"name": wanted.name or "answer", "schema": schema, "strict": wanted.strict},
    }


def _json_fields(struct: msgspec.Struct, name: str, param: str) -> dict[str, Any]:
    """Return the struct's fields that say something; the one of that name is JSON text."""
    fields = {
        key: value for key, value in msgspec.structs.asdict(struct).items() if value not in (None, False)
    }
    if name in fields:
        fields[name] = _object(fields[name], param)
    return fields


def _object(text: str, param: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise _wrong(f"{param} is no JSON object: {error}", param) from error
