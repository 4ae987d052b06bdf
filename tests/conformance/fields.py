"""Write `rift/gateway/FIELDS.md`: the fields of OpenAI's and vLLM's requests, and what Rift does with them.

`python -m tests.conformance.fields` needs the packages openai and vLLM. What Rift does is declared in
`rift/gateway/dialects`.
"""

import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from rift.gateway.dialects import chat_request, completions_request, responses_request, support
from rift.gateway.dialects.sampling import SEED_MAX, ParsedRequest

DOCUMENT = Path(support.__file__).parents[1] / "FIELDS.md"
COLUMNS = ("field", "support", "accepts", "notes", "OpenAI", "vLLM")
ORDER = ("supported", "refused", "ignored")

HEAD = """\
# Fields of OpenAI's request types

Every field that OpenAI (package `openai` {openai}) or vLLM's server ({vllm}) documents, and what Rift does
with it:

- *supported*: as OpenAI documents it, or as the notes say. A field without an entry under OpenAI is an
  extension.
- *refused*: answered with 400, the code `unsupported` and the field's name in `param`, because the field
  would change the answer. Values that ask for nothing are accepted: null, an empty text, list or object, and
  the values under *accepts*.
- *ignored*: accepted with any value, because the field cannot change the answer. Fields that are not listed
  are ignored too, as OpenAI's clients expect.

`python -m tests.conformance.fields` writes this page, and a test compares it with the installed packages.
"""

# The ranges that OpenAI publishes in its OpenAPI document. The package has only types.
Range = tuple[float | None, float | None]
SAMPLING: dict[str, Range] = {"temperature": (0, 2), "top_p": (0, 1)}
TEXT: dict[str, Range] = SAMPLING | {
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "n": (1, 128),
    "seed": (-SEED_MAX, SEED_MAX),
}


class Source(NamedTuple):
    """Where one API's fields are documented, with a request that has only the required ones."""

    body: type[msgspec.Struct]
    parse: Callable[[bytes], ParsedRequest]
    required: dict[str, Any]
    openai: Callable[[], Any]
    vllm: Callable[[], Any]
    published: dict[str, Range]


def _openai_chat() -> Any:
    from openai.types.chat import completion_create_params as module

    return module.CompletionCreateParamsNonStreaming


def _openai_completion() -> Any:
    from openai.types import completion_create_params as module

    return module.CompletionCreateParamsNonStreaming


def _openai_response() -> Any:
    from openai.types.responses import response_create_params as module

    return module.ResponseCreateParamsNonStreaming


def _vllm_chat() -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest


def _vllm_completion() -> Any:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return CompletionRequest


def _vllm_response() -> Any:
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    return ResponsesRequest


