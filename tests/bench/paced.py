"""The paced mode: engine arguments, step times and tokens of `paced_executor.py`, without importing vLLM."""

import re
from collections.abc import Mapping

from replay.scaling import hardware
from rift.catalogue import Profile

EXECUTOR = "tests.bench.paced_executor.PacedExecutor"
# Names the hardware profile in the environment of the engine process.
PROFILE_VARIABLE = "BENCH_PACED_PROFILE"
# vLLM's default for GPUs with 70 GiB of memory and more.
BATCHED_TOKENS = 8192

# A word with its leading space, as byte-level tokenizers write it: complete UTF-8, and no special token.
WORD = re.compile("Ġ[a-z]+")


def words(vocabulary: Mapping[str, int]) -> list[int]:
    """Return the ids that stand for whole words, so that text can be sent after each of them."""
    return sorted(number for text, number in vocabulary.items() if WORD.fullmatch(text))


def pace(profile: Profile, name: str) -> Profile:
    """Return `profile` with the steps and slots of the hardware profile of that name."""
    slots = hardware.profile(name).running_max
    args = {
        **profile.args,
        "max_num_seqs": slots,
        "max_num_batched_tokens": BATCHED_TOKENS,
        "distributed_executor_backend": EXECUTOR,
    }
    return Profile(args=args, env={**profile.env, PROFILE_VARIABLE: name})


def answer_s(name: str, *, streams: int, prompt_tokens: int, output_tokens: int) -> float:
    """Return how long an answer takes while `streams` requests run that were sent together."""
    speed = hardware.profile(name)
    prefill_s = streams * prompt_tokens / speed.prefill_tokens_per_s
    return prefill_s + output_tokens * speed.step_us_at(streams) / 1e6
