"""The alerts, the dashboards and the runbook name each other, and metrics that exist.

`tests/rift/test_status.py` compares the same queries with what a running installation serves.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import pytest
import yaml

from events.schema import FinishReason
from replay.questions import questions
from rift.gateway.api.error_codes import CODES
from rift.gateway.streams.lane_counts import TTFT_S
from tests.metrics.scrapes import documented
from tests.ops.promql import Labels, WrongQuery, labels_of
from tests.service import ROOT

PROMETHEUS = ROOT / "ops" / "prometheus"
RUNBOOK = (ROOT / "ops" / "RUNBOOK.md").read_text()
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "ops" / "grafana").glob("*.json")}

# Prometheus adds the labels of the target to each metric, and has metrics of its own.
TARGET = frozenset({"job", "instance"})
OWN = {"up": TARGET, "ALERTS": frozenset({"alertname", "alertstate", "severity", "model", "instance"})}
TEMPLATE = re.compile(r"\$labels\.(\w+)|{{(\w+)}}")


class Query(NamedTuple):
    """`shown` are the labels that its text or its legend names."""

    expression: str
    shown: Labels


def queries() -> Iterator[Query]:
    """Yield the queries of all rules, then those of all panels."""
    for rule in RULES:
        yield Query(rule["expr"], _shown(rule.get("annotations", {}).get("summary", "")))
    for dashboard in DASHBOARDS.values():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield Query(target["expr"], _shown(target.get("legendFormat", "")))


def _shown(text: str) -> Labels:
    return frozenset(one or other for one, other in TEMPLATE.findall(text))


def assert_answered(served: dict[str, Labels]) -> None:
    """Check that each query is valid and finds what it names, given the metrics that processes serve."""
    metrics = OWN | {name: labels | TARGET for name, labels in served.items()}
    for rule in RULES:
        if "record" in rule:
            metrics[rule["record"]] = labels_of(rule["expr"], metrics)
    for query in queries():
        assert query.shown <= labels_of(query.expression, metrics), query.expression


def with_histograms(metrics: dict[str, Labels]) -> dict[str, Labels]:
    """Add the series of those that end in `_seconds`. (A gauge has none of them.)"""
    times = {name: labels for name, labels in metrics.items() if name.endswith("_seconds")}
    return (
        metrics
        | {f"{name}_bucket": labels | {"le"} for name, labels in times.items()}
        | {f"{name}_{part}": labels for name, labels in times.items() for part in ("count", "sum")}
    )


def test_queries_name_documented_metrics_and_their_labels() -> None:
    documents = documented("gateway") | documented("control") | documented("worker")
    assert_answered(with_histograms(documents))


@pytest.mark.parametrize(
    "query",
    [
        "sum(a",
        "sum(a))",
        "sum by (x (a)",
        "a +",
        "a b",
        "a{x=1}",
        'a{y="1"}',
        "b",
        "rates(a[5m])",
        "rate(a)",
        "rate(a[5])",
        "sum(a[5m])",
        "sum by (y) (a)",
        "a and sum(a)",
        "a and on (x) sum(a)",
        "a / sum(a)",
        "histogram_quantile(0.9, a)",
        "a # 1",
        "",
    ],
)
def test_a_wrong_query_is_found(query: str) -> None:
    with pytest.raises(WrongQuery):
        labels_of(query, {"a": frozenset({"x"})})


def test_values_of_labels_exist() -> None:
    reasons = {*get_args(FinishReason)}
    text = "\n".join(query.expression for query in queries())
    for named in re.findall(r'ended_total\{reason=~?"([^"]*)"', text):
        assert reasons.issuperset(named.split("|"))
    for bound in re.findall(r'first_token_seconds_bucket\{le="([^"]*)"', text):
        assert float(bound) in TTFT_S
        assert bound == str(float(bound))


def test_prometheus_finds_the_pods() -> None:
    (job,) = [
        each
        for each in yaml.safe_load((PROMETHEUS / "scrape.yaml").read_text())["scrape_configs"]
        if "kubernetes_sd_configs" in each
    ]
    (found,) = job["kubernetes_sd_configs"]
    keep, *_ = job["relabel_configs"]
    part_of, port = keep["regex"].split(";")
    names = set()
    for path in (ROOT / "ops" / "kubernetes").glob("*.yaml"):
        for each in yaml.safe_load_all(path.read_text()):
            if each["kind"] != "Deployment":
                continue
            pod = each["spec"]["template"]
            (container,) = pod["spec"]["containers"]
            assert each["metadata"]["namespace"] in found["namespaces"]["names"]
            assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == part_of
            assert port in [one["name"] for one in container["ports"]]
            names.add(pod["metadata"]["labels"]["app.kubernetes.io/name"])
    assert names == {"rift-gateway", "rift-control", "rift-worker"}


def test_each_alert_says_what_an_operator_needs() -> None:
    assert len(ALERTS) == len([rule for rule in RULES if "alert" in rule])
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert re.fullmatch(r"\d+[smh]", rule["for"])
        summary, url = rule["annotations"]["summary"], rule["annotations"]["runbook_url"]
        assert summary.endswith(".") or summary.endswith(").")
        assert url == f"ops/RUNBOOK.md#{name.lower()}"


def test_each_alert_has_its_paragraph() -> None:
    paragraphs = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
    assert list(paragraphs) == list(ALERTS)
    for text in paragraphs.values():
        assert re.findall(r"^- \*\*(\w+)\*\*: ", text, re.MULTILINE) == ["Meaning", "Look", "Do"]
    for name, anchor in re.findall(r"\[(\w+)\]\(#(\w+)\)", RUNBOOK):
        assert name in ALERTS
        assert anchor == name.lower()


def test_the_runbook_names_questions_codes_and_panels_that_exist() -> None:
    known = {question.name: question for question in questions()}
    for name, arguments in re.findall(r"`rift\s+ask\s+([a-z-]+)([^`]*)`", RUNBOOK):
        names = {parameter.name for parameter in known[name].parameters}
        assert names.issuperset(re.findall(r"(\w+)=", arguments))
    codes = {code.name for code in CODES}
    assert codes.issuperset(
        re.findall(r"`(log_\w+able|log_full|\w+_blocked|\w+_unavailable|\w+_error)`", RUNBOOK)
    )
    for name, panel in re.findall(r'[dD]ashboard \*(\w+)\*(?:,\s+panel\s+"([^"]+)")?', RUNBOOK):
        titles = {each["title"] for each in DASHBOARDS[name.lower()]["panels"]}
        assert not panel or panel in titles


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_can_be_imported(name: str) -> None:
    dashboard = DASHBOARDS[name]
    assert dashboard["uid"] == f"rift-{name}"
    assert [variable["type"] for variable in dashboard["templating"]["list"]] == ["datasource"]
    panels = dashboard["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["description"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
    cells = [cell for panel in panels for cell in _cells(**panel["gridPos"])]
    assert len(set(cells)) == len(cells), "no panel covers another one"
    assert all(column < 24 for column, _ in cells)


def _cells(x: int, y: int, w: int, h: int) -> Iterator[tuple[int, int]]:
    return ((column, row) for column in range(x, x + w) for row in range(y, y + h))


def test_all_dashboards_are_there() -> None:
    assert DASHBOARDS.keys() == {"overview", "latency", "fleet", "money", "log"}
