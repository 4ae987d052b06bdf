"""The table of error codes against the source, ERRORS.md and the README."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from rift.gateway.admission import rate_limits
from rift.gateway.api.error_codes import CODES, PAGE, STREAM, by_status, page
from rift.gateway.api.routes import ROUTES
from rift.gateway.asgi import server
from rift.gateway.completion import FAILURES

RIFT = PAGE.parents[1]
TABLE = {code.name: code for code in CODES}

# Codes that the source does not write as `code="…"`, by the expression that it has instead.
ELSEWHERE = {
    # Decided by the book's state of a key.
    "f'{state}_api_key'": {"revoked_api_key", "expired_api_key"},
    # `_refusal` of key_limits.py and rate_limits.py, `_ask` of billing.py, `_refuse` of server.py, `wrong`.
    "code": {
        *("idempotency_keys", "content_keys", "invalid_query", "invalid_period", "invalid_value"),
        *(set(rate_limits.UNITS) - {"concurrent"}),
        "concurrent_requests",
        *(code for code, _ in server.REFUSALS.values()),
    },
    "CONTEXT_LENGTH": {"context_length_exceeded"},
    "LOG_OUTAGE.code": {"log_unavailable"},
    "STOPPING.code": {"gateway_stopping"},
    # The reason of an end without a problem.
    "code or reason": {"expired"},
    "self.life.reason": set(FAILURES),
    "'prompt_too_long' if prompt >= context else 'max_tokens_too_large'": {
        "prompt_too_long",
        "max_tokens_too_large",
    },
    # Passed on from another error.
    "error.code": set(),
    "overflow.code": set(),
    "problem.code": set(),
    "shown.code": set(),
    "self._code": set(),
}  # fmt: skip


def trees() -> Iterator[ast.AST]:
    files = [RIFT / "catalogue.py"]
    for folder in ("gateway", "worker", "engines", "control"):
        files += sorted((RIFT / folder).rglob("*.py"))
    return (ast.parse(file.read_text(encoding="utf-8")) for file in files if file.name != "error_codes.py")


def codes_of(value: ast.expr) -> set[str]:
    match value:
        case ast.Constant(str(code)):
            return {code}
        case ast.IfExp(body=ast.Constant(str(one)), orelse=ast.Constant(str(other))):
            return {one, other}
    text = ast.unparse(value)
    assert text in ELSEWHERE, f"code={text}: add the codes that it can be"
    return ELSEWHERE[text]


def raised() -> set[str]:
    codes = set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "code":
                codes |= codes_of(node.value)
    return codes


def test_the_table_has_exactly_the_codes_of_the_source() -> None:
    assert len(TABLE) == len(CODES)
    assert raised() == set(TABLE)


def test_each_code_has_the_statuses_of_the_source() -> None:
    seen = set()
    for tree in trees():
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name("HTTPError"), args=[ast.Constant(int(status)), *_]):
                    (code,) = [word.value for word in node.keywords if word.arg == "code"]
                    for name in codes_of(code) if not isinstance(code, ast.Name) else ():
                        assert status in TABLE[name].statuses, name
                        seen.add(name)
    assert len(seen) > 40
    for status, (name, _) in server.REFUSALS.items():
        assert status in TABLE[name].statuses
    for reason, (status, _) in FAILURES.items():
        assert status in TABLE[reason].statuses


def test_the_page_is_generated() -> None:
    remedy = "run `python -m rift.gateway.api.error_codes`"
    assert PAGE.read_text(encoding="utf-8") == page(), remedy


def test_the_readme_gives_a_code_the_statuses_of_the_table() -> None:
    readme = Path(PAGE.parent / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\b([45]\d\d) `(\w+)`", readme)
    assert len(named) > 20
    assert not [(status, name) for status, name in named if int(status) not in TABLE[name].statuses]


def test_every_code_with_a_status_is_listed_by_a_route() -> None:
    listed = {
        (status, code.name)
        for route in ROUTES
        for status, codes in by_status(route.errors).items()
        for code in codes
    }
    every = {(status, code.name) for code in CODES for status in code.statuses if status != STREAM}
    # Of a path that no route has.
    assert every - listed == {(404, "not_found")}


def test_a_route_without_a_key_answers_no_error_about_keys() -> None:
    for route in ROUTES:
        statuses = by_status(route.errors)
        assert route.is_public == (401 not in statuses), route.path
        assert (413 in statuses) == (route.body is not None), route.path
