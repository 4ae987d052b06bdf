"""vLLM as the engine, in the process that serves one model; `chat.py` has its renderer and parsers.

vLLM neither detokenizes nor matches stop strings here: the text comes from the logged ids (see
`rift/worker/detokenizer.py`). Must not live here: requests, lanes, the log, retries. A dead engine is
not restarted; its process exits.

The heavy imports are inside functions, because the environment has to be set before vLLM is imported.
"""

import gc
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import anyio
import anyio.to_thread

from events.schema import Message, Parameters
from rift.catalogue import Model, Profile
from rift.engines import (
    LONG_BYTES,
    Decoder,
    Emit,
    EngineFailed,
    InvalidRequest,
    Parser,
    Rendered,
    RequestAborted,
    Step,
    start_errors,
)
from rift.engines.chat import Chat, RenderedChat, invalid, logit_bias, no_grammar, structured_outputs
from rift.engines.engine_socket import receive_directly
from rift.engines.engine_words import silence_quotes
from rift.engines.prepare import digest_of
from rift.engines.prompt_limits import (
    check_bytes,
    check_token_bytes,
    check_turns,
    param_of,
    text_bytes,
    texts,
)
from rift.engines.tokens import Tokenizer
from rift.engines.vllm_client import Stats, VllmClient

# Defaults: the environment overrides the profile, and the profile overrides these. `spawn`, because a forked
# engine would keep the worker's sockets open after the worker's death. What a killed engine leaves behind,
# Python's resource tracker removes, so its warning adds nothing.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning,ignore::FutureWarning",
}
# vLLM encodes integers in 64 bits on the way to its engine process; a larger one fails there.
INT64_MIN = -(2**63)
INT64_MAX = 2**63 - 1
# vLLM refuses a `top_p` of 0. It always keeps the likeliest token, and this keeps no other.
TOP_P_MIN = 1e-9
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
# Encoding this much text takes about a millisecond. Longer texts are encoded in a thread.
ENCODE_INLINE_BYTES = 4096
# Threads that encode prompts and check grammars. More would take the cores from the event loop, which reads
# every stream.
THREADS = 2
# A chat template takes as long for a message as the tokenizer for so many bytes.
TURN_BYTES = 32
# A prompt of more bytes for each allowed token is probably too long: texts have 4 to 5 bytes per token.
CERTAIN_BYTES_PER_TOKEN = 4
# Accounts whose grammars compile at the same time on a machine of few cores. With one, each answer with a
# grammar would wait while another account's compiles, even if its own was compiled before.
GRAMMAR_THREADS_MIN = 2
# A killed process disappears within milliseconds.
CLOSE_S = 2.0


Result = TypeVar("Result")


class LoadedModel(NamedTuple):
    llm: Any
    tokenizer: Tokenizer
    model_digest: str
    processes: tuple[Any, ...]


class GrammarTurns:
    """Compiles one grammar of an account at a time, and none whose request has ended before its turn.

    vLLM's engine compiles all grammars in the order in which they came, also those of aborted requests. It
    cannot abort one that it has begun, which takes up to seconds. `submit` is its executor's, and it calls
    this one instead, from one thread.
    """

    def __init__(self, submit: Callable[..., Any]) -> None:
        self._submit = submit
        self._lock = threading.Lock()
        # The first of each queue is with the executor.
        self._queues: dict[str, deque[tuple[Future[Any], Callable[[Any], Any], Any]]] = {}

    def submit(self, compile_grammar: Callable[[Any], Any], request: Any) -> Future[Any]:
        account = request.cache_salt or ""
        future: Future[Any] = Future()
        with self._lock:
            queue = self._queues.setdefault(account, deque())
            queue.append((future, compile_grammar, request))
            if len(queue) == 1:
                self._submit(self._compile_first, account)
        return future

    def _compile_first(self, account: str) -> None:
        future, compile_grammar, request = self._queues[account][0]
        try:
            if request.is_finished():
                future.cancel()
            else:
                future.set_result(compile_grammar(request))
        except Exception as error:  # noqa: BLE001  # vLLM fails this request
            future.set_exception(error)
        with self._lock:
            self._queues[account].popleft()
            if self._queues[account]:
                self._submit(self._compile_first, account)
            else:
                del self._queues[account]


