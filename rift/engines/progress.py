"""Progress of a few named stages on standard error: a bar on a terminal, else one line per stage."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

BAR_CELLS = 24
# A stage that takes longer than expected stays just below its end.
STAGE_SHARE_MAX = 0.97
REDRAW_S = 0.2


class Progress:
    """`total_s` is the expected time of all stages; the bar is an estimate based on it."""

    def __init__(self, stream: TextIO, *, total_s: float = 22.0) -> None:
        self._stream = stream
        self._total_s = total_s
        self._past_s = 0.0
        self._bar = stream.isatty()

    @contextmanager
    def stage(self, name: str, *, expected_s: float) -> Iterator[None]:
        ended = threading.Event()
        drawer = threading.Thread(target=self._draw_until, args=(ended, name, expected_s), daemon=True)
        if self._bar:
            drawer.start()
        else:
            self.note(name)
        try:
            yield
        finally:
            ended.set()
            if self._bar:
                drawer.join()
            self._past_s += expected_s

    def note(self, text: str) -> None:
        self._stream.write(f"\r\033[K{text}\n" if self._bar else f"{text}\n")
        self._stream.flush()

    def _draw_until(self, ended: threading.Event, name: str, expected_s: float) -> None:
        started = time.monotonic()
        while True:
            in_stage_s = min(time.monotonic() - started, expected_s * STAGE_SHARE_MAX)
            share = min(1.0, (self._past_s + in_stage_s) / self._total_s)
            cells = int(share * BAR_CELLS)
            bar = "█" * cells + "░" * (BAR_CELLS - cells)
            self._stream.write(f"\r\033[K{bar} {share:4.0%}  {name}")
            self._stream.flush()
            if ended.wait(REDRAW_S):
                return