SECTIONS = {
    "Chat completions": Source(
        chat_request.ChatBody,
        chat_request.parse_chat,
        {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
        _openai_chat,
        _vllm_chat,
        TEXT | {"top_logprobs": (0, 20)},
    ),
    "Completions": Source(
        completions_request.CompletionBody,
        completions_request.parse_completion,
        {"model": "m", "prompt": "hi"},
        _openai_completion,
        _vllm_completion,
        TEXT | {"best_of": (0, 20), "logprobs": (0, 5), "max_tokens": (0, None)},
    ),
    "Responses": Source(
        responses_request.ResponseBody,
        responses_request.parse,
        {"model": "m", "input": "hi"},
        _openai_response,
        _vllm_response,
        SAMPLING | {"top_logprobs": (0, 20), "max_output_tokens": (16, None)},
    ),
}

Row = dict[str, str]
NUMBERS = ("integer", "number")
# Longer enumerations are names of models.
VALUES_MAX = 8


def rift_rows(source: Source) -> dict[str, Row]:
    """Return the columns that the declaration of a body decides, by field."""
    kinds = schemas(source.body)
    marks = support.marks(source.body)
    rows = {}
    for name, field in kinds[source.body.__name__]["properties"].items():
        mark = marks[name]
        row = {"support": "supported", "accepts": shape(field, kinds), "notes": field.get("description", "")}
        if "refusal" in mark:
            shown = (_json(value) for value in mark["accepted"] if value not in support.EMPTY)
            row = {"support": "refused", "accepts": ", ".join(shown), "notes": mark["advice"]}
        if "ignored" in mark:
            row = {"support": "ignored", "accepts": "", "notes": mark["ignored"]}
        rows[name] = row | {"notes": row["notes"].removesuffix(".")}
    return rows


@cache
def schemas(body: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the JSON schemas of a body and of the types in it, by name."""
    kinds: dict[str, Any] = msgspec.json.schema(body)["$defs"]
    return kinds


def openai_fields(source: Source) -> dict[str, str]:
    from pydantic import TypeAdapter

    fields = _schema_fields(TypeAdapter(source.openai()).json_schema(), source.published)
    return fields | {"stream": "boolean or null"}


def vllm_fields(source: Source) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _schema_fields(source.vllm().model_json_schema(), {})


def _schema_fields(schema: dict[str, Any], published: dict[str, Range]) -> dict[str, str]:
    fields = {}
    for name, field in schema["properties"].items():
        if name in published:
            number = next(each for each in field.get("anyOf", [field]) if each["type"] in NUMBERS)
            number["minimum"], number["maximum"] = published[name]
        text = shape(field, schema.get("$defs", {}))
        if field.get("default") is not None:
            text += f"; default {_json(field['default'])}"
        fields[name] = text
    return fields


def shape(schema: dict[str, Any], kinds: dict[str, Any]) -> str:
    """Return a JSON schema in a few words."""
    if "$ref" in schema:
        return shape(kinds[schema["$ref"].rpartition("/")[2]], kinds)
    if members := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(shape(member, kinds) for member in members))
    kind = schema.get("type", "any")
    values = schema.get("enum") or [schema["const"]] if "const" in schema or "enum" in schema else []
    if 0 < len(values) <= VALUES_MAX:
        return ", ".join(map(_json, values))
    if kind == "array":
        items = shape(schema.get("items", {}), kinds)
        return f"list of {items}" if items in ("integer", "number", "string", "object") else "list"
    if kind in NUMBERS:
        least = schema.get("minimum", schema.get("exclusiveMinimum"))
        text = _range(least, schema.get("maximum"))
        return kind + text.replace("from", "above") if "exclusiveMinimum" in schema else kind + text
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _range(least: float | None, most: float | None) -> str:
    return ("" if least is None else f" from {least:,}") + ("" if most is None else f" to {most:,}")


def _json(value: object) -> str:
    return f"`{msgspec.json.encode(value).decode()}`"


def page(rows: dict[str, dict[str, Row]]) -> str:
    """Return the document with the rows of each section."""
    lines = [HEAD.format(openai=version("openai"), vllm=_vllm_version())]
    for section, fields in rows.items():
        lines += [f"## {section}\n", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        names = sorted(fields, key=lambda name: (ORDER.index(fields[name]["support"]), name))
        for name in names:
            cells = [f"`{name}`", *(fields[name].get(column, "") for column in COLUMNS[1:])]
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
        lines.append("")
    return "\n".join(lines)


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def all_rows() -> dict[str, dict[str, Row]]:
    """Return the rows of every section. Ignored fields that neither documents for it are left out."""
    rows = {}
    for section, source in SECTIONS.items():
        fields = rift_rows(source)
        documented = {"OpenAI": openai_fields(source), "vLLM": vllm_fields(source)}
        for column, texts in documented.items():
            if unknown := set(texts) - set(fields):
                sys.exit(f"{section}: declare {sorted(unknown)} of {column} in rift/gateway/dialects first")
            for name, text in texts.items():
                fields[name][column] = text
        rows[section] = {
            name: row
            for name, row in fields.items()
            if row["support"] != "ignored" or set(row) & set(documented)
        }
    return rows


def document_rows(section: str) -> dict[str, Row]:
    """Return the rows of a section of the document, by field."""
    body = DOCUMENT.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = {}
    for line in body.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0].strip("`")] = dict(zip(COLUMNS[1:], cells[1:], strict=True))
    return rows


if __name__ == "__main__":
    DOCUMENT.write_text(page(all_rows()))
