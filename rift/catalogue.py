"""The models of an installation: those shipped in `catalogue.toml`, and those added in `rift.toml`.

Here are names, limits, list prices and how each model is served on which hardware. Running replicas are known
from the log, and prices in force from the book.
"""

import re
from importlib.resources import files
from typing import Annotated, Any, Literal

import msgspec

from events.money import InvalidMoney, nanousd, usd
from events.schema import Problem
from events.subjects import slug
from rift.errors import RiftError

# The most output tokens of a request that does not set `max_tokens`.
OUTPUT_TOKENS_DEFAULT = 1024

# The longest tokens are runs of spaces, dots or dashes: 81 to 128 bytes in the models shipped here. Twice the
# most of them serves a model that does not say it; too large a value only makes refusals later.
PROMPT_BYTES_PER_TOKEN_MAX = 256

# The native route accepts prompts of up to this many tokens, unless `native_prompt_tokens_max` sets another
# number; the worker counts them. The other routes accept what fits into the model's context.
NATIVE_PROMPT_TOKENS_MAX = 8192

NANOUSD_DIGITS = 3
# Up to a million USD per million tokens, so that a price with digits too many is refused.
PRICE = re.compile(r"(?P<whole>[0-9]{1,6})(?:\.(?P<part>[0-9]{1,3})0*)?")

# Numbers of the settings become numbers of events, which no reader accepts beyond 64 bits.
NUMBER_MAX = 2**53

ModelName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._:-]{0,62}\Z")]
Natural = Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=NUMBER_MAX)]
Argument = bool | Annotated[int, msgspec.Meta(ge=-NUMBER_MAX, le=NUMBER_MAX)] | float | str


def context_overflow(
    prompt: int, max_tokens: int | None, *, context: int, limit: int, at_least: bool
) -> Problem | None:
    """Return the problem of a request that does not fit into a model's context, or None if it fits.

    `prompt` is the number of its tokens, or with `at_least` a lower bound. `limit` is the most tokens of a
    prompt. Clients of OpenAI's APIs recognize the words "This model's maximum context length is" and "exceeds
    the context window", and then shorten the conversation.
    """
    output = max_tokens or 1
    if prompt <= limit and prompt + output <= context:
        return None
    if prompt > limit and limit < context - 1:
        least = "at least " if at_least else ""
        message = (
            f"the prompt has {least}{prompt} tokens; {limit} tokens is the limit of /v1/inference (setting "
            "native_prompt_tokens_max): send a shorter prompt, or use /v1/chat/completions, /v1/completions "
            f"or /v1/responses, which accept the model's whole context of {context} tokens"
        )
        return Problem(code="prompt_too_long", message=message)
    least = "at least " if at_least or max_tokens is None else ""
    too_long = (
        "prompt" if prompt >= context else "completion" if output >= context else "prompt or completion"
    )
    message = (
        f"This model's maximum context length is {context} tokens. However, you requested {least}"
        f"{prompt + output} tokens ({prompt} in the prompt, {output} in the completion), which exceeds the "
        f"context window. Reduce the length of the {too_long}."
    )
    return Problem(code="prompt_too_long" if prompt >= context else "max_tokens_too_large", message=message)


