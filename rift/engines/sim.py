"""The simulated engine: deterministic words at a steady pace, for load, failure and scaling tests.

It needs no weights and no engine package, and every answer is marked as simulated. A request that must call a
tool, or asks for JSON, gets the smallest value that satisfies the schema. No answer has reasoning.
Must not live here: faults, which tests inject, and any imitation of a model's judgement.
"""

import codecs
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import anyio

from events.schema import Logprob, Message, Parameters, ToolCallDelta
from rift.catalogue import Model, Pace, Profile
from rift.engines import Decoder, Delta, Emit, End, InvalidRequest, Parser, Rendered, Step
from rift.engines.prompt_limits import check_tokens, param_of

PROMPT_BYTES_PER_TOKEN = 4
SLOTS = 64

# A fraction of a step: below the resolution of any timer, above the rounding error of float sums.
STEP_DONE = 1e-6

# Ids below 256 are raw bytes, ids from 256 on are these words, each with its leading space.
WORD_LIST = """
    a about after again all also an and animal answer any are around as ask at away back be because
    been before began begin being below between big book both boy but by call came can car carry
    change children city close cold come could country cut day did different do does done door down
    draw each early earth eat end enough even every eye face fall family far father feet few find
    fire first fish five food for form found four from full gave get girl give go good got great
    green ground group grow had half hand hard has have he head hear help her here high him his
    home horse hot hour house how idea if in into is it its just keep kind king know land large
    last late learn leave left letter life light like line list little live long look made make
    man many may me mean men might mile more morning most mother mountain move much music must my
    name near need never new next night no north not notice now number of off often old on once
    one only open or order other our out over own page paper part people picture place plain plan
    plant play point port press problem question quick rain ran reach read ready real red rest
    right river road rock room round rule run said same saw say school sea second see seem self
    sentence serve set she ship short should show side simple since six sleep slow small snow so
    some song soon sound south spell stand star start state stay step stop story street strong
    study such sun sure table take talk teach tell ten than that the their them then there these
    they thing think this those though thought thousand three through time to together told too
    took top toward town travel tree true try turn two under unit until up upon us use very voice
    vowel wait walk want war warm was watch water way we week weight well went were west what wheel
    when where which while white who why will wind with wonder wood word work world would write
    year yes yet you young your
"""
WORDS = tuple(WORD_LIST.split())
WORD_IDS_FROM = 256
# The end-of-answer token. It has no text.
END_ID = WORD_IDS_FROM + len(WORDS)
SENTENCE_TOKENS = 16
# Some sentences end in one of these, byte by byte, so that decoders see unfinished characters.
ENDINGS = tuple(text.encode() for text in ("🌊", "🙂", "。水", "×é"))


class SimDecoder:
    """Decodes simulated ids. Invalid UTF-8 becomes U+FFFD, as in a real tokenizer."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        if token_id < WORD_IDS_FROM:
            return self._utf8.decode(bytes((token_id,)))
        if token_id == END_ID:
            return ""
        return self._utf8.decode(f" {WORDS[token_id - WORD_IDS_FROM]}".encode())

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class StepClock:
    """Counts the engine's steps. A step advances every running request, and each request makes it longer."""

    def __init__(self, pace: Pace, now: Callable[[], float]) -> None:
        self._pace = pace
        self._now = now
        self._running = 0
        self._count = 0.0
        self._counted_at_s = 0.0

    @property
    def step_s(self) -> float:
        return (self._pace.step_us + self._pace.step_us_per_running * self._running) / 1_000_000

    def count(self) -> float:
        """Return the steps so far, including the fraction of an unfinished one."""
        now_s = self._now()
        if self._running:
            self._count += (now_s - self._counted_at_s) / self.step_s
        self._counted_at_s = now_s
        return self._count

    @contextmanager
    def add_request(self) -> Iterator[float]:
        """Run one more request. Yields the count at its start."""
        first = self.count()
        self._running += 1
        try:
            yield first
        finally:
            self.count()
            self._running -= 1


class ForcedAnswer(NamedTuple):
    """An answer that the request prescribes: the arguments of a tool, or without one the text."""

    json: str
    tool: str | None = None


