"""`rift calibrate`: fit a hardware profile to a running replica, measured through the gateway like a client.

Prompts of doubling lengths, one at a time, show how fast prompts are read. 1, 2, 4, … parallel streams show
how long a step takes. Figures that a client cannot measure come from options, the log or the shipped
profile, and the output names their source.
"""

import json
import secrets
import string
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import anyio
import httpx
import msgspec

from events.jetstream import JetStream
from events.subjects import slug
from replay.scaling.hardware import Hardware, profiles
from rift import calibrate
from rift.calibrate import Fit, Prompt, Running
from rift.catalogue import Profile, nanousd_an_hour
from rift.cli.arguments import Commands, add_command, add_config, positive
from rift.cli.connection import ask_control, installation, load_settings, select, with_log
from rift.cli.output import CommandFailed, first_message, table
from rift.data_dir import DataDirError
from rift.settings import Settings

# Prompt lengths start here and double. Shorter prompts would measure the way to the worker and back.
PROMPT_TOKENS_MIN = 64
PROMPT_TOKENS_MAX = 8000
# The native route counts the tokens of the chat template, too.
TEMPLATE_TOKENS = 192
# The share of the time for prompts; streams get the rest. Each length counts once, by its median answer, and
# more than nine rounds do not make the median more certain.
PROMPTS_SHARE = 0.4
ROUNDS_MAX = 9
# A step's time is a mean over at least this many steps; beyond the maximum it does not change.
STEPS_MIN = 24
STEPS_MAX = 512
# Gateway, queue and worker answer far sooner, so after this time one of them is stuck.
STUCK_S = 60.0


class _Token(msgspec.Struct):
    index: int


class _Usage(msgspec.Struct):
    prompt_tokens: int


class _Done(msgspec.Struct):
    usage: _Usage


class Replica(msgspec.Struct, frozen=True):
    """The measured replica, as the log describes it."""

    replica: str
    hardware: str
    gpus: int
    slots: int
    context_tokens: int
    start_ms: int


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    parser = add_command(
        commands, "calibrate", run, "measure a running replica and print its hardware profile"
    )
    add_config(parser)
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="model with exactly one replica and no other users"
    )
    parser.add_argument("--url", help="gateway (default: the one in rift.toml)")
    parser.add_argument("--key", help="API key (default: the installation's first key)")
    parser.add_argument(
        "--seconds", type=positive, default=60, metavar="S", help="approximate duration (default: 60)"
    )
    parser.add_argument(
        "--concurrency-max", type=positive, metavar="N", help="most parallel streams (default: its slots)"
    )
    parser.add_argument("--kv-tokens", type=positive, metavar="N", help="capacity of its KV cache in tokens")
    parser.add_argument("--gpu-hour-usd", metavar="USD", help="cost of one GPU per hour")


def run(options: Namespace) -> None:
    settings = load_settings(options)
    replica = _replica(options, settings.model)
    url = options.url or settings.url()
    key = options.key or _first_key(options)
    measure = partial(_measure, url, key, settings, replica, float(options.seconds), options.concurrency_max)
    try:
        prompts, running = anyio.run(measure, backend_options={"use_uvloop": True})
    except* httpx.HTTPError as failed:
        raise CommandFailed(f"{url}: {first_message(failed)}; name the gateway with --url") from failed
    fitted = calibrate.fit(prompts, running)
    hardware, sources = _profile(options, settings, replica, fitted)
    name = f"{replica.hardware}-{slug(settings.model)}"
    if options.json:
        measured = {"prompts": prompts, "running": running, "fit": fitted}
        measured |= {"name": name, "profile": hardware, "not_measured": sources}
        print(json.dumps(msgspec.to_builtins(measured)))
        return
    print(_residuals(prompts, running, fitted), file=sys.stderr)
    print(calibrate.toml(name, hardware, sources))


def _replica(options: Namespace, model: str) -> Replica:
    """Return the model's only replica. Raises CommandFailed for several: any of them could answer."""

    async def ask(log: JetStream) -> Any:
        return await ask_control(log, select("calibrate_replicas", model=model))

    rows = with_log(options, ask)["rows"]
    if len(rows) != 1:
        raise CommandFailed(
            f"{len(rows)} replicas of {model} are ready, and calibration measures one: set its min and max "
            "(or workers) to 1 in rift.toml, restart, and let no other client use it meanwhile"
        )
    return Replica(*rows[0])


