"""From measurements of a live replica to its hardware profile: the fitting, and what is said of it.

Pure. What must not live here: how a replica is measured (`cli/calibrate.py` does that, over HTTP).
"""

import math
from collections.abc import Sequence
from statistics import median

import msgspec

from replay.scaling.hardware import Hardware

# A slope that is less than twice its own error may be none.
ERRORS = 2.0


class Prompt(msgspec.Struct, frozen=True):
    """One prompt by itself, and when its first token came."""

    tokens: int
    ttft_s: float


class Running(msgspec.Struct, frozen=True):
    """So many streams side by side, and how long a step took: the median over the streams."""

    running: int
    step_s: float


class Line(msgspec.Struct, frozen=True):
    """y = base + slope x; `error` is the slope's standard error, infinite with fewer than three points."""

    base: float
    slope: float
    error: float


class Fit(msgspec.Struct, frozen=True):
    """`prefill_at_least`: prompts of the lengths that were sent take no time that shows, so the rate is the
    least that fits. `ttft_off` and `step_off` are the largest shares by which the fit differs from what was
    measured."""

    prefill_tokens_per_s: int
    prefill_at_least: bool
    overhead_s: float
    step_us: int
    step_us_per_running: int
    ttft_off: float = 0.0
    step_off: float = 0.0

    def step_s(self, running: int) -> float:
        return (self.step_us + self.step_us_per_running * running) / 1e6

    def ttft_s(self, tokens: int) -> float:
        return self.overhead_s + tokens / self.prefill_tokens_per_s


def line(points: Sequence[tuple[float, float]]) -> Line:
    """Return the line of the least squares of relative errors, neither part negative: a short step counts as
    much as a long one. It takes at least one point, with y above 0."""
    assert points, "a line takes a point"
    weighted = [(x, y, 1 / y**2) for x, y in points]
    total = sum(w for _, _, w in weighted)
    mean_x = sum(w * x for x, _, w in weighted) / total
    mean_y = sum(w * y for _, y, w in weighted) / total
    spread = sum(w * (x - mean_x) ** 2 for x, _, w in weighted)
    slope = sum(w * (x - mean_x) * (y - mean_y) for x, y, w in weighted) / spread if spread else 0.0
    base = mean_y - slope * mean_x
    if slope < 0:
        slope = 0.0
        base = mean_y
    elif base < 0:
        slope = sum(w * x * y for x, y, w in weighted) / sum(w * x**2 for x, _, w in weighted)
        base = 0.0
    left = sum(w * (y - base - slope * x) ** 2 for x, y, w in weighted)
    free = len(points) - 2
    return Line(base, slope, math.sqrt(left / free / spread) if free > 0 and spread else math.inf)


def fit(prompts: Sequence[Prompt], running: Sequence[Running]) -> Fit:
    """Return the speeds that say again best what was measured."""
    prefill = line([(prompt.tokens, prompt.ttft_s) for prompt in prompts])
    does_not_show = prefill.slope <= ERRORS * prefill.error
    if math.isinf(prefill.error):
        # Too few lengths: all of the longest one's time, as if it were prefill.
        longest = max(prompts, key=lambda prompt: prompt.tokens)
        per_token_s = longest.ttft_s / longest.tokens
    else:
        per_token_s = prefill.slope + (ERRORS * prefill.error if does_not_show else 0.0)
    steps = line([(found.running, found.step_s) for found in running])
    fitted = Fit(
        prefill_tokens_per_s=max(1, round(1 / per_token_s)) if per_token_s else 1_000_000_000,
        prefill_at_least=does_not_show,
        overhead_s=prefill.base,
        step_us=max(1, round(steps.base * 1e6)),
        step_us_per_running=round(steps.slope * 1e6),
    )
    return msgspec.structs.replace(
        fitted,
        ttft_off=max(abs(fitted.ttft_s(prompt.tokens) / prompt.ttft_s - 1) for prompt in prompts),
        step_off=max(abs(fitted.step_s(found.running) / found.step_s - 1) for found in running),
    )


def step_s(streams: Sequence[Sequence[tuple[float, int]]]) -> float | None:
    """Return how long a step took while all streams ran, of each one's (time, index of the token) in order;
    None: they never all ran."""
    began = max(stream[0][0] for stream in streams)
    ended = min(stream[-1][0] for stream in streams)
    steps = []
    for stream in streams:
        inside = [(at, index) for at, index in stream if began <= at <= ended]
        if len(inside) > 1:
            (first_at, first) = inside[0]
            (last_at, last) = inside[-1]
            steps.append((last_at - first_at) / (last - first))
    return median(steps) if len(steps) == len(streams) else None


def toml(name: str, hardware: Hardware, told: dict[str, str]) -> str:
    """Return the profile as a table of hardware.toml; `told` says where what was not measured comes from."""
    lines = [f"[{name}]"]
    for field, value in msgspec.structs.asdict(hardware).items():
        shown = msgspec.json.encode(value).decode() if isinstance(value, str) else f"{value:_}"
        comment = f"  # not measured: {told[field]}" if field in told else ""
        lines.append(f"{field} = {shown}{comment}")
    return "\n".join(lines)
