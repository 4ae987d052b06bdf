"""vLLM as the engine: the only file that imports it, in the process that serves one model.

vLLM neither detokenizes nor matches stop strings here: the text comes from the logged ids (see
`rift/worker/text.py`). What must not live here: requests, lanes, the log, retries. An engine that
died is not started again; the process ends.

The heavy imports are inside functions: the environment has to be set before vLLM is imported, and
importing this module starts nothing.
"""

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anyio.to_thread

from events.schema import Message, Parameters
from rift.catalogue import Model, Profile
from rift.engines import Emit, EngineFailed, Invalid
from rift.engines.core import Core
from rift.engines.prepare import digest_of

# What the environment already says wins over the profile, and the profile over these. `spawn`, since
# a forked engine would hold the worker's own sockets open after the worker is gone.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
# vLLM's own parameters take what fits 64 bits; a larger integer breaks the way to the engine.
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
SAMPLED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
# A UTF-8 character has at most 4 bytes, so 32 ids without one are no character in the making, and
# each further one would make the tokenizer decode all of them again.
UNFINISHED_IDS_MAX = 32
# A killed process is gone in milliseconds.
CLOSE_S = 2.0


class _Loaded(NamedTuple):
    llm: Any
    tokenizer: Any
    model_digest: str
    processes: tuple[Any, ...]


