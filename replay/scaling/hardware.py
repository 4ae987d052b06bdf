"""Hardware profiles: speed, capacity, start time and cost of one replica.

This module reads the profiles of `hardware.toml` and computes figures that follow from a profile alone.
Measurements come from the log, and `policy.py` decides the number of replicas.
"""

import math
from functools import cache
from importlib.resources import files
from typing import Annotated

import msgspec

from replay.errors import ReplayError

# The share of requests that may miss their target: the SLO is 99 %.
MISSED_SHARE = 0.01

Natural = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class HardwareUnknown(ReplayError):
    """No profile has that name; the message lists the available ones."""


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One replica. A decode step takes `step_us` + `step_us_per_running` x running.

    Each step gives every running request one token.
    """

    gpus: Natural
    running_max: Positive
    kv_tokens: Positive
    prefill_tokens_per_s: Positive
    step_us: Positive
    step_us_per_running: Natural
    start_ms: Natural
    gpu_hour_nanousd: Natural
    source: str

    @property
    def start_ns(self) -> int:
        return self.start_ms * 1_000_000

    @property
    def hour_nanousd(self) -> int:
        """Return the cost of one replica per hour."""
        return self.gpus * self.gpu_hour_nanousd

    def step_us_at(self, running: int) -> int:
        return self.step_us + self.step_us_per_running * running

    def tokens_per_ks_at(self, running: int) -> int:
        """Return the tokens that `running` requests make together in a thousand seconds."""
        return running * 1_000_000_000 // self.step_us_at(running)

    def running_of(self, tokens: int) -> int:
        """Return how many requests of `tokens`, prompt and output, run at once; at least 1."""
        return max(1, min(self.running_max, self.kv_tokens // max(1, tokens)))


@cache
def profiles() -> dict[str, Hardware]:
    found = msgspec.toml.decode((files("replay.scaling") / "hardware.toml").read_bytes())
    return {name: msgspec.convert(entry, Hardware) for name, entry in found.items()}


def profile(name: str) -> Hardware:
    """Return the profile of that name. Raises HardwareUnknown."""
    if (found := profiles().get(name)) is None:
        raise HardwareUnknown(f"no hardware profile is called {name!r}; there are {', '.join(profiles())}")
    return found


def concurrency_max(hardware: Hardware, *, ttft_ms: int, prompt_tokens: int, output_tokens: int) -> int:
    """Return the largest steady concurrency of one replica at which 99 % of requests meet the TTFT target.

    Arrivals are Poisson. The number n of requests under way is a birth-death chain that generates n / step(n)
    tokens per second, up to the maximum batch. This is processor sharing, so only the mean of the output
    lengths matters. A request that finds all slots taken waits until others end, and then for the prompts
    ahead of its own, which are prefilled one at a time. Concurrency counts all requests under way, waiting or
    running, as a proxy sees it.
    """
    low = 0.0
    high = 1.0
    while _missed(hardware, high, ttft_ms, prompt_tokens, output_tokens)[0] <= MISSED_SHARE:
        high *= 2
    # Fifty bisections make the difference far smaller than one request.
    for _ in range(50):
        middle = (low + high) / 2
        missed, _ = _missed(hardware, middle, ttft_ms, prompt_tokens, output_tokens)
        low, high = (middle, high) if missed <= MISSED_SHARE else (low, middle)
    return max(1, int(_missed(hardware, low, ttft_ms, prompt_tokens, output_tokens)[1]))


def _missed(
    hardware: Hardware, per_s: float, ttft_ms: int, prompt_tokens: int, output_tokens: int
) -> tuple[float, float]:
    """Return the share of requests that miss the target at that arrival rate, and the concurrency."""
    slots = hardware.running_of(prompt_tokens + output_tokens)
    prefill_s = prompt_tokens / hardware.prefill_tokens_per_s
    slack_s = ttft_ms / 1000 - prefill_s
    prefill_load = per_s * prefill_s
    # Requests that end per second once all slots are taken.
    deaths_per_s = slots / (hardware.step_us_at(slots) / 1e6 * output_tokens)
    load = per_s / deaths_per_s
    if load >= 1 or prefill_load >= 1 or slack_s <= 0:
        return 1.0, 0.0
    # The distribution up to the last slot, in logarithms: products of hundreds of factors would overflow.
    logs = [0.0]
    for n in range(1, slots + 1):
        logs.append(logs[-1] + math.log(per_s * output_tokens * hardware.step_us_at(n) / 1e6 / n))
    top = max(logs)
    weights = [math.exp(value - top) for value in logs]
    # Beyond the last slot the distribution is geometric, so the waiting time is exponential.
    tail = weights[-1] / (1 - load)
    total = sum(weights[:-1]) + tail
    waits = tail / total
    mean = sum(n * weight for n, weight in enumerate(weights[:-1])) / total
    mean += waits * (slots + load / (1 - load))
    late = waits * math.exp(-deaths_per_s * (1 - load) * slack_s)
    # M/D/1: a request that waits for other prompts waits d / 2(1 - load) on average, nearly exponentially.
    late += prefill_load * math.exp(-2 * (1 - prefill_load) * slack_s / prefill_s) if prefill_s else 0.0
    mean += per_s * prefill_s + prefill_load**2 / (2 * (1 - prefill_load))
    return min(1.0, late), mean
