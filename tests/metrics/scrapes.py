"""Scrapes of `/metrics`, and the tables of metrics in ops/README.md."""

import re
from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.service import ROOT

# Name, type or meaning, labels.
ROW = re.compile(r"^\| `(rift_\w+)` \|[^|]*\|([^|]*)\|", re.MULTILINE)

Labels = frozenset[str]


def documented(role: str) -> dict[str, Labels]:
    """Return the metrics of a role in the tables, and the labels of each."""
    text = (ROOT / "ops" / "README.md").read_text()
    rows = [row for row in ROW.findall(text) if row[0].startswith(f"rift_{role}_")]
    assert len({name for name, _ in rows}) == len(rows), "a metric has one row"
    return {name: frozenset(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def scraped(address: str) -> Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]:
    """Return the samples of each metric by their labels; of a histogram, its counts."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(httpx.get(f"http://{address}/metrics").text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        wanted = f"{family.name}_count" if family.type == "histogram" else name
        samples = [sample for sample in family.samples if sample.name == wanted]
        found[name] = {tuple(sorted(sample.labels.items())): sample.value for sample in samples}
    return found


def series(address: str) -> dict[str, Labels]:
    """Return the labels of each series, those of buckets included; none if a metric has no sample yet."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(httpx.get(f"http://{address}/metrics").text):
        found.setdefault(f"{family.name}_total" if family.type == "counter" else family.name, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return {name: frozenset(labels) for name, labels in found.items()}