class VllmEngine:
    """Implements `rift.engines.Engine` on vLLM's AsyncLLM. Made by `start`, once in a process."""

    name = "vllm"
    simulated = False

    def __init__(self, loaded: _Loaded, model: Model) -> None:
        config = loaded.llm.vllm_config
        self.model_digest = loaded.model_digest
        self.slots: int = config.scheduler_config.max_num_seqs
        self.context_tokens: int = config.model_config.max_model_len
        self._llm = loaded.llm
        self._core = Core(loaded.llm.engine_core)
        self._processes = loaded.processes
        self._tokenizer = _Tokenizer(loaded.tokenizer)
        # Where the request says nothing: the catalogue, then as `vllm serve` the model's generation config.
        self._defaults: dict[str, Any] = config.model_config.get_diff_sampling_param() | model.sampling
        self._defaults.pop("max_tokens", None)

    @classmethod
    async def start(cls, model_path: str | Path, model: Model, profile: Profile) -> "VllmEngine":
        """Load the model in a thread (seconds to minutes) and generate one token with it.

        `model_path` is a folder or a model hub's id. Raises EngineFailed. A cancelled start goes on in
        its thread and may leave processes behind: end the process group.
        """
        try:
            await anyio.to_thread.run_sync(_import, str(model_path), profile)
            loaded = await anyio.to_thread.run_sync(_load, str(model_path), model, profile)
            engine = cls(loaded, model)
            await engine.generate(
                "warm-up", [0], [], Parameters(), max_tokens=1, salt="warm-up", emit=lambda step: True
            )
        except Exception as error:
            raise EngineFailed(f"{model_path} does not start: {error}") from error
        return engine

    def encode(self, prompt: str | tuple[Message, ...], *, raw: bool) -> list[int]:
        return self._tokenizer.encode(prompt, raw=raw)

    def decoder(self) -> "VllmDecoder":
        return VllmDecoder(self._tokenizer.backend, self._tokenizer.silent_ids)

    async def generate(
        self,
        attempt: str,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        parameters: Parameters,
        *,
        max_tokens: int,
        salt: str,
        emit: Emit,
    ) -> None:
        """As the interface says. A reader that lags gets fewer steps with more ids each."""
        from vllm.exceptions import VLLMClientError, VLLMServerError
        from vllm.inputs import tokens_input

        prompt = tokens_input([*prompt_ids, *output_ids], cache_salt=salt)
        self._check_room(len(prompt["prompt_token_ids"]))
        try:
            sampling = self._sampling(parameters, max_tokens)
            tasks = await self._llm.get_supported_tasks()
            request = self._llm.input_processor.process_inputs(
                attempt, prompt, sampling, supported_tasks=tasks
            )
            request.external_req_id = attempt
            await self._core.run(request, emit)
        except VLLMClientError as error:
            raise _invalid(error) from error
        except VLLMServerError as error:
            raise EngineFailed(str(error.__cause__ or error)) from error

    async def close(self) -> None:
        if self._llm is not None:
            llm, self._llm = self._llm, None
            await anyio.to_thread.run_sync(_shutdown, llm, self._processes)
            # It is part of a cycle, and complains if it meets its end after the interpreter's.
            del llm
            gc.collect()

    def _check_room(self, tokens: int) -> None:
        if tokens >= self.context_tokens:
            raise Invalid(
                f"the prompt has {tokens} tokens; this model's context of {self.context_tokens} leaves no "
                "room for an answer",
                code="context_length_exceeded",
                param="prompt",
            )

    def _sampling(self, parameters: Parameters, max_tokens: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        for name in ("seed", "top_k"):
            value = getattr(parameters, name)
            if value is not None and not INT64_MIN <= value <= INT64_MAX:
                raise Invalid(f"{name} must fit 64 bits, got {value}", code="invalid_value", param=name)
        wanted = {name: getattr(parameters, name) for name in SAMPLED}
        return SamplingParams(
            **(self._defaults | {name: value for name, value in wanted.items() if value is not None}),
            ignore_eos=parameters.ignore_eos,
            max_tokens=max_tokens,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,
        )


class _Tokenizer:
    """The model's tokenizer and chat template, apart from vLLM's own: safe to call from threads."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend = tokenizer.backend_tokenizer
        # A tokenizer file may ask for truncation or padding; a prompt wants neither.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.silent_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self._hf = tokenizer
        self._template = str(tokenizer.chat_template or "")

    def encode(self, prompt: str | tuple[Message, ...], *, raw: bool) -> list[int]:
        if isinstance(prompt, str):
            templated = bool(self._template) and not raw
            param, turns = "prompt", [{"role": "user", "content": prompt}]
        else:
            templated = True
            param, turns = "messages", [self._turn(message) for message in prompt]
        try:
            text = self._render(turns) if templated else turns[0]["content"]
            text.encode()  # half a surrogate pair is no text
            # The batch form releases the interpreter; a template writes its own special tokens.
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=not templated)
        except UnicodeEncodeError as error:
            raise Invalid(f"{param} is not text: {error.reason}", code="invalid_text", param=param) from error
        if not encoding.ids:
            raise Invalid(f"{param} has no tokens", code="empty_prompt", param=param)
        ids: list[int] = encoding.ids
        return ids

    def _turn(self, message: Message) -> dict[str, str]:
        # Most templates drop a role they do not know without a word.
        known = message.role != "developer" or "developer" in self._template
        return {"role": message.role if known else "system", "content": message.content}

    def _render(self, turns: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        if not self._template:
            raise Invalid(
                "this model has no chat template; send a prompt instead of messages",
                code="no_chat_template",
                param="messages",
            )
        try:
            text: str = self._hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise Invalid(
                f"this model's chat template refuses these messages: {error}",
                code="invalid_messages",
                param="messages",
            ) from error
        return text


class VllmDecoder:
    """The tokenizers library's own incremental decoder, without special tokens.

    All that it returned and `flush` together are what decoding all ids at once gives. (Not where a
    byte-fallback tokenizer, like Llama 2's, is fed bytes that are no UTF-8, or after
    `UNFINISHED_IDS_MAX` ids without a whole character: there it stays a function of the ids alone.)
    """

    def __init__(self, backend: Any, silent_ids: frozenset[int]) -> None:
        self._backend = backend
        self._silent_ids = silent_ids
        self._unfinished: list[int] = []
        self._restart()

    def feed(self, token_id: int) -> str:
        if token_id in self._silent_ids:
            return ""
        try:
            text: str | None = self._stream.step(self._backend, token_id)
        except Exception as error:
            if not str(error).startswith("Invalid prefix"):
                raise
            # Bytes that were a character turn out to be none: go on behind them, as vLLM does.
            return self._restart() + self.feed(token_id)
        self._unfinished.append(token_id)
        if text is None:
            return self._restart() if len(self._unfinished) >= UNFINISHED_IDS_MAX else ""
        self._unfinished.clear()
        return text

    def flush(self) -> str:
        text: str = self._backend.decode(self._unfinished)
        return text

    def _restart(self) -> str:
        from tokenizers.decoders import DecodeStream

        text = self.flush()
        self._unfinished.clear()
        self._stream = DecodeStream(skip_special_tokens=True)
        return text


def _import(model_path: str, profile: Profile) -> None:
    """Set the environment, then import vLLM. Apart from `_load`, for a frame that imported it stays
    referenced, and whatever its variables name would never go."""
    offline = {"HF_HUB_OFFLINE": "1"} if Path(model_path).is_dir() else {}
    for name, value in {**ENVIRONMENT, **offline, **profile.env}.items():
        os.environ.setdefault(name, value)

    import vllm.v1.engine.async_llm  # noqa: F401


def mend_cpu_seeds() -> None:
    """Let a seeded request live whose prompt is read in several steps, on a CPU. vLLM calls this in each
    of its processes, by the entry point in `pyproject.toml`.

    After a step that reads a part of a prompt, vLLM takes back what the request's generator drew by moving
    its offset. A CPU's generator has none, and raises: the engine dies. Here it begins anew instead,
    which is the same, since nothing was kept of it yet. (A request that is preempted in mid-answer
    draws the same numbers a second time.)
    """
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not current_platform.is_cpu():
        return
    original = GPUModelRunner._bookkeeping_sync

    def bookkeeping_sync(runner: Any, *args: Any, **more: Any) -> Any:
        batch = runner.input_batch
        discarded = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0]
        held = {int(row): batch.generators.pop(int(row), None) for row in discarded}
        for generator in held.values():
            if generator is not None:
                generator.manual_seed(generator.initial_seed())
        try:
            return original(runner, *args, **more)
        finally:
            batch.generators.update({row: kept for row, kept in held.items() if kept is not None})

    GPUModelRunner._bookkeeping_sync = bookkeeping_sync


def _load(model_path: str, model: Model, profile: Profile) -> _Loaded:
    import psutil
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    wanted = {"max_model_len": model.context_tokens, "disable_log_stats": True, **profile.args}
    others = set(psutil.Process().children(recursive=True))
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model_path, **wanted))
    # Noted now: the children of a core that is killed are no one's children any more.
    processes = set(psutil.Process().children(recursive=True)) - others
    config = llm.vllm_config.model_config
    tokenizer = AutoTokenizer.from_pretrained(
        config.tokenizer, revision=config.tokenizer_revision, trust_remote_code=config.trust_remote_code
    )
    if Path(model_path).is_dir():
        digest = digest_of(Path(model_path))
    else:
        digest = str(getattr(config.hf_config, "_commit_hash", None) or config.revision or "unknown")[:16]
    return _Loaded(llm, tokenizer, digest, tuple(processes))


def _shutdown(llm: Any, processes: Sequence[Any]) -> None:
    """End the engine's processes, then let vLLM tidy up what it holds here.

    They hold nothing worth saving, and unloading torch in an orderly way takes each of them 2 s.
    """
    import psutil

    # Python's own tracker of shared memory stays: it serves the whole process, and ends with it.
    engines = [
        process
        for process in processes
        if process.is_running() and "resource_tracker" not in " ".join(process.cmdline())
    ]
    for process in engines:
        process.kill()
    psutil.wait_procs(engines, timeout=CLOSE_S)
    llm.shutdown(timeout=CLOSE_S)


def _invalid(error: Exception) -> Invalid:
    """vLLM names the parameter in a field of the error, or only as the first word of its message."""
    message = str(error.args[0])
    param = getattr(error, "parameter", None) or message.split(" ", 1)[0]
    known = param if param in Parameters.__struct_fields__ else None
    return Invalid(message, code="invalid_value", param=known)
