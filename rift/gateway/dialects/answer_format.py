"""The format of an answer, in all the ways to ask for one. Pure; errors name the field."""

from typing import Annotated, Any, Literal

import msgspec

from events.schema import ResponseFormat
from rift.gateway.dialects.openai_fields import Name, Schema, schema_text
from rift.gateway.dialects.sampling import note, wrong
from rift.gateway.dialects.support import CommonBody, refused

# The name of a schema that the client did not name.
NAME = "answer"

SchemaOrText = Annotated[Schema, msgspec.Meta(extra_json_schema={"type": ["object", "string", "null"]})]


SCHEMA = note("The JSON schema of the answer.")
# Grammars always enforce the schema.
STRICT = note("Accepted and stored; a schema is always enforced.")
FORMAT = note("json_object is any JSON object; json_schema needs a schema.")
ABOUT = note("Ignored: the model does not read it.")


class JsonSchema(msgspec.Struct, frozen=True):
    name: Annotated[Name, note("A name for the schema.", "city")]
    description: Annotated[str | None, ABOUT] = None
    schema: Annotated[Schema, SCHEMA] = msgspec.field(default_factory=Schema)
    strict: Annotated[bool | None, STRICT] = None


class ChatFormat(msgspec.Struct, frozen=True):
    """The format as chat and completions have it. `schema` is an extension, for the type json_object."""

    type: Annotated[Literal["text", "json_object", "json_schema"], FORMAT]
    json_schema: Annotated[JsonSchema | None, note("The schema and its name, for json_schema.")] = None
    schema: Annotated[Schema, SCHEMA] = msgspec.field(default_factory=Schema)


class TextFormat(msgspec.Struct, frozen=True):
    """The format as responses have it."""

    type: Annotated[Literal["text", "json_object", "json_schema"], FORMAT]
    name: Annotated[Name | None, note("A name for the schema.", "city")] = None
    description: Annotated[str | None, ABOUT] = None
    schema: Annotated[Schema, SCHEMA] = msgspec.field(default_factory=Schema)
    strict: Annotated[bool | None, STRICT] = None


class StructuredOutputs(msgspec.Struct, frozen=True):
    """The format as vLLM has it."""

    json: Annotated[SchemaOrText, note("A JSON schema, or its text.")] = msgspec.field(default_factory=Schema)
    json_object: Annotated[bool | None, note("If true, any JSON object.")] = None
    regex: Annotated[Any, refused(advice="use a JSON schema with a `pattern`")] = None
    choice: Annotated[Any, refused(advice="use a JSON schema with an `enum`")] = None
    grammar: Annotated[Any, refused(advice="use a JSON schema")] = None
    structural_tag: Annotated[Any, refused()] = None
    whitespace_pattern: Annotated[Any, refused()] = None
    disable_any_whitespace: Annotated[Any, refused(False)] = None
    disable_additional_properties: Annotated[Any, refused(False)] = None


class FormatBody(CommonBody, frozen=True, kw_only=True):
    """A body whose answer may have a format, also by vLLM's fields."""

    structured_outputs: Annotated[
        StructuredOutputs | None, note("`json` and `json_object`; the other kinds are refused.")
    ] = None
    guided_json: Annotated[SchemaOrText, note("The older name of `structured_outputs.json`.")] = (
        msgspec.field(default_factory=Schema)
    )
    guided_choice: Annotated[Any, refused(advice="use a JSON schema with an `enum`")] = None
    guided_grammar: Annotated[Any, refused(advice="use a JSON schema")] = None
    guided_regex: Annotated[Any, refused(advice="use a JSON schema with a `pattern`")] = None
    guided_whitespace_pattern: Annotated[Any, refused()] = None


def of_chat(format: ChatFormat | None) -> ResponseFormat | None:
    """Return the format that `response_format` asks for. Raises HTTPError."""
    if format is None:
        return None
    schema = schema_text(format.schema, "response_format.schema")
    if format.type == "json_schema":
        if format.json_schema is None:
            raise wrong("response_format.json_schema", "the type json_schema needs it")
        inner = schema_text(format.json_schema.schema, "response_format.json_schema.schema")
        name, strict = format.json_schema.name, bool(format.json_schema.strict)
        return _json_schema(inner or schema or "{}", name, strict)
    if format.json_schema is not None:
        raise wrong(
            "response_format.json_schema", f"the type {format.type} has no such field; use json_schema"
        )
    return _typed(format.type, schema, "response_format.schema")


def of_response(format: TextFormat | None) -> ResponseFormat | None:
    """Return the format that `text.format` asks for. Raises HTTPError."""
    if format is None:
        return None
    schema = schema_text(format.schema, "text.format.schema")
    if format.type != "json_schema":
        return _typed(format.type, schema, "text.format.schema")
    if schema is None or format.name is None:
        raise wrong("text.format", "the type json_schema needs a name and a schema")
    return _json_schema(schema, format.name, bool(format.strict))


def with_structured_outputs(
    body: FormatBody, format: ResponseFormat | None, param: str
) -> ResponseFormat | None:
    """Return the one format that a body asks for. `format` is that of the field `param`. Raises HTTPError."""
    options = body.structured_outputs or StructuredOutputs()
    formats = [] if format is None else [(param, format)]
    for name, raw in (("structured_outputs.json", options.json), ("guided_json", body.guided_json)):
        if schema := schema_text(_unquoted(raw, name), name):
            formats.append((name, _json_schema(schema)))
    if options.json_object:
        formats.append(("structured_outputs.json_object", ResponseFormat(type="json_object")))
    if not formats:
        return None
    first, chosen = formats[0]
    for name, other in formats[1:]:
        if (other.type, other.schema) != (chosen.type, chosen.schema):
            raise wrong(name, f"`{first}` asks for another format; send one of them")
    return chosen


def _typed(kind: str, schema: str | None, param: str) -> ResponseFormat | None:
    if kind == "json_object":
        return _json_schema(schema) if schema else ResponseFormat(type="json_object")
    if schema:
        raise wrong(param, "the type text takes no schema; use the type json_schema")
    return None


def _json_schema(schema: str, name: str = NAME, strict: bool = False) -> ResponseFormat:
    return ResponseFormat(type="json_schema", name=name, schema=schema, strict=strict)


def _unquoted(raw: Schema, param: str) -> Schema:
    """Return a schema that may be a JSON string with the schema's text."""
    if not bytes(raw).strip().startswith(b'"'):
        return raw
    try:
        text = msgspec.json.decode(bytes(raw), type=str).encode()
        return msgspec.json.decode(text, type=Schema) if text else Schema()
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise wrong(param, f"not valid JSON: {error}", code="invalid_json") from error
