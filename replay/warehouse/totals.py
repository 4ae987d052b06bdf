"""Totals of the requests that ended since the file was opened. Its own relations hold those of all time."""

from collections import Counter
from collections.abc import Iterable

from replay.facts.rows import RequestRow, Row


class Totals:
    """Requests by model and reason of their end; tokens and charges, corrections excluded, by model."""

    def __init__(self) -> None:
        self.ended: Counter[tuple[str, ...]] = Counter()
        self.prompt_tokens: Counter[tuple[str, ...]] = Counter()
        self.output_tokens: Counter[tuple[str, ...]] = Counter()
        self.charged_nanousd: Counter[tuple[str, ...]] = Counter()

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if isinstance(row, RequestRow):
                model = (row.model,)
                self.ended[row.model, row.finish_reason or ""] += 1
                self.prompt_tokens[model] += row.prompt_tokens
                self.output_tokens[model] += row.output_tokens
                self.charged_nanousd[model] += row.charge_nanousd