class SimParser:
    """Reads an answer that consists of the arguments of one tool call."""

    def __init__(self, tool: str) -> None:
        self.decoder: Decoder = SimDecoder()
        self._tool: str | None = tool

    def feed(self, text: str, token_ids: Sequence[int], end: End | None = None) -> Delta:
        del token_ids, end
        name = self._tool
        self._tool = None
        return Delta(tool_calls=(ToolCallDelta(index=0, id=name, name=name, arguments=text),))

    def reasoning_tokens(self, output_ids: Sequence[int]) -> int:
        del output_ids
        return 0


class SimEngine:
    """Implements `rift.engines.Engine` at its profile's pace (50 tokens a second for each stream).

    Output token k depends only on the prompt's ids, the seed and k, so a continuation from logged ids equals
    what the first attempt would have generated. `sleep` and `now` (seconds) are its only source of time.
    """

    name = "sim"
    simulated = True
    model_digest = "simulated"

    def __init__(
        self,
        model: Model,
        profile: Profile | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        now: Callable[[], float] = anyio.current_time,
    ) -> None:
        profile = profile or Profile()
        self.slots = profile.sim.running_max or int(profile.args.get("max_num_seqs", SLOTS))
        self.context_tokens = model.context_tokens
        self.token_bytes_max = PROMPT_BYTES_PER_TOKEN
        self.after_step: list[Callable[[], None]] = []
        self._pace = profile.sim
        self._sleep = sleep
        self._now = now
        self._steps = StepClock(profile.sim, now)
        self._prefill = anyio.Lock()

    def log_metrics(self) -> None:
        """Do nothing: it keeps none."""

    @classmethod
    async def start(cls, model: Model, profile: Profile) -> "SimEngine":
        """Start after the time that the profile sets."""
        engine = cls(model, profile)
        await engine._sleep(profile.sim.start_ms / 1000)
        return engine

    def encode(self, prompt: str | tuple[Message, ...], *, raw: bool, tokens_max: int) -> list[int]:
        """Return one id for every 4 bytes, at least one. Without a chat template `raw` changes nothing."""
        del raw
        param = param_of(prompt)
        text = prompt if isinstance(prompt, str) else "\n".join(turn.content for turn in prompt)
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{param} is not valid text: {error.reason}", code="invalid_text", param=param
            ) from error
        size = PROMPT_BYTES_PER_TOKEN
        check_tokens(-(-len(data) // size), param, tokens_max=tokens_max)
        return [int.from_bytes(data[at : at + size], "big") for at in range(0, len(data), size)] or [0]

    async def render(
        self, prompt: str | tuple[Message, ...], parameters: Parameters, *, raw: bool, tokens_max: int
    ) -> Rendered:
        ids = self.encode(prompt, raw=raw, tokens_max=tokens_max)
        return Rendered(ids, parameters, private=_forced(parameters))

    def decoder(self) -> SimDecoder:
        return SimDecoder()

    def parser(self, rendered: Rendered) -> Parser | None:
        forced: ForcedAnswer | None = rendered.private
        return SimParser(forced.tool) if forced is not None and forced.tool is not None else None

    async def generate(
        self,
        attempt: str,
        rendered: Rendered,
        output_ids: Sequence[int],
        *,
        max_tokens: int,
        salt: str,
        emit: Emit,
    ) -> None:
        """Generate to `max_tokens`, to the end of the context, or to the end of a forced answer.

        A late step carries every token that is due, so the pace does not drift.
        """
        del attempt, salt
        assert max_tokens >= 1, "max_tokens bounds the new tokens: at least one"
        prompt_ids = rendered.prompt_ids
        parameters = rendered.parameters
        room = self.context_tokens - len(prompt_ids) - len(output_ids)
        if room < 1:
            raise InvalidRequest(
                f"the prompt has {len(prompt_ids)} tokens, this model's context has {self.context_tokens}",
                code="context_length_exceeded",
                param="prompt",
            )
        key = _key(prompt_ids, parameters.seed)
        forced: ForcedAnswer | None = rendered.private
        script = None if forced is None else [*forced.json.encode(), END_ID]
        first = len(output_ids)
        limit = min(max_tokens, room)
        if script is not None:
            limit = min(limit, len(script) - first)
        await self._prefill_prompt(len(prompt_ids) + len(output_ids))
        done = 0
        with self._steps.add_request() as start:
            while done < limit:
                # Requests that arrive during the sleep make the steps longer.
                while (left := start + done + 1 - self._steps.count()) > STEP_DONE:
                    await self._sleep(left * self._steps.step_s)
                due = min(limit, int(self._steps.count() - start + STEP_DONE))
                indexes = range(first + done, first + due)
                ids = tuple(script[index] if script else _token(key, index) for index in indexes)
                done = due
                finish: Literal["stop", "length"] | None = None
                if done == limit:
                    finish = "stop" if ids[-1] == END_ID else "length"
                continues = emit(Step(ids, finish, logprobs=_logprobs(ids, parameters.logprobs)))
                for call in self.after_step:
                    call()
                if not continues:
                    return

    async def _prefill_prompt(self, tokens: int) -> None:
        """Read a prompt, after all earlier ones."""
        if self._pace.prefill_tokens_per_s:
            async with self._prefill:
                await self._sleep(tokens / self._pace.prefill_tokens_per_s)

    async def close(self) -> None:
        return None


def _key(prompt_ids: Sequence[int], seed: int | None) -> bytes:
    digest = blake2b(repr(seed).encode(), digest_size=32)
    digest.update(",".join(map(str, prompt_ids)).encode())
    return digest.digest()


def _token(key: bytes, index: int) -> int:
    sentence, place = divmod(index, SENTENCE_TOKENS)
    chance = _draw(key, sentence, SENTENCE_TOKENS)
    if chance % 4 == 0:
        ending = ENDINGS[chance // 4 % len(ENDINGS)]
        if (at := place - (SENTENCE_TOKENS - len(ending))) >= 0:
            return ending[at]
    return WORD_IDS_FROM + _draw(key, sentence, place) % len(WORDS)


def _draw(key: bytes, sentence: int, place: int) -> int:
    return int.from_bytes(blake2b(f"{sentence}.{place}".encode(), key=key, digest_size=8).digest(), "big")


def _logprobs(ids: Sequence[int], count: int | None) -> tuple[Logprob, ...]:
    """Return made-up log probabilities: each token is the likeliest, then the first words of the list."""
    if count is None:
        return ()
    logprobs = []
    for token_id in ids:
        word = WORDS[token_id % len(WORDS)] if token_id >= WORD_IDS_FROM else f"<{token_id:02x}>"
        own = Logprob(token=SimDecoder().feed(token_id) or word, logprob=-0.5)
        others = [Logprob(token=f" {WORDS[at]}", logprob=-1.0 - at) for at in range(max(0, count - 1))]
        logprobs.append(Logprob(token=own.token, logprob=own.logprob, top=(own, *others)[:count]))
    return tuple(logprobs)


def _forced(parameters: Parameters) -> ForcedAnswer | None:
    tool = None
    response_format = parameters.response_format
    param = "response_format"
    if parameters.tool_choice in ("required", "function"):
        tools = {tool.name: tool for tool in parameters.tools}
        tool = parameters.tool_name or next(iter(tools), "")
        if tool not in tools:
            raise InvalidRequest(
                f"tool_choice requires the tool {tool!r}, which is not in tools",
                code="invalid_value",
                param="tool_choice",
            )
        schema = tools[tool].parameters or "{}"
        param = "tools"
    elif response_format is None:
        return None
    else:
        schema = response_format.schema or "{}"
    try:
        answer = json.dumps(_smallest(json.loads(schema)))
    except (ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        raise InvalidRequest(
            f"{param} has a schema that the simulated engine cannot read", code="invalid_value", param=param
        ) from error
    return ForcedAnswer(answer, tool)


def _smallest(schema: dict[str, Any]) -> Any:
    """Return the smallest value of a schema without references, bounds or combinations."""
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type", "object"):
        case "object":
            properties = schema.get("properties", {})
            return {name: _smallest(properties.get(name, {})) for name in schema.get("required", ())}
        case "string":
            return ""
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return False
        case "array":
            return []
        case _:
            return None
