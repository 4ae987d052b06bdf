"""Computes figures from the clients' observations. Each has its unit in its name."""

import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from tests.bench.client import Window

NAN = float("nan")


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that `share` of the values do not exceed; NaN without values."""
    ordered = sorted(values)
    if not ordered:
        return NAN
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def of_window(window: Window) -> dict[str, float]:
    """Return tokens per second, latencies in milliseconds, and counts.

    A frame may carry several tokens, so an answer's tokens are divided evenly over its frames. Latencies
    count requests that were sent in the window, and gaps between tokens count if they ended in it.
    """

    def inside(at: float) -> bool:
        return window.began_at_s <= at < window.ended_at_s

    tokens = 0.0
    frames = 0
    ttft, e2e, gaps = [], [], []
    for seen in window.seen:
        if seen.wrong is not None:
            continue
        per_frame = seen.request.output_tokens / len(seen.tokens_at_s)
        inside_frames = sum(map(inside, seen.tokens_at_s))
        tokens += per_frame * inside_frames
        frames += inside_frames
        pairs = zip(seen.tokens_at_s, seen.tokens_at_s[1:], strict=False)
        gaps += [after - before for before, after in pairs if inside(after)]
        if inside(seen.sent_at_s):
            ttft.append(seen.tokens_at_s[0] - seen.sent_at_s)
            e2e.append(seen.ended_at_s - seen.sent_at_s)
    figures = {
        "tokens_per_s": tokens / (window.ended_at_s - window.began_at_s),
        "tokens": tokens,
        "tokens_per_frame": tokens / (frames or NAN),
        "requests": len(ttft),
        "errors": sum(seen.wrong is not None for seen in window.seen),
        "prompt_tokens": percentile([seen.prompt_tokens for seen in window.seen], 0.5),
    }
    for name, values in (("ttft", ttft), ("itl", gaps), ("e2e", e2e)):
        for share in (50, 99):
            figures[f"{name}_p{share}_ms"] = percentile(values, share / 100) * 1000
    return figures


def median(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the median of a figure over the rounds."""
    return statistics.median(float(row[name]) for row in rows)


def plain(value: Any) -> Any:
    """Return the value for JSON, with null for NaN."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def machine(*packages: str) -> dict[str, Any]:
    """Return the machine that the figures depend on: processor, cores, versions."""
    model = "unknown"
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.partition(": ")[2].strip()
                break
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "versions": versions,
    }