async def _measure(
    url: str, key: str, settings: Settings, replica: Replica, seconds: float, concurrency_max: int | None
) -> tuple[list[Prompt], list[Running]]:
    """Measure prompts and steps within about `seconds`. Raises CommandFailed, httpx.HTTPError."""
    async with httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"},
        limits=httpx.Limits(max_connections=None),
        timeout=STUCK_S,
        trust_env=False,
    ) as client:
        bench = _Bench(client, settings.model)
        accepted_max = settings.native_prompt_tokens_max - TEMPLATE_TOKENS
        prompt_tokens_max = min(PROMPT_TOKENS_MAX, accepted_max, replica.context_tokens // 2)
        running_max = min(replica.slots, concurrency_max or replica.slots)
        try:
            with anyio.fail_after(2 * seconds + STUCK_S):
                start_s = anyio.current_time()
                prompts = await bench.prompts(prompt_tokens_max, until_s=start_s + PROMPTS_SHARE * seconds)
                return prompts, await bench.steps(running_max, until_s=start_s + seconds)
        except TimeoutError as error:
            raise CommandFailed(
                f"{settings.model} answers too slowly for --seconds {seconds:g}; allow more seconds"
            ) from error


class _Bench:
    """Send measured requests for one model. Times are those of the event loop."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    async def prompts(self, tokens_max: int, *, until_s: float) -> list[Prompt]:
        """Send ever longer prompts, round by round, while the next answer is sure to arrive in time."""
        # The first answer gives the bytes per token. It also starts a replica that idles.
        first = await self._prompt(4 * PROMPT_TOKENS_MIN)
        bytes_per_token = 4 * PROMPT_TOKENS_MIN / first.tokens
        by_length: dict[int, list[Prompt]] = {}
        for _ in range(ROUNDS_MAX):
            tokens = PROMPT_TOKENS_MIN
            took_s = first.ttft_s
            while tokens <= tokens_max and anyio.current_time() + 2 * took_s < until_s:
                answer = await self._prompt(round(tokens * bytes_per_token))
                by_length.setdefault(tokens, []).append(answer)
                tokens = 2 * tokens
                took_s = answer.ttft_s
        samples = [sorted(answers, key=lambda answer: answer.ttft_s) for answers in by_length.values()]
        return [answers[len(answers) // 2] for answers in samples] or [first]

    async def _prompt(self, size: int) -> Prompt:
        sent_s = anyio.current_time()
        first_s = 0.0
        tokens = 0
        async for time_s, event in self._stream(_words(size), max_tokens=1):
            if isinstance(event, _Token):
                first_s = first_s or time_s
            else:
                tokens = event.usage.prompt_tokens
        return Prompt(tokens, first_s - sent_s)

    async def steps(self, running_max: int, *, until_s: float) -> list[Running]:
        """Run 1, 2, 4, … parallel streams, each level for an equal share of the remaining time."""
        measured = [Running(1, await self._parallel(1, STEPS_MIN) or 0.0)]
        levels = [1 << power for power in range(running_max.bit_length())]
        if levels[-1] != running_max:
            levels.append(running_max)
        for index, running in enumerate(levels):
            left_s = (until_s - anyio.current_time()) / (len(levels) - index)
            steps = int(left_s / (2 * measured[-1].step_s))
            if index > 1 and steps < STEPS_MIN:
                break
            took_s = await self._parallel(running, max(STEPS_MIN, min(STEPS_MAX, steps)))
            if took_s is None:
                break
            measured.append(Running(running, took_s))
        return measured[1:] or measured

    async def _parallel(self, running: int, steps: int) -> float | None:
        """Return the time of a step while all streams run, or None if they never all ran."""
        streams: list[list[tuple[float, int]]] = [[] for _ in range(running)]

        async def follow(stream: list[tuple[float, int]]) -> None:
            async for time_s, event in self._stream(_words(PROMPT_TOKENS_MIN), max_tokens=steps):
                if isinstance(event, _Token):
                    stream.append((time_s, event.index))

        async with anyio.create_task_group() as tasks:
            for stream in streams:
                tasks.start_soon(follow, stream)
        return calibrate.step_s(streams)

    async def _stream(self, prompt: str, *, max_tokens: int) -> AsyncIterator[tuple[float, _Token | _Done]]:
        """Yield the tokens of an answer and its end, each with its time of arrival. Raises CommandFailed."""
        parameters = {"max_tokens": max_tokens, "raw": True, "ignore_eos": True, "temperature": 0}
        body = {"model": self._model, "prompt": prompt, "parameters": parameters, "stream": True}
        async with self._client.stream("POST", "/v1/inference", json=body) as response:
            if not response.is_success:
                await response.aread()
                raise CommandFailed(
                    f"{self._client.base_url} answers {response.status_code}: {response.text.strip()}"
                )
            rest = b""
            async for chunk in response.aiter_bytes():
                time_s = anyio.current_time()
                *frames, rest = (rest + chunk).split(b"\n\n")
                for frame in frames:
                    if event := _event(frame):
                        yield time_s, event


def _event(frame: bytes) -> _Token | _Done | None:
    fields = dict(line.split(b": ", 1) for line in frame.split(b"\n") if b": " in line)
    match fields.get(b"event"):
        case b"token":
            return msgspec.json.decode(fields[b"data"], type=_Token)
        case b"done":
            return msgspec.json.decode(fields[b"data"], type=_Done)
        case b"error":
            raise CommandFailed(f"the gateway ended the answer: {fields[b'data'].decode(errors='replace')}")
    return None


def _words(size: int) -> str:
    """Return random words of `size` bytes, which no prefix cache can hold."""
    letters = (string.ascii_lowercase[byte % 26] for byte in secrets.token_bytes(size))
    return "".join(" " if index % 5 == 4 else letter for index, letter in enumerate(letters))


def _first_key(options: Namespace) -> str:
    file = installation(options).first_key
    try:
        return file.read_text().strip()
    except OSError as error:
        raise DataDirError(f"{file}: {error.strerror}; name a key with --key") from error


def _profile(
    options: Namespace, settings: Settings, replica: Replica, fitted: Fit
) -> tuple[Hardware, dict[str, str]]:
    """Return the profile, and the source of each figure that was not measured."""
    name = f"{replica.hardware}-{slug(settings.model)}"
    sources = {
        "gpus": "reported by the replica",
        "running_max": "the replica's slots",
        "start_ms": f"the last start of {replica.replica}",
    }
    kv_tokens = options.kv_tokens
    if kv_tokens is not None:
        sources["kv_tokens"] = "--kv-tokens"
    elif known := profiles().get(name):
        kv_tokens = known.kv_tokens
        sources["kv_tokens"] = "from the shipped profile"
    else:
        kv_tokens = replica.slots * replica.context_tokens
        sources["kv_tokens"] = "slots x context, an upper bound; set it with --kv-tokens"
    price = options.gpu_hour_usd
    sources["gpu_hour_nanousd"] = "--gpu-hour-usd"
    if price is None:
        price = settings.catalogue()[settings.model].profiles.get(replica.hardware, Profile()).gpu_hour_usd
        sources["gpu_hour_nanousd"] = "from the catalogue" if price else "unknown; set it with --gpu-hour-usd"
    if fitted.prefill_at_least:
        sources["prefill_tokens_per_s"] = "a lower bound: longer prompts took no longer"
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
    return hardware, sources


def _residuals(prompts: list[Prompt], running: list[Running], fitted: Fit) -> str:
    """Return tables of measured and fitted times."""
    ttfts = [[prompt.tokens, _ms(prompt.ttft_s), _ms(fitted.ttft_s(prompt.tokens))] for prompt in prompts]
    steps = [[level.running, _ms(level.step_s), _ms(fitted.step_s(level.running))] for level in running]
    of_prompts = table(["prompt tokens", "ttft ms", "fitted"], ttfts)
    of_steps = table(["running", "step ms", "fitted"], steps)
    return f"{of_prompts}\n\n{of_steps}\n"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
