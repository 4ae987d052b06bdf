"""Declare fields that Rift refuses or ignores, and the fields that the bodies of OpenAI's three APIs share.

Each body declares every field that OpenAI or vLLM documents. The declaration decides what the gateway does
with the field, and what `/openapi.json` and FIELDS.md say about it. Unknown fields are ignored, as clients
expect.
"""

from functools import cache
from typing import Annotated, Any

import msgspec

from rift.gateway.dialects.openai_fields import Biases, Metadata
from rift.gateway.dialects.sampling import STORE, Sampling, note, wrong

# Values that ask for nothing, whatever the field.
EMPTY: tuple[object, ...] = (None, "", [], {})


def refused(*neutral: object, advice: str = "") -> msgspec.Meta:
    """Mark a field that would change the answer: refused unless empty, or one of the neutral values."""
    shown = " or ".join(msgspec.json.encode(value).decode() for value in neutral)
    words = f"only {shown} is supported" if neutral else "this field is not supported; leave it out"
    words += advice and f"; {advice}"
    return msgspec.Meta(
        description=f"Refused unless empty: {words}.",
        extra_json_schema={"enum": [*EMPTY, *neutral]},
        extra={"accepted": (*EMPTY, *neutral), "refusal": words, "advice": advice},
    )


def ignored(reason: str) -> msgspec.Meta:
    """Mark a field that cannot change the answer: accepted with any value, without effect."""
    return msgspec.Meta(description=f"Ignored: {reason}.", extra={"ignored": reason})


class CacheOptions(msgspec.Struct, frozen=True):
    prewarm: Annotated[Any, refused(False)] = None


class CommonBody(Sampling, frozen=True, kw_only=True):
    """Fields that chat, completions and responses have."""

    model: Annotated[str, note("A model of `GET /v1/models`.", "smollm2:135m")]
    stream: Annotated[bool | None, note("If true, server-sent events.")] = None
    metadata: Annotated[Metadata | None, note("Up to 16 pairs; `GET /v1/inference/{id}` returns them.")] = (
        None
    )
    store: Annotated[bool | None, note(STORE)] = None
    logit_bias: Annotated[Biases | None, note("By token id, up to 1,024.")] = None

    # These change which tokens are generated.
    allowed_token_ids: Annotated[Any, refused(advice="use `logit_bias`")] = None
    bad_words: Annotated[Any, refused(advice="use `logit_bias`")] = None
    min_tokens: Annotated[Any, refused(0)] = None
    repetition_detection: Annotated[Any, refused()] = None
    stop_token_ids: Annotated[Any, refused(advice="use `stop`")] = None
    thinking_token_budget: Annotated[Any, refused(-1, advice="use `max_tokens`")] = None
    use_beam_search: Annotated[Any, refused(False)] = None
    vllm_xargs: Annotated[Any, refused()] = None
    watermarking: Annotated[Any, refused(False)] = None
    # These change what the model reads.
    ec_transfer_params: Annotated[Any, refused()] = None
    kv_transfer_params: Annotated[Any, refused()] = None
    truncate_prompt_tokens: Annotated[Any, refused(advice="shorten the prompt")] = None
    # These change what the answer shows.
    echo: Annotated[Any, refused(False)] = None
    include_reasoning: Annotated[Any, refused(True, advice="skip the reasoning in the answer")] = None
    include_stop_str_in_output: Annotated[Any, refused(False)] = None
    logprob_token_ids: Annotated[Any, refused()] = None
    moderation: Annotated[Any, refused()] = None
    prompt_logprobs: Annotated[Any, refused()] = None
    return_prompt_text: Annotated[Any, refused(False)] = None
    return_token_ids: Annotated[Any, refused(False)] = None
    return_tokens_as_token_ids: Annotated[Any, refused(False)] = None
    skip_special_tokens: Annotated[Any, refused(True)] = None

    prompt_cache_options: Annotated[
        CacheOptions | None, note("`prewarm` is refused; the others are ignored, as `prompt_cache_key`.")
    ] = None
    cache_salt: Annotated[Any, ignored("each account has a prefix cache of its own")] = None
    guided_decoding_backend: Annotated[Any, ignored("the engine has one backend")] = None
    length_penalty: Annotated[Any, ignored("it is for beam search, which is refused")] = None
    media_io_kwargs: Annotated[Any, ignored("only text is read")] = None
    mm_payload: Annotated[Any, ignored("it is for vLLM's render routes")] = None
    mm_processor_kwargs: Annotated[Any, ignored("only text is read")] = None
    priority: Annotated[Any, ignored("all requests have the same priority")] = None
    prompt_cache_key: Annotated[Any, ignored("each account has a prefix cache of its own")] = None
    prompt_cache_retention: Annotated[Any, ignored("each account has a prefix cache of its own")] = None
    request_id: Annotated[Any, ignored("Rift makes the id; send `X-Request-Id` for one of yours")] = None
    return_mm_kwargs: Annotated[Any, ignored("it is for vLLM's render routes")] = None
    return_token_offsets: Annotated[Any, ignored("it is for vLLM's render routes")] = None
    routed_experts_prompt_start: Annotated[Any, ignored("no answer has routed experts")] = None
    safety_identifier: Annotated[Any, ignored("it does not reach the model")] = None
    service_tier: Annotated[Any, ignored("there is only one tier")] = None
    session_id: Annotated[Any, ignored("it does not reach the model")] = None
    spaces_between_special_tokens: Annotated[Any, ignored("an answer has no special tokens")] = None
    stream_interval: Annotated[Any, ignored("it only groups tokens into chunks")] = None
    truncation_side: Annotated[Any, ignored("no prompt is truncated")] = None
    user: Annotated[Any, ignored("it does not reach the model")] = None


@cache
def marks(body: type[msgspec.Struct]) -> dict[str, dict[str, Any]]:
    """Return for each field the `extra` of its `refused` or `ignored`, or an empty dict."""
    fields = msgspec.inspect.type_info(body).fields  # type: ignore[attr-defined]
    return {field.encode_name: getattr(field.type, "extra", None) or {} for field in fields}


@cache
def _refused(body: type[msgspec.Struct]) -> list[tuple[str, tuple[object, ...], str]]:
    return [
        (name, mark["accepted"], mark["refusal"]) for name, mark in marks(body).items() if "refusal" in mark
    ]


def check_support(body: msgspec.Struct, at: str = "") -> None:
    """Raise HTTPError for a refused field of the body, or of an object in it. `at` is their path."""
    for name, accepted, words in _refused(type(body)):
        if getattr(body, name) not in accepted:
            raise wrong(f"{at}{name}", words, code="unsupported")
    for name in body.__struct_fields__:
        # The second check is slow, and most fields are None.
        if (value := getattr(body, name)) is not None and isinstance(value, msgspec.Struct):
            check_support(value, f"{at}{name}.")
