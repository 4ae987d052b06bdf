"""`rift calibrate`: a hardware profile from a live replica, measured through the gateway as a client would.

Prompts of doubling lengths, one at a time, show how fast prompts are read; 1, 2, 4, … streams side by side
show how long a step takes. What a client cannot see is taken from options, the log or the shipped profile,
and the table says so.
"""

import json
import secrets
import string
import sys
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import msgspec

from events.jetstream import JetStream
from events.subjects import slug
from replay.scaling.hardware import Hardware, profiles
from replay.warehouse.result import QueryResult
from rift import calibrate
from rift.calibrate import Fit, Prompt, Running
from rift.catalogue import Profile, nanousd_an_hour
from rift.cli.connection import installation, load_settings
from rift.cli.output import CommandFailed, asked, first_of, table, with_log
from rift.data_dir import DataDirError
from rift.rpc import Sql
from rift.settings import Settings

# Prompts from here on, doubled: shorter ones measure the way to the worker and back.
PROMPT_TOKENS_MIN = 64
# The native route takes no more, its own template's few included.
PROMPT_TOKENS_MAX = 8000
# The share of the time that prompts may take; streams have the rest. Each length counts once, by the middle
# one of its answers: more rounds make it no surer.
PROMPTS_SHARE = 0.4
ROUNDS_MAX = 9
# A step's time is a mean over this many at least, and more tells nothing new.
STEPS_MIN = 24
STEPS_MAX = 512
# A gateway, a queue and a worker answer far sooner. What takes longer is stuck.
STUCK_S = 60.0


class _Token(msgspec.Struct):
    index: int


class _Usage(msgspec.Struct):
    prompt_tokens: int


class _Done(msgspec.Struct):
    usage: _Usage


class Replica(msgspec.Struct, frozen=True):
    """What the log says of the one that is measured."""

    replica: str
    hardware: str
    gpus: int
    slots: int
    context_tokens: int
    start_ms: int


def run(options: Namespace) -> None:
    settings = load_settings(options)
    replica = _replica(options, settings.model)
    bench = _Bench(options, settings, replica)
    try:
        prompts, running = anyio.run(bench.measure, backend_options={"use_uvloop": True})
    except* httpx.HTTPError as failed:
        raise CommandFailed(f"{bench.url}: {first_of(failed)}; name the gateway with --url") from failed
    fitted = calibrate.fit(prompts, running)
    hardware, told = _profile(options, settings, replica, fitted)
    name = f"{replica.hardware}-{slug(settings.model)}"
    if options.json:
        shown = {"prompts": prompts, "running": running, "fit": fitted}
        shown |= {"name": name, "profile": hardware, "not_measured": told}
        print(json.dumps(msgspec.to_builtins(shown)))
        return
    print(_residuals(prompts, running, fitted), file=sys.stderr)
    print(calibrate.toml(name, hardware, told))


def _replica(options: Namespace, model: str) -> Replica:
    """Return the only replica of a model: of two, nobody knows which answers. Raises CommandFailed."""
    select = (
        "select replica, hardware, gpus, slots, context_tokens, (ready_at_ns - first_seen_at_ns) // 1000000 "
        f"from replicas where state = 'ready' and slots is not null and model = '{model}'"
    )

    async def ask(log: JetStream) -> Any:
        return await asked(log, Sql(select))

    rows = with_log(options, ask)["rows"]
    if len(rows) != 1:
        raise CommandFailed(
            f"{len(rows)} replicas of {model} are ready, and calibration measures one: set its min and max "
            "(or workers) to 1 in rift.toml, start again, and let nobody else use it meanwhile"
        )
    return Replica(*rows[0])


