"""Fits a hardware profile to measurements of a replica. Pure: `cli/calibrate.py` measures over HTTP."""

import math
from collections.abc import Sequence
from statistics import median

import msgspec

from replay.scaling.hardware import Hardware

# A slope below twice its standard error may be zero.
SIGNIFICANT_ERRORS = 2.0


class Prompt(msgspec.Struct, frozen=True):
    """A prompt that ran alone, and the time to its first token."""

    tokens: int
    ttft_s: float


class Running(msgspec.Struct, frozen=True):
    """A number of parallel streams, and the time of a step: the median over the streams."""

    running: int
    step_s: float


class Line(msgspec.Struct, frozen=True):
    """y = base + slope x. `error` is the slope's standard error, infinite with fewer than three points."""

    base: float
    slope: float
    error: float


class Fit(msgspec.Struct, frozen=True):
    """The fitted speeds.

    With `prefill_at_least`, longer prompts took no longer, so the rate is a lower bound. `ttft_off` and
    `step_off` are the largest relative differences between fit and measurement.
    """

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
    """Return the line with the least squares of relative errors, so that a short step counts as much as a
    long
    one. Base and slope are not negative. Needs at least one point, with y above 0."""
    assert points, "pass at least one point"
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
    """Return the speeds that fit the measurements best."""
    prefill = line([(prompt.tokens, prompt.ttft_s) for prompt in prompts])
    is_insignificant = prefill.slope <= SIGNIFICANT_ERRORS * prefill.error
    if math.isinf(prefill.error):
        # Too few lengths: attribute all of the longest prompt's time to prefill.
        longest = max(prompts, key=lambda prompt: prompt.tokens)
        per_token_s = longest.ttft_s / longest.tokens
    else:
        per_token_s = prefill.slope + (SIGNIFICANT_ERRORS * prefill.error if is_insignificant else 0.0)
    steps = line([(level.running, level.step_s) for level in running])
    fitted = Fit(
        prefill_tokens_per_s=max(1, round(1 / per_token_s)) if per_token_s else 1_000_000_000,
        prefill_at_least=is_insignificant,
        overhead_s=prefill.base,
        step_us=max(1, round(steps.base * 1e6)),
        step_us_per_running=round(steps.slope * 1e6),
    )
    return msgspec.structs.replace(
        fitted,
        ttft_off=max(abs(fitted.ttft_s(prompt.tokens) / prompt.ttft_s - 1) for prompt in prompts),
        step_off=max(abs(fitted.step_s(level.running) / level.step_s - 1) for level in running),
    )


def step_s(streams: Sequence[Sequence[tuple[float, int]]]) -> float | None:
    """Return the time of a step while all streams ran, or None if they never all ran.

    `streams` has each stream's (time in s, token index) in order.
    """
    start_s = max(stream[0][0] for stream in streams)
    end_s = min(stream[-1][0] for stream in streams)
    steps = []
    for stream in streams:
        inside = [(time_s, index) for time_s, index in stream if start_s <= time_s <= end_s]
        if len(inside) > 1:
            first_s, first = inside[0]
            last_s, last = inside[-1]
            steps.append((last_s - first_s) / (last - first))
    return median(steps) if len(steps) == len(streams) else None


def toml(name: str, hardware: Hardware, sources: dict[str, str]) -> str:
    """Return the profile as a table for hardware.toml. `sources` names where unmeasured figures come from."""
    lines = [f"[{name}]"]
    for field, value in msgspec.structs.asdict(hardware).items():
        text = msgspec.json.encode(value).decode() if isinstance(value, str) else f"{value:_}"
        comment = f"  # not measured: {sources[field]}" if field in sources else ""
        lines.append(f"{field} = {text}{comment}")
    return "\n".join(lines)
