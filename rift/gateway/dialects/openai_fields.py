"""Fields that OpenAI's APIs share beyond sampling: tools, schemas, metadata. Pure; errors name the field."""

from typing import Annotated, Any, Literal

import msgspec

from events.schema import Parameters, Tool
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.dialects.sampling import note, wrong

# As OpenAI's own.
TOOLS_MAX = 128
METADATA_PAIRS_MAX = 16
METADATA_NAME_MAX = 64
METADATA_TEXT_MAX = 512
ALTERNATIVES_MAX = 20

# The engine's sampler applies every bias at every step.
BIASES_MAX = 1024

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Alternatives = Annotated[int, msgspec.Meta(ge=0, le=ALTERNATIVES_MAX)]
TokenId = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
Biases = Annotated[dict[TokenId, Bias], msgspec.Meta(max_length=BIASES_MAX)]
Metadata = Annotated[
    dict[
        Annotated[str, msgspec.Meta(max_length=METADATA_NAME_MAX)],
        Annotated[str, msgspec.Meta(max_length=METADATA_TEXT_MAX)],
    ],
    msgspec.Meta(max_length=METADATA_PAIRS_MAX),
]
Effort = Annotated[str, msgspec.Meta(pattern=r"^[a-z]{0,16}$")]
Choice = Literal["none", "auto", "required"]
# Some clients send an empty text for their own default.
Verbosity = Literal["", "low", "medium", "high"]
PARALLEL = "Default: true. If false, an answer has at most one call."
VERBOSITY = "low and high are passed to the model's chat template; medium is every model's default."

# vLLM passes these on to the tokenizer. Together, some pad a prompt to any length, or cut it.
TOKENIZER_ARGUMENTS = frozenset(
    (
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    )
)


# JSON as the client wrote it, or empty.
Schema = msgspec.Raw


class Function(msgspec.Struct, frozen=True):
    name: Annotated[Name, note("The function's name.", "weather")]
    description: Annotated[str | None, note("What it does, for the model.", "Tell the weather.")] = None
    parameters: Annotated[Schema, note("The JSON schema of its arguments.")] = msgspec.field(
        default_factory=Schema
    )
    strict: Annotated[bool | None, note("If true, some models' calls are forced into the schema.")] = None


class NamedFunction(msgspec.Struct, frozen=True):
    name: Annotated[Name, note("The name of a function in `tools`.", "weather")]


class Part(msgspec.Struct, frozen=True):
    """A part of a message. Only text is supported; the APIs have several types for it."""

    type: Annotated[
        str,
        note("`text`, `input_text`, `output_text`, `refusal`, `reasoning_text` or `summary_text`.", "text"),
    ]
    text: Annotated[str | None, note("The text.", "hi")] = None
    refusal: Annotated[str | None, note("The text of a refusal.")] = None


TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text")


def text_of(content: str | list[Part] | None, param: str) -> str:
    """Return the text of a message: each part that has text is a line, as in vLLM. Raises HTTPError."""
    if content is None or isinstance(content, str):
        return content or ""
    for at, part in enumerate(content):
        if part.type not in TEXT_PARTS:
            words = f"only text is supported, got {part.type!r}"
            raise wrong(f"{param}[{at}].type", words, code="unsupported")
    texts = (part.text or part.refusal for part in content)
    return "\n".join(text for text in texts if text)


def tool(function: Function, param: str) -> Tool:
    return Tool(
        name=function.name,
        description=function.description,
        parameters=schema_text(function.parameters, f"{param}.parameters"),
        strict=bool(function.strict),
    )


def schema_text(raw: Schema, param: str) -> str | None:
    """Return a JSON schema as the client wrote it, or None. Raises HTTPError."""
    data = bytes(raw).strip()
    if data in (b"", b"null"):
        return None
    if not data.startswith(b"{"):
        raise wrong(param, "a JSON schema must be an object")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise HTTPError(
            400, f"{param}: not valid UTF-8: {error}", code="invalid_json", param=param
        ) from error


def template(variables: dict[str, Any] | None, verbosity: Verbosity | None) -> str | None:
    """Return further variables of the chat template as JSON, or None. Raises HTTPError."""
    for name in sorted(TOKENIZER_ARGUMENTS.intersection(variables or {})):
        words = "this is not a variable of the chat template; leave it out"
        raise wrong(f"chat_template_kwargs.{name}", words, code="unsupported")
    named = {} if verbosity in (None, "", "medium") else {"verbosity": verbosity}
    if not (given := named | (variables or {})):
        return None
    try:
        return msgspec.json.encode(given).decode()
    except OverflowError as error:
        raise wrong("chat_template_kwargs", f"a number is out of range: {error}") from error


def with_tools(
    parameters: Parameters,
    tools: tuple[Tool, ...],
    choice: Choice | NamedFunction | None,
    *,
    parallel: bool | None,
) -> Parameters:
    """Add tools and their choice. Raises HTTPError if the choice names an unknown tool."""
    named = choice.name if isinstance(choice, NamedFunction) else None
    if named is not None and named not in {each.name for each in tools}:
        raise wrong("tool_choice", f"`tools` has no tool {named!r}")
    if choice == "required" and not tools:
        raise wrong("tool_choice", "`required` needs at least one entry in `tools`")
    return msgspec.structs.replace(
        parameters,
        tools=tools,
        tool_choice="function" if isinstance(choice, NamedFunction) else choice if tools else None,
        tool_name=named,
        parallel_tool_calls=parallel is not False,
    )
