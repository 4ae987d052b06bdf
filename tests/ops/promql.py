"""The part of PromQL that our rules and dashboards use: which labels the result of a query has.

Anything else is an error, as are an unknown metric or function, and a label that a metric does not have.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

Labels = frozenset[str]

TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<duration>\d+(?:ms|[smhdwy])\b|\$__rate_interval)'
    r"|(?P<number>\d+(?:\.\d+)?)|(?P<name>[A-Za-z_:][\w:]*)|(?P<sign>=~|!~|==|!=|<=|>=|[-+*/<>=(){}\[\],]))"
)
AGGREGATIONS = {"sum", "max", "min", "avg", "count"}
ARITHMETIC = {"+", "-", "*", "/"}
COMPARISONS = {"==", "!=", "<=", ">=", "<", ">"}
SETS = {"and", "or", "unless"}
MATCHES = {"=", "!=", "=~", "!~"}


class WrongQuery(ValueError):
    pass


class Value(NamedTuple):
    """A number if `labels` is None."""

    labels: Labels | None
    is_range: bool = False


def labels_of(query: str, metrics: Mapping[str, Labels]) -> Labels:
    """Return the labels of the result, given those of each metric. Raises WrongQuery."""
    try:
        result = _Parser(query, metrics).whole()
    except WrongQuery as error:
        raise WrongQuery(f"{error}: {query}") from None
    return result.labels or frozenset()


class _Parser:
    def __init__(self, query: str, metrics: Mapping[str, Labels]) -> None:
        self._metrics = metrics
        self._tokens = [*_tokens(query), ("end", "")]

    def whole(self) -> Value:
        result = self._instant()
        self._take("")
        return result

    # --- tokens ---

    def _next(self) -> str:
        return self._tokens[0][1]

    def _is(self, *texts: str) -> bool:
        return self._next() in texts

    def _take(self, *texts: str) -> str:
        """Return the next token, which must be one of `texts`."""
        if not self._is(*texts):
            raise WrongQuery(f"{self._next() or 'the end'!r} instead of {' or '.join(texts) or 'the end'}")
        return self._tokens.pop(0)[1]

    def _kind(self, kind: str) -> str:
        if self._tokens[0][0] != kind:
            raise WrongQuery(f"{self._next() or 'the end'!r} instead of a {kind}")
        return self._tokens.pop(0)[1]

    def _list(self, close: str, item: Callable[[], str]) -> Iterator[str]:
        while not self._is(close):
            yield item()
            if not self._is(close):
                self._take(",")
        self._take(close)

    def _labels(self, keyword: str) -> Labels:
        """Return the labels in brackets after a keyword; none without it."""
        if not self._is(keyword):
            return frozenset()
        self._take(keyword)
        self._take("(")
        return frozenset(self._list(")", lambda: self._kind("name")))

    # --- expressions. Precedence does not matter for labels, except that of sets. ---

    def _instant(self) -> Value:
        left = self._sum()
        while self._is(*SETS):
            operator = self._take(*SETS)
            on = self._labels("on")
            right = self._sum()
            if left.labels is None or right.labels is None:
                raise WrongQuery(f"{operator!r} with a number")
            if operator == "or":
                left = Value(left.labels & right.labels)
            elif not on <= left.labels & right.labels or (not on and left.labels != right.labels):
                raise _mismatch(left.labels, right.labels)
        return left

    def _sum(self) -> Value:
        left = self._operand()
        while self._is(*ARITHMETIC, *COMPARISONS):
            self._take(*ARITHMETIC, *COMPARISONS)
            right = self._operand()
            if left.is_range or right.is_range:
                raise WrongQuery("an operator with a range")
            if left.labels is not None and right.labels is not None and left.labels != right.labels:
                raise _mismatch(left.labels, right.labels)
            left = right if left.labels is None else left
        return left

    def _operand(self) -> Value:
        kind, text = self._tokens[0]
        if kind == "number":
            self._kind("number")
            return Value(None)
        if self._is("("):
            self._take("(")
            value = self._instant()
            self._take(")")
            return value
        name = self._kind("name")
        if name in AGGREGATIONS:
            return self._aggregation()
        if self._is("("):
            return self._call(name)
        return self._selector(text)

    def _aggregation(self) -> Value:
        kept = self._labels("by")
        value = self._argument("(")
        self._take(")")
        if value.labels is None or value.is_range or not kept <= value.labels:
            raise WrongQuery(f"by {sorted(kept)} of {sorted(value.labels or ())}")
        return Value(kept)

    def _argument(self, before: str) -> Value:
        self._take(before)
        return self._instant()

    def _call(self, name: str) -> Value:
        first = self._argument("(")
        if name in ("rate", "increase", "avg_over_time", "max_over_time"):
            if not first.is_range:
                raise WrongQuery(f"{name} without a range")
            first = Value(first.labels)
        elif name == "histogram_quantile":
            series = self._argument(",")
            if first.labels is not None or series.labels is None or "le" not in series.labels:
                raise WrongQuery(f"{name} without a number or le")
            first = Value(series.labels - {"le"})
        elif name in ("absent", "vector"):
            if first.is_range or (first.labels is None) != (name == "vector"):
                raise WrongQuery(f"{name} of something else")
            first = Value(frozenset())
        else:
            raise WrongQuery(f"unknown function {name}")
        self._take(")")
        return first

    def _selector(self, metric: str) -> Value:
        if metric not in self._metrics:
            raise WrongQuery(f"unknown metric {metric}")
        labels = self._metrics[metric]
        if self._is("{"):
            self._take("{")
            used = set(self._list("}", self._matcher))
            if not used <= labels:
                raise WrongQuery(f"{metric} has no {sorted(used - labels)}")
        is_range = self._is("[")
        if is_range:
            self._take("[")
            self._kind("duration")
            self._take("]")
        if self._is("offset"):
            self._take("offset")
            self._kind("duration")
        return Value(labels, is_range)

    def _matcher(self) -> str:
        label = self._kind("name")
        self._take(*MATCHES)
        self._kind("string")
        return label


def _mismatch(left: Labels, right: Labels) -> WrongQuery:
    return WrongQuery(f"{sorted(left)} and {sorted(right)} never match")


def _tokens(query: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(query.rstrip()):
        match = TOKEN.match(query, at)
        if match is None or match.lastgroup is None:
            raise WrongQuery(f"{query[at:]!r} is not PromQL")
        yield match.lastgroup, match[match.lastgroup]
        at = match.end()
