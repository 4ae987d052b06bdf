"""Events without their content, and the hash of a record: the archive keeps both for ever.

Content is what clients sent and received: prompts, stop strings, token ids, texts, messages of errors. In a
sealed request (`encryption.py`) it is the encrypted bytes, so that a hash can be checked when nothing can
decrypt them. A redacted event is one line of JSON with the rest, and folds to the same state. Its bytes are
hashed:

    event hash    SHA-256 of the redacted event's JSON
    record hash   SHA-256 of "STREAM SEQUENCE AT_NS CONTENT EVENTS SUBJECT WRITER"

AT_NS is the stored time (the largest of the stream so far), CONTENT a keyed hash of the record's content or
`-`, EVENTS the concatenated hashes of its events or `-`. So a reader can check a record from some of its
events and the hashes of the others, and cannot guess contents without the key.
"""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    """Return an event's redacted JSON and its content, None if it has none."""
    match event:
        case TokensGenerated():
            redacted: Any = RedactedTokens(
                attempt=event.attempt,
                index=event.index,
                tokens=len(event.token_ids),
                cached_tokens=event.cached_tokens,
            )
            parts = (event.reasoning, event.tool_calls, event.logprobs)
            return (
                _encoder.encode(redacted),
                [event.token_ids, event.text, *(parts if any(parts) else ()), *_sealed(event)],
            )
        case RequestAccepted():
            full = event.parameters
            shapes = (full.tools, full.tool_name, full.response_format, full.template, event.metadata)
            parameters = replace(full, stop=(), tools=(), tool_name=None, response_format=None, template=None)
            if event.sealed is not None:
                # The tokens of a bias are the client's words, so a sealed request hides them. They only steer
                # the answer, so any other request keeps them readable.
                parameters = replace(parameters, logit_bias={})
            return (
                _encoder.encode(replace(event, input="", parameters=parameters, metadata={}, content="")),
                [event.input, full.stop, *(shapes if any(shapes) else ()), *_sealed(event)],
            )
        case RequestFinished() if event.error is not None:
            redacted = replace(event, error=replace(event.error, message=""), content="")
            return _encoder.encode(redacted), [event.error.message, *_sealed(event)]
    return _encoder.encode(event), None


def _sealed(event: RequestAccepted | TokensGenerated | RequestFinished) -> tuple[str, ...]:
    return (event.content,) if event.content else ()


def decode(redacted: bytes | str) -> AnyEvent:
    """Return a redacted event as the folds take it, with zeros as token ids. Raises msgspec.DecodeError."""
    if '"type":"TokensGenerated"' in (redacted if isinstance(redacted, str) else redacted.decode()):
        tokens = _tokens.decode(redacted)
        return TokensGenerated(
            attempt=tokens.attempt,
            index=tokens.index,
            token_ids=(0,) * tokens.tokens,
            text="",
            cached_tokens=tokens.cached_tokens,
        )
    return _event.decode(redacted)


def event_hash(redacted: bytes) -> str:
    return hashlib.sha256(redacted).hexdigest()


def content_hash(key: bytes, contents: Sequence[Any]) -> str:
    """Return the keyed hash of a record's contents, one for each event; `-` if no event has content."""
    if all(content is None for content in contents):
        return NONE
    return hmac.new(key, _encoder.encode(contents), hashlib.sha256).hexdigest()


class RecordParts(NamedTuple):
    """The parts of a record that its hash covers. `content` and `events` are hashes, as hex."""

    stream: str
    sequence: int
    at_ns: int
    content: str
    events: Sequence[str]
    subject: str
    writer: str

    def record_hash(self) -> bytes:
        events = "".join(self.events) or NONE
        head = f"{self.stream} {self.sequence} {self.at_ns} {self.content}"
        return hashlib.sha256(f"{head} {events} {self.subject} {self.writer}".encode()).digest()