class Pace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Speed of the simulated engine.

    A step gives each running request one token, and takes `step_us` plus `step_us_per_running` for each of
    them. Prompts are read one after the other; if `prefill_tokens_per_s` is 0, reading is instant.
    """

    step_us: Positive = 20_000
    step_us_per_running: Natural = 0
    prefill_tokens_per_s: Natural = 0
    running_max: Positive | None = None
    start_ms: Natural = 0


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one kind of hardware serves a model.

    vLLM's engine arguments and environment, the cost of one GPU per hour ("" if unknown), and the speed of
    the simulated engine in its place.
    """

    gpus: Natural = 0
    gpu_hour_usd: str = ""
    args: dict[str, Argument] = {}
    env: dict[str, str] = {}
    sim: Pace = Pace()

    @property
    def hour_nanousd(self) -> int:
        """Return the cost of a whole replica per hour; 0 if unknown."""
        return self.gpus * nanousd_an_hour(self.gpu_hour_usd, where="gpu_hour_usd")


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model.

    `source` is a local path, a model hub id, or `builtin:` and a name that `prepare` knows. `sampling` has
    defaults that take precedence over the model's generation config. The parsers are vLLM's names for how the
    model writes tool calls and reasoning. At level "parameter" the arguments of a tool call always satisfy
    the tool's schema. No token of a prompt stands for more than `prompt_bytes_per_token_max` bytes, so that a
    gateway, which has no tokenizer, can refuse a prompt that cannot fit; a worker checks it at its start.
    """

    source: str
    context_tokens: Annotated[int, msgspec.Meta(ge=16, le=NUMBER_MAX)]
    prompt_usd: str
    output_usd: str
    prompt_bytes_per_token_max: Positive = PROMPT_BYTES_PER_TOKEN_MAX
    title: str = ""
    sampling: dict[str, int | float] = {}
    tool_parser: str = ""
    tool_strict_level: Literal["auto", "function", "parameter"] = "auto"
    reasoning_parser: str = ""
    profiles: dict[str, Profile] = {}


Catalogue = dict[ModelName, Model]


class InvalidCatalogue(RiftError):
    """A model's entry is invalid; the message names the model and the valid values."""


def shipped() -> Catalogue:
    return load(msgspec.toml.decode((files("rift") / "catalogue.toml").read_bytes())["models"])


def load(entries: dict[str, Any]) -> Catalogue:
    """Return the catalogue of decoded TOML. Raises InvalidCatalogue."""
    return checked({name: _model(name, entry) for name, entry in entries.items()})


def checked(catalogue: Catalogue) -> Catalogue:
    """Return the catalogue if no two of its models share a subject. Raises InvalidCatalogue."""
    slugs: dict[str, str] = {}
    for name in catalogue:
        if (other := slugs.setdefault(slug(name), name)) != name:
            raise InvalidCatalogue(
                f"models {other!r} and {name!r} would share one subject in the log; rename one of them"
            )
    return catalogue


def _model(name: str, entry: Any) -> Model:
    try:
        msgspec.convert(name, ModelName)
        model = msgspec.convert(entry, Model)
    except msgspec.ValidationError as error:
        raise InvalidCatalogue(f"models.{name}: {error}") from error
    for field in ("prompt_usd", "output_usd"):
        nanousd_per_token(getattr(model, field), where=f"models.{name}.{field}")
    for hardware, profile in model.profiles.items():
        where = f"models.{name}.profiles.{hardware}"
        nanousd_an_hour(profile.gpu_hour_usd, where=f"{where}.gpu_hour_usd")
        if profile.hour_nanousd > NUMBER_MAX:
            raise InvalidCatalogue(
                f"{where}: gpus times gpu_hour_usd is {usd(profile.hour_nanousd)} USD per hour; the most is "
                f"{usd(NUMBER_MAX)}"
            )
    return model


def nanousd_per_token(usd_per_million: str, *, where: str) -> int:
    """Return nano-USD per token for USD per million tokens, exactly. Raises InvalidCatalogue.

    One nano-USD per token is 0.001 USD per million tokens, so the digits are the answer, without rounding.
    """
    if not (digits := PRICE.fullmatch(usd_per_million)):
        raise InvalidCatalogue(
            f"{where}: must be USD per million tokens as a string, in steps of 0.001, "
            f'like "0.15", got {usd_per_million!r}'
        )
    return int(digits["whole"] + (digits["part"] or "").ljust(NANOUSD_DIGITS, "0"))


def nanousd_an_hour(usd: str, *, where: str) -> int:
    """Return nano-USD for USD as a string; "" is 0. Raises InvalidCatalogue."""
    try:
        amount = nanousd(usd or "0")
    except InvalidMoney as error:
        raise InvalidCatalogue(f"{where}: {error}") from error
    if amount < 0:
        raise InvalidCatalogue(f'{where}: must not be negative, got {usd!r}; write USD per hour like "1.99"')
    return amount