class VllmEngine:
    """Implements `rift.engines.Engine` with vLLM's AsyncLLM. Made by `start`, once per process."""

    name = "vllm"
    simulated = False

    def __init__(self, loaded: LoadedModel, model: Model) -> None:
        config = loaded.llm.vllm_config
        self.model_digest = loaded.model_digest
        self.slots: int = config.scheduler_config.max_num_seqs
        self.context_tokens: int = config.model_config.max_model_len
        self._llm = loaded.llm
        receive_directly(loaded.llm.engine_core.resources.output_socket)
        self._client = VllmClient(loaded.llm.engine_core)
        self._processes = loaded.processes
        self._tokenizer = loaded.tokenizer
        self.token_bytes_max = self._tokenizer.bytes_max
        self._long_prompts = anyio.Lock()
        self._threads = anyio.CapacityLimiter(THREADS)
        self._chat = Chat(loaded.llm, model, self._tokenizer)
        # Defaults of a request: the catalogue, then the model's generation config, as in `vllm serve`.
        self._defaults: dict[str, Any] = config.model_config.get_diff_sampling_param() | model.sampling
        self._defaults.pop("max_tokens", None)

    @classmethod
    async def start(
        cls, model_path: str | Path, model: Model, profile: Profile, *, name: str
    ) -> "VllmEngine":
        """Load the catalogue's model `name` in a thread (seconds to minutes) and generate one token with it.

        `model_path` is a folder or a model hub's id. Raises EngineFailed. A cancelled start continues in its
        thread and may leave processes behind, so the caller must end the process group.
        """
        try:
            await anyio.to_thread.run_sync(_import, str(model_path), profile)
            loaded = await anyio.to_thread.run_sync(_load, str(model_path), name, model, profile)
            engine = cls(loaded, model)
            rendered = Rendered([0], Parameters())
            await engine.generate(
                "warm-up", rendered, [], max_tokens=1, salt="warm-up", emit=lambda step: True
            )
            engine._client.stats = _stats(loaded.llm)
        except Exception as error:
            raise EngineFailed(f"{model_path} cannot be started: {error}") from error
        return engine

    @property
    def after_step(self) -> list[Callable[[], None]]:
        return self._client.after_step

    def log_metrics(self) -> None:
        self._client.log_stats()

    async def render(
        self, prompt: str | tuple[Message, ...], parameters: Parameters, *, raw: bool, tokens_max: int
    ) -> Rendered:
        check_turns(prompt, tokens_max=tokens_max)
        around = text_bytes((), parameters)
        size = text_bytes(prompt, Parameters()) + around
        param = "tools" if parameters.tools and 2 * around > size else param_of(prompt)
        check_bytes(size, param, tokens_max=tokens_max, token_bytes_max=self.token_bytes_max)
        # Each message takes its time too, however short it is.
        effort = size + (0 if isinstance(prompt, str) else TURN_BYTES * len(prompt))

        def check() -> None:
            if size > CERTAIN_BYTES_PER_TOKEN * tokens_max:
                text = "\n".join(texts(prompt, parameters))
                self._tokenizer.check_pieces(text, param, tokens_max=tokens_max)

        templated = self._tokenizer.is_templated(prompt, raw=raw)
        if templated and not self._chat.is_plain(prompt, parameters):
            # vLLM parses and renders on an event loop. A long request gets a loop of its own, in a thread.
            render = partial(self._chat.render, prompt, parameters, tokens_max=tokens_max)
            if effort <= LONG_BYTES:
                return await render()
            return await self._run_long(check, lambda: anyio.run(render))
        grammar = None if templated else structured_outputs(parameters)
        encode = partial(self._tokenizer.encode, prompt, raw=raw, tokens_max=tokens_max)
        if effort <= ENCODE_INLINE_BYTES:
            ids = encode()
        elif effort <= LONG_BYTES:
            ids = await anyio.to_thread.run_sync(encode, limiter=self._threads)
        else:
            ids = await self._run_long(check, encode)
        return Rendered(
            ids, parameters, grammar=grammar is not None, private=RenderedChat(structured_outputs=grammar)
        )

    async def _run_long(self, check: Callable[[], None], render: Callable[[], Result]) -> Result:
        """Return the result of `render`, in a thread and after that of all earlier long prompts."""

        def run() -> Result:
            check()
            return render()

        async with self._long_prompts:
            return await anyio.to_thread.run_sync(run)

    def decoder(self) -> Decoder:
        return self._tokenizer.decoder()

    def parser(self, rendered: Rendered) -> Parser | None:
        return self._chat.parser(rendered)

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
        """See `Engine.generate`. A slow reader gets fewer steps with more ids each."""
        from vllm.exceptions import VLLMServerError

        ids = [*rendered.prompt_ids, *output_ids]
        self._check_room(len(ids))
        count = rendered.parameters.logprobs
        logprobs = None if count is None else self._chat.logprobs(count, output_ids)
        has_begun = not rendered.grammar

        def emit_first(step: Step) -> bool:
            nonlocal has_begun
            has_begun = True
            return emit(step)

        try:
            request = await self._request(attempt, rendered, ids, max_tokens=max_tokens, salt=salt)
            await self._client.run(request, emit if has_begun else emit_first, logprobs)
        except RequestAborted as error:
            if has_begun:
                raise
            raise no_grammar(rendered.parameters) from error
        except VLLMServerError as error:
            raise EngineFailed(str(error.__cause__ or error)) from error

    async def _request(
        self, attempt: str, rendered: Rendered, ids: list[int], *, max_tokens: int, salt: str
    ) -> Any:
        """Return vLLM's `EngineCoreRequest`. Raises InvalidRequest; vLLM's error if the engine is dead."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input

        tasks = await self._llm.get_supported_tasks()
        parameters = rendered.parameters
        chat = rendered.private or RenderedChat()

        def build() -> Any:
            sampling = self._sampling(parameters, max_tokens, chat.structured_outputs)
            prompt = tokens_input(ids, cache_salt=salt)
            return self._llm.input_processor.process_inputs(attempt, prompt, sampling, supported_tasks=tasks)

        try:
            # This parses the grammar, to check it. The engine compiles it, see `GrammarTurns`.
            if rendered.grammar:
                request = await anyio.to_thread.run_sync(build, limiter=self._threads)
            else:
                request = build()
        except (VLLMClientError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise invalid(error, parameters) from error
        request.external_req_id = attempt
        if chat.template_kwargs is not None:
            request.reasoning_ended = chat.reasoning_ended
            request.reasoning_parser_kwargs = {"chat_template_kwargs": chat.template_kwargs}
        return request

    async def close(self) -> None:
        if self._llm is not None:
            llm = self._llm
            self._llm = None
            await anyio.to_thread.run_sync(_shutdown, llm, self._processes)
            # The client is part of a cycle, and logs an error if it is collected at the interpreter's exit.
            del llm
            gc.collect()

    def _check_room(self, tokens: int) -> None:
        if tokens >= self.context_tokens:
            raise InvalidRequest(
                f"the prompt has {tokens} tokens; this model's context of {self.context_tokens} leaves no "
                "room for an answer",
                code="context_length_exceeded",
                param="prompt",
            )

    def _sampling(self, parameters: Parameters, max_tokens: int, structured_outputs: Any = None) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        for name in ("seed", "top_k"):
            value = getattr(parameters, name)
            if value is not None and not INT64_MIN <= value <= INT64_MAX:
                raise InvalidRequest(
                    f"{name} must fit 64 bits, got {value}", code="invalid_value", param=name
                )
        values = {name: getattr(parameters, name) for name in SAMPLED}
        if values["top_p"] == 0:
            values["top_p"] = TOP_P_MIN
        return SamplingParams(
            **(self._defaults | {name: value for name, value in values.items() if value is not None}),
            ignore_eos=parameters.ignore_eos,
            logit_bias=logit_bias(parameters),
            logprobs=parameters.logprobs,
            structured_outputs=structured_outputs,
            max_tokens=max_tokens,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,
        )


def _import(model_path: str, profile: Profile) -> None:
    """Set the environment, then import vLLM.

    Separate from `_load`: the frame of the import stays referenced, and so would every variable of `_load`.
    """
    offline = {"HF_HUB_OFFLINE": "1"} if Path(model_path).is_dir() else {}
    for name, value in {**ENVIRONMENT, **offline, **profile.env}.items():
        os.environ.setdefault(name, value)

    import vllm.v1.engine.async_llm  # noqa: F401


def mend_cpu_seeds() -> None:
    """Fix a crash of vLLM on CPUs: a seeded request whose prompt is read in several steps kills the engine.

    vLLM calls this in each of its processes, through the entry point in `pyproject.toml`. After a step that
    reads a part of a prompt, vLLM rewinds the request's random generator by its offset. A CPU's generator has
    no offset and raises. Here the generator is reseeded instead, which is equivalent because no number has
    been used yet. (A request that is preempted during its answer draws the same numbers again.)

    Also record why this process fails to start, keep content out of its log and compile grammars in turns,
    since vLLM has no other hook in its processes.
    """
    start_errors.record()
    silence_quotes()
    compile_in_turns()
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not current_platform.is_cpu():
        return
    original = GPUModelRunner._bookkeeping_sync

    def bookkeeping_sync(runner: Any, *args: Any, **more: Any) -> Any:
        batch = runner.input_batch
        discarded = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0]
        generators = {int(row): batch.generators.pop(int(row), None) for row in discarded}
        for generator in generators.values():
            if generator is not None:
                generator.manual_seed(generator.initial_seed())
        try:
            return original(runner, *args, **more)
        finally:
            batch.generators.update({row: kept for row, kept in generators.items() if kept is not None})

    GPUModelRunner._bookkeeping_sync = bookkeeping_sync


def compile_in_turns() -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    original = StructuredOutputManager.__init__

    def init(manager: Any, *args: Any) -> None:
        original(manager, *args)
        # As many as vLLM has, but not fewer than the least.
        executor = ThreadPoolExecutor(max(GRAMMAR_THREADS_MIN, ((os.cpu_count() or 1) + 1) // 2))
        turns = GrammarTurns(executor.submit)
        executor.submit = turns.submit  # type: ignore[method-assign,assignment]
        manager.executor = executor

    StructuredOutputManager.__init__ = init


def _load(model_path: str, name: str, model: Model, profile: Profile) -> LoadedModel:
    import psutil
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = {
        "max_model_len": model.context_tokens,
        "disable_log_stats": False,
        # A label of its metrics, instead of a path of this machine.
        "served_model_name": name,
        # One thread stays free for short prompts while another one tokenizes a long one.
        "renderer_num_workers": 2,
        "reasoning_parser": model.reasoning_parser,
        # By default vLLM lets the first request with a grammar choose the backend for all others.
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar"),
        **profile.args,
    }
    engine_arguments = AsyncEngineArgs(model=model_path, **arguments)
    tokenizer = _tokenizer(engine_arguments.create_model_config())
    # Before the weights, whose loading can take minutes.
    check_token_bytes(tokenizer.bytes_max, name, model)
    others = set(psutil.Process().children(recursive=True))
    with start_errors.reported():
        llm = AsyncLLM.from_engine_args(engine_arguments)
    # Again: here vLLM has configured its loggers after its plugins.
    silence_quotes()
    # Collected now, because the children of a killed engine process lose their parent.
    processes = set(psutil.Process().children(recursive=True)) - others
    config = llm.vllm_config.model_config
    if Path(model_path).is_dir():
        digest = digest_of(Path(model_path))
    else:
        digest = str(getattr(config.hf_config, "_commit_hash", None) or config.revision or "unknown")[:16]
    return LoadedModel(llm, tokenizer, digest, tuple(processes))


def _stats(llm: Any) -> Stats | None:
    """Return what fills vLLM's metrics, or None if the profile switched them off."""
    from rift.engines.vllm_stats import VllmStats

    return None if llm.logger_manager is None else VllmStats(llm.logger_manager)


def _tokenizer(config: Any) -> Tokenizer:
    """Load the tokenizer that vLLM's `ModelConfig` names."""
    from transformers import AutoTokenizer

    return Tokenizer(
        AutoTokenizer.from_pretrained(
            config.tokenizer, revision=config.tokenizer_revision, trust_remote_code=config.trust_remote_code
        )
    )


def _shutdown(llm: Any, processes: Sequence[Any]) -> None:
    """Kill the engine's processes, then let vLLM clean up in this one.

    They have no state worth saving, and an orderly exit takes each of them 2 s to unload torch.
    """
    import psutil

    # Python's tracker of shared memory serves this whole process and exits with it.
    engines = [
        process
        for process in processes
        if process.is_running() and "resource_tracker" not in " ".join(process.cmdline())
    ]
    for process in engines:
        process.kill()
    psutil.wait_procs(engines, timeout=CLOSE_S)
    llm.shutdown(timeout=CLOSE_S)
