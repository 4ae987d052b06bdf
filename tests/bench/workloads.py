"""Generated workloads for the scaling policy, each from a seed. The policy was not tuned on `gusts`."""

import math
import random
from collections.abc import Iterator

from replay.backtest.simulator import TraceRequest


def poisson(seed: int, hours: float, per_s: float) -> Iterator[TraceRequest]:
    """Yield requests at a constant rate, independent of each other."""
    chance = random.Random(seed)
    now_s = 0.0
    while now_s < hours * 3600:
        yield _request(chance, now_s)
        now_s += chance.expovariate(per_s)


def bursty(seed: int, hours: float) -> Iterator[TraceRequest]:
    """Yield bursts of 1 to 10 minutes at 1 to 8 requests/s, with 2 to 20 idle minutes in between."""
    chance = random.Random(seed)
    now_s = 0.0
    while now_s < hours * 3600:
        per_s = math.exp(chance.uniform(0, math.log(8)))
        until_s = now_s + chance.uniform(60, 600)
        while now_s < until_s:
            yield _request(chance, now_s)
            now_s += chance.expovariate(per_s)
        now_s += math.exp(chance.uniform(math.log(120), math.log(1200)))


def gusts(seed: int, hours: float) -> Iterator[TraceRequest]:
    """Yield a Poisson process whose rate jumps between a calm 0.3, 2 and 9 requests/s.

    A calm lasts two minutes on average and the others one, both exponentially, and one in four of the jumps
    from the calm goes to the highest rate. Prompts are longer and answers shorter than in `bursty`.
    """
    chance = random.Random(seed)
    now_s, per_s, until_s = 0.0, 0.3, 120.0
    while now_s < hours * 3600:
        if now_s >= until_s:
            per_s = chance.choice((2.0, 2.0, 2.0, 9.0)) if per_s < 1 else 0.3
            until_s = now_s + chance.expovariate(1 / (120 if per_s < 1 else 60))
        yield _request(chance, now_s, prompt=7.2, output=5.2)
        now_s += chance.expovariate(per_s)


def _request(chance: random.Random, at_s: float, *, prompt: float = 6.5, output: float = 5.8) -> TraceRequest:
    """Return a request with lognormal lengths: medians of 665 and 330 tokens, unless others are given."""
    tokens = chance.lognormvariate(prompt, 0.9), chance.lognormvariate(output, 0.8)
    return TraceRequest(at_s, 1 + int(tokens[0]), 1 + int(tokens[1]))
