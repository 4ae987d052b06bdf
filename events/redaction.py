"""Events without their content, and the hash of a record: what the archive keeps for ever.

Content is what clients said and were told: prompts, stop strings, token ids, texts, words of errors; of a
sealed request (`sealing.py`) its sealed bytes, so that a hash can be checked when nobody can open them any
more. A bare event is one line of JSON that says the rest, and folds to the same state. Its bytes are hashed:

    event hash    SHA-256 of the bare event's JSON
    record hash   SHA-256 of "STREAM SEQUENCE AT_NS CONTENT EVENTS SUBJECT WRITER"

AT_NS is the stored time (the largest of the stream so far), CONTENT a keyed hash of the record's content or
`-`, EVENTS the hashes of its events one after the other or `-`. So a reader who is shown some events of a
record, and only the hashes of others, can check it; and who has no key cannot try out contents.
"""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from events.schema import AnyEvent, Event, Natural, RequestAccepted, RequestFinished, TokensGenerated

NONE = "-"


class RedactedTokens(Event, frozen=True, kw_only=True, omit_defaults=True, tag="TokensGenerated"):
    """`TokensGenerated` with the number of its tokens instead of the tokens."""

    attempt: str
    index: Natural
    tokens: Natural
    cached_tokens: Natural = 0


_encoder = msgspec.json.Encoder(order="deterministic")
_tokens = msgspec.json.Decoder(RedactedTokens)
_event: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def split(event: AnyEvent) -> tuple[bytes, Any]:
    """Return an event's bare JSON and its content, None if it has none."""
    match event:
        case TokensGenerated():
            bare: Any = RedactedTokens(
                attempt=event.attempt,
                index=event.index,
                tokens=len(event.token_ids),
                cached_tokens=event.cached_tokens,
            )
            said = (event.reasoning, event.tool_calls, event.logprobs)
            return (
                _encoder.encode(bare),
                [event.token_ids, event.text, *(said if any(said) else ()), *_sealed(event)],
            )
        case RequestAccepted():
            told = event.parameters
            shapes = (told.tools, told.tool_name, told.response_format, told.template, event.metadata)
            parameters = replace(told, stop=(), tools=(), tool_name=None, response_format=None, template=None)
            if event.sealed is not None:
                # Tokens that a client chose are words; they only bend an answer, and are left in the clear
                # where nothing was to be forgotten.
                parameters = replace(parameters, logit_bias={})
            return (
                _encoder.encode(replace(event, input="", parameters=parameters, metadata={}, content="")),
                [event.input, told.stop, *(shapes if any(shapes) else ()), *_sealed(event)],
            )
        case RequestFinished() if event.error is not None:
            words = event.error.message
            bare = replace(event, error=replace(event.error, message=""), content="")
            return _encoder.encode(bare), [words, *_sealed(event)]
    return _encoder.encode(event), None


def _sealed(event: RequestAccepted | TokensGenerated | RequestFinished) -> tuple[str, ...]:
    return (event.content,) if event.content else ()


def decode(bare: bytes | str) -> AnyEvent:
    """Return a bare event as the fold takes it: tokens that count, and say nothing.

    Raises msgspec.DecodeError.
    """
    if '"type":"TokensGenerated"' in (bare if isinstance(bare, str) else bare.decode()):
        told = _tokens.decode(bare)
        return TokensGenerated(
            attempt=told.attempt,
            index=told.index,
            token_ids=(0,) * told.tokens,
            text="",
            cached_tokens=told.cached_tokens,
        )
    return _event.decode(bare)


def event_hash(bare: bytes) -> str:
    return hashlib.sha256(bare).hexdigest()


def content_hash(key: bytes, contents: Sequence[Any]) -> str:
    """Return the keyed hash of a record's contents, one for each event; `-` if none has any."""
    if all(content is None for content in contents):
        return NONE
    return hmac.new(key, _encoder.encode(contents), hashlib.sha256).hexdigest()


def record_hash(
    *, stream: str, sequence: int, at_ns: int, content: str, events: Sequence[str], subject: str, writer: str
) -> bytes:
    """Return the hash of a record from the hashes of its parts, as hex, in order."""
    text = f"{stream} {sequence} {at_ns} {content} {''.join(events) or NONE} {subject} {writer}"
    return hashlib.sha256(text.encode()).digest()
