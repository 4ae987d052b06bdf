"""Shared by the bodies of all APIs: sampling fields with their limits, decoding, and errors that name the
field."""

import re
from decimal import Decimal
from typing import Annotated, TypeVar

import msgspec

from events.schema import Kind, Message, Parameters
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.asgi.trace_context import TraceContext

OUTPUT_TOKENS_MAX = 1 << 20
STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256
# The ends of 64 bits as OpenAI publishes them and JavaScript writes them: rounded, and so just outside.
SEED_MAX = 9223372036854776000
# vLLM draws a seed for it. If it counted as a seed, the choices after the first would get 0, 1 and so on.
NO_SEED = -1
# The mark that some editors and shells write at the start of a UTF-8 file.
MARK = b"\xef\xbb\xbf"
NUMBER = re.compile(rb"-?\d{1,20}(\.\d{1,40})?([eE][+-]?\d{1,2})?")

Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
TopP = Annotated[float, msgspec.Meta(ge=0, le=1)]
MinP = Annotated[float, msgspec.Meta(ge=0, le=1)]
TopK = Annotated[int, msgspec.Meta(ge=-1, le=1 << 31)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, msgspec.Meta(gt=0)]
MaxTokens = Annotated[int, msgspec.Meta(ge=0, le=OUTPUT_TOKENS_MAX)]
Seed = Annotated[int, msgspec.Meta(extra_json_schema={"minimum": -SEED_MAX, "maximum": SEED_MAX})]
StopString = Annotated[str, msgspec.Meta(max_length=STOP_CHARACTERS_MAX)]
Stop = StopString | Annotated[list[StopString], msgspec.Meta(max_length=STOPS_MAX)] | None
Text = Annotated[str, msgspec.Meta(min_length=1)]
Decoded = TypeVar("Decoded")
# The bytes of a body.
Body = bytes | bytearray


class ParsedRequest(msgspec.Struct, frozen=True):
    """A body as all APIs have it in common. `kind` names the API.

    Each of the `more` prompts has `choices` choices too.
    """

    kind: Kind
    model: str
    input: str | tuple[Message, ...]
    parameters: Parameters
    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False
    more: tuple[str, ...] = ()
    choices: int = 1
    background: bool = False
    metadata: dict[str, str] = {}
    store: bool = True
    prompt_tokens_max: int | None = None
    # The field that limits the output, as this API's clients write it.
    max_tokens_param: str = "max_tokens"
    trace: TraceContext | None = None


def note(words: str, *examples: object) -> msgspec.Meta:
    """Return the description of a field, for `/openapi.json` and FIELDS.md."""
    return msgspec.Meta(description=words, examples=list(examples) or None)


STORE = (
    "Default: true. If false, prompt and answer are encrypted, and their key is erased 60 s after the end."
)


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling fields that every API accepts."""

    temperature: Annotated[Temperature | None, note("0 takes the likeliest token.")] = None
    top_p: Annotated[TopP | None, note("0 takes the likeliest token.")] = None
    top_k: Annotated[TopK | None, note("0 and -1 are no limit.")] = None
    min_p: Annotated[
        MinP | None, note("Leaves out tokens less likely than this share of the likeliest. 0 is no limit.")
    ] = None
    max_tokens: Annotated[
        MaxTokens | None, note("Default: 1,024, or the rest of the context if that is less.")
    ] = None
    stop: Annotated[
        Stop,
        note(f"Up to {STOPS_MAX}, each up to {STOP_CHARACTERS_MAX} characters. Empty ones are left out."),
    ] = None
    seed: Annotated[
        Seed | None, note("A seed outside 64 bits is the nearest within. -1 is no seed, as in vLLM.")
    ] = None
    presence_penalty: Annotated[Penalty | None, note("Against tokens that the answer has. Default: 0.")] = (
        None
    )
    frequency_penalty: Annotated[
        Penalty | None, note("Against tokens, by how often the answer has them. Default: 0.")
    ] = None
    repetition_penalty: Annotated[
        RepetitionPenalty | None,
        note("Above 1 against tokens that prompt or answer have, below 1 in favour of them. Default: 1."),
    ] = None
    ignore_eos: Annotated[
        bool | None, note("If true, the answer goes on to `max_tokens`, whatever the model says.")
    ] = None


def decode(data: Body, decoder: "msgspec.json.Decoder[Decoded]") -> Decoded:
    """Raises HTTPError."""
    if data.startswith(MARK):
        data = data[len(MARK) :]
    try:
        try:
            return decoder.decode(data)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
            return decoder.decode(_with_integers(data))
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error


def _with_integers(data: Body, inner: str = "parameters") -> bytes:
    """Return a body whose whole numbers are integers: some languages write 5 as 5.0, and 100,000 as 1e+05.

    Only its own fields are read and, once, those of its field `inner`: the time must not grow with the depth.
    """
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    for name, raw in fields.items():
        value = bytes(raw)
        if name == inner and value.startswith(b"{"):
            fields[name] = msgspec.Raw(_with_integers(value, inner=""))
        elif NUMBER.fullmatch(value) and (number := Decimal(value.decode())) == int(number):
            fields[name] = msgspec.Raw(b"%d" % number)
    return msgspec.json.encode(fields)


def _invalid(message: str) -> HTTPError:
    """Return the refusal for msgspec's message, which ends in the JSON path of the field."""
    words, _, path = message.rpartition(" - at ") if " - at " in message else (message, "", "")
    param = path.rpartition("`$")[2].rstrip("`").lstrip(".") or None
    if missing := re.search(r"(?:required field|unknown field) `(.+?)`", words):
        param = f"{param}.{missing[1]}" if param else missing[1]
    return HTTPError(400, f"{param}: {words}" if param else words, code="invalid_value", param=param)


def wrong(param: str, words: str, *, code: str = "invalid_value") -> HTTPError:
    """Return the refusal of a field whose value cannot be served."""
    return HTTPError(400, f"{param}: {words}", code=code, param=param)


def parameters(body: Sampling, max_tokens: int | None, *, raw: bool = False, at: str = "") -> Parameters:
    """Return the sampling parameters of a body. The caller adds those that only its API has.

    `at` is the path of the body's fields. Raises HTTPError.
    """
    stop = (body.stop,) if isinstance(body.stop, str) else body.stop or ()
    seed = body.seed
    if seed is not None:
        if abs(seed) > SEED_MAX:
            raise wrong(f"{at}seed", f"must be between {-SEED_MAX} and {SEED_MAX}")
        seed = max(-(2**63), min(2**63 - 1, seed)) if seed != NO_SEED else None
    return Parameters(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        max_tokens=max_tokens,
        stop=tuple(text for text in stop if text),
        seed=seed,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        ignore_eos=bool(body.ignore_eos),
        raw=raw,
    )