class _Bench:
    """Asks one replica, for about `seconds` in all."""

    def __init__(self, options: Namespace, settings: Settings, replica: Replica) -> None:
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
        host = f"[{host}]" if ":" in host else host
        self.url = options.url or f"http://{host}:{settings.port}"
        self._key = options.key or _first_key(options)
        self._model = settings.model
        self._replica = replica
        self._seconds = float(options.seconds)
        self._running_max = min(replica.slots, options.concurrency_max or replica.slots)

    async def measure(self) -> tuple[list[Prompt], list[Running]]:
        """Raises CommandFailed, httpx.HTTPError."""
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {self._key}"}
        async with httpx.AsyncClient(
            base_url=self.url, headers=headers, limits=limits, timeout=STUCK_S, trust_env=False
        ) as self._client:
            try:
                with anyio.fail_after(2 * self._seconds + STUCK_S):
                    began_at = anyio.current_time()
                    prompts = await self._prompts(began_at + PROMPTS_SHARE * self._seconds)
                    return prompts, await self._steps(began_at + self._seconds)
            except TimeoutError as error:
                raise CommandFailed(
                    f"{self._model} answers too slowly for --seconds {self._seconds:g}"
                ) from error

    async def _prompts(self, until: float) -> list[Prompt]:
        """Send ever longer prompts, round by round, for as long as the next one is sure to be answered."""
        # How many bytes a token takes, by the first answer, which also wakes what sleeps.
        first = await self._prompt(4 * PROMPT_TOKENS_MIN)
        per_token = 4 * PROMPT_TOKENS_MIN / first.tokens
        longest = min(PROMPT_TOKENS_MAX, self._replica.context_tokens // 2)
        found: dict[int, list[Prompt]] = {}
        for _ in range(ROUNDS_MAX):
            tokens = PROMPT_TOKENS_MIN
            took_s = first.ttft_s
            while tokens <= longest and anyio.current_time() + 2 * took_s < until:
                answer = await self._prompt(round(tokens * per_token))
                found.setdefault(tokens, []).append(answer)
                tokens = 2 * tokens
                took_s = answer.ttft_s
        samples = [sorted(answers, key=lambda answer: answer.ttft_s) for answers in found.values()]
        return [answers[len(answers) // 2] for answers in samples] or [first]

    async def _prompt(self, size: int) -> Prompt:
        began_at = anyio.current_time()
        first_at = 0.0
        tokens = 0
        async for at, event in self._stream(_words(size), max_tokens=1):
            if isinstance(event, _Token):
                first_at = first_at or at
            else:
                tokens = event.usage.prompt_tokens
        return Prompt(tokens, first_at - began_at)

    async def _steps(self, until: float) -> list[Running]:
        """Run 1, 2, 4, … streams side by side, each time for an equal share of what is left."""
        found = [Running(1, await self._side_by_side(1, STEPS_MIN) or 0.0)]
        levels = [1 << power for power in range(self._running_max.bit_length())]
        if levels[-1] != self._running_max:
            levels.append(self._running_max)
        for at, running in enumerate(levels):
            left_s = (until - anyio.current_time()) / (len(levels) - at)
            steps = int(left_s / (2 * found[-1].step_s))
            if at > 1 and steps < STEPS_MIN:
                break
            took_s = await self._side_by_side(running, max(STEPS_MIN, min(STEPS_MAX, steps)))
            if took_s is None:
                break
            found.append(Running(running, took_s))
        return found[1:] or found

    async def _side_by_side(self, running: int, steps: int) -> float | None:
        streams: list[list[tuple[float, int]]] = [[] for _ in range(running)]

        async def follow(stream: list[tuple[float, int]]) -> None:
            async for at, event in self._stream(_words(PROMPT_TOKENS_MIN), max_tokens=steps):
                if isinstance(event, _Token):
                    stream.append((at, event.index))

        async with anyio.create_task_group() as tasks:
            for stream in streams:
                tasks.start_soon(follow, stream)
        return calibrate.step_s(streams)

    async def _stream(self, prompt: str, *, max_tokens: int) -> AsyncIterator[tuple[float, _Token | _Done]]:
        """Yield the tokens of an answer and its end, each with the time it came. Raises CommandFailed."""
        parameters = {"max_tokens": max_tokens, "raw": True, "ignore_eos": True, "temperature": 0}
        body = {"model": self._model, "prompt": prompt, "parameters": parameters, "stream": True}
        async with self._client.stream("POST", "/v1/inference", json=body) as response:
            if not response.is_success:
                await response.aread()
                raise CommandFailed(f"{self.url} answers {response.status_code}: {response.text.strip()}")
            rest = b""
            async for chunk in response.aiter_bytes():
                at = anyio.current_time()
                *frames, rest = (rest + chunk).split(b"\n\n")
                for frame in frames:
                    if event := _event(frame):
                        yield at, event


def _event(frame: bytes) -> _Token | _Done | None:
    fields = dict(line.split(b": ", 1) for line in frame.split(b"\n") if b": " in line)
    match fields.get(b"event"):
        case b"token":
            return msgspec.json.decode(fields[b"data"], type=_Token)
        case b"done":
            return msgspec.json.decode(fields[b"data"], type=_Done)
        case b"error":
            raise CommandFailed(f"the answer ended: {fields[b'data'].decode(errors='replace')}")
    return None


def _words(size: int) -> str:
    """Return so many bytes of words that no cache has seen."""
    letters = (string.ascii_lowercase[byte % 26] for byte in secrets.token_bytes(size))
    return "".join(" " if at % 5 == 4 else letter for at, letter in enumerate(letters))


def _first_key(options: Namespace) -> str:
    file = installation(options).first_key
    try:
        return file.read_text().strip()
    except OSError as error:
        raise DataDirError(f"{file}: {error.strerror}; name a key with --key") from error


def _profile(
    options: Namespace, settings: Settings, replica: Replica, fitted: Fit
) -> tuple[Hardware, dict[str, str]]:
    """Return the profile, and of each figure that was not measured where it comes from."""
    name = f"{replica.hardware}-{slug(settings.model)}"
    told = {
        "gpus": "as the replica says",
        "running_max": "the replica's slots",
        "start_ms": f"the start of {replica.replica}",
    }
    kv_tokens = options.kv_tokens
    if kv_tokens is not None:
        told["kv_tokens"] = "--kv-tokens"
    elif known := profiles().get(name):
        kv_tokens = known.kv_tokens
        told["kv_tokens"] = "the shipped profile's"
    else:
        kv_tokens = replica.slots * replica.context_tokens
        told["kv_tokens"] = "slots x context, the most that can be used; give --kv-tokens"
    price = options.gpu_hour_usd
    told["gpu_hour_nanousd"] = "--gpu-hour-usd"
    if price is None:
        price = settings.catalogue()[settings.model].profiles.get(replica.hardware, Profile()).gpu_hour_usd
        told["gpu_hour_nanousd"] = "the catalogue's" if price else "none is known; give --gpu-hour-usd"
    if fitted.prefill_at_least:
        told["prefill_tokens_per_s"] = "no prompt took longer for its length, so at least this"
    hardware = Hardware(
        gpus=replica.gpus,
        running_max=replica.slots,
        kv_tokens=kv_tokens,
        prefill_tokens_per_s=fitted.prefill_tokens_per_s,
        step_us=fitted.step_us,
        step_us_per_running=fitted.step_us_per_running,
        start_ms=replica.start_ms,
        gpu_hour_nanousd=nanousd_an_hour(price, where="--gpu-hour-usd"),
        source=(
            f"calibrated on {replica.replica} through a gateway: off by at most {fitted.ttft_off:.0%} for a "
            f"first token and {fitted.step_off:.0%} for a step"
        ),
    )
    return hardware, told


def _residuals(prompts: list[Prompt], running: list[Running], fitted: Fit) -> str:
    """Say how well the fit says again what was measured."""
    told = [[prompt.tokens, _ms(prompt.ttft_s), _ms(fitted.ttft_s(prompt.tokens))] for prompt in prompts]
    steps = [[found.running, _ms(found.step_s), _ms(fitted.step_s(found.running))] for found in running]
    first = table(QueryResult(["prompt tokens", "ttft ms", "fitted"], told))
    return f"{first}\n\n{table(QueryResult(['running', 'step ms', 'fitted'], steps))}\n"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
